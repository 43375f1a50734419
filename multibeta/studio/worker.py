"""One worker for all pages: the newest wish of a page ends the older ones, and everyone can see how long the queue is."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from multibeta.sampling import Callback

Result = TypeVar("Result")
LOOK_SECONDS = 0.25  # between two words about a work that lasts
MOST_PAGES = 1000  # that are remembered


class Superseded(Exception):
    """A page wants something newer."""


@dataclass(frozen=True)
class Waiting:
    """A wish that is not done.

    Attributes:
        before: Works that come first, the running one among them; 0 while it is worked on.
        done, total: Evaluations of a network; 0 before the first.
        seconds: Since it was begun.
        early: What can be shown already; None where nothing is new.
    """

    before: int
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    early: Any = None

    def __str__(self) -> str:
        if self.before:
            return f"waiting, {self.before} before this"
        if not self.done:
            return "working"
        left = self.seconds / self.done * (self.total - self.done)
        return f"evaluation {self.done} of {self.total}" + (f", {left:.0f} s left" if left >= 1 else "")


class Wish(Generic[Result]):
    """What a page asked for.

    Attributes:
        number: Tells it from the other wishes of its page.
    """

    def __init__(self, worker: Worker, page: str, number: int) -> None:
        self.number = number
        self._worker, self._page = worker, page
        self._began: float | None = None
        self._done = self._total = 0
        self._left = False
        self._early: Any = None

    @property
    def superseded(self) -> bool:
        """Whether nobody waits for it any more: the page has asked for something newer, or is gone."""
        return self._left or not self._worker.is_newest(self._page, self.number)

    def advance(self, done: int, total: int, latent: Tensor) -> None:
        """A `sampling.Callback`, which ends a walk that nobody waits for any more."""
        if self.superseded:
            raise Superseded
        self._done, self._total = done, total

    def show(self, early: Any) -> None:
        """Something that can be shown before the work is done, if that takes long enough for a word."""
        self._early = early

    def run(self, work: Callable[[Callback], Result]) -> Iterator[Waiting | Result]:
        """Let the worker do it: words while it lasts, in the end what it gives.

        Raises:
            Superseded: The page has asked for something newer meanwhile.
        """
        future = self._worker.submit(self, work)
        try:
            while wait([future], LOOK_SECONDS).not_done:
                if self.superseded:
                    raise Superseded
                seconds = 0.0 if self._began is None else time.perf_counter() - self._began
                early, self._early = self._early, None
                yield Waiting(self._worker.before(self), self._done, self._total, seconds, early)
            yield future.result()
        finally:
            self._left = True
            future.cancel()

    def begin(self) -> None:
        """Called by the worker."""
        if self.superseded:
            raise Superseded
        self._began = time.perf_counter()


class Worker:
    """Computes one thing at a time, in the order that it was asked for."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="studio")
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._newest: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._queue: list[Wish] = []

    def wish(self, page: str) -> Wish:
        """A new wish of a page, which ends its older ones."""
        with self._lock:
            number = next(self._numbers)
            self._newest[page] = number
            self._newest.move_to_end(page)
            while len(self._newest) > MOST_PAGES:
                self._newest.popitem(last=False)
        return Wish(self, page, number)

    def again(self, page: str, number: int) -> Wish:
        """More of the wish of this number."""
        return Wish(self, page, number)

    def is_newest(self, page: str, number: int) -> bool:
        """Whether a page has asked for nothing since the wish of this number."""
        return self._newest.get(page) == number

    def before(self, wish: Wish) -> int:
        """How many works come before a wish."""
        with self._lock:
            return self._queue.index(wish) if wish in self._queue else 0

    def submit(self, wish: Wish, work: Callable[[Callback], Result]) -> Future[Result]:
        """Queue a work of a wish; what it is called with is a `sampling.Callback`."""

        def do() -> Result:
            wish.begin()
            return work(wish.advance)

        def leave(future: Future) -> None:
            with self._lock:
                self._queue.remove(wish)

        with self._lock:
            self._queue.append(wish)
        future = self._executor.submit(do)
        future.add_done_callback(leave)
        return future

    def run(self, work: Callable[[], Result]) -> Result:
        """Let a work be done that belongs to no wish, and wait for it."""
        return self._executor.submit(work).result()

    def close(self) -> None:
        """End what runs, and take nothing more."""
        with self._lock:
            self._newest.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)
