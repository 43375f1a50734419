"""Several processes that do one work together: who they are, what each does of it, and that they agree.

`torchrun --nproc-per-node=N -m multibeta ...` starts them and says in the environment who each is. One process, which everything
here also stands for, is a world of size 1.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import functools
import itertools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]: torch documents both

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TIMEOUT_SECONDS = 600.0  # that one process waits for the others within one exchange; to begin one it waits without end
_SAID = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # in the environment, by torchrun
_LOOK_SECONDS = 0.2  # how often who waits looks whether another process failed
_FAILED, _STEP, _LIFE = "failed", "step", "life"  # in the store: how many processes failed, how far each is, that it is there
_LIFE_SECONDS, _SILENT_SECONDS = 5.0, 60.0  # between signs of life; without one a process is gone
_LOST = ("connection closed", "connection reset", "broken pipe", "connection was likely closed", "connection refused")
_ALONE = contextvars.ContextVar("alone", default=False)
_store: Store | None = None  # of the processes that `joined` joined
_meetings = 0


class OtherProcessFailed(RuntimeError):
    """Another process failed first and says why; this one cannot go on without it."""


@dataclass(frozen=True)
class World:
    """The processes that work together.

    Attributes:
        rank: Which of them this is, from 0.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` items are this process's: consecutive ones, as many as any other has, or one more."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def turns(self, items: Sequence[Result]) -> list[Result]:
        """Every `size`-th of some items that all processes know, from the one of this rank on: see `in_turn`."""
        return list(items[self.rank :: self.size])


def chunks(count: int, size: int) -> list[range]:
    """`count` items by number, `size` at a time: shared whole, so that what is made of one has company of its own alone."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def world() -> World:
    """The processes of `torch.distributed`, where they were joined and this one does not work `alone`; else this one."""
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In a `with` block this process works by itself: what it calls waits for no other."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


@contextlib.contextmanager
def joined(timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """In a `with` block the processes that torchrun started work together; any other process stays alone.

    Where one of them raises an exception the others cannot go on: they raise `OtherProcessFailed`, whatever they met with.

    Args:
        timeout_seconds: That one waits for the others within one exchange.

    Raises:
        TimeoutError: One of them came to a standstill; says which, and at which step.
        ConnectionError: One of them is gone.
        ValueError: The environment names some of what torchrun says, but not all; or no process could be reached in time.
    """
    global _store
    size = os.environ.get("WORLD_SIZE")
    if size is None or dist.is_initialized():  # alone, or whoever called has joined them already
        yield world()
        return
    if missing := [name for name in _SAID if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {size} in the environment, but {', '.join(missing)} is not: start with torchrun")
    numbers = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    if odd := {name: value for name, value in numbers.items() if not value.isdecimal()}:
        raise ValueError(f"of the environment {', '.join(odd)} must be whole numbers, got {', '.join(odd.values())}")
    if not int(numbers["RANK"]) < int(size):
        raise ValueError(f"RANK must be below WORLD_SIZE, got {numbers['RANK']} of {size}")
    if int(size) == 1:
        yield World()
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout, began = datetime.timedelta(seconds=timeout_seconds), time.monotonic()
    try:
        from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

        store, rank, _ = next(iter(rendezvous("env://", timeout=timeout)))
        _store = PrefixStore(_prefix(), store)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=int(size), timeout=timeout)
    except (RuntimeError, ValueError) as error:  # the errors of torch.distributed are RuntimeErrors
        raise ValueError(
            f"process {os.environ['RANK']} of {size} could not join the others at {place} in {time.monotonic() - began:.0f} "
            f"s; a process is missing, or another --master-port is free: {str(error).splitlines()[0]}"
        ) from error
    try:
        with _signs_of_life(rank):
            yield world()
    except BaseException as error:
        if not _first_to_fail(_store) and isinstance(error, Exception):
            raise OtherProcessFailed(f"another process failed before process {rank} of {size}") from error
        words = str(error).lower() if isinstance(error, RuntimeError) else ""
        if "timed out" in words:
            raise TimeoutError(f"not all processes came together within {timeout_seconds:g} s: {_where_they_are()}") from error
        if any(each in words for each in _LOST):
            raise ConnectionError("another process ended without a word: it was killed, or ran out of memory") from error
        raise
    finally:
        _store = None
        dist.destroy_process_group()


@contextlib.contextmanager
def _signs_of_life(rank: int) -> Iterator[None]:
    """In a `with` block this process counts up in the store, by a connection of its own, so that others know that it is there."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own, done = TCPStore(address, port, is_master=False, wait_for_workers=False), threading.Event()
    store = PrefixStore(_prefix(), own)

    def count() -> None:
        with contextlib.suppress(RuntimeError):  # the process that kept the store is gone
            while not done.wait(_LIFE_SECONDS):
                store.add(f"{_LIFE}/{rank}", 1)

    thread = threading.Thread(target=count, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _prefix() -> str:
    """Of keys in the store, which remembers those of attempts that torchrun made before."""
    return f"multibeta/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _first_to_fail(store: Store) -> bool:
    """Whether no other process has failed; from now on one has."""
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:  # the process that kept the store is gone
        return False


def tell_step(step: int) -> None:
    """Let the others know how far this process is, so that they can say who came to a standstill."""
    if _store is not None and world().size > 1:
        _store.set(f"{_STEP}/{world().rank}", str(step))


def _where_they_are() -> str:
    """Which processes are behind the others, and at which step; or that none is."""
    assert _store is not None
    try:
        told = {rank: int(_store.get(key)) for rank in range(world().size) if _store.check([key := f"{_STEP}/{rank}"])}
    except RuntimeError as error:
        return f"the process that keeps the store is gone ({error})"
    furthest = max(told.values(), default=0)
    late = [f"process {rank} after step {step}" for rank, step in told.items() if step < furthest]
    return f"{', '.join(late) or 'none'} behind step {furthest}"


def local_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, by default the GPU where torch sees one, else the CPU; of several processes each has a GPU of its own.

    It becomes the current one of this process, where kernels are launched and exchanges happen.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type != "cuda" or device.index is not None or world().size == 1:
        return device
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= there:
        raise ValueError(f"process {local} of this machine needs a GPU of its own, there are {there}: lower --nproc-per-node")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@functools.cache  # once for what calls itself several times
def say_device(device: torch.device) -> None:
    """Log where is computed."""
    there = "torch sees no GPU" if not torch.cuda.is_available() else "it was asked for, there is a GPU"
    logger.info("computing on %s", torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU: {there}")


def gather(value: Result) -> list[Result]:
    """The value of every process, by rank; it is pickled on the way, from one process of this program to another."""
    size = world().size
    if size == 1:
        return [value]
    wait()
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def in_turn(items: Iterable[Result]) -> Iterator[Result]:
    """The items of all processes in all of them, as they are made: the first of each, by rank, then the second of each.

    Of processes that each take the `World.turns` of a sequence these are those of the sequence, in its order. Each process comes
    to the end of its own, where a bar may be closed.
    """
    own = iter(items)
    while True:
        row = gather(list(itertools.islice(own, 1)))
        for items_of_one in row:
            yield from items_of_one
        if not any(row):
            return


def gather_rows(rows: Tensor) -> Tensor:
    """The rows (n, ...) of all processes, in the order of their ranks; each may have another number of them."""
    size = world().size
    if size == 1:
        return rows
    counts = gather(len(rows))
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def total(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in their place."""
    if world().size > 1:
        dist.all_reduce(values)
    return values


def anywhere(*flags: bool) -> list[bool]:
    """Of each flag whether it is True in any process."""
    if world().size == 1:
        return list(flags)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return [count > 0 for count in total(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


def wait() -> None:
    """Go on when all processes have come here, however long that takes.

    Raises:
        OtherProcessFailed: One of them failed.
        ConnectionError: One of them has given no sign of life for long.
    """
    global _meetings
    size = world().size
    if size == 1:
        return
    if _store is None:  # whoever joined the processes keeps it
        dist.barrier()
        return
    _meetings += 1
    here = f"meeting/{_meetings}"
    if _store.add(here, 1) == size:
        _store.set(f"{here}/all", "")
    pause, silence = 0.001, _Silence(_store, size)
    while not _store.check([f"{here}/all"]):
        if _store.check([_FAILED]):
            raise OtherProcessFailed("another process failed")
        silence.check()
        time.sleep(pause)  # the store's own waiting writes a warning whenever its time is over
        pause = min(2 * pause, _LOOK_SECONDS)


class _Silence:
    """Notices processes that no longer count up in the store."""

    def __init__(self, store: Store, size: int):
        self.store, self.looked = store, time.monotonic()
        self.heard = {rank: (0, self.looked) for rank in range(size)}

    def check(self) -> None:
        """Raise `ConnectionError` for a process that has been silent for long; looks every few seconds."""
        now = time.monotonic()
        if now - self.looked < _LIFE_SECONDS:
            return
        self.looked = now
        for rank, (count, since) in self.heard.items():
            new = self.store.add(f"{_LIFE}/{rank}", 0)
            if new != count:
                self.heard[rank] = new, now
            elif now - since > _SILENT_SECONDS:
                raise ConnectionError(
                    f"process {rank} has given no sign of life for {now - since:.0f} s: it was killed, or hangs"
                )


def agree(what: str, value: object) -> None:
    """`ValueError`, which says who differs, unless `value` is the same in all processes; in all of them alike."""
    values = gather(value)
    others = [rank for rank, each in enumerate(values) if each != values[0]]
    if others:
        named = f"in {', '.join(map(str, others))} {values[others[0]]!r}"
        raise ValueError(f"{what} must be the same in all processes: in process 0 {values[0]!r}, {named}")


def by_first(compute: Callable[[], Result]) -> Result:
    """What the first process computes, `alone`, in all of them; an error of it is raised in all of them alike."""
    if world().size == 1:
        return compute()
    outcome: tuple[Result | None, Exception | None] = None, None
    if world().first:
        try:
            with alone():
                outcome = compute(), None
        except Exception as error:
            outcome = None, _picklable(error)
    shared: list[Any] = [outcome]
    wait()
    dist.broadcast_object_list(shared)
    result, error = shared[0]
    if error is not None:
        raise error
    return result


def _picklable(error: Exception) -> Exception:
    """An error as it can be told to other processes: itself, or one of its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def first_goes_before(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by the first process before the others: these find what it left on the disk. Each is `alone`."""
    if world().size == 1:
        return work()
    done: list[Result] = []
    by_first(lambda: done.append(work()))
    if not done:
        with alone():
            done.append(work())
    return done[0]


@contextlib.contextmanager
def held_by_first(context: contextlib.AbstractContextManager) -> Iterator[None]:
    """In a `with` block the first process is in a context, such as a lock of a folder, for all of them."""
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(context) and None)
        yield
