"""The bars of all long works, where they are seen and where they are written down, and the log beside them."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # between the lines of a bar that is written to a file


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar with these options of tqdm; where standard error is no terminal, a line of its numbers now and then."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules or "file" in options:  # a notebook draws over what it has as well
        return tqdm(iterable, **options)
    lines = {"file": _Lines(), "ncols": 0, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    return tqdm(iterable, **(lines | options))


def advance(bar: tqdm, done: int, total: int) -> None:
    """Set a bar to `done` of `total`."""
    bar.total = total
    bar.update(done - bar.n)


@contextlib.contextmanager
def log_above_bars() -> Iterator[None]:
    """What the log says on standard output and error meanwhile stands above the bars there, not within them."""
    loggers = (logging.root, logging.getLogger(__name__.partition(".")[0]))
    handlers = [each for logger in loggers for each in logger.handlers if isinstance(each, logging.StreamHandler)]
    with contextlib.ExitStack() as stack:
        for handler in handlers:
            if handler.stream in (sys.stdout, sys.stderr):
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(_AboveBars(handler.stream))
        yield


class _Lines:
    """Standard error, to which a bar writes each of its states as a line, once."""

    last = ""

    def write(self, text: str) -> None:
        if (words := text.strip()) and words != self.last:
            self.last = words
            sys.stderr.write(f"{words}\n")

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return False


class _AboveBars:
    """A stream of a terminal, on which bars make room for what is written."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()
