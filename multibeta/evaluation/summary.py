"""The measures of the field on any saved model and any dataset: MIG, DCI, TAD, Frechet distance, sharpness, precision, recall."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta import data, distribution
from multibeta.environment import version
from multibeta.evaluation.codes import NEEDS, code_measures
from multibeta.evaluation.features import dataset_features
from multibeta.evaluation.images import NEIGHBOUR, ImageComparison, rendered
from multibeta.evaluation.likelihood import described_likelihood, likelihood_measure
from multibeta.evaluation.probe import class_probe, described_probe
from multibeta.evaluation.records import data_origin, json_ready, model_origin
from multibeta.metrics.checks import as_integer
from multibeta.pipelines import Pipeline, generate_share
from multibeta.seeds import as_seed, as_short_seed

logger = logging.getLogger(__name__)


def evaluate(
    model: Pipeline,
    dataset: data.Dataset,
    *,
    betas: Sequence[float] | None = None,
    num_images: int = 10_000,
    dci: bool = False,
    auroc: str = "grid",
    probe: bool = False,
    likelihood: bool = False,
    fidelity: bool = True,
    features: Callable[[Tensor], Tensor] | None = None,
    reference: str | Path | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every measure that the dataset allows, as one JSON-ready dictionary; images are read a batch at a time.

    Several processes (`distribution`) share the images that are made, and the features; the rest is done by the first. The result
    is that of one process.

    Memory holds the codes and features of `num_images` images, and up to 22,000 images where a factor classifier is trained.

    Args:
        model: A `Pipeline`.
        dataset: Gives `images(indices)`, `resolution` and `channels`, and `factors(indices)` and `attributes(indices)` with their
            names where it knows them.
        betas: Levels to measure, each in [0, 1]; by default 0.1, 0.3, 0.5, 0.7 and 0.9. A model of one representation takes none.
        num_images: MIG draws so many images, with replacement; DCI as many to train and half as many to test. The distances take
            as many as there are, TAD at most 1000, without replacement. 10,000 makes MIG, DCI and TAD the published protocols.
        dci: Measure DCI too, which takes minutes for each beta; `cache` is a folder that keeps its fits.
        auroc: "grid" of step 0.01 or "exact"; see `metrics.tad_from_codes`.
        probe: Measure what codes tell of known classes, of factors or attributes where there are none, by a linear probe and
            nearest neighbours, beside principal components of the pixels; see `class_probe` for the images that it takes.
        likelihood: Measure the bound on the log-likelihood of up to 500 images that a `DenoisingMultiBetaVAE` gives, in bits per
            dimension, beside a Gaussian of the pixels: see `likelihood_measure` for the images. It takes minutes.
        fidelity: Measure generated images, and for each beta samples of the latent, decoded directly and denoised first; of a
            `DiffusionVAE` decoded, and refined besides.
        features: What they are compared in: a network of `metrics.load_features`, or any function of images. By default the
            features of a factor classifier, trained on other images of the dataset, where factors are known, else principal
            components of the pixels.
        reference: Stored statistics (`metrics.load_statistics`) to take the Frechet distance to in place of the dataset's; they
            must be of the network `features`, and tell nothing of precision and recall; sharpness stays relative to the dataset.
        sampler, steps: Of `generate` and `denoise`; by default those of `usual_sampling`, in no more steps
            than the grid has. A model that decodes at once takes none.
        seed: Draws the images and all noise; any integer.

    Returns:
        "rows": one for each beta, with "mig", "dci", "tad", "probe", "direct" and "denoised" as far as measured; "generation";
        "probe", what those of the rows depend on, with "pixels" to compare them with; "likelihood" as of `likelihood_measure`;
        "skipped": measure to reason; "features", "model", "data" and "versions". The distance is called "fid" in Inception
        features, else "frechet"; beside each is "sharpness", the mean `metrics.gradient_energy` of the images that were made
        relative to that of the dataset's: 1 for images equally sharp, None where the dataset's are of one colour each. Every
        measure says what it depends on; per-factor numbers go by name.

    Raises:
        ValueError, FileNotFoundError: What cannot be measured, before the measuring begins.
    """
    levels = model.levels(betas)
    check_dataset(model, dataset)
    seed, batch_size = as_seed(seed), as_integer(batch_size, "batch_size", 1)
    count = checked_count(dataset, as_integer(num_images, "num_images"), least=NEIGHBOUR + 1 if fidelity else 2)
    sampling = model.sampling_options(sampler, steps) if fidelity or model.denoises else {}
    renderings: dict[str, dict[str, Any]] = {"direct": {}} | ({"denoised": sampling} if model.denoises else {})
    common = {"batch_size": batch_size, "device": model.device, "progress": progress, "seed": seed}
    measures = code_measures(dataset, num_images, dci=dci, auroc=auroc, cache=cache, **common)
    skipped = {name: f"the images have no known {NEEDS[name]}" for name, measure in measures.items() if measure is None}
    if math.prod(model.vae.config.latent_shape) == 1:  # gaps and differences are between codes
        alone = [name for name in ("mig", "tad") if measures[name] is not None]
        measures |= dict.fromkeys(alone)
        skipped |= dict.fromkeys(alone, "it compares codes, and the latent is a single number")
    of_images = {"seed": seed, "batch_size": batch_size, "progress": progress}
    classes = class_probe(model, dataset, num_images, **of_images) if probe else None
    measure_likelihood = likelihood_measure(model, dataset, num_images, **of_images) if likelihood else None
    if not (fidelity or probe or likelihood or any(measures.values())):
        raise ValueError(f"{type(dataset).__name__} has no known factors or attributes: only the distances can be measured")

    result = {
        "model": model_origin(model),
        "data": data_origin(model, dataset),
        "rows": [{"beta": beta} for beta in levels],
        "skipped": skipped,
        "versions": {name: version(name) for name in ("multibeta", "torch", "numpy")},
    }
    if fidelity:
        order = torch.from_numpy(np.random.RandomState(as_short_seed(seed)).permutation(len(dataset)))
        features = features or dataset_features(dataset, order, count, reference, progress)
        compare = ImageComparison.with_images(features, dataset, order[:count], reference, batch_size, progress)
        result["features"] = compare.origin | {"accuracy": getattr(features, "accuracy", None)}
    if classes is not None:
        dimensions = math.prod(model.vae.config.latent_shape)
        result["probe"] = classes.origin | {"pixels": distribution.by_first(lambda: classes.of_pixels(dimensions))}
    for row in result["rows"]:
        beta = row["beta"]
        for name, measure in measures.items():
            if measure is not None:
                encode = functools.partial(model.encode, beta=beta)
                row[name] = distribution.by_first(functools.partial(measure, encode))
        if classes is not None:
            row["probe"] = distribution.by_first(functools.partial(classes.of_model, model, beta))
        if fidelity:
            for name, options in renderings.items():
                given = options | {"denoise": name == "denoised", "seed": seed, "batch_size": batch_size}
                batches = rendered(model, dataset, order[:count], beta, **given)
                row[name] = compare(batches, name if beta is None else f"{name}, beta {beta:g}") | options | {"seed": seed}
    if fidelity:
        batches = generate_share(model, count, seed=seed, batch_size=batch_size, **sampling)
        result["generation"] = compare(batches, "generated") | sampling | {"seed": seed}
    if measure_likelihood is not None:
        result["likelihood"] = measure_likelihood()
    return json_ready(result)


