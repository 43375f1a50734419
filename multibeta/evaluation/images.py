"""What a model makes of images, and the images it makes: decoded at once, denoised and new ones, next to real ones."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multibeta import data, distribution, metrics, ops
from multibeta.evaluation.features import Features, batched, say_if_few, usual_features
from multibeta.metrics.checks import as_integer
from multibeta.metrics.fidelity import LEAST_ENERGY, mean_energy, sharpness
from multibeta.pipelines import Pipeline
from multibeta.progress import advance, progress_bar

NEIGHBOUR = 3  # k of precision and recall, as published
IMAGES_AT_ONCE, LATENTS_AT_ONCE = 64, 250  # that are denoised together
COMPARED_BETAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
COMPARED_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"sampler": "ode2", "steps": 10, "delta_sign": 1},
    {"sampler": "ode2", "steps": 20, "delta_sign": 1},
    {"sampler": "dpm2m", "steps": 10, "delta_sign": 1},
    {"sampler": "dpm2m", "steps": 20, "delta_sign": 1},
    {"sampler": "heun", "steps": 10, "delta_sign": 1},
    {"sampler": "ode", "steps": 50, "delta_sign": 1},
    {"sampler": "ancestral", "steps": 50, "delta_sign": 1},
    {"sampler": "resample", "steps": 50, "delta_sign": 1},
    {"sampler": "resample", "steps": 50, "delta_sign": -1},  # Algorithm 2 as printed
    {"sampler": "ddim", "steps": 100},
    {"sampler": "ddpm", "steps": 100},
    {"sampler": "map", "steps": 1},
    {"sampler": "map", "steps": 2},
    {"sampler": "map", "steps": 4},
    {"sampler": "map_noise", "steps": 2},
    {"sampler": "map_noise", "steps": 3},
    {"sampler": "map_noise", "steps": 4},
)


@dataclass(frozen=True)
class ImageComparison:
    """Compares sets of images with those of a dataset, or with stored statistics, in one set of features.

    Several processes do it together, each with its turns of the batches; what comes out is the same for any number of them.

    Attributes:
        real: Features of the dataset's images, (N, d), or None with statistics.
        statistics: Their stored mean and covariance, or None.
        origin: What all comparisons depend on.
        energy: The mean gradient energy of the dataset's images, which sharpness is relative to.
        num_batches: Of each set, for the progress bar.
    """

    features: Callable[[Tensor], Tensor]
    real: np.ndarray | None
    statistics: tuple[np.ndarray, np.ndarray] | None
    origin: dict[str, Any]
    energy: float
    batch_size: int
    num_batches: int
    progress: bool

    @classmethod
    def with_images(
        cls,
        features: Callable[[Tensor], Tensor],
        dataset: data.Dataset,
        indices: Tensor,
        reference: str | Path | None,
        batch_size: int,
        progress: bool,
    ) -> ImageComparison:
        """With the images of a dataset at `indices`; with `reference`, the path of stored statistics, only by their sharpness."""
        real, statistics = None, None
        if reference is None:
            options = {"batch_size": batch_size, "device": device_of(features), "progress": progress, "shared": True}
            real, origin = metrics.extract_features(features, dataset, indices, **options)
            origin["num_real"] = origin.pop("num_images")
        else:
            statistics = metrics.load_statistics(reference)
            width = getattr(features, "dimension", len(statistics[0]))
            if width != len(statistics[0]):
                raise ValueError(f"{reference} holds statistics of {len(statistics[0])} features, the network gives {width}")
            digest = hashlib.sha256(Path(reference).read_bytes()).hexdigest()[:16]
            origin = {**getattr(features, "origin", {}), "reference": os.path.abspath(reference), "reference_hash": digest}
        chunks, energies = indices.split(batch_size), Energies()
        for chunk in progress_bar(distribution.world().turns(chunks), desc="sharpness", unit="batch", disable=not progress):
            energies.note(data.to_float(dataset.images(chunk)))
        return cls(features, real, statistics, origin, energies.mean(), batch_size, len(chunks), progress)

    def __call__(self, batches: Iterable[Tensor], label: str) -> dict[str, Any]:
        """Frechet distance and sharpness, and where the real features are kept precision and recall, of images in batches.

        Args:
            batches: Those of this process: its `World.turns`.
        """
        distance = "fid" if self.origin.get("features", "").startswith("FID") else "frechet"
        options = {"batch_size": self.batch_size, "device": device_of(self.features), "progress": False, "shared": True}
        total = len(distribution.world().turns(range(self.num_batches)))
        energies = Energies()
        batches = map(energies.note, progress_bar(batches, desc=label, total=total, unit="batch", disable=not self.progress))
        if self.statistics is not None:
            made = metrics.extract_statistics(self.features, batches, **options)
            stored = self.statistics
            say_if_few(made.count, len(made.mean))
            value = distribution.by_first(lambda: metrics.frechet_distance_from_statistics(*stored, made.mean, made.covariance))
            return {distance: value, "sharpness": sharpness(energies.mean(), self.energy), **self.origin, **made.origin}
        features, origin = metrics.extract_features(self.features, batches, **options)
        real = self.real
        assert real is not None  # there are statistics in its place, or it
        precision, recall = distribution.by_first(lambda: metrics.precision_recall(real, features, NEIGHBOUR))
        say_if_few(min(len(real), len(features)), real.shape[1])
        value = distribution.by_first(lambda: metrics.frechet_distance(real, features))
        similarity = {
            distance: value,
            "sharpness": sharpness(energies.mean(), self.energy),
            "precision": precision,
            "recall": recall,
        }
        return similarity | {"k": NEIGHBOUR} | self.origin | origin


class Energies:
    """The `gradient_energy` of images that pass in batches, those of this process."""

    def __init__(self):
        self.noted: list[float] = []

    def note(self, images: Tensor) -> Tensor:
        """The images, (n, C, H, W) in [-1, 1], whose energies are kept."""
        self.noted += metrics.gradient_energy(images.float()).tolist()
        return images

    def mean(self) -> float:
        """Over the images of all processes, bitwise the same for any number of them: their `mean_energy`."""
        return max(fmean(itertools.chain(*distribution.gather(self.noted))), LEAST_ENERGY)


def device_of(features: Callable[[Tensor], Tensor]) -> torch.device:
    """Where a feature network computes; the CPU for any other function."""
    parameters = features.parameters() if isinstance(features, nn.Module) else iter(())
    return getattr(next(parameters, None), "device", torch.device("cpu"))


def rendered(
    model: Pipeline,
    dataset: data.Dataset,
    indices: Tensor,
    beta: float | None,
    *,
    denoise: bool,
    seed: int,
    batch_size: int,
    **sampling: Any,
) -> Iterator[Tensor]:
    """This process's turns of batches of a dataset, encoded at beta as samples and rendered: see `Pipeline.render`.

    The noise of the encoder and of the reverse process belongs to (seed, index of the image).
    """
    for chunk in distribution.world().turns(indices.split(batch_size)):
        images, seeds = data.to_float(dataset.images(chunk)), ops.sample_seeds(seed, chunk)
        latents = model.encode(images, beta, seeds=seeds)
        yield model.render(latents, beta, denoise=denoise, seeds=seeds, **sampling)


def decoded_and_denoised(
    model: Pipeline,
    images: Tensor,
    beta: float | None = None,
    *,
    samples: bool = True,
    label: str | None = None,
    **sampling: Any,
) -> tuple[Tensor, Tensor]:
    """Images of one latent of each image: decoded at once, and denoised, (N, C, H, W) each.

    A `DenoisingMultiBetaVAE` decodes z_beta at beta, and after its way to 0; a `DiffusionVAE` decodes z to x_hat, and refines
    this. The noise of image i is that of seed i.

    Args:
        samples: Whether latents are samples, or means.
        label: Of the progress bar, None for no bar.
        sampling: Arguments of `denoise`; sampler and steps are by default those of `Pipeline.sampling_options`.
    """
    sampling |= model.sampling_options(sampling.get("sampler"), sampling.get("steps"))

    def both(index: Tensor) -> Tensor:
        latents = model.encode(images[index], beta, seeds=index if samples else None)
        denoised = model.render(latents, beta, denoise=True, seeds=index, **sampling)
        return torch.stack([model.render(latents, beta, denoise=False), denoised], 1)

    decoded, denoised = batched(both, torch.arange(len(images)), at_once(model), label=label).unbind(1)
    return decoded, denoised


def at_once(model: Pipeline) -> int:
    """How many samples are denoised together: fewer by a model of one representation, whose network is as large as images."""
    return IMAGES_AT_ONCE if model.levels() == (None,) else LATENTS_AT_ONCE


def similarity(features: Features, made: Tensor, images: Tensor, factors: Tensor | None, energy: float) -> dict[str, Any]:
    """How similar images are to those that they were made from.

    Args:
        made, images: (N, C, H, W) each.
        factors: Of `images`, (N, F), where they are known.
        energy: The `mean_energy` that sharpness is relative to.

    Returns:
        "frechet", "sharpness", "mse" to `images`, and "accuracy" by factor where a classifier can tell.
    """
    result: dict[str, Any] = {
        "frechet": features.distance(made, images),
        "sharpness": sharpness(mean_energy(made), energy),
        "mse": float((made - images).square().mean()),
    }
    if features.classifier is not None and factors is not None:
        result["accuracy"] = [float(share) for share in features.classifier.accuracy(made, factors)]
    return result


def checked_samplings(model: Pipeline, samplings: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """Ways to denoise, arguments of `denoise`, each with its sampler and steps.

    By default those of COMPARED_SAMPLINGS whose sampler the model has, in no more steps than its grid has.

    Raises:
        ValueError: None, or one whose sampler, steps or sign of delta the model does not have.
    """
    if samplings is None:
        usual = [sampling for sampling in COMPARED_SAMPLINGS if sampling["sampler"] in model.samplers]
        fitting = [sampling | {"steps": min(sampling["steps"], model.num_steps)} for sampling in usual]
        return [sampling for index, sampling in enumerate(fitting) if sampling not in fitting[:index]]
    if not samplings:
        raise ValueError("name at least one walk: a sampler and its steps")
    for sampling in samplings:
        if (sign := sampling.get("delta_sign", 1)) not in (1, -1):
            raise ValueError(f"the sign of delta must be 1 or -1, got {sign!r}")
    return [sampling | model.sampling_options(sampling.get("sampler"), sampling.get("steps")) for sampling in samplings]


def latent_sources(model: Pipeline) -> dict[str, Pipeline]:
    """The model by where its new latents come from: "prior", and "mixture" where it has one."""
    if model.mixture is None:
        return {"prior": model}
    prior = copy.copy(model)
    prior.mixture = None
    return {"prior": prior, "mixture": model}


def generation(
    model: Pipeline,
    features: Features,
    train_images: Tensor,
    real: Tensor,
    samplings: Sequence[dict[str, Any]] | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Frechet distance and sharpness of new images for each way to denoise, with the floors that they are measured against.

    Args:
        train_images: As many training images as `real` holds.
        real: Held-out images.
        samplings: See `checked_samplings`; "delta_sign" -1 of "resample" is MultiBeta Algorithm 2 as printed, and "seed" that of
            the new images, 0 where none is given.

    Returns:
        "real_floor": training against held-out images; "autoencoder_floor": decode(encode(training, 0)), or by a model of one
        representation decoded samples of it, against held-out; of the latter also "refined_floor", these denoised by the first
        of `samplings`; "samples": for each source of latents a row for each of `samplings`, and of a model of one representation
        before them one of images decoded at once, whose sampler is None.

    Raises:
        ValueError: See `checked_samplings`; before anything is made.
    """
    samplings, (lowest,) = checked_samplings(model, samplings), model.levels(default=(0.0,))
    energy, label = mean_energy(real), "refining" if progress else None

    def quality(images: Tensor) -> dict[str, float]:
        return {"frechet": features.distance(images, real), "sharpness": sharpness(mean_energy(images), energy)}

    floors = {}
    if lowest is None:
        refining = {name: value for name, value in samplings[0].items() if name != "seed"}  # image i has the noise of seed i
        rebuilt, refined = map(quality, decoded_and_denoised(model, train_images, label=label, **refining))
        floors = {"refined_floor": refined["frechet"], "refined_sharpness": refined["sharpness"]}
    else:
        rebuilt = quality(reconstructions(model, train_images, lowest))
    samples, seeds = [], ops.sample_seeds(0, torch.arange(len(real)))
    for name, source in latent_sources(model).items():
        if lowest is None:
            decoded = batched(lambda chunk, source=source: source.decode(source.draw_latents(chunk)), seeds)
            samples.append({"latents": name, "sampler": None, "steps": None} | quality(decoded))
        for sampling in samplings:
            images = new_images(source, len(real), progress=progress, **sampling)
            samples.append({"latents": name} | sampling | quality(images))
    return {
        "num_images": len(real),
        "features": features.name,
        "real_floor": features.distance(train_images, real),
        "autoencoder_floor": rebuilt["frechet"],
        "autoencoder_sharpness": rebuilt["sharpness"],
        **floors,
        "samples": samples,
    }


