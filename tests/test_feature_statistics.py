"""Mean and covariance of features: batch by batch, from files, and of images wherever they come from."""

import pickle

import numpy as np
import pytest
import torch
from processes import in_processes

from multibeta import distribution
from multibeta.metrics import (
    FeatureNetwork,
    FeatureStatistics,
    extract_features,
    extract_statistics,
    feature_statistics,
    frechet_distance,
    frechet_distance_from_statistics,
    load_statistics,
)


def shared_of(images, sizes):
    """What this process gets of images in batches of each size, of which it measures its turns: see `extract_features`."""
    features, rows = lambda x: x.flatten(1)[:, :5] ** 3, []
    for size in sizes:
        batches = distribution.world().turns(images.split(size))
        found, origin = extract_features(features, batches, progress=False, shared=True)
        statistics = extract_statistics(features, batches, progress=False, shared=True)
        rows.append((found, origin, statistics.mean, statistics.covariance, statistics.count))
    return rows


def gathered(features, *borders):
    statistics = FeatureStatistics()
    for batch in np.split(features, borders):
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize(
    "borders",
    [
        (),
        (1, 2, 50),  # one sample at a time, then many
        (0, 30, 30),  # empty batches
        tuple(range(7, 300, 7)),  # a shorter last one
    ],
)
@pytest.mark.parametrize("mean", [0, 1e4])  # in deviations: raw second moments would keep half the digits
def test_batches_add_up_to_the_whole(borders, mean):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + mean
    statistics = gathered(features, *borders)
    expected = np.cov(features, rowvar=False)
    assert statistics.count == 300 and statistics.mean.dtype == statistics.covariance.dtype == np.float64
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    assert (statistics.covariance == statistics.covariance.T).all()


def test_an_unlike_first_batch_costs_no_digits():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, 3))
    features[:20] += 1e6  # sorted data: a shift by the first mean alone would not help
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(gathered(features, 20, 100).covariance, expected, rtol=1e-10)


def test_statistics_of_one_channel():
    mean, covariance = feature_statistics([[0.0], [2.0]])
    assert mean.tolist() == [1] and covariance.tolist() == [[2]]


def test_half_precision_features_are_summed_in_double():
    features = (torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    mean, covariance = feature_statistics(features)
    np.testing.assert_allclose(mean, features.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(covariance, features.double().T.cov().numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((4, 3)), "equally wide, got 2 and 3"),
        (np.full((4, 2), np.nan), "finite"),
        (np.zeros(4), r"\(samples, channels\)"),
        (np.zeros((4, 0)), "at least one channel"),
        (np.zeros((4, 2), complex), "real numbers, got complex128"),
    ],
)
def test_a_refused_batch_leaves_no_trace(features, message):
    statistics = FeatureStatistics()
    statistics.update([[1.0, 2.0], [3.0, 2.0]])
    with pytest.raises(ValueError, match=message):
        statistics.update(features)
    assert statistics.count == 2 and statistics.mean.tolist() == [2, 2] and statistics.covariance.tolist() == [[2, 0], [0, 0]]


def test_statistics_need_samples():
    statistics = FeatureStatistics()
    with pytest.raises(ValueError, match="at least 1 samples are needed, got 0"):
        _ = statistics.mean
    statistics.update(np.ones((1, 3)))
    assert statistics.mean.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="at least 2 samples are needed, got 1"):
        _ = statistics.covariance


# --- files ---


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_travel_in_files(tmp_path, save):
    mean, covariance = feature_statistics(np.random.default_rng(2).normal(size=(9, 3)))
    save(tmp_path / "ours.npz", arr_0=np.zeros((2, 3)), mu=mean, sigma=covariance)  # guided-diffusion keeps images beside them
    loaded = load_statistics(tmp_path / "ours.npz")
    np.testing.assert_array_equal(loaded[0], mean)
    np.testing.assert_array_equal(loaded[1], covariance)


def test_statistics_kept_in_float32_are_read_in_double(tmp_path):
    _, covariance = feature_statistics(np.random.default_rng(3).normal(size=(9, 3)))
    np.savez(tmp_path / "single.npz", mu=np.zeros(3, np.float32), sigma=covariance.astype(np.float32))
    assert [array.dtype for array in load_statistics(tmp_path / "single.npz")] == [np.float64, np.float64]


class Touches:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_run(tmp_path):
    touched = tmp_path / "touched"
    (tmp_path / "stats.pkl").write_bytes(pickle.dumps(Touches(touched)))
    (tmp_path / "disguised.npz").write_bytes(pickle.dumps(Touches(touched)))
    for name in ("stats.pkl", "disguised.npz"):
        with pytest.raises(ValueError, match="is a pickle, which could execute code"):
            load_statistics(tmp_path / name)
    np.savez(tmp_path / "objects.npz", mu=np.array([Touches(touched)]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="holds more than numbers"):
        load_statistics(tmp_path / "objects.npz")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(2)}, "must hold mu and sigma, got mu"),
        ({}, "must hold mu and sigma, got nothing"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"\(d,\) and \(d, d\), got \(2,\) and \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1, 2], [0, 1]])}, "must be symmetric, got entries that differ by 2"),
        ({"mu": np.array([0, np.inf]), "sigma": np.eye(2)}, "mean must be finite"),
    ],
)
def test_other_files_are_named_with_what_is_wrong(tmp_path, arrays, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"stats\.npz.*{message}"):
        load_statistics(path)


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(FileNotFoundError, match=r"stats\.npz is not a file"):
        load_statistics(path)
    np.savez(path, mu=np.zeros(50), sigma=np.eye(50))
    whole = path.read_bytes()
    path.write_bytes(whole[:9000])
    with pytest.raises(ValueError, match="truncated or no"):
        load_statistics(path)
    path.write_bytes(whole[:900] + b"\xff" + whole[901:])
    with pytest.raises(ValueError, match="damaged"):
        load_statistics(path)