def checked_count(dataset: data.Dataset, num_images: int, least: int) -> int:
    """How many different images there are to measure, `num_images` or the whole dataset, at least `least`."""
    count = min(num_images, len(dataset))
    if count < least:
        raise ValueError(f"at least {least} images are needed, got num_images={num_images} of a dataset of {len(dataset)}")
    if count < num_images:
        logger.warning("the dataset holds %d images, not %d: it is measured on these", count, num_images)
    return count


def check_dataset(model: Pipeline, dataset: data.Dataset) -> None:
    """`TypeError` or `ValueError` where the images of a dataset are not those that a model takes."""
    data.require_dataset(dataset)
    config = model.vae.config
    wanted, given = (config.image_channels, config.resolution), (dataset.channels, dataset.resolution)
    if wanted != given:
        raise ValueError("the model takes images of {} channels and {} pixels, the dataset has {} and {}".format(*wanted, *given))


def results_table(result: dict[str, Any]) -> str:
    """What `evaluate` returns as a small table, a line for each beta, and a line for the generated images.

    Beside a probe of codes there are lines of one of as many principal components of the pixels, and of 32.
    """
    fid = "fid" in result.get("generation", {})
    distance, short = ("fid", "FID") if fid else ("frechet", "FD")
    columns = {
        "MIG": lambda row: cell(row, "mig", "mig"),
        "DCI": lambda row: cell(row, "dci", "disentanglement"),
        "TAD": lambda row: cell(row, "tad", "tad"),
        f"direct {short}": lambda row: cell(row, "direct", distance),
        "direct sharpness": lambda row: cell(row, "direct", "sharpness"),
        f"denoised {short}": lambda row: cell(row, "denoised", distance),
        "denoised sharpness": lambda row: cell(row, "denoised", "sharpness"),
    }
    rows = [("-" if row["beta"] is None else f"{row['beta']:g}", row) for row in result["rows"]]
    if "probe" in result:
        columns |= {
            "probe": lambda row: cell(row, "probe", "accuracy"),
            "balanced": lambda row: cell(row, "probe", "balanced_accuracy"),
            "1-NN": lambda row: cell(row, "probe", "nearest_1"),
            "5-NN": lambda row: cell(row, "probe", "nearest_5"),
            "sampled": lambda row: cell(row["probe"], "sampled", "accuracy"),
        }
        rows += [(f"PCA {pixels['components']}", {"probe": pixels}) for pixels in result["probe"]["pixels"]]
        rows += [("chance", {"probe": {"accuracy": result["probe"]["chance"]}})]
    columns = {name: show for name, show in columns.items() if any(show(row) != "-" for _, row in rows)}  # what was measured
    lines = [["beta", *columns], *([label, *(show(row) for show in columns.values())] for label, row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    shown = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    if "generation" in result:
        made = result["generation"]
        by = f" by {made['sampler']}, {made['steps']} steps" if "sampler" in made else ""
        sharp = cell(result, "generation", "sharpness")
        shown.append(f"{made['num_images']} generated{by}: {short} {made[distance]:.3f}, sharpness {sharp}")
        if "precision" in made:
            shown[-1] += f", precision {made['precision']:.3f}, recall {made['recall']:.3f}"
        shown.append(f"{short} in {made.get('features', 'features of your own')}; sharpness relative to the real images")
    if "probe" in result:
        shown.append(described_probe(result["probe"]))
    if "likelihood" in result:
        shown.append(described_likelihood(result["likelihood"]))
    shown += [f"no {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(shown)


def cell(row: dict[str, Any], measure: str, name: str) -> str:
    """A cell of `results_table`, "-" of what was not measured or could not be."""
    value = row.get(measure, {}).get(name)
    return "-" if value is None else f"{value:.3f}"
