"""Networks prepared for inference: a copy in another dtype and layout, kept up to date with the network it was made of."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from multibeta import ops
from multibeta.blocks import Conv2d, ResBlock, Upsample
from multibeta.checks import is_traced
from multibeta.inference.freshness import Snapshot, structure_and_weights
from multibeta.inference.host import searching_algorithms
from multibeta.inference.layers import DenseConv2d, PackedLinear, PairConv2d, PointwiseConv2d, packs, prepare_conv
from multibeta.inference.replays import Replays
from multibeta.inference.upsampling import MeasuredUpsample, bucket, choose_upsampling
from multibeta.networks import UNet

Network = TypeVar("Network", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)
_TENSORS = (nn.Parameter, Tensor, type(None))


class Derived(Protocol):
    """A module whose weights are made of those of the module it stands for."""

    def load(self, source: nn.Module, dtype: torch.dtype, /) -> None: ...


def _is_plain(module: nn.Module, layer: type[Layer]) -> TypeGuard[Layer]:
    """Whether a prepared form of `layer` computes what `module` does: it has the forward of that class, and no other padding."""
    if not isinstance(module, layer) or type(module).forward is not layer.forward:
        return False
    if not isinstance(module, nn.Conv2d):
        return True
    padded_with_zeros = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return padded_with_zeros and type(module)._conv_forward is nn.Conv2d._conv_forward


def _has_geometry(conv: nn.Module, kernel: int, padding: int) -> TypeGuard[Conv2d]:
    if not _is_plain(conv, Conv2d):
        return False
    geometry = conv.kernel_size, conv.padding, conv.stride, conv.dilation, conv.groups
    return geometry == ((kernel, kernel), (padding, padding), (1, 1), (1, 1), 1)


def _is_upsample(module: nn.Module) -> TypeGuard[Upsample]:
    return _is_plain(module, Upsample) and _has_geometry(module.conv, 3, 1)


def prepare(network: Network, dtype: torch.dtype, *, pack: bool, tabulate: bool = False, defers: bool | None = None) -> Network:
    """A copy of `network` for inference in `dtype`, channels-last: same function to rounding, its weights a snapshot.

    Args:
        network: A network of `blocks`.
        pack: Pack weights for the CPU (see `packs`); torch.compile cannot trace packed weights.
        tabulate: For a `UNet` on tables of time: its ResBlocks lose their projection and take their shift as embedding, from
            `shift_table`; on CUDA its input has its channels padded to a multiple of 8.
        defers: Let convolutions leave their bias and the sum with the residual to the norm that reads them (see `blocks.Sum`); by
            default on CUDA, where both are passes of their own and a kernel of ours adds them.
    """
    on_cuda = next(network.parameters()).is_cuda
    defers = not pack and (on_cuda if defers is None else defers)
    prepared = copy.deepcopy(network).eval().requires_grad_(False)
    sources = dict(network.named_modules())
    for name, module in list(prepared.named_modules()):
        replacement, source, path = None, sources[name], name.split(".")
        parent, _, last = name.rpartition(".")
        if _is_upsample(source):
            replacement = MeasuredUpsample(source, dtype, pack, defers)
        elif _is_plain(source, Conv2d) and not _is_upsample(sources[parent]):
            if not pack and last == "skip" and _has_geometry(source, 1, 0):
                replacement = PointwiseConv2d(source, dtype)
            else:  # a table of shifts brings the bias of the first convolution of a block
                bias = not (tabulate and last == "conv1")
                replacement = prepare_conv(source, dtype, pack, bias=bias, defers=defers and last != "conv_out")
        elif _is_plain(source, nn.Linear) and pack and "embedding_projection" not in path:
            replacement = PackedLinear(source, dtype)
        elif isinstance(module, ResBlock) and tabulate:
            module.embedding_projection = None
        if replacement is not None:
            prepared.set_submodule(name, replacement)
    if tabulate:
        assert isinstance(network, UNet) and isinstance(prepared, UNet)
        prepare_pairs(prepared, network, dtype, pack)
        conv_in = network.conv_in
        if on_cuda and _is_plain(conv_in, Conv2d):
            channels = -(-conv_in.in_channels // 8) * 8
            prepared.down[0][0] = DenseConv2d(conv_in, dtype, in_channels=channels, defers=defers)
    return prepared.to(dtype=dtype, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def prepare_pairs(prepared: UNet, network: UNet, dtype: torch.dtype, pack: bool) -> None:
    """Let the blocks that take a skip connection read both inputs where they lie, without a concatenation."""
    channels = cast("ResBlock", network.middle[-1]).conv2.out_channels
    for my_stage, their_stage in zip(prepared.up, network.up, strict=True):
        mine, theirs = cast("ResBlock", my_stage[0]), cast("ResBlock", their_stage[0])
        if isinstance(theirs.skip, Conv2d) and _has_geometry(theirs.skip, 1, 0):
            mine.skip, mine.takes_pairs = PairConv2d(theirs.skip, channels, dtype, pack), True
        channels = theirs.conv2.out_channels


@torch.no_grad()
def shift_table(prepared: UNet, network: UNet, times: Tensor) -> Tensor:
    """The embeddings that the blocks of `prepared` take at `times` (S,), side by side: (S, sum of `shift_widths`), float32."""
    parts = []
    for chunk in times.split(256):
        shifts = network.shifts(chunk)
        for index, (mine, theirs) in enumerate(zip(prepared.res_blocks, network.res_blocks, strict=True)):
            if mine.conv1.bias is None and theirs.conv1.bias is not None:
                shifts[index] = shifts[index] + theirs.conv1.bias
        parts.append(torch.cat(shifts, dim=1).float())
    return torch.cat(parts)


def shift_widths(network: UNet) -> list[int]:
    """Channels that each block takes of a row of `shift_table`."""
    return [block.conv1.out_channels for block in network.res_blocks]


@torch.no_grad()
def refresh(prepared: nn.Module, network: nn.Module, dtype: torch.dtype) -> None:
    """Give `prepared` the present weights of `network`, in place where a captured graph may hold their addresses."""
    derived = [name for name, module in prepared.named_modules() if hasattr(module, "load")]
    for name in derived:
        if not any(name.startswith(f"{other}.") for other in derived):
            cast("Derived", prepared.get_submodule(name)).load(network.get_submodule(name), dtype)
    for name, parameter in prepared.named_parameters():
        if not any(name.startswith(f"{other}.") for other in derived):
            parameter.copy_(network.get_parameter(name))
    for name, buffer in prepared.named_buffers():
        if not any(name.startswith(f"{other}.") for other in derived):
            buffer.copy_(network.get_buffer(name))


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """`device` is the current one of its type: streams, events and graphs that are made belong to it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def ordinary_tensors(device: torch.device) -> Iterator[None]:
    """No gradients and no autocast, and tensors made in the block may be written later, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def why_not_prepared(network: nn.Module) -> str | None:
    """Why a call must go through `network` itself and not through a prepared copy, or None."""
    if (transform := ops.active_transform()) is not None:
        return transform
    if is_traced():
        return "it is traced"
    if isinstance(network, UNet) and (type(network).forward, type(network).run) != (UNet.forward, UNet.run):
        return f"{type(network).__name__} has a forward of its own"
    for name, module in network.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            return f"{name} is quantised, which no copy in another dtype would be"
        if others := [type(tensor).__name__ for tensor in module._parameters.values() if type(tensor) not in _TENSORS]:
            return f"a weight of {name} is a {others[0]}, which no copy would compute with"
        if isinstance(module, ResBlock) and not (isinstance(module.conv1, nn.Conv2d) and isinstance(module.conv2, nn.Conv2d)):
            return f"the convolutions of {name} are wrapped, which no copy would follow"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the network'} has hooks, which a copy would not call"
        if "forward" in vars(module) or "_conv_forward" in vars(module):
            return f"the forward of {name or 'the network'} was replaced on the object"
    return None


class Prepared(Generic[Network]):
    """`network` prepared on first use, again, in place, whenever its weights have changed, and anew where its layers have.

    `Snapshot` is the rule. Copies and pickles take the network and prepare it themselves. On CUDA small calls are replayed as
    graphs (see `Replays`).

    Args:
        network, dtype, tabulate: See `prepare`.
        pack: Pack weights where the device can.
    """

    def __init__(self, network: Network, dtype: torch.dtype, *, pack: bool = True, tabulate: bool = False) -> None:
        self.network, self.dtype, self.pack, self.tabulate = network, dtype, pack, tabulate
        self.report: dict[str, str] = {}
        self.version = 0
        self._prepared: Network | None = None
        self._replays: Replays | None = None
        self._structure: list[tuple] = []
        self._snapshot = Snapshot([])
        self._measured: set[tuple[int, ...]] = set()
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return functools.partial(type(self), pack=self.pack, tabulate=self.tabulate), (self.network, self.dtype)

    def get(self) -> Network:
        """The prepared copy, with the weights of now; `version` counts their changes."""
        device = next(self.network.parameters()).device
        with self._lock, ordinary_tensors(device):
            structure, weights = structure_and_weights(self.network)
            if self._prepared is None or structure != self._structure:
                self._prepared, self._replays, self._structure = None, None, []
                pack = self.pack and packs(device, self.dtype)
                self._prepared = prepare(self.network, self.dtype, pack=pack, tabulate=self.tabulate)
                if device.type == "cuda":
                    self._replays = Replays(self._prepared, device)
                self.report.clear()
                self._measured.clear()
            elif self._snapshot.is_of(weights):
                return self._prepared
            else:
                with self._replays.paused() if self._replays else contextlib.nullcontext():
                    refresh(self._prepared, self.network, self.dtype)
            self._structure, self._snapshot = structure, Snapshot(weights)
            self.version += 1
            return self._prepared

    def measure(self, size: tuple[int, ...], run: Callable[[], object]) -> None:
        """Choose each upsampling by what it sees when `run` runs the prepared copy on inputs of this size, once for each size."""
        with self._lock:
            if size not in self._measured:
                self._measured.add(size)
                with searching_algorithms():  # cuDNN keeps what it takes for the first call of a shape
                    choices = choose_upsampling(self.get(), self.network, run)
                self.report |= {f"{name} at batch {size[0]}": text for name, text in choices.items()}

    def __call__(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """The prepared copy on (N, C, H, W), in its dtype; `network` itself where `why_not_prepared` says so."""
        if not len(x) or why_not_prepared(self.network) is not None:
            return self.network(x, *conditions)
        with ordinary_tensors(x.device), on_device(x.device):
            network = self.get()
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            self.measure((bucket(len(x)), *x.shape[1:]), lambda: network(x, *conditions))
            return (self._replays or network)(x, *conditions)
