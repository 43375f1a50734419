"""Measures of fidelity against closed forms, and the classifier that judges scenes."""

import types

import numpy as np
import pytest
import scipy.linalg
import torch

from multibeta.metrics import (
    FactorClassifier,
    FactorClassifierObjective,
    feature_statistics,
    fidelity,
    frechet_distance,
    frechet_distance_from_statistics,
    gradient_energy,
    precision_recall,
)


def gaussian_sample(mean, covariance, num_samples=50, seed=0):
    """Samples whose mean and covariance are exactly the given ones."""
    white = np.random.default_rng(seed).normal(size=(num_samples, len(mean)))
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(num_samples - 1)
    return white @ np.linalg.cholesky(covariance).T + mean


def random_covariance(channels, seed):
    root = np.random.default_rng(seed).normal(size=(channels, channels))
    return root @ root.T + 0.1 * np.eye(channels)


def random_rotation(channels, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(channels, channels)))[0]


def random_pair(channels=6):
    rng = np.random.default_rng(5)
    return rng.normal(size=(40, channels)), rng.normal(size=(70, channels)) @ random_covariance(channels, 6) + 0.5


def test_frechet_of_commuting_gaussians_is_a_distance_of_deviations():
    deviations_a, deviations_b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([2.0, 1.0, -1.0])
    first = gaussian_sample(mean_a, np.diag(deviations_a**2), seed=1)
    second = gaussian_sample(mean_b, np.diag(deviations_b**2), num_samples=33, seed=2)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((deviations_a - deviations_b) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_two_by_two_covariances_that_do_not_commute():
    cov_a, cov_b = np.array([[2.0, 1.2], [1.2, 1.0]]), np.array([[1.0, -0.6], [-0.6, 3.0]])
    assert not np.allclose(cov_a @ cov_b, cov_b @ cov_a)
    # The trace of the root of a 2 x 2 matrix: its eigenvalues obey (p + q)^2 = p^2 + q^2 + 2 p q.
    trace_of_root = np.sqrt(np.trace(cov_a @ cov_b) + 2 * np.sqrt(np.linalg.det(cov_a @ cov_b)))
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root
    distance = frechet_distance(gaussian_sample(np.zeros(2), cov_a), gaussian_sample(np.zeros(2), cov_b, seed=1))
    assert distance == pytest.approx(expected, rel=1e-12)


def test_frechet_agrees_with_the_matrix_square_root():
    first, second = random_pair()
    cov_a, cov_b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_and_zero_on_itself():
    first, second = random_pair()
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-12)
    assert 0 <= frechet_distance(first, first) < 1e-12 * first.var(0).sum()


def test_frechet_does_not_change_under_rotation_and_translation():
    first, second = random_pair()
    rotation = random_rotation(6)
    moved = frechet_distance(first @ rotation + 3, second @ rotation + 3)
    assert moved == pytest.approx(frechet_distance(first, second), rel=1e-11)


def test_frechet_survives_a_large_mean():
    first, second = random_pair()
    # Deviations of 0.01 around 1000: raw second moments in float32 would lose the variance.
    far = frechet_distance(0.01 * first + 1000, 0.01 * second + 1000)
    assert far == pytest.approx(1e-4 * frechet_distance(first, second), rel=1e-8)


def test_frechet_in_one_dimension():
    first, second = np.array([[0.0], [2.0]]), np.array([[5.0], [5.0], [8.0]])
    assert frechet_distance(first, second) == pytest.approx(25 + (np.sqrt(2) - np.sqrt(3)) ** 2, rel=1e-12)


def test_frechet_with_fewer_samples_than_dimensions():
    first, second = random_pair(channels=5)
    embedding = random_rotation(100)[:5]
    expected = frechet_distance(first, second)
    assert frechet_distance(first @ embedding, second @ embedding) == pytest.approx(expected, rel=1e-11)


