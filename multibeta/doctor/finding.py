"""What a diagnosis says."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        name: In a few words.
        where: The part that it is wrong with, such as the folder of a training.
        seen: The numbers that show it, and what they are where all is well.
        means: What follows.
        advice: What to do, with the flags of `multibeta train`.
        undertrained: Whether it is a matter of too few steps, of this training or of one before it.
    """

    name: str
    where: str
    seen: str
    means: str
    advice: str
    undertrained: bool = False

    def __str__(self) -> str:
        said = {"seen": self.seen, "means": self.means, "do": self.advice}
        lines = [textwrap.fill(text, WIDTH, initial_indent=f"  {key:6}", subsequent_indent=" " * 8) for key, text in said.items()]
        return "\n".join([f"{self.where}: {self.name}", *lines])


def longer_first_stage(flag: str, steps: int | None, followed: tuple[str, ...]) -> str:
    """How a finished VAE gets more than its `steps`, where trainings were begun on what it made, in the folders `followed`."""
    now = "" if steps is None else f" (now {steps})"
    if not followed:
        return f"--resume with more {flag}{now}"
    folders = f"folder{'s' if len(followed) > 1 else ''} {' and '.join(followed)}"
    return (
        f"delete the {folders} of the run, or choose another folder, then "
        f"--resume with more {flag}{now}: stage 2 has to be trained anew on it"
    )
