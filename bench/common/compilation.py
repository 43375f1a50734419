"""Triton compiles for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


class _Driver:
    """Stands for a device of one compute capability, as far as compilation asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, CompiledKernel]]]:
    """Launches compile for `capability` and do nothing else; yields the list that fills with (name, compiled kernel)."""
    compiled: list[tuple[str, CompiledKernel]] = []
    run, active = JITFunction.run, driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = cast(CompiledKernel, run(self, *args, grid=grid, warmup=True, **kwargs))
        compiled.append((self.fn.__name__.strip("_"), kernel))

    JITFunction.run = compile_only
    driver.set_active(cast(DriverBase, _Driver(capability)))
    try:
        yield compiled
    finally:
        JITFunction.run, driver._active = run, active
