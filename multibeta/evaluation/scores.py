"""The measures of the field on any saved model and any dataset: MIG, DCI, TAD, Frechet distance, precision and recall."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from multibeta import data, evaluation, metrics, ops, recipes
from multibeta.checks import check_beta
from multibeta.environment import version
from multibeta.evaluation import checked_walk, decoded, json_ready
from multibeta.metrics.auroc import check_auroc
from multibeta.metrics.checks import as_integer
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline
from multibeta.seeds import as_seed, as_short_seed
from multibeta.weights import shorten, weights_hash

logger = logging.getLogger(__name__)

BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEIGHBOUR = 3  # k of precision and recall, as published
TAD_IMAGES = 1000  # as published
CLASSIFIER_IMAGES, CLASSIFIER_LEAST = 20_000, 128
NEEDS = {"mig": "factors", "dci": "factors", "tad": "attributes"}


def scores(
    model: Pipeline,
    dataset,
    *,
    betas: Sequence[float] | None = None,
    num_images: int = 10_000,
    dci: bool = False,
    auroc: str = "grid",
    fidelity: bool = True,
    features: Callable[[Tensor], Tensor] | None = None,
    reference: str | Path | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Every measure that the dataset allows, as one JSON-ready dictionary; images are read a batch at a time.

    Memory holds the codes and features of `num_images` images, and up to 22,000 images where a factor classifier is trained.

    Args:
        model: Any class of `pipelines.PIPELINES`.
        dataset: Gives `images(indices)`, `resolution` and `channels`, and `factors(indices)` and `attributes(indices)` with their
            names where it knows them.
        betas: Levels to measure, each in [0, 1]; by default 0.1, 0.3, 0.5, 0.7 and 0.9. A model that does not denoise has one
            representation and takes none.
        num_images: MIG draws so many images, with replacement; DCI as many to train and half as many to test. The distances take
            as many as there are, TAD at most 1000, without replacement. 10,000 makes MIG, DCI and TAD the published protocols.
        dci: Measure DCI too, which takes minutes for each beta; `cache` is a folder that keeps what it found.
        auroc: "grid" of step 0.01 or "exact"; see `metrics.tad_from_codes`.
        fidelity: Measure generated images, and for each beta samples of the latent, decoded directly and denoised first; of a
            `DiffusionVAE` decoded, and refined besides.
        features: What they are compared in: a network of `metrics.load_features`, or any function of images. By default the
            features of a factor classifier, trained on other images of the dataset, where factors are known, else principal
            components of the pixels.
        reference: Stored statistics (`metrics.load_statistics`) to take the Frechet distance to in place of the dataset's; they
            must be of the network `features`, and tell nothing of precision and recall.
        sampler, steps: Of `generate` and `denoise`; by default "ode2" and 20, of a DiffusionVAE "ddim" and 100, in no more steps
            than the grid has. A model that decodes at once takes none.
        seed: Draws the images and all noise; any integer.

    Returns:
        "rows": one for each beta, with "mig", "dci", "tad", "direct" and "denoised" as far as measured; "generation"; "skipped":
        measure to reason; "features", "model", "data" and "versions". The distance is called "fid" in Inception features, else
        "frechet". Every measure says what it depends on; per-factor numbers go by name.

    Raises:
        ValueError, FileNotFoundError: What cannot be measured, before the measuring begins.
    """
    levels = checked_levels(model, betas)
    check_dataset(model, dataset)
    seed, batch_size = as_seed(seed), as_integer(batch_size, "batch_size", 1)
    count = checked_count(dataset, as_integer(num_images, "num_images"), least=NEIGHBOUR + 1 if fidelity else 2)
    walk = checked_walk(model, sampler, steps) if fidelity or hasattr(model, "denoise") else {}
    ways = {"direct": {}, "denoised": walk} if walk else {"direct": {}}
    common = {"batch_size": batch_size, "device": model.device, "progress": progress, "seed": seed}
    measures = code_measures(dataset, num_images, dci=dci, auroc=auroc, cache=cache, **common)
    skipped = {name: f"the images have no known {NEEDS[name]}" for name, measure in measures.items() if measure is None}
    if math.prod(model.vae.config.latent_shape) == 1:  # gaps and differences are between codes
        alone = [name for name in ("mig", "tad") if measures[name] is not None]
        measures |= dict.fromkeys(alone)
        skipped |= dict.fromkeys(alone, "it compares codes, and the latent is a single number")
    if not fidelity and not any(measures.values()):
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
        features = features or default_features(dataset, order, count, reference, progress)
        judge = Judge.of(features, dataset, order[:count], reference, batch_size, progress)
        result["features"] = judge.origin | {"accuracy": getattr(features, "accuracy", None)}
    for row in result["rows"]:
        beta = row["beta"]
        for name, measure in measures.items():
            if measure is not None:
                row[name] = measure(lambda images, b=beta: model.encode(images, b))
        if fidelity:
            for how, used in ways.items():
                batches = decodings(model, dataset, order[:count], beta, how, used, seed, batch_size)
                row[how] = judge(batches, how if beta is None else f"{how}, beta {beta:g}") | used | {"seed": seed}
    if fidelity:
        batches = model.generate_batches(count, seed=seed, batch_size=batch_size, **walk)
        result["generation"] = judge(batches, "generated") | walk | {"seed": seed}
    return json_ready(result)


