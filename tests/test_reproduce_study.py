"""What the experiments compare: how representations are made, chosen and scored."""

import dataclasses

import numpy as np
import pytest
import torch

from multibeta.metrics import dci_from_codes, mig_from_codes
from multibeta.reproduce import study
from multibeta.reproduce.study import Representation, bases, select


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


class TestBudget:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"seeds": ()}, "at least one seed"),
            ({"seeds": (0, True)}, r"a seed must be an integer .*, got True"),
            ({"seeds": (0.5,)}, r"a seed must be an integer .*, got 0.5"),
            ({"steps": -5}, "steps must be at least 1, got -5"),
            ({"diffusion_steps": 2.5}, "diffusion_steps must be an integer, got 2.5"),
            ({"num_images": 0}, "num_images must be at least 1, got 0"),
            ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ],
    )
    def test_nonsense_is_refused_before_any_training(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            study.Study(**wrong)


class TestModels:
    def test_goes_on_without_training_again(self, tiny_study, tmp_path, monkeypatch):
        once = study.codes_of(study.UNTIED, tiny_study, 1, tmp_path, progress=False)
        monkeypatch.setattr(study, "trained", None)
        again = study.codes_of(study.UNTIED, tiny_study, 1, tmp_path, progress=False)
        assert all(np.array_equal(once[name], again[name]) for name in once)
        assert once["codes"].shape == (2, 200, 6) and once["betas"].tolist() == [0.2, 0.5]

    def test_every_method_has_the_same_budget(self, tiny_study):
        one, other = (tiny_study.recipe(0, untie=untie) for untie in (False, True))
        assert one.vae_training.steps == tiny_study.steps and one.vae_objective.untie_steps == 0
        assert other.vae_training.steps + other.vae_objective.untie_steps == tiny_study.steps

    def test_the_folded_variant_shares_the_first_stage(self, tiny_study, tmp_path):
        first = study.trained(study.MULTI_BETA, tiny_study, 0, tmp_path, progress=False)
        folded = study.trained(study.FOLDED, tiny_study, 0, tmp_path, progress=False)
        untied = study.trained(study.UNTIED, tiny_study, 0, tmp_path, progress=False)
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        decoded = [vae.decode(vae.encode(images, 0.4), 0.4) for vae in (first, folded)]
        torch.testing.assert_close(*decoded, rtol=1e-4, atol=1e-4)
        assert untied.config.sigma_per_channel and not folded.config.sigma_per_channel

    def test_seeds_differ(self, tiny_study, tmp_path):
        pair = [study.trained("beta-vae-1", tiny_study, seed, tmp_path / str(seed), progress=False) for seed in (0, 1)]
        assert not torch.equal(pair[0].encoder.conv_out.weight, pair[1].encoder.conv_out.weight)