def test_frechet_of_singular_covariances():
    first, second = random_pair(channels=4)
    # Three channels more: a copy, a sum of two others and a constant.
    spread = np.concatenate([np.eye(4), np.eye(4)[:, :1], np.eye(4)[:, 1:2] + np.eye(4)[:, 2:3], np.zeros((4, 1))], 1)
    scale = np.linalg.cholesky(spread @ spread.T)  # keeps the same scalar products within four channels
    assert frechet_distance(first @ spread, second @ spread) == pytest.approx(
        frechet_distance(first @ scale, second @ scale), rel=1e-11
    )
    assert frechet_distance(np.ones((5, 3)), np.zeros((4, 3))) == 3


def test_frechet_with_fewer_samples_than_dimensions_on_one_side():
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=(10, 30)), rng.normal(size=(90, 30)) * 1.2
    cov_a, cov_b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    eigenvalues, vectors = np.linalg.eigh(cov_b)
    root = vectors * np.sqrt(eigenvalues) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root @ cov_a @ root).clip(0)).sum()
    expected = np.sum((first.mean(0) - second.mean(0)) ** 2) + np.trace(cov_a + cov_b) - 2 * trace_of_root
    # Loose for the eigenvalues: those that should be zero have roots of the size of the root of the rounding error.
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "channels"),
    [
        ((40, 70), 6),
        ((40, 70), 1),  # one dimension
        ((10, 90), 30),  # one covariance singular
        ((10, 12), 30),  # both singular, in spaces of their own
        ((2, 2), 5),  # rank one
    ],
)
def test_frechet_of_statistics_is_that_of_the_features(sizes, channels):
    rng = np.random.default_rng(9)
    first, second = (rng.normal(size=(size, channels)) * scale + scale for size, scale in zip(sizes, (1, 1.4), strict=True))
    statistics = *feature_statistics(first), *feature_statistics(second)
    assert frechet_distance_from_statistics(*statistics) == pytest.approx(frechet_distance(first, second), rel=1e-10)


