"""Every measure says what is wrong with its input in one sentence, and takes arrays as it takes tensors."""

import warnings

import numpy as np
import pytest
import torch

from multibeta import metrics
from multibeta.metrics import checks
from multibeta.metrics.inception import FIDInception
from multibeta.metrics.streaming import image_batches


class Pixels:
    """A dataset of random pictures with two factors and two attributes."""

    factor_names, attribute_names = ("colour", "place"), ("bright", "high")

    def __init__(self, length=40):
        self.pixels = torch.randint(256, (length, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[torch.as_tensor(indices)]

    def factors(self, indices):
        indices = torch.as_tensor(indices)
        return torch.stack([indices % 3, indices % 2], 1)

    def attributes(self, indices):
        return self.factors(indices) > 0


def network():
    """A feature network of averages."""
    facts = {"name": "averages", "preprocessing": "bytes", "weights_hash": "0123", "dimension": 3}
    return metrics.FeatureNetwork(torch.nn.Flatten(), lambda x: x.mean((2, 3)) / 255, **facts)


def classifier():
    return metrics.FactorClassifier((3, 2), resolution=16, width=8)


def mean_colours(images):
    return images.mean((2, 3))


def lpips(images):
    return metrics.LPIPS()(images, images)


MEASURES = {
    "features": lambda images: network()(images),
    "extract_features": lambda images: metrics.extract_features(network(), images, progress=False)[0],
    "extract_features of a function": lambda images: metrics.extract_features(lambda x: x.mean((2, 3)), images, progress=False)[
        0
    ],
    "extract_statistics": lambda images: metrics.extract_statistics(network(), images, progress=False).mean,
    "image_batches": lambda images: torch.cat(list(image_batches(images, progress=False))),
    "lpips": lpips,
    "classifier, features": lambda images: classifier().features(images),
    "classifier, predict": lambda images: classifier().predict(images),
    "classifier, accuracy": lambda images: classifier().accuracy(images, torch.zeros(len(images), 2, dtype=torch.int64)),
    "inception": lambda images: FIDInception()(images),
}
STREAMS = {name for name in MEASURES if name.startswith(("extract", "image_batches"))}  # these scale bytes themselves
PICTURES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
WRONG = {
    "bytes": (
        (PICTURES * 127.5 + 127.5).to(torch.uint8),
        "floating point in .*, got torch.uint8; .*to_float converts bytes",
    ),
    "floats of bytes": (PICTURES * 127.5 + 127.5, r"must lie in \[-1, 1\], got values up to 25"),
    "scaled twice": (PICTURES * 2 - 1, r"must lie in \[-1, 1\], got values down to -2\.99"),
    "NaN": (PICTURES.clone().fill_(float("nan")), "must be finite, got NaN or infinity"),
    "infinity": (PICTURES.clone().index_fill(0, torch.tensor(1), float("inf")), "must be finite, got NaN or infinity"),
    "integers": ((PICTURES * 2).long(), "floating point in .-1, 1., got torch.int64"),
    "none": (PICTURES[:0], "at least one image is needed"),
    "one picture": (PICTURES[0], r"tensors \(n, C, H, W\), got \(3, 16, 16\)"),
    "channels last": (PICTURES.permute(0, 2, 3, 1), "bring the channels to the front"),
    "no pixels": (PICTURES[..., :0], r"tensors \(n, C, H, W\), got \(2, 3, 16, 0\)"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_image_is_refused(name, kind):
    if kind == "bytes" and name in STREAMS:
        return
    images, message = WRONG[kind]
    if name == "inception" and images.dim() == 4 and images.shape[1] == 3 and images.shape[3]:
        images = images.repeat_interleave(5, 2).repeat_interleave(5, 3)
    for given in (images, images.numpy()):
        with pytest.raises(ValueError, match=message):
            MEASURES[name](given)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "inception"])
def test_arrays_are_measured_as_tensors_are(name):
    torch.manual_seed(0)
    expected = MEASURES[name](PICTURES)
    torch.manual_seed(0)
    found = MEASURES[name](PICTURES.numpy()[:, :, ::-1][:, :, ::-1])  # a view of negative strides and back
    np.testing.assert_array_equal(checks.as_array(found), checks.as_array(expected))


@pytest.mark.parametrize("name", ["features", "extract_features", "extract_features of a function", "lpips", "image_batches"])
def test_pictures_in_zero_to_one_are_warned_of_and_others_not(name):
    with pytest.warns(UserWarning, match=r"lie in \[-1, 1\], and have no negative pixel.* 2 \* images - 1"):
        MEASURES[name]((PICTURES + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MEASURES[name](PICTURES)
        if name in STREAMS:
            MEASURES[name](torch.full((2, 3, 16, 16), 200, dtype=torch.uint8))  # bytes have one range


def test_a_bright_batch_is_no_reason_to_warn_where_others_are_dark():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.extract_features(network(), [PICTURES, PICTURES.abs()], progress=False)


def test_a_slight_overshoot_of_a_decoder_is_an_image():
    assert network()(PICTURES * 1.2).isfinite().all()


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 3, 8, 8), torch.nan), [[1.0]]])
def test_gradient_energy_needs_floats(wrong):
    with pytest.raises(ValueError, match="images must"):
        metrics.gradient_energy(wrong)


