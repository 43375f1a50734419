"""What the experiments compare: how representations are made, chosen and scored."""

import dataclasses

import numpy as np

from multibeta.metrics import dci_from_codes, mig_from_codes
from multibeta.reproduce import codes as measured
from multibeta.reproduce import models
from multibeta.reproduce.codes import Representation, bases, select


def codes_and_factors(count=2000, seed=0):
    random = np.random.RandomState(seed)
    factors = np.stack([random.randint(size, size=count) for size in (4, 5, 6)], 1)
    return (factors - factors.mean(0)) * np.array([3.0, 1.5, 0.7]) + 0.01 * random.randn(count, 3), factors


class TestBases:
    def test_principal_axes_undo_a_rotation(self):
        codes, factors = codes_and_factors()
        rotation, _ = np.linalg.qr(np.random.RandomState(1).randn(3, 3))
        found = bases(codes @ rotation, seed=0)
        scores = {name: mig_from_codes(basis(codes @ rotation), factors) for name, basis in found.items()}
        assert scores["pca"] > 0.7 > 0.3 > scores["trained"]
        assert scores["ica"] > 0.9  # independent and not Gaussian

    def test_independent_components_tell_factors_of_equal_variance_apart(self):
        codes, factors = codes_and_factors()
        codes = codes / codes.std(0)
        rotation, _ = np.linalg.qr(np.random.RandomState(1).randn(3, 3))
        found = bases(codes @ rotation, seed=0)
        assert mig_from_codes(found["ica"](codes @ rotation), factors) > 0.9
        assert mig_from_codes(found["pca"](codes @ rotation), factors) < 0.5  # the axes of equal variances are arbitrary

    def test_rotations_keep_distances(self):
        codes, _ = codes_and_factors(200)
        found = bases(codes, seed=0)
        for name in ("trained", "random", "pca"):
            np.testing.assert_allclose(np.linalg.norm(found[name](codes), axis=1), np.linalg.norm(codes - codes.mean(0), axis=1))

    def test_dead_dimensions_do_no_harm(self):
        codes, _ = codes_and_factors()
        padded = np.concatenate([codes, np.zeros((len(codes), 2))], 1)
        for basis in bases(padded, seed=0).values():
            assert np.isfinite(basis(padded)).all()


class TestSelection:
    def representation(self, beta, good_first, good_second):
        """Codes that are the factors on the halves that are `good`, and noise on the others."""
        codes, factors = codes_and_factors(1000)
        noise = np.random.RandomState(int(beta * 10)).randn(*codes.shape)
        halves = [
            c if good else n for good, c, n in zip((good_first, good_second), np.split(codes, 2), np.split(noise, 2), strict=True)
        ]
        return Representation("method", beta, 0, bases(codes, 0), np.concatenate(halves), {"factors": factors})

    def test_chooses_on_the_first_half_alone(self):
        candidates = [self.representation(0.1, False, True), self.representation(0.2, True, False)]
        assert select(candidates, "trained").beta == 0.2

    def test_reports_on_the_second_half_alone(self, tiny_study, tmp_path):
        item, budget = self.representation(0.2, True, False), dataclasses.replace(tiny_study, dci_train=300)
        score = item.score("trained", budget, tmp_path, False)
        assert score["mig"] < 0.1 and score["dci"] < 0.1

    def test_scores_are_those_of_the_metrics(self, tiny_study, tmp_path):
        item, budget = self.representation(0.2, True, True), dataclasses.replace(tiny_study, dci_train=300, dci_test=100)
        codes, factors = item.half("pca", 1)
        score = item.score("pca", budget, tmp_path, False)
        assert score["mig"] == mig_from_codes(codes, factors)
        expected = dci_from_codes(codes[:300], factors[:300], codes[300:400], factors[300:400], seed=0)
        assert (score["dci"], score["completeness"]) == (expected["disentanglement"], expected["completeness"])


class TestCodes:
    def test_goes_on_without_training_again(self, tiny_study, tmp_path, monkeypatch):
        once = measured.codes_of(models.UNTIED, tiny_study, 1, tmp_path, progress=False)
        monkeypatch.setattr(measured, "trained_vae", None)
        again = measured.codes_of(models.UNTIED, tiny_study, 1, tmp_path, progress=False)
        assert all(np.array_equal(once[name], again[name]) for name in once)
        assert once["codes"].shape == (2, 200, 6) and once["betas"].tolist() == [0.2, 0.5]
