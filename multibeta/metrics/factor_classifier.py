"""A small network that reads the known factors of an image: it tells whether generated scenes show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.data.dataset import FactorDataset
from multibeta.draws import noise_like
from multibeta.metrics.checks import ArrayLike, as_array, as_factors, as_images

COARSEST_PIXELS = 4


class FactorClassifier(nn.Module):
    """Convolutional classifier of every factor, with shared features for `frechet_distance` and `precision_recall`.

    Args:
        factor_sizes: Number of values of each factor.
        resolution: Pixels per side: 4 times a power of two, at least 8.
        width: Channels after the first halving, a multiple of 8; doubled at the next two.
        feature_channels: Width of the features beneath the heads.
    """

    def __init__(self, factor_sizes: Sequence[int], resolution: int = 32, width: int = 32, feature_channels: int = 64):
        super().__init__()
        levels = (resolution // COARSEST_PIXELS).bit_length() - 1
        if not self.takes(resolution):
            raise ValueError(f"resolution must be 4 times a power of two and at least 8, got {resolution}")
        layers, channels = [], 3
        # Strided from the first layer on: convolutions at full resolution cost five times the rest together.
        for level in range(levels):
            fine, channels = channels, width * 2 ** min(level, 2)
            layers += [nn.Conv2d(fine, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.SiLU()]
        self.resolution = resolution
        self.convolutions = nn.Sequential(*layers)
        # Flattened, not pooled: position tells the scale of an object and the orientation of a room.
        self.project = nn.Linear(channels * COARSEST_PIXELS**2, feature_channels)
        self.heads = nn.ModuleList(nn.Linear(feature_channels, size) for size in factor_sizes)

    @staticmethod
    def takes(resolution: int) -> bool:
        """Whether there is a classifier of images of `resolution` pixels."""
        levels = (resolution // COARSEST_PIXELS).bit_length() - 1
        return levels >= 1 and resolution == COARSEST_PIXELS * 2**levels

    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """What the heads see, (N, feature_channels), of images (N, 3, resolution, resolution) in [-1, 1].

        Raises:
            ValueError: Images of another shape, bytes, NaN, infinity, or values far outside [-1, 1].
        """
        return self._features(self._here(as_images(images, warn=False)))

    def _here(self, images: Tensor) -> Tensor:
        """Images where the network is, in its dtype."""
        return images.to(self.project.weight)

    def _features(self, images: Tensor) -> Tensor:
        if images.shape[1:] != (3, self.resolution, self.resolution):
            expected = (3, self.resolution, self.resolution)
            raise ValueError(f"images must have shape (N, {', '.join(map(str, expected))}), got {tuple(images.shape)}")
        return F.silu(self.project(self.convolutions(images).flatten(1)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits of every factor, a list of (N, factor_size), of images that may carry the noise of training."""
        features = self._features(images)
        return [head(features) for head in self.heads]

    @torch.no_grad()
    def predict(self, images: Tensor | np.ndarray, batch_size: int = 512) -> Tensor:
        """Most likely value of every factor, (N, F) int64, of images as `features` takes them, where the network is."""
        images = self._here(as_images(images))
        chunks = [torch.stack([logits.argmax(1) for logits in self(chunk)], 1) for chunk in images.split(batch_size)]
        return torch.cat(chunks)

    def accuracy(self, images: Tensor | np.ndarray, factors: ArrayLike, batch_size: int = 512) -> Tensor:
        """Share of images whose factor is read rightly, (F,) float64, for integer factors (N, F).

        Raises:
            ValueError: Images that `features` refuses, factors that are no integers, or not one row of F for each image.
        """
        predicted = self.predict(images, batch_size)
        factors = torch.from_numpy(as_factors(as_array(factors, "factors"), len(predicted), constant=True))
        if factors.shape != predicted.shape:
            raise ValueError(f"the classifier reads {predicted.shape[1]} factors, got {factors.shape[1]}")
        return (predicted == factors.to(predicted.device)).double().mean(0)


class FactorClassifierObjective:
    """Mean cross-entropy over the factors, under slight pixel noise so that smooth generated images can be read too.

    Args:
        module: A `FactorClassifier`.
        dataset: Gives `factors(indices)` of training batches.
        validation: The same for batches seen with the module in evaluation mode; needed only to validate.
        pixel_noise: Deviation of the Gaussian noise added to training images.
    """

    def __init__(
        self, module: FactorClassifier, dataset: FactorDataset, validation: FactorDataset | None = None, pixel_noise: float = 0.02
    ):
        self.module = module
        self.dataset = dataset
        self.validation = validation
        self.pixel_noise = pixel_noise

    def __call__(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a `training.Batch`, and "accuracy": the share of all factors read rightly."""
        images, dataset = batch.images, self.dataset if self.module.training else self.validation
        if dataset is None:
            raise ValueError("validation needs the factors of its images, got no dataset of them")
        if self.module.training:
            images = images + self.pixel_noise * noise_like(images, generator).to(images)
        factors = dataset.factors(batch.indices).to(images.device)
        predictions = [logits.float() for logits in self.module(images)]
        losses = [F.cross_entropy(logits, factor) for logits, factor in zip(predictions, factors.T, strict=True)]
        correct = torch.stack([logits.argmax(1) for logits in predictions], 1) == factors
        return torch.stack(losses).mean(), {"accuracy": correct.float().mean()}