def test_gradient_energy_has_no_range_and_takes_arrays():
    assert torch.equal(metrics.gradient_energy(PICTURES.numpy() * 255), metrics.gradient_energy(PICTURES * 255))
    with pytest.raises(ValueError, match="need 2 pixels a side"):
        metrics.gradient_energy(torch.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match="at least one image is needed"):
        metrics.gradient_energy(torch.zeros(0, 3, 8, 8))


def test_accuracy_needs_a_row_of_integers_for_each_image():
    for factors, message in (
        (torch.zeros(2, 2), "factors must be integers, got float32"),
        (torch.zeros(3, 2, dtype=torch.int64), "got 3 rows for 2"),
        (np.zeros((2, 1), dtype=np.int64), "the classifier reads 2 factors, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier().accuracy(PICTURES, factors)


SEEDED = {
    "mig": lambda seed: metrics.mig(mean_colours, Pixels(), num_images=20, seed=seed, progress=False),
    "tad": lambda seed: metrics.tad(mean_colours, Pixels(), num_images=20, seed=seed, min_range=0.0, progress=False),
    "dci": lambda seed: metrics.dci(mean_colours, Pixels(), num_train=20, num_test=10, seed=seed, progress=False),
    "dci_from_codes": lambda seed: metrics.dci_from_codes(
        *(np.random.RandomState(0).rand(20, 2), Pixels().factors(range(20))) * 2, seed=seed
    ),
}


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.filterwarnings("ignore:latents")
def test_seeds_are_integers_of_which_32_bits_count(name):
    for seed in (0.5, 1.0, None, "3", True):
        with pytest.raises(ValueError, match="a seed must be an integer"):
            SEEDED[name](seed)
    assert str(SEEDED[name](-1)) == str(SEEDED[name](2**32 - 1)) == str(SEEDED[name](np.uint64(2**64 - 1)))
    assert str(SEEDED[name](np.int64(2**32 - 1))) == str(SEEDED[name](2**32 - 1))


def refuse_to_encode(images):
    raise AssertionError("encoded")


class Halves(Pixels):
    def factors(self, indices):
        return super().factors(indices) / 2

    def attributes(self, indices):
        return super().factors(indices)[:-1]


class Constant(Pixels):
    def factors(self, indices):
        return 0 * super().factors(indices)


@pytest.mark.parametrize(
    ("measure", "data", "options", "message"),
    [
        (metrics.mig, Halves(), {}, "factors must be integers, got float32"),
        (metrics.dci, Halves(), {}, "factors must be integers, got float32"),
        (metrics.mig, Constant(), {}, "every factor must take two values"),
        (metrics.dci, Constant(), {}, "every factor must take two values"),
        (metrics.tad, Halves(), {"num_images": 9}, "got 8 rows for 9 codes"),
        (metrics.mig, Pixels(), {"num_images": 2.5}, "num_images must be an integer, got 2.5"),
        (metrics.mig, Pixels(), {"num_bins": 2.5}, "num_bins must be an integer, got 2.5"),
        (metrics.mig, Pixels(), {"num_images": -1}, "at least one image is needed, got num_images=-1"),
        (metrics.dci, Pixels(), {"num_test": 0}, "at least one image is needed, got num_test=0"),
        (metrics.tad, Pixels(), {"num_images": 9, "auroc": "curve"}, '"grid" or "exact"'),
        (metrics.tad, Pixels(), {"num_images": 9, "step": "0.1"}, "step must divide 1"),
        (metrics.tad, Pixels(), {"num_images": 9, "min_range": float("nan")}, "min_range must be a finite number"),
        (metrics.mig, Pixels(0), {}, "the dataset has no images"),
    ],
)
def test_what_the_arguments_show_is_said_before_the_encoding(measure, data, options, message):
    with pytest.raises(ValueError, match=message):
        measure(refuse_to_encode, data, progress=False, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mig_from_codes([[1.0, 2.0], [3.0]], [[0], [1]]), "codes must be an array, got rows of several lengths"),
        (lambda: metrics.mig_from_codes(None, [[0], [1]]), "codes must be"),
        (lambda: metrics.tad_from_codes([[1.0, 2.0]] * 2, [["yes"], ["no"]]), "attributes must be 0 or 1, got <U3"),
        (lambda: metrics.dci_from_importance([["a", "b"]] * 2), "importance must be real numbers"),
        (lambda: metrics.precision_recall(np.eye(5), np.eye(5), k=1.5), "k must be an integer, got 1.5"),
        (
            lambda: metrics.frechet_distance([[1.0], [2.0, 3.0]], np.eye(2)),
            "features must be an array, got rows of several",
        ),
        (lambda: metrics.frechet_distance(np.zeros((0, 3)), np.eye(3)), "at least 2 samples are needed, got 0"),
        (lambda: metrics.extract_features(network(), 7, progress=False), "got int"),
        (lambda: metrics.dci_from_codes(*(np.eye(4), np.eye(4, dtype=int)) * 2, num_threads=0), "num_threads must be at least 1"),
    ],
)
def test_what_is_no_array_or_number_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
