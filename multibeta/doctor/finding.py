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
    """

    name: str
    where: str
    seen: str
    means: str
    advice: str

    def __str__(self) -> str:
        said = {"seen": self.seen, "means": self.means, "do": self.advice}
        lines = [textwrap.fill(text, WIDTH, initial_indent=f"  {key:6}", subsequent_indent=" " * 8) for key, text in said.items()]
        return "\n".join([f"{self.where}: {self.name}", *lines])
