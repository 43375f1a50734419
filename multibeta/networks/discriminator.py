"""What tells real images from made ones, patch by patch."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from multibeta.checks import check_integer

WIDEST = 8  # times the base channels


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches of an image, high where they look real: PatchGAN (Isola et al. 2017) of latent-diffusion.

    `num_layers` 4x4 convolutions of stride 2, each twice as wide as the one before, one of stride 1, one to the logits;
    LeakyReLU(0.2) after each, and a norm before it but for the first. With norm="batch" and the other defaults the 2,765,633
    parameters have the names of latent-diffusion's. Weights start from N(0, 0.02), those of norms from N(1, 0.02).

    Args:
        image_channels: Of an image.
        base_channels: Width of the first layer, even.
        num_layers: How often the image is halved. A logit sees 70 x 70 pixels with 3, 34 x 34 with 2, 16 x 16 with 1.
        norm: "group", up to 32 groups of at least 4 channels; or "batch", whose statistics are of the images that are seen
            together: of one piece of an update (`accumulate`), in one of several processes.

    Shapes: images (N, image_channels, H, W); result (N, 1, H / f - 2, W / f - 2), float32, f = 2^num_layers, rounded down.

    Raises:
        ValueError: A number out of its range; or, of a call, images with H or W below 3 f.
    """

    def __init__(
        self,
        image_channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        norm: Literal["group", "batch"] = "group",
    ) -> None:
        super().__init__()
        for name, value in (("image_channels", image_channels), ("base_channels", base_channels), ("num_layers", num_layers)):
            check_integer(name, value, 1)
        if base_channels % 2:
            raise ValueError(f"base_channels must be even, got {base_channels}")
        if norm not in ("group", "batch"):
            raise ValueError(f"norm must be 'group' or 'batch', got {norm!r}")
        self.num_layers = num_layers
        width = base_channels
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for number in range(1, num_layers + 1):
            inputs, width = width, base_channels * min(2**number, WIDEST)
            layers += [
                nn.Conv2d(inputs, width, 4, 2 if number < num_layers else 1, 1, bias=False),
                nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(math.gcd(32, width // 4), width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    @staticmethod
    def most_layers(pixels: int) -> int:
        """The largest `num_layers` of which images of that height or width give a logit, 0 if there is none."""
        return max(0, int(math.log2(pixels / 3)))

    def forward(self, images: Tensor) -> Tensor:
        if (most := self.most_layers(min(images.shape[-2:]))) < self.num_layers:
            raise ValueError(
                f"num_layers={self.num_layers} needs images of at least {3 * 2**self.num_layers} pixels, got "
                f"{tuple(images.shape[-2:])}: {f'at most {most} fits' if most else 'they must have at least 6'}"
            )
        return self.main(images).float()
