"""What the codes of a model know of the classes of images, beside principal components of the pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multibeta import data, ops
from multibeta.environment import version
from multibeta.evaluation.features import principal_pixels
from multibeta.evaluation.records import recorded_split
from multibeta.metrics.checks import ArrayLike, as_array
from multibeta.metrics.disentanglement import encode_images
from multibeta.metrics.probe import NEIGHBOURS, linear_probe, nearest_neighbours
from multibeta.pipelines import Pipeline
from multibeta.seeds import as_short_seed

PIXEL_COMPONENTS = 32  # measured beside as many as the code has numbers

Labels = dict[str, np.ndarray]


@dataclass(frozen=True)
class ClassProbe:
    """Images of known classes, some to learn from and others to be tested on, and what is measured of codes of them.

    Attributes:
        dataset: Where they are.
        learning, test: Their numbers, int64, (N,) and (M,), disjoint.
        kind: What is known: "classes", "factors" or "attributes".
        labels: Name of what is told to the labels of all, int64, (N + M,), learning ones first.
        known: Name to the images, bool, (N + M,), whose label is among those of both parts: the others are left out.
        held_out: Whether the model was trained on `learning` and not on `test`; False where that is not known.
        left_out: Names of the classes that are not in both parts.
        common: `batch_size` and `progress` of the encoding, and the `seed`.
    """

    dataset: data.Dataset
    learning: Tensor
    test: Tensor
    kind: str
    labels: Labels
    known: dict[str, np.ndarray]
    held_out: bool
    left_out: tuple[str, ...]
    common: dict[str, Any]

    @property
    def origin(self) -> dict[str, Any]:
        """What its numbers depend on, with "classes", how many there are, and "chance", the accuracy of the commonest class."""
        rows = {name: self._parts(name, labels) for name, labels in self.labels.items()}
        sizes = {name: len(np.unique(train)) for name, (train, _) in rows.items()}
        chance = [float(np.mean(test == np.bincount(train).argmax())) for train, test in rows.values()]
        return {
            "kind": self.kind,
            "classes": sizes["class"] if self.kind == "classes" else sizes,
            "chance": float(np.mean(chance)),
            "num_train": len(self.learning),
            "num_test": len(self.test),
            "held_out": self.held_out,
            "left_out": self.left_out,
            "seed": self.common["seed"],
            "estimator": f"LogisticRegression and KNeighborsClassifier of scikit-learn {version('scikit-learn')}",
        }

    def of_model(self, model: Pipeline, beta: float | None) -> dict[str, Any]:
        """What the mean codes of a model tell at beta, and under "sampled" what one sample of each does; see `scores`."""
        seeds = iter(
            ops.sample_seeds(self.common["seed"], torch.cat([self.learning, self.test])).split(self.common["batch_size"])
        )
        means = self.scores(self._encoded(lambda images: model.encode(images, beta), model.device))
        return means | {"sampled": self.scores(self._encoded(lambda x: model.encode(x, beta, seeds=next(seeds)), model.device))}

    def of_pixels(self, dimensions: int) -> list[dict[str, Any]]:
        """What principal components of the pixels tell, as many as `dimensions`, and 32: rows of "components" and `scores`.

        They are those of the images to learn from, of large images of fewer; there are no more than one less than these.
        """
        mean, axes, _ = principal_pixels(self.dataset, self.learning, max(dimensions, PIXEL_COMPONENTS))
        codes = self._encoded(lambda images: (images.flatten(1) - mean) @ axes, "cpu")
        counts = dict.fromkeys(min(count, codes.shape[1]) for count in (dimensions, PIXEL_COMPONENTS))
        return [{"components": count, **self.scores(codes[:, :count])} for count in counts]

    def scores(self, codes: np.ndarray) -> dict[str, Any]:
        """What codes (N + M, K) tell of classes: the mean over what is told, and if there are several kinds each "of" them.

        "accuracy" and "balanced_accuracy" are of `metrics.linear_probe`, "strength" its C; "nearest_1" and "nearest_5" of
        `metrics.nearest_neighbours`.
        """
        found = {name: self._scores(codes, name) for name in self.labels}
        if self.kind == "classes":
            return found["class"]
        names = [name for name in next(iter(found.values())) if name != "strength"]
        return {name: float(np.mean([each[name] for each in found.values()])) for name in names} | {"of": found}

    def _scores(self, codes: np.ndarray, name: str) -> dict[str, float]:
        (train_codes, test_codes), (train, test) = self._parts(name, codes), self._parts(name, self.labels[name])
        arrays = train_codes, train, test_codes, test
        nearest = {f"nearest_{k}": found for k, found in nearest_neighbours(*arrays).items()}
        return linear_probe(*arrays, seed=self.common["seed"]) | nearest

    def _parts(self, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows to learn from and those of the test, of images whose label of that name is known to both."""
        known, count = self.known[name], len(self.learning)
        return rows[:count][known[:count]], rows[count:][known[count:]]

    def _encoded(self, encode: Callable[[Tensor], ArrayLike], device: str | torch.device) -> np.ndarray:
        """Codes of all images, (N + M, K)."""
        options = {name: self.common[name] for name in ("batch_size", "progress")}
        return encode_images(encode, self.dataset, torch.cat([self.learning, self.test]), device=device, **options)[0]


