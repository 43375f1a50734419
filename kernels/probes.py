"""Questions about this machine, which torch.compile takes as answered: it calls them, and does not trace into them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar, cast

Answer = TypeVar("Answer")
Function = TypeVar("Function", bound=Callable[..., Any])
AnswerOf = TypeVar("AnswerOf", covariant=True)


class Probe(Protocol[AnswerOf]):
    """A question of `probe`."""

    cache_clear: Callable[[], None]  # forgets the answers

    def __call__(self, *args: Any) -> AnswerOf: ...


def constant(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without its import of torch._dynamo."""
    function._dynamo_marked_constant = True
    return function


def probe(function: Callable[..., Answer]) -> Probe[Answer]:
    """Ask `function`, which tries something on real tensors, once for each arguments.

    It is asked in a thread of its own, where no mode of the caller holds: fake tensors, tracing, transforms, autocast.
    """

    @functools.cache
    def asked(*args: Any) -> Answer:
        answer: Future[Answer] = Future()

        def ask() -> None:
            try:
                answer.set_result(function(*args))
            except BaseException as error:
                answer.set_exception(error)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return answer.result()

    @functools.wraps(function)
    def answered(*args: Any) -> Answer:
        return asked(*args)

    probed = cast("Probe[Answer]", answered)
    probed.cache_clear = asked.cache_clear
    return constant(probed)


def first_line(error: BaseException) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
