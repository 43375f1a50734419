"""What images are compared in: features of a factor classifier, or principal components of the pixels."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from multibeta import data, distribution, files
from multibeta.metrics import FactorClassifier, FactorClassifierObjective, frechet_distance
from multibeta.metrics.checks import as_images
from multibeta.metrics.streaming import image_batches
from multibeta.progress import progress_bar
from multibeta.training import TrainingInterrupted, TrainingOptions, train
from multibeta.weights import weights_hash

logger = logging.getLogger(__name__)

CLASSIFIER_BATCH = 128
CLASSIFIER_IMAGES, CLASSIFIER_LEAST = 20_000, 128  # of one dataset that is measured too
FEW = 2  # images for each feature
LEAST_DEVIATION = 1e-4  # of a principal component, next to the largest: less is rounding
PIXEL_VALUES = 2**27  # 512 MiB of the images whose principal components are measured in


@dataclass(frozen=True)
class Features:
    """What the Frechet distance is measured in: a function from images to features, as `metrics.extract_features` takes it.

    Attributes:
        name: For the report.
        function: Images (N, C, H, W) in [-1, 1] to features (N, d), in units of the real deviation.
        classifier: The factor classifier behind them, or None where no factors are known.
        accuracy: Its accuracy on held-out images, per factor.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    classifier: FactorClassifier | None = None
    accuracy: dict[str, float] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(as_images(images))

    def of_checked(self, images: Tensor) -> Tensor:
        """The same of one batch of many that were checked together."""
        return self.function(images)

    @property
    def origin(self) -> dict[str, Any]:
        """What to store with a result."""
        weights = {} if self.classifier is None else {"weights_hash": weights_hash(self.classifier.state_dict())}
        return {"features": self.name} | weights

    def distance(self, images: Tensor, real: Tensor) -> float:
        """Frechet distance of two sets of images."""
        made, wanted = self(images), self(real)
        say_if_few(min(len(made), len(wanted)), wanted.shape[1])
        return frechet_distance(made, wanted)


def say_if_few(images: int, features: int) -> None:
    """A word in the log, once, where a Frechet distance is of no more images than `FEW` times the features.

    Its bias is then as large as what it measures: of two sets of n images of one Gaussian, in d features of unit variance, the
    distance is about d (d + 5) / 2n and not 0, and which of several is the least may be chance.
    """
    if images <= FEW * features:
        files.say_once(
            f"a Frechet distance of {images} images in {features} features says little, and which of several is the least may be "
            f"chance: measure more than {FEW * features}"
        )