def class_probe(
    model: Pipeline, dataset: data.Dataset, num_images: int, *, seed: int, batch_size: int, progress: bool
) -> ClassProbe:
    """Choose the images for a probe of what a model knows of the classes of a dataset, or else of its factors or attributes.

    Where the model records that it was trained on images of this dataset, the probe learns from these and is tested on those that
    were held out, up to `num_images` of each. Of other images it takes `num_images`, learns from one half of every class and is
    tested on the other: the model may have seen any of them.

    Raises:
        ValueError: No classes are known, or there are too few images of them.
    """
    random = np.random.RandomState(as_short_seed(seed))
    split = recorded_split(model, dataset)
    if split is not None:
        learning, test = (indices[random.permutation(len(indices))[:num_images]] for indices in split)
    else:
        order = torch.from_numpy(random.permutation(len(dataset))[:num_images])
        if data.knows_classes(dataset):
            order = order[np.argsort(as_array(dataset.labels(order)), kind="stable")]  # so that both halves get of every class
        learning, test = order[::2], order[1::2]
    kind, labels = known_labels(dataset, torch.cat([learning, test]))
    count, known = len(learning), {}
    for name, values in labels.items():
        both = np.isin(values, np.intersect1d(values[:count], values[count:]))
        sizes = np.unique(values[:count][both[:count]], return_counts=True)[1]
        if len(sizes) > 1 and sizes.max() > 1 and sizes.sum() >= max(NEIGHBOURS):
            known[name] = both
    if not known:
        raise ValueError(
            f"too few images for a probe of {kind}, {count} to learn from and {len(test)} to be tested on: they must have two "
            f"{kind if kind == 'classes' else 'values'} or more in common, and {max(NEIGHBOURS)} of them be there to learn from"
        )
    left_out: tuple[str, ...] = ()
    if data.knows_classes(dataset):
        left_out = tuple(dataset.class_names[label] for label in np.unique(labels["class"][~known["class"]]))
    kept = np.any(list(known.values()), axis=0)
    learning, test = learning[kept[:count]], test[kept[count:]]
    labels, known = ({name: rows[name][kept] for name in known} for rows in (labels, known))
    common = {"seed": seed, "batch_size": batch_size, "progress": progress}
    return ClassProbe(dataset, learning, test, kind, labels, known, split is not None, left_out, common)


def known_labels(dataset: data.Dataset, indices: Tensor) -> tuple[str, Labels]:
    """What there is to tell of images: ("classes", {"class": labels}), or else ("factors" or "attributes", name to values)."""
    if data.knows_classes(dataset):
        return "classes", {"class": as_array(dataset.labels(indices)).astype(np.int64)}
    if data.knows_factors(dataset):
        kind, names, columns = "factors", dataset.factor_names, dataset.factors(indices)
    elif data.knows_attributes(dataset):
        kind, names, columns = "attributes", dataset.attribute_names, dataset.attributes(indices)
    else:
        raise ValueError(
            f"a probe needs known classes, {type(dataset).__name__} has none: in a folder, one subfolder for the images of each; "
            "in tar archives, a .cls beside every image"
        )
    return kind, dict(zip(names, as_array(columns).astype(np.int64).T, strict=True))


def described_probe(origin: dict[str, Any]) -> str:
    """The images and classes of `ClassProbe.origin`, and what the columns of the table mean."""
    classes = origin["classes"]
    told = f"{classes} classes" if origin["kind"] == "classes" else f"{len(classes)} {origin['kind']}"
    seen = "which the model held out" if origin["held_out"] else "of which the model may have seen any"
    left_out = f"; without {', '.join(origin['left_out'])}: too few images" if origin["left_out"] else ""
    return (
        f"probe of {told}, learned from {origin['num_train']} images, tested on {origin['num_test']}, {seen}{left_out}\n"
        "probe: accuracy of a linear classifier of the codes, balanced its mean over classes; 1-NN, 5-NN: of their nearest\n"
        "neighbours; sampled: of codes with their noise; PCA: of the pixels; chance: always the commonest class"
    )
