"""The Inception-v3 network of FID (Szegedy et al. 2015, the TensorFlow release of 2015-12-05) up to its pooled features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.metrics.checks import as_images

RESOLUTION = 299
LEAST_PIXELS = 75
DIMENSION = 2048
CLASSES = 1008

# Per block: branch -> (channels, kernel) of its convolutions; a second kernel forks the last one. Then the pool and the
# channels of the convolution behind it; without one the block halves the resolution.
_SEVEN = ((1, 7), (7, 1))
BLOCKS = {
    **{
        f"Mixed_5{letter}": (
            {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]},
            "average",
            pool,
        )
        for letter, pool in zip("bcd", (32, 64, 64), strict=True)
    },
    "Mixed_6a": ({"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "max", None),
    **{
        f"Mixed_6{letter}": (
            {
                "branch1x1": [(192, 1)],
                "branch7x7": [(c, 1), (c, (1, 7)), (192, (7, 1))],
                "branch7x7dbl": [(c, 1), (c, (7, 1)), (c, (1, 7)), (c, (7, 1)), (192, (1, 7))],
            },
            "average",
            192,
        )
        for letter, c in zip("bcde", (128, 160, 160, 192), strict=True)
    },
    "Mixed_7a": (
        {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]},
        "max",
        None,
    ),
    **{
        f"Mixed_7{letter}": (
            {
                "branch1x1": [(320, 1)],
                "branch3x3": [(384, 1), (384, (1, 3), (3, 1))],
                "branch3x3dbl": [(448, 1), (384, 3), (384, (1, 3), (3, 1))],
            },
            pool,
            192,
        )
        for letter, pool in zip("bc", ("average", "max"), strict=True)
    },
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")


Branches = dict[str, list[tuple]]  # by the name of a branch: (channels, kernel[, kernel]) of each convolution


class FIDInception(nn.Module):
    """Inception-v3 as FID uses it, from scaled images to the 2048 averages that its classifier would read.

    It differs from the network of most vision libraries in three places: average pools leave the padding out of the mean, the
    last block pools by maximum, and there is no auxiliary classifier. The names of the parameters are those of the
    published `pt_inception-2015-12-05` files, without `fc`.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        channels = 192
        for name, (branches, pool, pool_channels) in BLOCKS.items():
            block = Mixed(channels, branches, pool, pool_channels)
            self.add_module(name, block)
            channels = block.out_channels
        assert channels == DIMENSION

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Features (N, 2048) of images (N, 3, H, W) in [-1, 1], H and W at least 75; FID has 299.

        Raises:
            ValueError: Another shape or dtype, NaN, infinity, or values far outside [-1, 1].
        """
        images = as_images(images, channels=3, least=LEAST_PIXELS, warn=False)
        hidden = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        hidden = F.max_pool2d(hidden, 3, stride=2)
        hidden = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(hidden))
        hidden = F.max_pool2d(hidden, 3, stride=2)
        for name in BLOCKS:
            hidden = self.get_submodule(name)(hidden)
        return hidden.mean((2, 3))


class Mixed(nn.Module):
    """Branches of convolutions and one of a pool, side by side over one input and joined along the channels.

    Args:
        in_channels: Channels of the input.
        branches: Branch name -> (channels, kernel[, kernel]) of each convolution. Two kernels fork: both read the same
            input and their outputs are joined.
        pool: "average" or "max", 3 x 3.
        pool_channels: Width of the convolution behind the pool. None: the pool and the last convolutions halve the resolution.
    """

    def __init__(self, in_channels: int, branches: Branches, pool: str, pool_channels: int | None):
        super().__init__()
        self.pool, self.halves = pool, pool_channels is None
        self.paths, self.out_channels = [], 0
        for branch, layers in branches.items():
            path, channels = [], in_channels
            for index, (width, *kernels) in enumerate(layers, start=1):
                names = convolution_names(branch, len(layers), index, len(kernels))
                strided = self.halves and index == len(layers)
                for name, kernel in zip(names, kernels, strict=True):
                    layout = {"stride": 2} if strided else {"padding": same_padding(kernel)}
                    self.add_module(name, ConvNorm(channels, width, kernel, **layout))
                path.append(names)
                channels = width * len(kernels)
            self.paths.append(path)
            self.out_channels += channels
        if pool_channels is not None:
            self.branch_pool = ConvNorm(in_channels, pool_channels, 1)
        self.out_channels += in_channels if pool_channels is None else pool_channels

    def forward(self, hidden: Tensor) -> Tensor:
        outputs = []
        for path in self.paths:
            output = hidden
            for names in path:
                output = torch.cat([self.get_submodule(name)(output) for name in names], 1)
            outputs.append(output)
        return torch.cat([*outputs, self._pooled(hidden)], 1)

    def _pooled(self, hidden: Tensor) -> Tensor:
        if self.halves:
            return F.max_pool2d(hidden, 3, stride=2)
        if self.pool == "max":
            return self.branch_pool(F.max_pool2d(hidden, 3, stride=1, padding=1))
        return self.branch_pool(F.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False))


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation by stored statistics, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], **layout: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **layout)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.bn.num_batches_tracked = None  # counts training steps; half of the published files lack it

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(hidden)))


def same_padding(kernel: int | tuple[int, int]) -> int | tuple[int, ...]:
    return tuple(side // 2 for side in kernel) if isinstance(kernel, tuple) else kernel // 2


def convolution_names(branch: str, num_layers: int, index: int, num_kernels: int) -> list[str]:
    """Names of the convolutions at `index`: `branch1x1` when alone, `branch5x5_2`, or `branch3x3_2a` and `_2b` of a fork."""
    if num_layers == 1:
        return [branch]
    return [f"{branch}_{index}"] if num_kernels == 1 else [f"{branch}_{index}{letter}" for letter in "ab"]


def from_other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the FID Inception under the names of `FIDInception`, whichever of these files it comes from.

    - `pt_inception-2015-12-05` (pytorch-fid, torch-fidelity): these names.
    - The `InceptionV3` module of pytorch-fid, saved whole: `blocks.2.3.branch3x3.conv.weight`.
    - NVIDIA's `inception-2015-12-05.pt`: `layers.mixed_3.tower.conv_1.weight`, as in the TensorFlow graph, and without the
      scales of the batch normalisation, which are one.

    The classifier (`fc`, `output`) and `num_batches_tracked` are left out; names of no family stay, for the error to show.
    """
    ours = dict(_block_names() + _graph_names())
    renamed = {ours.get(name, name): value for name, value in state.items()}
    for name, value in state.items():
        if name in ours and name.endswith(".beta"):
            renamed[ours[name].replace("bias", "weight")] = torch.ones_like(value)
    return {
        name: value
        for name, value in renamed.items()
        if not name.startswith(("fc.", "output.")) and not name.endswith("num_batches_tracked")
    }