def classifier_features(
    train_set: data.FactorDataset,
    test_set: data.FactorDataset,
    *,
    steps: int = 600,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> Features:
    """Train a factor classifier on images with known factors; its 64 features, divided by their deviation on real images.

    It is trained and computes on `device`, takes images of any, and gives features on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the distance depends on the network: the same in every call
        network = FactorClassifier(train_set.factor_sizes, resolution=train_set.resolution).to(device)
    network.load_state_dict(distribution.by_first(lambda: trained_classifier(network, train_set, steps, progress)))
    network.eval()
    held_out = torch.arange(min(2000, len(test_set)))
    images = images_at(test_set, held_out)

    def measured() -> tuple[dict[str, float], Tensor]:
        values = network.accuracy(images, test_set.factors(held_out))
        accuracy = {name: float(value) for name, value in zip(test_set.factor_names, values, strict=True)}
        return accuracy, batched(network.features, images).std(0)

    accuracy, deviation = distribution.by_first(measured)
    return Features("features of a factor classifier", lambda x: batched(network.features, x) / deviation, network, accuracy)


def trained_classifier(network: FactorClassifier, train_set: data.FactorDataset, steps: int, progress: bool) -> dict[str, Tensor]:
    """The weights of a factor classifier after `steps` of training, which ends where it is interrupted."""
    batch_size = min(CLASSIFIER_BATCH, len(train_set))
    if batch_size < CLASSIFIER_BATCH:
        logger.warning("the factor classifier learns from %d images only: its accuracy and distances are rough", len(train_set))
    options = TrainingOptions(steps=steps, batch_size=batch_size, learning_rate=2e-3, ema_decay=0.99, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        try:
            state = train(
                FactorClassifierObjective(network, train_set),
                train_set,
                options,
                folder,
                progress=progress,
                description="classifier",
            )
        except TrainingInterrupted as stopped:  # its message names a folder that is gone and a flag that there is not
            message = "stopped in the training of the classifier that distances are measured with: nothing of it is kept"
            raise TrainingInterrupted(message, stopped.signal) from None
    return state


def pixel_features(train_set: data.Dataset, components: int = 64, *, indices: Tensor | None = None) -> Features:
    """Principal components of the pixels of up to 4000 images, for images without known factors.

    Args:
        indices: The images in order of preference; by default the first ones. Of large images fewer are taken.
    """
    indices = torch.arange(len(train_set)) if indices is None else indices
    mean, axes, scale = distribution.by_first(lambda: principal_pixels(train_set, indices, components))
    name = f"{len(scale)} principal component{'s' * (len(scale) > 1)} of the pixels"
    return Features(name, lambda x: (x.cpu().flatten(1) - mean) @ axes / scale)


def principal_pixels(dataset: data.Dataset, indices: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of the pixels of the first 4000 images at `indices`; of large images fewer are taken.

    Returns:
        (mean, axes, deviations): (CHW,), (CHW, K) and (K,); K is `components`, or less where images or pixels are fewer, or vary
        in fewer ways.

    Raises:
        ValueError: All these images are the same.
    """
    pixels = dataset.channels * dataset.resolution**2
    images = images_at(dataset, indices[: min(4000, PIXEL_VALUES // pixels)]).flatten(1)
    mean = (images - images[0]).mean(0) + images[0]  # of images that are all the same exactly that
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random projection that it begins with
        _, deviations, axes = torch.pca_lowrank(images - mean, q=min(components, len(images) - 1, pixels), center=False)
    varied = deviations > LEAST_DEVIATION * deviations[:1]
    if not varied.any():
        raise ValueError(f"the {len(images)} images are all the same: they have no principal components to be measured in")
    return mean, axes[:, varied], deviations[varied] / len(images) ** 0.5


def usual_features(train_set: data.Dataset, test_set: data.Dataset, *, progress: bool = True, **training: Any) -> Features:
    """Those of a factor classifier, trained as `training` says, where factors of colour images are known, else of the pixels.

    They take images of any device and are on the CPU.
    """
    if has_classifiable_factors(test_set) and data.knows_factors(train_set):
        return classifier_features(train_set, test_set, progress=progress, **training)
    return pixel_features(train_set)


def dataset_features(dataset: data.Dataset, order: Tensor, count: int, reference: str | Path | None, progress: bool) -> Features:
    """As `usual_features` of one dataset: the classifier learns from other images than those that are measured.

    Args:
        order: A permutation of the dataset, whose first `count` images are measured.
        reference: Must be None: stored statistics belong to a network.
    """
    if reference is not None:
        raise ValueError("reference statistics need the feature network that they were made with")
    if not has_classifiable_factors(dataset):
        return pixel_features(dataset, indices=order[:count])
    others = order[count : count + CLASSIFIER_IMAGES]
    if len(others) < CLASSIFIER_LEAST:
        raise ValueError(
            f"{count} of {len(dataset)} images leave {len(others)} to train a factor classifier, {CLASSIFIER_LEAST} are needed: "
            "measure fewer images, bring a feature network, or leave the distances out"
        )
    learning, held_out = data.Subset(dataset, others), data.Subset(dataset, order[: min(count, 2000)])
    assert data.knows_factors(learning) and data.knows_factors(held_out)
    return classifier_features(learning, held_out, progress=progress)


def has_classifiable_factors(dataset: data.Dataset) -> TypeGuard[data.FactorDataset]:
    """Whether a `FactorClassifier` can learn the factors of a dataset; the log says where the resolution alone is against it."""
    if not data.knows_factors(dataset) or dataset.channels != 3:
        return False
    if not FactorClassifier.takes(dataset.resolution):
        logger.warning("no factor classifier takes images of %d pixels: they are judged by their pixels", dataset.resolution)
        return False
    return True


def images_at(dataset: data.Dataset, indices: Tensor) -> Tensor:
    """Images of a dataset, asked for in batches, (N, C, H, W) in [-1, 1]."""
    return torch.cat(list(image_batches(dataset, indices, progress=False)))


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 250, *, label: str | None = None) -> Tensor:
    """`function` over many images, a batch at a time, collected on the CPU; with a `label` there is a progress bar."""
    chunks = progress_bar(images.split(size), desc=label, unit="batch", disable=label is None)
    return torch.cat([function(chunk).cpu() for chunk in chunks])