def test_frechet_of_statistics_in_closed_form():
    rotation = random_rotation(5)
    variances_a, variances_b = np.array([1.0, 4, 9, 0, 2]), np.array([4.0, 4, 1, 3, 0])
    cov_a, cov_b = (rotation * variances @ rotation.T for variances in (variances_a, variances_b))  # they commute
    expected = 20 + np.sum((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2)
    distance = frechet_distance_from_statistics(np.zeros(5), cov_a, np.full(5, 2.0), cov_b)
    assert distance == pytest.approx(expected, rel=1e-12)
    assert frechet_distance_from_statistics([3.0], [[0.0]], [1.0], [[0.0]]) == 4  # two constants
    assert frechet_distance_from_statistics([0.0], [[9.0]], [0.0], [[4.0]]) == pytest.approx(1, rel=1e-12)


def test_frechet_of_statistics_that_were_kept_in_float32():
    first, second = random_pair(channels=30)
    first = first[:20]
    stored = [array.astype(np.float32) for array in feature_statistics(first)]
    # Zeros become eigenvalues of the size of float32's rounding, of either sign.
    assert np.linalg.eigvalsh(stored[1].astype(float)).min() < 0
    distance = frechet_distance_from_statistics(*stored, *feature_statistics(second))
    assert distance == pytest.approx(frechet_distance(first, second), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_a": np.zeros((1, 2))}, r"must be \(d,\) and \(d, d\), got \(1, 2\) and \(2, 2\)"),
        ({"covariance_a": np.eye(3)}, r"must be \(d,\) and \(d, d\), got \(2,\) and \(3, 3\)"),
        ({"mean_a": np.zeros(3), "covariance_a": np.eye(3)}, "equally wide, got 3 and 2"),
        ({"covariance_b": np.array([[1.0, 0.1], [0.2, 1.0]])}, "symmetric, got entries that differ by 0.1"),
        ({"covariance_b": np.diag([1.0, -0.1])}, "no negative eigenvalues, got -0.1"),
        ({"covariance_b": np.diag([1.0, np.nan])}, "covariance must be finite"),
        ({"mean_b": np.array([np.inf, 0])}, "mean must be finite"),
        ({"mean_b": np.array(["a", "b"])}, "mean must be real numbers"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(change, message):
    statistics = {"mean_a": np.zeros(2), "covariance_a": np.eye(2), "mean_b": np.zeros(2), "covariance_b": np.eye(2)}
    with pytest.raises(ValueError, match=message):
        frechet_distance_from_statistics(**{**statistics, **change})


def test_frechet_takes_tensors_of_any_precision():
    first, second = (torch.from_numpy(features).bfloat16() for features in random_pair())
    assert frechet_distance(first, second) == frechet_distance(first.double().numpy(), second.double().numpy())


@pytest.mark.parametrize("measure", [frechet_distance, precision_recall])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (np.zeros((9, 3)), np.zeros((9, 4)), "equally wide, got 3 and 4"),
        (np.zeros((9, 3)), np.zeros((1, 3)), "samples are needed, got 1"),
        (np.zeros((9, 3)), np.full((9, 3), np.nan), "finite"),
        (np.full((9, 3), np.inf), np.zeros((9, 3)), "finite"),
        (np.zeros((9, 3, 1)), np.zeros((9, 3)), r"\(samples, channels\)"),
        (np.zeros((9, 0)), np.zeros((9, 0)), "at least one channel"),
        (np.zeros((9, 3)), np.zeros((9, 3), complex), "real numbers, got complex128"),
    ],
)
def test_features_that_make_no_sense_are_refused(measure, first, second, message):
    with pytest.raises(ValueError, match=message):
        measure(first, second)


def direct_precision_recall(real, fake, k):
    """The definition, from differences of vectors."""

    def coverage(samples, support):
        radii = np.sort(np.linalg.norm(support[:, None] - support, axis=2), axis=1)[:, k]
        return (np.linalg.norm(samples[:, None] - support, axis=2) <= radii).any(1).mean()

    return coverage(fake, real), coverage(real, fake)


def test_precision_recall_by_hand():
    real = np.array([[0.0], [1.0], [2.0], [3.0]])  # every ball has radius 1
    fake = np.array([[-1.0], [1.5], [5.0], [6.0]])  # -1 lies on a border, 5 and 6 outside; radii 2.5, 2.5, 1, 1
    assert precision_recall(real, fake, k=1) == (0.5, 1.0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_agrees_with_its_definition(k):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(120, 4)), rng.normal(size=(90, 4)) * [1, 1, 0.3, 1] + 0.7
    assert precision_recall(real, fake, k) == pytest.approx(direct_precision_recall(real, fake, k))


def test_precision_recall_counts_ties():
    rng = np.random.default_rng(1)
    real, fake = rng.integers(0, 3, (80, 6)), rng.integers(0, 4, (90, 6))
    assert precision_recall(real, fake) == pytest.approx(direct_precision_recall(real, fake, 3))


def test_precision_recall_of_duplicates_is_perfect():
    points = np.random.default_rng(2).normal(size=(30, 64))
    # Five copies of each point: every ball has radius zero.
    assert precision_recall(np.repeat(points, 5, axis=0), points[np.arange(150) % 30]) == (1.0, 1.0)


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision():
    rng = np.random.default_rng(3)
    one = rng.normal(size=(200, 3))
    two = rng.normal(size=(200, 3)) + 100 * rng.integers(0, 2, (200, 1))
    precision, recall = precision_recall(two, one)
    assert precision > 0.8 and recall < 0.6
    assert precision_recall(one, two) == (recall, precision)


def test_precision_recall_far_from_the_origin():
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(100, 8)), rng.normal(size=(100, 8)) * 1.3
    assert precision_recall(real + 1e6, fake + 1e6) == precision_recall(real, fake)


def test_precision_recall_does_not_depend_on_chunks(monkeypatch):
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(50, 5)), rng.normal(size=(41, 5)) * 1.4
    expected = precision_recall(real, fake)
    monkeypatch.setattr(fidelity, "PAIRS_AT_ONCE", 350)
    assert precision_recall(real, fake) == expected


def test_precision_recall_needs_a_neighbour():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        precision_recall(np.zeros((9, 3)), np.zeros((9, 3)), k=0)
    with pytest.raises(ValueError, match="at least 4 samples are needed, got 3"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))