def checked_levels(model: Pipeline, betas: Sequence[float] | None, default: Sequence[float] = BETAS) -> Sequence[float | None]:
    """The betas asked for, by default those of `default`; (None,) for a model that has one representation.

    Raises:
        ValueError: No beta, one outside [0, 1], or any for a model that has none.
    """
    if not isinstance(model, DenoisingMultiBetaVAE):
        if betas is not None:
            raise ValueError(f"a {type(model).__name__} has one representation and takes no betas, got {list(betas)}")
        return (None,)
    betas = default if betas is None else betas
    if len(betas) == 0:
        raise ValueError("name at least one beta")
    for beta in betas:
        check_beta(beta)
    return betas


def checked_count(dataset, num_images: int, least: int) -> int:
    """How many different images there are to measure, `num_images` or the whole dataset, at least `least`."""
    count = min(num_images, len(dataset))
    if count < least:
        raise ValueError(f"at least {least} images are needed, got num_images={num_images} of a dataset of {len(dataset)}")
    if count < num_images:
        logger.warning("the dataset holds %d images, not %d: distances are measured on these", count, num_images)
    return count


def check_dataset(model: Pipeline, dataset) -> None:
    """`ValueError` where the images of a dataset are not those that a model takes."""
    config = model.vae.config
    wanted, found = (config.image_channels, config.resolution), (dataset.channels, dataset.resolution)
    if wanted != found:
        raise ValueError("the model takes images of {} channels and {} pixels, the dataset has {} and {}".format(*wanted, *found))


def default_features(dataset, order: Tensor, count: int, reference, progress: bool) -> evaluation.Features:
    """The features of a factor classifier where there are factors to learn, else of the pixels.

    Args:
        order: A permutation of the dataset, whose first `count` images are measured.
        reference: Must be None: stored statistics belong to a network.
    """
    if reference is not None:
        raise ValueError("reference statistics need the feature network that they were made with")
    if not evaluation.reads_factors(dataset):
        return evaluation.pixel_features(dataset, indices=order[:count])
    others = order[count : count + CLASSIFIER_IMAGES]
    if len(others) < CLASSIFIER_LEAST:
        raise ValueError(
            f"{count} of {len(dataset)} images leave {len(others)} to train a factor classifier, {CLASSIFIER_LEAST} are needed: "
            "measure fewer images, bring a feature network, or leave the distances out"
        )
    held_out = data.Subset(dataset, order[: min(count, 2000)])
    return evaluation.classifier_features(data.Subset(dataset, others), held_out, progress=progress)


