"""The command `multibeta`: choose a recipe or a model, override fields, call."""

from multibeta.cli.commands import main

__all__ = ["main"]
