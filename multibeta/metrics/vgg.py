"""VGG16 (Simonyan and Zisserman 2014): the layers that LPIPS and improved precision and recall read."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

RESOLUTION = 224
DIMENSION = 4096
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in [0, 1], as torchvision's weights expect

# Channels of the 3 x 3 convolutions of each stage; a 2 x 2 maximum halves the resolution between stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16Stages(nn.Module):
    """The convolutions of VGG16, stage by stage. Parameters have torchvision's names, `features.0.weight` and so on."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for stage in STAGES:
            for width in stage:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of normalised images (N, 3, H, W), H and W at least 16."""
        outputs, hidden = [], images
        for layer in list(self.features)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                outputs.append(hidden)
            hidden = layer(hidden)
        return [*outputs, hidden]


class VGG16(VGG16Stages):
    """VGG16 up to its second hidden layer, without the classification: the features of precision and recall."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, DIMENSION), nn.ReLU(), nn.Dropout(), nn.Linear(DIMENSION, DIMENSION), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (N, 4096) after the ReLU of normalised images (N, 3, H, W), H and W at least 32; their averages fill 7 x 7."""
        hidden = F.max_pool2d(super().forward(images)[-1], 2)
        return self.classifier(F.adaptive_avg_pool2d(hidden, 7).flatten(1))


def from_other_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `VGG16Stages` or `VGG16` from a file with torchvision's names or those of the `lpips` package.

    The package keeps the same layers as `net.slice3.14.weight`, with torchvision's index last. Heads of LPIPS, constants and
    the classification layer (`classifier.6`) are left out.
    """
    renamed = {re.sub(r"^net\.slice\d\.", "features.", name): value for name, value in state.items()}
    other = ("classifier.6.", "scaling_layer.", "lin")
    return {name: value for name, value in renamed.items() if not name.startswith(other)} or state