@dataclass(frozen=True)
class Judge:
    """Compares sets of images with those of a dataset, or with stored statistics, in one set of features.

    Attributes:
        real: Features of the dataset's images, (N, d), or None with statistics.
        statistics: Their stored mean and covariance, or None.
        origin: What all comparisons depend on.
        num_batches: Of each set, for the progress bar.
    """

    features: Callable[[Tensor], Tensor]
    real: np.ndarray | None
    statistics: tuple[np.ndarray, np.ndarray] | None
    origin: dict
    batch_size: int
    num_batches: int
    progress: bool

    @classmethod
    def of(cls, features, dataset, indices: Tensor, reference, batch_size: int, progress: bool) -> Judge:
        """For the images of a dataset at `indices`; with `reference`, the path of stored statistics, none of them are read."""
        batches = (batch_size, math.ceil(len(indices) / batch_size))
        if reference is None:
            options = {"batch_size": batch_size, "device": device_of(features), "progress": progress}
            real, origin = metrics.extract_features(features, dataset, indices, **options)
            origin["num_real"] = origin.pop("num_images")
            return cls(features, real, None, origin, *batches, progress)
        statistics = metrics.load_statistics(reference)
        width = getattr(features, "dimension", len(statistics[0]))
        if width != len(statistics[0]):
            raise ValueError(f"{reference} holds statistics of {len(statistics[0])} features, the network gives {width}")
        digest = hashlib.sha256(Path(reference).read_bytes()).hexdigest()[:16]
        origin = {**getattr(features, "origin", {}), "reference": os.path.abspath(reference), "reference_hash": digest}
        return cls(features, None, statistics, origin, *batches, progress)

    def __call__(self, batches: Iterable[Tensor], label: str) -> dict:
        """Frechet distance, and where the real features are kept precision and recall, of images that come in batches."""
        distance = "fid" if self.origin.get("features", "").startswith("FID") else "frechet"
        options = {"batch_size": self.batch_size, "device": device_of(self.features), "progress": False}
        batches = tqdm(batches, desc=label, total=self.num_batches, unit="batch", disable=not self.progress)
        if self.statistics is not None:
            made = metrics.extract_statistics(self.features, batches, **options)
            value = metrics.frechet_distance_from_statistics(*self.statistics, made.mean, made.covariance)
            return {distance: value, **self.origin, **made.origin}
        made, origin = metrics.extract_features(self.features, batches, **options)
        precision, recall = metrics.precision_recall(self.real, made, NEIGHBOUR)
        found = {distance: metrics.frechet_distance(self.real, made), "precision": precision, "recall": recall, "k": NEIGHBOUR}
        return found | self.origin | origin


def device_of(features) -> torch.device:
    """Where a feature network computes; the CPU for any other function."""
    parameters = features.parameters() if isinstance(features, nn.Module) else iter(())
    return getattr(next(parameters, None), "device", torch.device("cpu"))


def decodings(
    model: Pipeline, dataset, indices: Tensor, beta: float | None, how: str, walk: dict, seed: int, batch_size: int
) -> Iterator[Tensor]:
    """Batches of images of a dataset, encoded at beta as samples and decoded; see `evaluation.decoded`.

    The noise of the encoder and of the walk belongs to (seed, index of the image).
    """
    for chunk in indices.split(batch_size):
        images, seeds = data.to_float(dataset.images(chunk)), ops.sample_seeds(seed, chunk)
        yield decoded(model, model.encode(images, beta, seeds=seeds), beta, how, seeds=seeds, **walk)


