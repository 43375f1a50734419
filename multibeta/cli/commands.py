"""The command line: which commands there are, running one, and what its end says to the shell."""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
import tyro

from multibeta import caches, files, processors, recipes
from multibeta.cli.demo import Demo
from multibeta.cli.measures import Encode, Evaluate, Report
from multibeta.cli.pictures import Edit, Interpolate, Sample, Show
from multibeta.cli.spectrum import Spectrum
from multibeta.cli.tools import Accelerate, Bench, Cache, Convert, Env
from multibeta.cli.training import reproduce_command, train_command
from multibeta.training import TrainingStopped

DESCRIPTION = """Generative models whose latent space a person can read and steer.

Start with `multibeta demo`; `multibeta COMMAND --help` explains a command. MODEL is a folder that `train` wrote, or the
name of a shipped model, such as scenes32. Anywhere, --debug shows the traceback of an error, and --cache FOLDER says where
caches lie, as the variable MULTIBETA_CACHE does."""

DEFAULT_RECIPE = "scenes32"


def choose_cache(arguments: Sequence[str]) -> list[str]:
    """The arguments without --cache FOLDER, which is put into the environment, for this process and those it starts."""
    kept, left = [], iter(arguments)
    for argument in left:
        name, equals, folder = argument.partition("=")
        if name != "--cache":
            kept.append(argument)
        elif folder := folder if equals else next(left, ""):
            os.environ[caches.CACHE_VARIABLE] = str(files.expanded(folder).absolute())
        else:
            raise ValueError("--cache needs a folder")
    return kept


def commands(typed: Sequence[str]) -> dict[str, Callable]:
    """Name to dataclass or function; the preset of --recipe is read first, because it gives the defaults of `train`."""
    parser = argparse.ArgumentParser(prog="multibeta train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    preset = recipes.find(parser.parse_known_args(typed)[0].recipe)
    train = train_command(preset, shlex.join(["multibeta", *typed]))
    models = (Sample, Show, Edit, Interpolate, Encode, Evaluate, Spectrum, Report, Accelerate, Convert, Bench, Cache, Env)
    reproduce = reproduce_command(shlex.join(["multibeta", *typed]))
    return {"demo": Demo, "train": train, "reproduce": reproduce} | {each.__name__.lower(): each for each in models}


def run(typed: list[str]) -> None:
    """Run the command of a command line."""
    name, *flags = choose_cache([argument for argument in typed if argument != "--debug"]) or ["--help"]
    known = commands(typed)
    if name not in known:
        tyro.extras.subcommand_cli_from_dict(known, prog="multibeta", description=DESCRIPTION, args=[name])
        return
    flags = [flags[0], "--", *flags[1:]] if name == "bench" and len(flags) > 1 else flags  # they are the script's
    with processors.fitting_threads():
        chosen = tyro.cli(known[name], prog=f"multibeta {name}", args=flags)
        if chosen is not None:  # train is a function, which has run
            chosen.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 after an error of the user or the machine, 128 and its number after a signal."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="multibeta: %(message)s")
    logging.getLogger("multibeta").setLevel(logging.INFO)
    try:
        try:
            run(typed)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `multibeta ... | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"multibeta: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except (
        ValueError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        torch.OutOfMemoryError,
        TrainingStopped,
        subprocess.CalledProcessError,
    ) as error:
        if "--debug" in typed:
            raise
        print(f"multibeta: {error}", file=sys.stderr)
        return 2
    return 0