def _convolutions(block: str) -> list[str]:
    """Names of the convolutions of one block, or of the one convolution of the stem."""
    if block in STEM:
        return [block]
    branches, _, pool_channels = BLOCKS[block]
    names = [
        f"{block}.{name}"
        for branch, layers in branches.items()
        for index, (_, *kernels) in enumerate(layers, start=1)
        for name in convolution_names(branch, len(layers), index, len(kernels))
    ]
    return names if pool_channels is None else [*names, f"{block}.branch_pool"]


def _block_names() -> list[tuple[str, str]]:
    """(name in pytorch-fid's module, our name) of every parameter."""
    leaves = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    mixed = list(BLOCKS)
    return [
        (f"blocks.{group}.{index}{name.removeprefix(block)}.{leaf}", f"{name}.{leaf}")
        for group, blocks in enumerate((STEM[:3], STEM[3:], mixed[:8], mixed[8:]))
        for index, block in enumerate(blocks)
        for name in _convolutions(block)
        for leaf in leaves
    ]


def _graph_names() -> list[tuple[str, str]]:
    """(name in the TensorFlow graph, as NVIDIA's script has it, our name) of every parameter."""
    leaves = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    places = {name: _numbered("conv", index) for index, name in enumerate(STEM)}
    for number, (block, (branches, _, pool_channels)) in enumerate(BLOCKS.items()):
        mixed, tower = _numbered("mixed", number), 0
        dot = "_" if block in ("Mixed_7b", "Mixed_7c") else "."  # the forked blocks of the script are flat
        for branch, layers in branches.items():
            if len(layers) == 1:
                places[f"{block}.{branch}"] = f"{mixed}.conv"
                continue
            for index, (_, *kernels) in enumerate(layers, start=1):
                names = convolution_names(branch, len(layers), index, len(kernels))
                for fork, name in enumerate(names):
                    step = _numbered("conv", index - 1) if len(names) == 1 else f"mixed{dot}{_numbered('conv', fork)}"
                    places[f"{block}.{name}"] = f"{mixed}.{_numbered('tower', tower)}{dot}{step}"
            tower += 1
        if pool_channels is not None:
            places[f"{block}.branch_pool"] = f"{mixed}.{_numbered('tower', tower)}{dot}conv"
    return [(f"layers.{place}.{theirs}", f"{name}.{ours}") for name, place in places.items() for theirs, ours in leaves.items()]


def _numbered(word: str, index: int) -> str:
    return word if index == 0 else f"{word}_{index}"
