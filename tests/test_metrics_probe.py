"""What codes know of classes: against separable classes, closed truths, and neighbours counted by hand."""

import numpy as np
import pytest
import torch

from multibeta.metrics import linear_probe, nearest_neighbours
from multibeta.metrics.probe import STRENGTHS, accuracies


def clouds(count, distance, classes=3, seed=0, dimensions=4):
    """Gaussian clouds of unit deviation, `count` codes of each class, whose centres lie `distance` from 0 along an axis each."""
    random = np.random.RandomState(seed)
    labels = np.repeat(np.arange(classes), count)
    return random.randn(len(labels), dimensions) + distance * np.eye(classes, dimensions)[labels], labels


@pytest.mark.parametrize(("distance", "expected", "within"), [(12, 1, 0), (0, 1 / 3, 0.1)])
def test_separable_classes_are_told_and_equal_ones_are_not(distance, expected, within):
    arrays = *clouds(100, distance), *clouds(100, distance, seed=1)
    for found in (linear_probe(*arrays)["accuracy"], *nearest_neighbours(*arrays).values()):
        assert found == pytest.approx(expected, abs=within)


def test_the_probe_comes_near_the_best_classifier_of_two_gaussians():
    """At means -1 and 1 the best is right with probability Phi(1)."""
    parts = []
    for seed in (0, 1):
        random, labels = np.random.RandomState(seed), np.arange(4000) % 2
        parts += [random.randn(4000, 1) + 2 * labels[:, None] - 1, labels]
    assert linear_probe(*parts)["accuracy"] == pytest.approx(0.8413, abs=0.015)


def test_a_ring_around_a_cloud_is_near_but_not_on_a_side():
    random = np.random.RandomState(0)

    def ring_and_cloud():
        angles, labels = random.rand(400) * 2 * np.pi, np.arange(400) % 2
        return (0.2 + 2 * labels)[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1), labels

    train, test = ring_and_cloud(), ring_and_cloud()
    assert nearest_neighbours(*train, *test) == {1: 1, 5: 1}
    assert linear_probe(*train, *test)["accuracy"] < 0.7


def test_the_probe_is_blind_to_the_scale_of_codes_and_neighbours_are_not():
    train, test, scale = clouds(50, 3), clouds(50, 3, seed=1), np.array([1, 1e-3, 1e-3, 1e3])
    stretched = train[0] * scale + 7, train[1], test[0] * scale + 7, test[1]
    assert linear_probe(*stretched) == linear_probe(*train, *test)
    assert nearest_neighbours(*stretched)[5] < nearest_neighbours(*train, *test)[5] - 0.2


def test_codes_that_collapsed_tell_the_commonest_class():
    labels = np.array([0] * 30 + [1] * 10)
    found = linear_probe(np.zeros((40, 3)), labels, np.zeros((40, 3)), labels)
    assert (found["accuracy"], found["balanced_accuracy"]) == (0.75, 0.5)


def test_the_penalty_is_chosen_by_other_codes_than_it_is_fitted_to():
    """With more codes than images anything is fitted; only a strong penalty finds the one code that tells."""
    random = np.random.RandomState(0)
    labels = np.arange(120) % 2
    codes = random.randn(240, 300)
    codes[:, 0] += 6 * np.tile(labels, 2)
    weak = linear_probe(codes[:120], labels, codes[120:], labels)
    assert weak["strength"] in STRENGTHS[:4] and weak["accuracy"] > 0.7
    assert linear_probe(codes[:120], labels, codes[120:], labels) == weak


def test_neighbours_are_those_counted_by_hand():
    random = np.random.RandomState(0)
    train, test = random.randn(70, 3), random.randn(50, 3)
    train_labels, test_labels = random.randint(4, size=70), random.randint(4, size=50)
    nearest = np.argsort(np.square(test[:, None] - train[None]).sum(2), axis=1)
    expected = {}
    for k in (1, 4, 70):
        votes = np.stack([(train_labels[nearest[:, :k]] == label).sum(1) for label in range(4)], 1)
        expected[k] = np.mean(votes.argmax(1) == test_labels)
    assert nearest_neighbours(train, train_labels, test, test_labels, (1, 4, 70)) == pytest.approx(expected)


def test_tensors_of_any_precision_are_codes():
    (train, labels), (test, _) = clouds(20, 9), clouds(20, 9, seed=1)
    given = torch.tensor(train, dtype=torch.bfloat16), torch.tensor(labels), torch.tensor(test), torch.tensor(labels)
    assert linear_probe(*given)["accuracy"] == nearest_neighbours(*given)[1] == 1


def test_labels_need_not_be_counted_from_zero_or_be_in_both_parts():
    (train, labels), (test, _) = clouds(20, 12), clouds(20, 12, seed=1)
    unknown = np.where(labels == 2, 99, labels * 5)
    assert linear_probe(train, labels * 5, test, unknown)["accuracy"] == pytest.approx(2 / 3)
    assert nearest_neighbours(train, labels * 5, test, unknown)[5] == pytest.approx(2 / 3)


def test_balanced_accuracy_counts_every_class_alike():
    found = accuracies(np.zeros(10, int), np.array([0] * 9 + [1]))
    assert found == {"accuracy": 0.9, "balanced_accuracy": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: np.full((20, 4), np.nan)}, "codes must be finite"),
        ({2: np.zeros((20, 3))}, "the same codes, got 4 and 3"),
        ({1: np.arange(19)}, r"labels must be one for each of 20 codes, got shape \(19,\)"),
        ({1: np.zeros((20, 1), int)}, r"got shape \(20, 1\)"),
        ({3: np.zeros(20)}, "labels must be integers, got float64"),
        ({1: np.full(20, 3)}, "at least two classes are needed in training, got the label 3 alone"),
    ],
)
def test_what_cannot_be_measured_is_said(change, message):
    given = [np.zeros((20, 4)), np.arange(20) % 2, np.zeros((20, 4)), np.arange(20) % 2]
    given = [change.get(place, array) for place, array in enumerate(given)]
    for measure in (linear_probe, nearest_neighbours):
        with pytest.raises(ValueError, match=message):
            measure(*given)


def test_too_few_codes_are_refused():
    codes, labels = np.eye(3), np.arange(3)
    with pytest.raises(ValueError, match="a class of at least 2 training codes"):
        linear_probe(codes, labels, codes, labels)
    with pytest.raises(ValueError, match="neighbours must lie between 1 and 3, got 5"):
        nearest_neighbours(codes, labels, codes, labels)
