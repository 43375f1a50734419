"""LPIPS, the learned perceptual distance between two images (Zhang et al. 2018), on the stages of VGG16."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from multibeta.metrics import vgg as vgg16
from multibeta.metrics.checks import as_images
from multibeta.weights import assign, read_weights, weights_hash

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
VGG16_FITS = "vgg16-397923af.pth (torchvision), 528 MiB"
LEAST_PIXELS = 16  # the convolutions halve them four times
HEADS_FIT = (
    "vgg.pth of the lpips package (v0.1), which taming-transformers and LDM use too; weights-vgg16-lpips.pth (torch-fidelity)"
)


class LPIPS(nn.Module):
    """Distance between images in the features of VGG16 (Zhang et al. 2018, Eq. 1, version 0.1).

    Each of five layers is scaled to unit length over its channels; squared differences are weighted per channel and averaged
    over the pixels. Always in evaluation mode: the dropout that the weights were trained with never acts. Weights are
    frozen, gradients flow to the images.

    Attributes:
        name, preprocessing, weights_hash: What a result in this distance depends on.
    """

    name = "LPIPS v0.1, VGG16"
    preprocessing = "(image - (-0.030, -0.088, -0.188)) / (0.458, 0.448, 0.450), at the images' own resolution"

    shift: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        self.network = vgg16.VGG16Stages()
        self.heads = nn.ParameterDict({f"lin{index}": torch.zeros(stage[-1]) for index, stage in enumerate(vgg16.STAGES)})
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.weights_hash: str | None = None
        self.requires_grad_(False)

    def forward(self, image: Tensor | np.ndarray, other: Tensor | np.ndarray) -> Tensor:
        """Distances (N,) between images (N, 3, H, W) in [-1, 1], H and W at least 16; never negative with published heads.

        Raises:
            ValueError: Another shape or dtype, NaN, infinity, or values far outside [-1, 1].
        """
        image = as_images(image, channels=3, least=LEAST_PIXELS)
        other = as_images(other, channels=3, least=LEAST_PIXELS)
        if image.shape != other.shape:
            raise ValueError(f"images must share a shape (N, 3, H, W), got {tuple(image.shape)} and {tuple(other.shape)}")
        return self.distance(image, other)

    def distance(self, image: Tensor, other: Tensor) -> Tensor:
        """`forward` of tensors that are known to be images of one shape: in a loss, whose reconstructions may overshoot."""
        stages = zip(self._directions(image), self._directions(other), self.heads.values(), strict=True)
        distances = (((a - b).square() * head.view(-1, 1, 1)).sum(1).mean((1, 2)) for a, b, head in stages)
        return sum(distances, start=image.new_zeros(()))

    def _directions(self, image: Tensor) -> list[Tensor]:
        # vector_norm has gradient zero where all channels are zero; a square root of the sum has none.
        return [
            stage / (torch.linalg.vector_norm(stage, dim=1, keepdim=True) + 1e-10)
            for stage in self.network((image - self.shift) / self.scale)
        ]


def load_lpips(vgg: str | Path, heads: str | Path | None = None) -> LPIPS:
    """LPIPS from the user's own files; nothing is downloaded.

    Args:
        vgg: Path of VGG16's weights, torchvision's `vgg16-397923af.pth`, or of a saved LPIPS module that holds both.
        heads: Path of the learned weights per channel, `vgg.pth` of the lpips package. None: they are in `vgg`.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is damaged or fits another network; as in `load_features`.
    """
    state = read_weights(vgg)
    learned = state if heads is None else read_weights(heads)
    network = LPIPS()
    stages = {name: value for name, value in vgg16.from_other_names(state).items() if not name.startswith("classifier.")}
    assign(network.network, stages, vgg, "the convolutions of VGG16", VGG16_FITS)
    assign(network.heads, _heads(learned), vgg if heads is None else heads, "the heads of LPIPS", HEADS_FIT)
    network.weights_hash = weights_hash(network.state_dict())
    return network


def _heads(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights per channel by stage: `lin0.model.1.weight`, or `.0.` where saved without dropout; `lins` repeats them."""
    weights = {}
    for name, value in state.items():
        match = re.fullmatch(r"lin(\d)\.model\.[01]\.weight", name)
        if match:
            weights[f"lin{match[1]}"] = value.flatten() if value.shape[:1] == (1,) and value.dim() == 4 else value
    return weights or state
