"""Disentanglement of any encoder on any dataset with known factors or attributes: images in, numbers out."""

from importlib.metadata import version

import numpy as np
import torch

from multibeta.data.dataset import KNOWS
from multibeta.metrics.auroc import check_thresholds, tad_from_codes
from multibeta.metrics.checks import as_array, as_attributes, as_factors, as_integer
from multibeta.metrics.importance import boosted_importance, dci_summary
from multibeta.metrics.mutual_information import check_bins, information_gap
from multibeta.metrics.streaming import image_batches
from multibeta.seeds import as_short_seed


def mig(encode, data, *, num_images=10_000, num_bins=20, seed=0, batch_size=64, device="cpu", progress=True):
    """Mutual information gap of an encoder; see `mig_from_codes`.

    Images are drawn uniformly and with replacement, as published; memory holds one batch of them and all codes.

    Args:
        encode: Images (n, C, H, W) in [-1, 1] on `device` to codes (n, ...), which are flattened to (n, K). The published
            protocol takes the mean of the encoder.
        data: Gives `images(indices)`, uint8, and `factors(indices)`, integers (n, F), and has a length and `factor_names`.
        seed: Draws the images; any integer.

    Returns:
        The dictionary of `information_gap`, `factor_names`, and what the numbers depend on: `num_images`, `num_bins`, `seed`,
        `code_shape` and `resolution`.

    Raises:
        ValueError: What cannot be measured: no images, a seed or num_bins out of range, factors that are no integers or never
            change, images or codes of another shape or range, NaN. What the arguments show is said before the encoding.
    """
    num_bins, seed = check_bins(num_bins), as_short_seed(seed)
    indices = np.random.RandomState(seed).randint(_length(data, "factors"), size=_count(num_images))
    factors = as_factors(data.factors(indices), len(indices))
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    result = information_gap(codes, factors, num_bins)
    return {**result, "factor_names": tuple(data.factor_names), "num_bins": num_bins, "seed": seed, **protocol}


def dci(
    encode,
    data,
    *,
    num_train=10_000,
    num_test=5_000,
    seed=0,
    num_threads=None,
    cache=None,
    batch_size=64,
    device="cpu",
    progress=True,
):
    """Disentanglement, completeness and informativeness of an encoder; see `dci_from_codes` and, for the rest, `mig`.

    Training and test images are drawn with replacement from the whole of `data`, as published: in a small dataset they overlap.

    Returns:
        The dictionary of `dci_from_codes`; `importance`, (K, F); `accuracy_train` and `accuracy_test`, (F,); `factor_names`; and
        what the numbers depend on: `num_train`, `num_test`, `seed`, `code_shape`, `resolution` and `estimator`, whose version
        moves them by some thousandths.
    """
    length, num_train, num_test = _length(data, "factors"), _count(num_train, "num_train"), _count(num_test, "num_test")
    seed = as_short_seed(seed)
    indices = np.random.RandomState(seed).randint(length, size=num_train + num_test)
    factors = as_factors(data.factors(indices), len(indices), constant=True)
    train, test = slice(None, num_train), slice(num_train, None)
    as_factors(factors[train], num_train)
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    fits = boosted_importance(
        codes[train], factors[train], codes[test], factors[test], seed, num_threads=num_threads, cache=cache, progress=progress
    )
    del protocol["num_images"]
    return {
        **dci_summary(*fits),
        **dict(zip(("importance", "accuracy_train", "accuracy_test"), fits, strict=True)),
        "factor_names": tuple(data.factor_names),
        "num_train": num_train,
        "num_test": num_test,
        "seed": seed,
        "estimator": f"GradientBoostingClassifier of scikit-learn {version('scikit-learn')}",
        **protocol,
    }


def tad(
    encode,
    data,
    *,
    num_images=1000,
    auroc="grid",
    step=0.01,
    min_range=0.2,
    seed=30,
    batch_size=64,
    device="cpu",
    progress=True,
):
    """Total AUROC difference of an encoder; see `tad_from_codes` and, for the rest, `mig`.

    Images are drawn without replacement, as published; `data` gives `attributes(indices)`, bool (n, A), and `attribute_names`.

    Returns:
        The dictionary of `tad_from_codes` with the names of the captured attributes as `captured`; `attribute_names`; and `seed`,
        `code_shape` and `resolution`.

    Raises:
        ValueError: besides those of `tad_from_codes`, more images than `data` has.
    """
    length, num_images = _length(data, "attributes"), _count(num_images)
    seed = as_short_seed(seed)
    check_thresholds(auroc, step, min_range)
    if num_images > length:
        raise ValueError(f"num_images must be at most the {length} images of the dataset, got {num_images}")
    indices = np.random.RandomState(seed).permutation(length)[:num_images]
    attributes = as_attributes(data.attributes(indices), num_images)
    codes, protocol = encode_images(encode, data, indices, batch_size, device, progress)
    result = tad_from_codes(codes, attributes, auroc, step, min_range=min_range)
    names = tuple(data.attribute_names)
    captured = [names[index] for index in result["captured"]]
    return {**result, "captured": captured, "attribute_names": names, "seed": seed, **protocol}


@torch.no_grad()
def encode_images(encode, data, indices, batch_size=64, device="cpu", progress=True):
    """Codes of the images at `indices`, one batch of images at a time.

    Returns:
        (codes, protocol): float array (N, K), float32 from half precision, and a dictionary of `num_images`, `code_shape`, the
        shape of one code before it was flattened, and `resolution`.
    """
    codes, shape, start = None, None, 0
    for images in image_batches(data, indices, batch_size, device, progress, "encoding"):
        batch = as_array(encode(images), "codes")
        if batch.ndim < 2 or len(batch) != len(images) or batch.shape[1:] != (shape or batch.shape[1:]):
            raise ValueError(f"encode must return codes (n, ...) for n images, got shape {batch.shape} for {len(images)}")
        if codes is None:
            shape = batch.shape[1:]
            codes = np.empty((len(indices), batch[0].size), dtype=batch.dtype)
        codes[start : start + len(batch)] = batch.reshape(len(batch), -1)
        start += len(batch)
    return codes, {"num_images": len(indices), "code_shape": tuple(shape), "resolution": tuple(images.shape[2:])}


def _length(data, needed):
    """Images in a dataset, at least one, which must know the factors or attributes of each."""
    if not KNOWS[needed](data):
        raise ValueError(f"{type(data).__name__} has no {needed}(indices): choose a dataset with known {needed}")
    if len(data) == 0:
        raise ValueError("the dataset has no images")
    return len(data)


def _count(num_images, name="num_images"):
    """How many images, at least one."""
    num_images = as_integer(num_images, name)
    if num_images < 1:
        raise ValueError(f"at least one image is needed, got {name}={num_images}")
    return num_images
