"""Signals that end a training: each is answered after the step at hand, which is then saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# What a terminal or a scheduler sends before it kills; those that a program handles itself are left to it, but for Ctrl-C.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or another signal of `SIGNALS`, after the current step was finished and saved; `signal` is its number."""

    def __init__(self, message: str, signal: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """A list of the signals of `SIGNALS` that came; a Ctrl-C after any of them stops at once. Main thread only."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        if len(came) == 1:
            name = "" if number == signal.SIGINT else f"{signal.Signals(number).name}: "
            message = f"\n{name}finishing this step, then saving; Ctrl-C{' again' if not name else ''} stops at once\n"
            with contextlib.suppress(AttributeError, OSError, ValueError):  # of no stream, and of one that is none of the system
                os.write(sys.stderr.fileno(), message.encode())  # print may not re-enter

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    ours = [number for number in numbers if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL]
    previous = {number: signal.signal(number, handle) for number in ours}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
