"""The bars of all long works, where they are seen and where they are written down, and the log beside them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # between the lines of a bar that is written to a file


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A bar with these options of tqdm; where standard error is no terminal, a line of its numbers now and then.

    In a notebook it is a widget where ipywidgets is installed, and else a bar that is drawn over in the output of the cell. What
    cannot be written of it is dropped: nobody's work ends because its bar is not seen.
    """
    own = options.pop("file", None)
    notebook = "ipykernel" in sys.modules
    if notebook and own is None and (widget := widget_bar()) is not None:
        return widget(iterable, **options)
    stream = Lasting(sys.stderr if own is None else own)
    if stream.isatty() or notebook or own is not None:  # a notebook draws over what it has as well
        return tqdm(iterable, file=stream, **options)
    lines = {"ncols": 0, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
    return tqdm(iterable, file=_Lines(stream), **(lines | options))


@functools.cache
def widget_bar() -> type[tqdm] | None:
    """The bar of tqdm for notebooks, whose total may come later; None without ipywidgets, of which tqdm would warn."""
    if importlib.util.find_spec("ipywidgets") is None:
        return None
    from tqdm.notebook import tqdm_notebook

    class Widget(tqdm_notebook):
        def display(self, *arguments: Any, **options: Any) -> None:
            _, bar, _ = self.container.children
            if self.total and bar.max != self.total:
                bar.max, bar.bar_style, bar.layout.width = self.total, "", None
            super().display(*arguments, **options)

    return Widget


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
                stack.callback(setattr, handler, "stream", handler.stream)  # its setStream flushes, which may fail
                handler.stream = _AboveBars(handler.stream)
        yield


class Lasting:
    """A stream, or none, that takes every word: those that cannot be written, since nobody reads or it is closed, are dropped.

    Args:
        dropped: Errors that end nothing; others are raised.
    """

    def __init__(self, stream: Any, dropped: tuple[type[Exception], ...] = (OSError, ValueError)):
        self.stream, self.dropped = stream, (AttributeError, *dropped)  # the first of no stream, and of one with less than these

    def write(self, text: str) -> int:
        with contextlib.suppress(*self.dropped):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self.dropped):
            self.stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(*self.dropped):
            return bool(self.stream.isatty())
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # by which tqdm knows where it draws
        return self.stream is (other.stream if isinstance(other, Lasting) else other)


class _Lines:
    """A stream to which a bar writes each of its states as a line, once."""

    last = ""

    def __init__(self, stream: Lasting):
        self.lines = stream

    def write(self, text: str) -> None:
        if (words := text.strip()) and words != self.last:
            self.last = words
            self.lines.write(f"{words}\n")

    def flush(self) -> None:
        self.lines.flush()

    def isatty(self) -> bool:
        return False


class _AboveBars:
    """A stream of a terminal, on which bars make room for what is written."""

    def __init__(self, stream: Any):
        self.stream = Lasting(stream)

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.stream, end="")

    def flush(self) -> None:
        self.stream.flush()