def code_measures(dataset, num_images: int, *, dci: bool, auroc: str, cache, **common) -> dict[str, Callable | None]:
    """MIG, DCI if asked for, and TAD, name to function of an encoder; None where the dataset does not know what it takes."""

    def mig(encode):
        found = metrics.mig(encode, dataset, num_images=num_images, **common)
        return keyed(found | {"max_information": found["mutual_information"].max(1)}, "factor_names")

    def dci_of_trees(encode):
        images = {"num_train": num_images, "num_test": max(num_images // 2, 1)}
        return keyed(metrics.dci(encode, dataset, cache=cache, **images, **common), "factor_names")

    def tad(encode):
        count = min(num_images, len(dataset), TAD_IMAGES)
        found = metrics.tad(encode, dataset, num_images=count, auroc=auroc, **common)
        return keyed(found | {"best_area": found["areas"].max(1)}, "attribute_names")

    check_auroc(auroc)
    if dci and not data.knows_factors(dataset):
        raise ValueError(f"DCI needs known factors, {type(dataset).__name__} has none: leave it out")
    measures = {"mig": mig} | ({"dci": dci_of_trees} if dci else {}) | {"tad": tad}
    return {name: measure if data.KNOWS[NEEDS[name]](dataset) else None for name, measure in measures.items()}


def keyed(result: dict, names: str) -> dict:
    """A metric's dictionary with its vectors by name; matrices, a number for every code, are left out."""
    result = dict(result)
    labels = result.pop(names)
    vectors = {key: value for key, value in result.items() if isinstance(value, np.ndarray)}
    named = {key: dict(zip(labels, value.tolist(), strict=True)) for key, value in vectors.items() if value.ndim == 1}
    return {key: value for key, value in result.items() if key not in vectors} | named


def source_of(model: Pipeline, named: str | None, flag: str) -> str:
    """The source of images that was `named` with `flag`, or else the one that the model records."""
    source = named or recorded_training(model)["trained_on"]
    if source is None:
        raise ValueError(f"the model does not record its data: name a folder or scenes with {flag}")
    return source


@contextlib.contextmanager
def of_recorded_data(source: str, named: str | None, flag: str) -> Iterator[None]:
    """Opening `source` goes on in here: where it fails and nobody `named` it, the error says that the model did, and `flag`."""
    try:
        yield
    except (OSError, ValueError) as error:
        if named is not None:
            raise
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(
            f"the model records {source} as its data, which cannot be opened: name other images with {flag} ({error})"
        ) from error


def recorded_recipe(model: Pipeline) -> dict:
    """The recipe that a model records, as `recipes.to_dict` writes it, or as much of it as there is; {} without one."""
    recipe = model.info.get("recipe")
    return recipe if isinstance(recipe, dict) else {} if recipe is None else {"name": recipe}


def recorded_training(model: Pipeline) -> dict:
    """What a model records of its training, None where it does not.

    Returns:
        "recipe", its name; "changed", what differs from the preset of that name, field to (preset, here), None if there is no
        such preset; "trained_on", the source of the images; "training_steps" of the VAE and of the diffusion model; "command".
    """
    recipe = recorded_recipe(model)
    steps = [recipe.get(stage, {}).get("steps") for stage in ("vae_training", "diffusion_training")]
    if None not in steps:
        steps[0] += recipe["vae_objective"].get("untie_steps", 0)
    return {
        "recipe": recipe.get("name"),
        "changed": recipes.recorded_changes(model.info),
        "trained_on": recipe.get("data", {}).get("source"),
        "training_steps": None if None in steps else steps,
        "command": model.info.get("command"),
    }


def described_training(facts: dict) -> str:
    """What `recorded_training` found as a phrase: the recipe, what was changed of it, and the images."""
    if not facts["recipe"] and not facts["trained_on"]:
        return "no recipe recorded"
    changed = f" (changed: {shorten(list(facts['changed']))})" if facts["changed"] else ""
    images = f"trained on {facts['trained_on']}" if facts["trained_on"] else ""
    return ", ".join(filter(None, (f"recipe {facts['recipe'] or 'without a name'}{changed}", images)))


def model_origin(model: Pipeline) -> dict:
    """Which model was measured."""
    return {
        "class": type(model).__name__,
        **recorded_training(model),
        "latent_shape": model.vae.config.latent_shape,
        "weights_hash": {name: weights_hash(getattr(model, name).state_dict()) for name in model.parts},
    }


def data_origin(model: Pipeline, dataset) -> dict:
    """Which images it was measured on, and how many of them the model was trained on, None where that is not recorded."""
    named = {name: getattr(dataset, name, ()) or None for name in ("factor_names", "attribute_names")}
    recorded = model.info.get("images") or {}
    same = None not in (found := {recorded.get("fingerprint"), data.fingerprint_of(dataset)}) and len(found) == 1
    trained = recorded["training"] if same else None
    if trained:
        logger.warning("the model was trained on %d of these %d images; --data names others", trained, len(dataset))
    size = {"num_images": len(dataset), "resolution": dataset.resolution, "trained_on": trained}
    return {"class": type(dataset).__name__, **size, **named}


def table(result: dict) -> str:
    """What `scores` returns as a small table, a line for each beta, and a line for the generated images."""
    fid = "fid" in result.get("generation", {})
    distance, short = ("fid", "FID") if fid else ("frechet", "FD")
    columns = {
        "beta": lambda row: "-" if row["beta"] is None else f"{row['beta']:g}",
        "MIG": lambda row: number(row, "mig", "mig"),
        "DCI": lambda row: number(row, "dci", "disentanglement"),
        "TAD": lambda row: number(row, "tad", "tad"),
        f"direct {short}": lambda row: number(row, "direct", distance),
        f"denoised {short}": lambda row: number(row, "denoised", distance),
    }
    lines = [[*columns], *([show(row) for show in columns.values()] for row in result["rows"])]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    shown = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    if "generation" in result:
        made = result["generation"]
        by = f" by {made['sampler']}, {made['steps']} steps" if "sampler" in made else ""
        shown.append(f"{made['num_images']} generated{by}: {short} {made[distance]:.3f}")
        if "precision" in made:
            shown[-1] += f", precision {made['precision']:.3f}, recall {made['recall']:.3f}"
        shown.append(f"{short} in {made.get('features', 'features of your own')}")
    shown += [f"no {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(shown)


def number(row: dict, measure: str, name: str) -> str:
    """A cell of `table`."""
    return f"{row[measure][name]:.3f}" if measure in row else "-"
