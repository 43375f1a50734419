"""How likely images are to a model, in bits per dimension, beside a Gaussian of the pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta import data, distribution, ops
from multibeta.evaluation.features import images_at
from multibeta.evaluation.records import recorded_split
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline
from multibeta.progress import progress_bar
from multibeta.seeds import as_short_seed
from multibeta.variational import PIXEL_BIN, bits_per_dimension, dequantised

LIKELIHOOD_IMAGES = 500  # their mean is known to 0.01 bits or so
GAUSSIAN_IMAGES, GAUSSIAN_VALUES = 4000, 2**26  # of all pixels, 512 MiB in float64
LEAST_IMAGES = 10
WALK = {"sampler": "ode2", "steps": 50, "num_probes": 1}


def likelihood_measure(
    model: Pipeline, dataset: data.Dataset, num_images: int, *, seed: int, batch_size: int, progress: bool
) -> Callable[[], dict[str, Any]]:
    """Choose the images whose bound of `DenoisingMultiBetaVAE.log_likelihood` is measured, and those that a Gaussian learns from.

    Where the model records that it was trained on images of this dataset, it is measured on those that it held out, and the
    Gaussian learns from those of its training. Otherwise both are drawn from all, apart from each other: the model may have seen
    any of them. Several processes share the work.

    Returns:
        A function that measures and returns "bits_per_dimension", and "pixels", "latent" and "posterior" in nats, means over
        images, and "gaussian", the bits of `pixel_gaussian_bits`; the standard error of each under "error"; what they depend on.

    Raises:
        ValueError: A model of another class, or less than 10 images on either side.
    """
    if not isinstance(model, DenoisingMultiBetaVAE):
        raise ValueError(f"a likelihood is known of a DenoisingMultiBetaVAE, not of a {type(model).__name__}: leave it out")
    random, split, most = np.random.RandomState(as_short_seed(seed)), recorded_split(model, dataset), LIKELIHOOD_IMAGES
    if split is None:
        order = torch.from_numpy(random.permutation(len(dataset)))
        measured = order[: min(num_images, most, len(order) // 2)]
        learning = order[len(measured) :]
    else:
        learning, measured = (indices[random.permutation(len(indices))] for indices in split)
        measured = measured[: min(num_images, most)]
    learning = learning[: min(GAUSSIAN_IMAGES, GAUSSIAN_VALUES // (dataset.channels * dataset.resolution**2))]
    if min(len(learning), len(measured)) < LEAST_IMAGES:
        raise ValueError(
            f"a likelihood takes {LEAST_IMAGES} images and {LEAST_IMAGES} others, got {len(measured)} and {len(learning)}"
        )

    def measure() -> dict[str, Any]:
        def batches() -> Iterator[Tensor]:
            chunks = distribution.world().turns(measured.split(batch_size))
            for chunk in progress_bar(chunks, desc="likelihood", unit="batch", disable=not progress):
                seeds = ops.sample_seeds(seed, chunk)
                yield torch.stack(model.log_likelihood(dataset.images(chunk), seeds=seeds, batch_size=batch_size, **WALK)).cpu()

        bits, pixels, latent, posterior = torch.cat(list(distribution.in_turn(batches())), dim=1)
        gaussian = distribution.by_first(lambda: pixel_gaussian_bits(images_at(dataset, learning), images_at(dataset, measured)))
        parts = {"bits_per_dimension": bits, "pixels": pixels, "latent": latent, "posterior": posterior, "gaussian": gaussian}
        return {
            **{name: float(values.mean()) for name, values in parts.items()},
            "error": {name: float(values.std() / len(values) ** 0.5) for name, values in parts.items()},
            "num_images": len(measured),
            "num_train": len(learning),
            "held_out": split is not None,
            "seed": seed,
            **WALK,
        }

    return measure


def pixel_gaussian_bits(learning: Tensor, images: Tensor) -> Tensor:
    """Bits per dimension of images of 8 bits under a Gaussian of the pixels, (N,) float64: the least that a model has to beat.

    It is N(mean, covariance + v I) of four fifths of `learning`, with that v under which the last fifth is likeliest: of few
    images v is all that is known of most directions.

    Args:
        learning, images: (M, C, H, W) and (N, C, H, W) in [-1, 1].
    """
    known = learning.flatten(1).double()
    fitted, others = known.split([len(known) * 4 // 5, len(known) - len(known) * 4 // 5])
    mean, dimensions = fitted.mean(0), fitted.shape[1]
    _, singular_values, axes = torch.linalg.svd(fitted - mean, full_matrices=False)
    covariance, missing = singular_values**2 / len(fitted), dimensions - len(singular_values)

    def log_probability(pixels: Tensor, variance: float) -> Tensor:
        along, variances = (pixels - mean) @ axes.T, covariance + variance
        across = ((pixels - mean).square().sum(1) - along.square().sum(1)).clamp(min=0)
        squared = (along.square() / variances).sum(1) + across / variance
        determinant = variances.log().sum() + missing * math.log(variance)
        log_density = -(squared + determinant + dimensions * math.log(2 * math.pi)) / 2
        return dequantised(log_density, variances.reciprocal().sum() + missing / variance, dimensions)

    least = math.log10(PIXEL_BIN**2 / 12)  # of the dequantisation
    choices = torch.logspace(least, 0, 40, dtype=torch.float64).tolist()
    best = max(choices, key=lambda variance: float(log_probability(others, variance).mean()))
    return bits_per_dimension(log_probability(images.flatten(1).double(), best), dimensions)


def described_likelihood(found: dict[str, Any]) -> str:
    """What `likelihood_measure` measured, in two lines."""
    error, seen = found["error"], "held out" if found["held_out"] else "of which the model may have seen any"
    return (
        f"likelihood: at most {found['bits_per_dimension']:.3f} ± {error['bits_per_dimension']:.3f} bits per dimension of "
        f"{found['num_images']} images, {seen}, by {found['sampler']}, {found['steps']} steps; the latent is "
        f"{found['posterior'] - found['latent']:.0f} nats an image of it, the rest is the decoder's one deviation of all pixels\n"
        f"a Gaussian of the pixels of {found['num_train']} others: {found['gaussian']:.3f} ± {error['gaussian']:.3f}"
    )