def test_gradient_energy_of_ramps_is_the_sum_of_squared_slopes():
    row, column = torch.meshgrid(torch.arange(7.0), torch.arange(5.0), indexing="ij")
    images = torch.stack([0.1 * column + 0.3 * row, torch.full((7, 5), 0.4)]).unsqueeze(1).expand(2, 3, 7, 5)
    torch.testing.assert_close(gradient_energy(images), torch.tensor([0.1, 0.0]))


def test_blur_lowers_gradient_energy():
    images = torch.randn(4, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert (gradient_energy(blurred) < 0.3 * gradient_energy(images)).all()


class Squares:
    """A bright square in one of nine places, in one of three colours."""

    factor_sizes = (3, 9)

    def __init__(self, reverse=False):
        self.reverse = reverse

    def factors(self, indices):
        indices = 26 - indices if self.reverse else indices
        return torch.stack([indices // 9, indices % 9], 1)

    def images(self, indices):
        images = torch.full((len(indices), 3, 16, 16), -1.0)
        for image, (color, place) in zip(images, self.factors(indices).tolist(), strict=True):
            row, column = 5 * (place // 3), 5 * (place % 3)
            image[color, row : row + 4, column : column + 4] = 1.0
        return images


def squares_batch(dataset):
    indices = torch.arange(27)
    return types.SimpleNamespace(images=dataset.images(indices), indices=indices)


def test_the_factor_classifier_learns_colour_and_place():
    dataset = Squares()
    network = FactorClassifier(dataset.factor_sizes, resolution=16, width=8)
    objective = FactorClassifierObjective(network, dataset)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    batch, generator = squares_batch(dataset), torch.Generator().manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        objective(batch, generator)[0].backward()
        optimizer.step()
    accuracy = network.accuracy(batch.images, dataset.factors(batch.indices), batch_size=10)
    assert accuracy.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("resolution", [8, 32, 128])
def test_heads_read_the_features(resolution):
    network = FactorClassifier((3, 7), resolution=resolution, width=8, feature_channels=12)
    images = torch.rand(2, 3, resolution, resolution) * 2 - 1
    features = network.features(images)
    assert features.shape == (2, 12)
    assert [logits.shape for logits in network(images)] == [(2, 3), (2, 7)]
    for head, logits in zip(network.heads, network(images), strict=True):
        torch.testing.assert_close(head(features), logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_classifier_reads_images_of_any_float(dtype):
    network = FactorClassifier((3, 7), resolution=8)
    images = torch.rand(2, 3, 8, 8).to(dtype)
    torch.testing.assert_close(network.features(images), network.features(images.float()))
    torch.testing.assert_close(network.features(images.double().numpy()), network.features(images.float()))
    assert network.predict(images).shape == (2, 2)


def test_the_classifier_says_which_images_it_reads():
    with pytest.raises(ValueError, match="4 times a power of two and at least 8, got 48"):
        FactorClassifier((3,), resolution=48)
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\), got \(2, 3, 16, 16\)"):
        FactorClassifier((3,)).features(torch.zeros(2, 3, 16, 16))


def test_training_noise_comes_from_the_generator_and_validation_has_none():
    dataset = Squares()
    network = FactorClassifier(dataset.factor_sizes, resolution=16, width=8)
    objective = FactorClassifierObjective(network, dataset, validation=dataset, pixel_noise=0.5)
    batch = squares_batch(dataset)

    def loss(seed):
        return objective(batch, torch.Generator().manual_seed(seed))[0].item()

    assert loss(1) == loss(1) != loss(2)
    network.eval()
    assert loss(1) == loss(2)


def test_validation_reads_the_factors_of_its_own_dataset():
    dataset, other = Squares(), Squares(reverse=True)
    network = FactorClassifier(dataset.factor_sizes, resolution=16, width=8).eval()
    objective = FactorClassifierObjective(network, dataset, validation=other)
    logits = network(squares_batch(other).images)
    factors = other.factors(torch.arange(27))
    expected = sum(torch.nn.functional.cross_entropy(a, b) for a, b in zip(logits, factors.T, strict=True)) / 2
    torch.testing.assert_close(objective(squares_batch(other), None)[0], expected)


def test_images_of_one_colour_have_an_energy_to_divide_by():
    flat = torch.full((2, 3, 4, 4), 0.3)
    assert fidelity.mean_energy(flat) > 0