# --- images ---


def pixels(name="pixels"):
    return FeatureNetwork(
        torch.nn.Flatten(), lambda x: x / 255, name=name, preprocessing="bytes / 255", weights_hash="0123", dimension=12
    )


class Tiles:
    """Random images of 2 x 2 pixels, which counts how many were asked for at a time."""

    def __init__(self, length=23):
        self.pixels = torch.randint(256, (length, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.asked = []

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        self.asked.append(len(indices))
        return self.pixels[indices]


def test_features_of_a_dataset_are_read_batch_by_batch_and_know_their_origin():
    tiles = Tiles()
    features, origin = extract_features(pixels(), tiles, batch_size=10, progress=False)
    np.testing.assert_allclose(features, tiles.pixels.flatten(1).numpy() / 255, rtol=1e-6)
    assert tiles.asked == [10, 10, 3] and features.dtype == np.float32
    assert origin == {
        "features": "pixels",
        "preprocessing": "bytes / 255",
        "weights_hash": "0123",
        "num_images": 23,
        "resolution": (2, 2),
    }
    some, origin = extract_features(pixels(), tiles, [4, 2, 4], progress=False)
    np.testing.assert_array_equal(some, features[[4, 2, 4]])
    assert origin["num_images"] == 3


def test_features_do_not_depend_on_where_images_come_from():
    tiles = Tiles()
    expected, _ = extract_features(pixels(), tiles, progress=False)
    floats = tiles.pixels.float() / 127.5 - 1
    sources = (tiles.pixels, floats, floats.split(5), (batch for batch in floats.split(23)), [tiles.pixels[:0], tiles.pixels])
    for source in sources:
        features, origin = extract_features(pixels(), source, batch_size=8, progress=False)
        np.testing.assert_array_equal(features, expected)
        assert origin["num_images"] == 23


def test_statistics_of_images_are_those_of_their_features():
    tiles = Tiles()
    features, origin = extract_features(pixels(), tiles, progress=False)
    statistics = extract_statistics(pixels(), tiles, batch_size=4, progress=False)
    mean, covariance = feature_statistics(features)
    np.testing.assert_allclose(statistics.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, covariance, rtol=1e-11, atol=1e-14)
    assert statistics.count == 23 and statistics.origin == origin
    other = features[:9] * 1.5
    assert frechet_distance_from_statistics(statistics.mean, statistics.covariance, *feature_statistics(other)) == pytest.approx(
        frechet_distance(features, other), rel=1e-9
    )


def test_a_function_is_a_network_without_a_name():
    features, origin = extract_features(lambda x: x.mean((2, 3)), Tiles(), progress=False)
    assert features.shape == (23, 3) and origin == {"num_images": 23, "resolution": (2, 2)}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "at least one image is needed, got none"),
        (torch.zeros(0, 3, 2, 2), {}, "at least one image is needed, got none"),
        (Tiles(), {"indices": []}, "at least one image is needed, got none"),
        (Tiles(), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([torch.zeros(2, 3, 2, 2)], {"indices": [0]}, r"indices need a dataset with images\(indices\), got list"),
        ([[torch.zeros(2, 3, 2, 2), torch.zeros(2)]], {}, r"tensors \(n, C, H, W\), got list"),  # a loader with labels
        (torch.zeros(3, 2, 2), {}, r"tensors \(n, C, H, W\), got \(3, 2, 2\)"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.int64), {}, "uint8 or floating point in .*, got torch.int64"),
        ([torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 4, 4)], {}, r"share a shape, got \(3, 2, 2\) and \(3, 4, 4\)"),
        (torch.zeros(2, 1, 2, 2), {}, "repeat a single channel three times"),
    ],
)
def test_images_that_make_no_sense_are_refused(source, options, message):
    for extract in (extract_features, extract_statistics):
        with pytest.raises(ValueError, match=message):
            extract(pixels(), source, progress=False, **options)


def test_networks_must_give_a_row_per_image():
    with pytest.raises(ValueError, match=r"features must be \(n, d\) for n images, got shape \(23, 3, 2, 2\) for 23"):
        extract_features(lambda x: x, Tiles(), progress=False)
    with pytest.raises(ValueError, match=r"got shape \(1, 3\) for 23"):
        extract_features(lambda x: x.mean((0, 2, 3))[None], Tiles(), progress=False)


def test_processes_that_share_images_get_the_statistics_of_one(tmp_path):
    images, sizes = torch.rand(10, 3, 4, 4) * 2 - 1, (4, 20)  # an odd number of batches; one alone, and a process without any
    one = shared_of(images, sizes)
    for both in in_processes(2, shared_of, images, sizes, folder=tmp_path):
        for found, expected in zip(both, one, strict=True):
            assert all(np.array_equal(found[part], expected[part]) for part in (0, 2, 3, 4))
    assert [origin for _, origin, *_ in one] == [{"num_images": 10, "resolution": (4, 4)}] * 2