def new_images(model: Pipeline, count: int, *, progress: bool = True, **sampling: Any) -> Tensor:
    """`count` images, by default of seed 0, (N, C, H, W) on the CPU, under a progress bar of their evaluations."""
    label = f"{sampling['sampler']} {sampling['steps']}"
    with progress_bar(desc=label, unit="evaluation", disable=not progress) as bar:
        follow = lambda done, total, _: advance(bar, done, total)  # noqa: E731
        return model.generate(count, batch_size=at_once(model), callback=follow, **sampling).cpu()


def reconstructions(model: Pipeline, images: Tensor, beta: float | None) -> Tensor:
    """Images encoded to their mean at beta and decoded there, (N, C, H, W) on the CPU."""
    return batched(lambda chunk: model.decode(model.encode(chunk, beta), beta), images)


def compare_denoising(
    model: Pipeline,
    features: Features,
    images: Tensor,
    factors: Tensor | None,
    betas: Sequence[float] | None = None,
    *,
    progress: bool = False,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """What denoising makes of latents next to decoding them at once: distance to real, sharpness, error, factor accuracy.

    Sharpness is relative to `images`, or of a model of several levels to decode(encode(x, 0)); accuracy is the classifier's on
    the images made, against the true factors.

    Args:
        images: Held-out images, (N, C, H, W).
        factors: Of these, (N, F), where they are known.
        betas: Of a model of several levels; by default COMPARED_BETAS.
        sampling: Arguments of `denoise`: see `decoded_and_denoised`.

    Returns:
        A row for each level: "beta", and the `similarity` of images "direct" and "denoised", which start from one sample of the
        latent; at several levels also "direct_mean" and "denoised_mean", which start from the mean f(x, beta) itself.
    """
    levels = model.levels(betas, default=COMPARED_BETAS)
    single, label = levels == (None,), "refining" if progress else None
    energy = mean_energy(images if single else reconstructions(model, images, 0.0))
    rows = []
    for beta in levels:
        row: dict[str, Any] = {"beta": beta}
        for suffix in ("",) if single else ("", "_mean"):
            pair = decoded_and_denoised(model, images, beta, samples=not suffix, label=label, **sampling)
            for name, made in zip(("direct", "denoised"), pair, strict=True):
                row[name + suffix] = similarity(features, made, images, factors, energy)
        rows.append(row)
    return rows


def evaluate_images(
    model: Pipeline,
    train_set: data.Dataset,
    test_set: data.Dataset,
    *,
    num_images: int = 1000,
    samplings: Sequence[dict[str, Any]] | None = None,
    features: Features | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Held-out images through both stages of a model of one representation, and new images, as one JSON-ready dictionary.

    Args:
        train_set, test_set, num_images, features: As of `evaluate_multi_beta`.
        samplings: See `checked_samplings`; held-out images are refined by the first.

    Returns:
        "reconstructions": the `similarity` of x_hat ("decoded") and of what became of it ("refined"); "generation"; the
        classifier's accuracy and the factors' names where they are known.
    """
    samplings = checked_samplings(model, samplings)
    train_images, real, factors = equally_many(train_set, test_set, num_images)
    features = features or usual_features(train_set, test_set, progress=progress)
    (row,) = compare_denoising(model, features, real, factors, progress=progress, **samplings[0])
    return {
        "reconstructions": {"decoded": row["direct"], "refined": row["denoised"]},
        "generation": generation(model, features, train_images, real, samplings, progress=progress),
        "classifier_accuracy": features.accuracy,
        "factor_names": list(test_set.factor_names) if data.knows_factors(test_set) else None,
    }


def equally_many(train_set: data.Dataset, test_set: data.Dataset, num_images: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equally many training and held-out images, (N, C, H, W) in [-1, 1], and the factors of the latter where they are known."""
    count = min(as_integer(num_images, "num_images"), len(train_set), len(test_set))
    if count < 2:
        raise ValueError(f"an evaluation needs at least 2 training and 2 held-out images, got {count}")
    train_images, real = (data.to_float(part.images(range(count))) for part in (train_set, test_set))
    return train_images, real, test_set.factors(range(count)) if data.knows_factors(test_set) else None
