"""Several processes of a test, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from multibeta import distribution


def in_processes(size: int, function: Callable, *args: Any, folder: Path, machines: int = 1) -> list[Any]:
    """What `function(*args)` gives in each of `size` processes that were joined, by rank; `folder` carries it back.

    They are told that they are on so many `machines`.

    A function of a test module, because it is named to the other processes. One that raises fails the test.
    """
    port = free_port()
    sys.path.append(str(Path(__file__).parents[1]))  # where the others find `tests.test_...`, as pytest calls a test module
    try:
        multiprocessing.spawn(_one, (size, size // machines, port, function, args, str(folder)), nprocs=size)
    finally:
        sys.path.pop()
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(size)]


def torchrun(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What `torchrun` makes of a script or `-m MODULE` and its arguments in `size` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}"]
    here = os.path.dirname(__file__)  # not the checkout, where `multibeta` would be half of the package
    return subprocess.run([*command, *map(str, arguments)], cwd=here, capture_output=True, text=True, timeout=120)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _one(rank: int, size: int, local_size: int, port: int, function: Callable, args: tuple, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_RANK": str(rank % local_size), "LOCAL_WORLD_SIZE": str(local_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distribution.joined(timeout_seconds=120):
        torch.save(function(*args), Path(folder) / f"rank-{rank}.pt")
