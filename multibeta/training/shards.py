"""Checkpoints of which each process writes its part, by `torch.distributed.checkpoint` into safetensors."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from multibeta import checkpoints, distribution

SHARDED = "sharded"  # in the config: how many processes wrote it
FILE_BYTES = 2**26  # of the tensors of a file, which is put together in memory


class _PartsWriter(HuggingFaceStorageWriter):
    """Writes the part of one process, and reads it back."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        written = super().write_data(plan, planner)
        files: dict[str, dict[str, Tensor]] = {}
        items = {item.index: item for item in plan.items}
        for result in written.wait():
            part = planner.resolve_data(items[result.index])
            files.setdefault(result.storage_data.relative_path, {})[result.index.fqn] = cast("Tensor", part)
        for name, state in files.items():
            checkpoints.verify(Path(self.path) / name, state)
        return written


class Writer:
    """Writes one checkpoint after the other; all processes call its methods alike.

    Args:
        overlaps: Whether each is copied to the host first, and written while the training goes on: else it waits, which on a CPU
            costs as much time and less memory.
    """

    def __init__(self, *, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))  # its messages meet none of the training's
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def write(self, folder: Path, weights: Mapping[str, Mapping[str, Tensor]], config: dict[str, Any]) -> None:
        """Begin a checkpoint of `weights`, as of `checkpoints.save_folder`, when that before is complete; they may change then.

        Args:
            folder: All processes see it.

        Raises:
            OSError: This, or that before, could not be written; what is there is unchanged. In all processes alike.
        """
        self.wait()
        standing = contextlib.ExitStack()
        config = {**config, SHARDED: distribution.world().size}
        place = distribution.by_first(lambda: standing.enter_context(checkpoints.replacing(folder, config)))
        tensors = {f"{name}.{key}": value.detach() for name, state in weights.items() for key, value in state.items()}
        sizes = itertools.accumulate(value.nbytes for value in tensors.values())
        files = {key: 1 + size // FILE_BYTES for key, size in zip(tensors, sizes, strict=True)}
        writer = _PartsWriter(str(place), files, save_distributed=True)
        written = (async_save if self.overlaps else _save)(tensors, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(_finish, standing, written)
        if not self.overlaps:
            self.wait()

    def wait(self) -> None:
        """Go on when the checkpoint that was begun is complete.

        Raises:
            OSError: It could not be written; that before is unchanged. In all processes alike.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            distribution.by_first(pending.result)

    def close(self) -> None:
        """Complete what was begun, and end."""
        self.wait()
        self.thread.shutdown()


def _save(tensors: dict[str, Tensor], **options: Any) -> Future:
    """As `async_save`, done already."""
    done = Future()
    try:
        done.set_result(save(tensors, **options))
    except (Exception, CheckpointException) as error:
        done.set_exception(error)
    return done


def _words(error: BaseException) -> str:
    """What an error says, of several processes of each that met with one."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())


def _number(error: BaseException) -> int | None:
    """The errno of an error, of several processes that of the first that has one."""
    failures = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return next((number for failure in failures if (number := getattr(failure, "errno", None)) is not None), None)


def _finish(standing: contextlib.ExitStack, written: Any) -> None:
    """When all parts are written the checkpoint stands, or after an error nothing of it."""
    with standing:
        try:
            written.result()
        except (Exception, CheckpointException) as error:
            failed = OSError(f"a part of a checkpoint could not be written: {_words(error)}")
            failed.errno = _number(error)
            raise failed from error


def load(folder: Path, like: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Weights and config of a checkpoint, as of `checkpoints.load_folder`, whoever wrote it.

    Args:
        like: By file and name, tensors whose layout over the processes that of the file's shall have, where each wrote its part.

    Raises:
        FileNotFoundError, ValueError: See `checkpoints.load_folder`.
    """
    config = checkpoints.load_config(folder)
    if SHARDED not in config:
        return checkpoints.load_folder(folder)
    checkpoints.require_files(folder)
    reader = HuggingFaceStorageReader(str(checkpoints.standing(folder)))
    try:
        stored = reader.read_metadata().state_dict_metadata
        tensors = {}
        for key, about in stored.items():
            assert isinstance(about, TensorStorageMetadata)
            name, _, rest = key.partition(".")
            wanted = like.get(name, {}).get(rest)
            if wanted is not None and wanted.shape == about.size:
                tensors[key] = torch.empty_like(wanted)
            else:
                tensors[key] = torch.empty(about.size, dtype=about.properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads all parts
            load_parts(tensors, storage_reader=reader, no_dist=distribution.world().size == 1)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{folder} is damaged or lacks parts ({_words(error)}): copy it again, or use another") from error
    weights: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, rest = key.partition(".")
        weights.setdefault(name, {})[rest] = value.detach()
    return weights, config
