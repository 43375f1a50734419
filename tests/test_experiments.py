"""The experiments of the papers: how representations are chosen and scored, and that each runs through."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from multibeta import experiments, recipes
from multibeta.experiments import Representation, Study, bases, reproduce, select, spread, summarise
from multibeta.metrics import dci_from_codes, mig_from_codes

TINY = Study(
    seeds=(0, 1),
    steps=4,
    batch_size=4,
    num_train=40,
    num_images=100,
    dci_train=60,
    dci_test=40,
    disco_steps=1,
    disco_width=2,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Networks of 16 pixels, two betas, a classifier of two steps."""
    preset = recipes.find("scenes64")
    toy = dataclasses.replace(
        preset.vae, resolution=16, base_channels=8, channel_multipliers=(1, 1), latent_channels=6, num_steps=20
    )
    unet = dataclasses.replace(preset.diffusion, base_channels=8, num_groups=4, head_channels=4)
    training = dataclasses.replace(preset.diffusion_training, steps=1, batch_size=4)
    tiny = dataclasses.replace(preset, vae=toy, diffusion=unet, diffusion_training=training)
    monkeypatch.setitem(recipes.RECIPES, "scenes64", tiny)
    monkeypatch.setattr(experiments, "SWEEP", (0.2, 0.5))
    monkeypatch.setattr(experiments, "HEADLINE_BETAS", (0.5, 0.9))
    features = experiments.evaluation.Features("pixels", lambda x: x.flatten(1)[:, ::97])
    monkeypatch.setattr(experiments, "distance_features", lambda study, progress=True: features)
    cached = experiments.open_data
    cached.cache_clear()
    yield
    cached.cache_clear()


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

    def test_reports_on_the_second_half_alone(self, tmp_path):
        score = self.representation(0.2, True, False).score("trained", dataclasses.replace(TINY, dci_train=300), tmp_path, False)
        assert score["mig"] < 0.1 and score["dci"] < 0.1

    def test_scores_are_those_of_the_metrics(self, tmp_path):
        item, study = self.representation(0.2, True, True), dataclasses.replace(TINY, dci_train=300, dci_test=100)
        codes, factors = item.half("pca", 1)
        score = item.score("pca", study, tmp_path, False)
        assert score["mig"] == mig_from_codes(codes, factors)
        expected = dci_from_codes(codes[:300], factors[:300], codes[300:400], factors[300:400], seed=0)
        assert (score["dci"], score["completeness"]) == (expected["disentanglement"], expected["completeness"])


class TestSummary:
    def test_mean_and_deviation_over_seeds(self):
        rows = [{"name": name, "seed": seed, "mig": value} for name, seed, value in (("a", 0, 1.0), ("b", 0, 5.0), ("a", 1, 3.0))]
        first, second = summarise(rows, ("name",), ("mig",))
        assert first["mig"] == {"mean": 2.0, "std": pytest.approx(2**0.5)} and first["seeds"] == 2
        assert second["mig"] == {"mean": 5.0, "std": 0.0}

    def test_a_single_value_has_no_deviation(self):
        assert spread([0.5]) == {"mean": 0.5, "std": 0.0}


class TestReproduce:
    @pytest.mark.parametrize("name", experiments.EXPERIMENTS)
    def test_runs_through_and_keeps_everything(self, name, tmp_path, monkeypatch):
        families = {key: experiments.FAMILIES[key] for key in ("VAE", "multi-beta VAE", "multi-beta VAE, sigma per channel")}
        monkeypatch.setattr(experiments, "FAMILIES", families)
        monkeypatch.setattr(experiments, "SEPARATE_BETAS", (1,))
        monkeypatch.setitem(experiments.TABLE1, "beta-VAE, best of 5", (("beta-vae-1", "beta-vae-2"), "trained", None))
        names = ("disentanglement", "completeness", "informativeness_test")
        monkeypatch.setattr(experiments, "dci_from_codes", lambda *args, **options: dict.fromkeys(names, 0.5))  # minutes else
        study = dataclasses.replace(TINY, seeds=(0,))
        text = reproduce(name, study, tmp_path, progress=False, command="typed")
        record = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=lambda value: pytest.fail(value))
        assert record["command"] == "typed" and record["study"]["steps"] == 4 and record["rows"]
        assert (tmp_path / f"{name}.md").read_text().strip() == text
        assert ("As printed" in text) == (name in experiments.PRINTED)
        assert (tmp_path / f"{name}.png").exists() == (name in ("figure4", "headline"))

    def test_goes_on_without_training_again(self, tmp_path, monkeypatch):
        once = experiments.codes_of(experiments.UNTIED, TINY, 1, tmp_path, progress=False)
        monkeypatch.setattr(experiments, "trained", None)
        again = experiments.codes_of(experiments.UNTIED, TINY, 1, tmp_path, progress=False)
        assert all(np.array_equal(once[name], again[name]) for name in once)
        assert once["codes"].shape == (2, 200, 6) and once["betas"].tolist() == [0.2, 0.5]

    def test_every_method_has_the_same_budget(self):
        one, other = (TINY.recipe(0, untie=untie) for untie in (False, True))
        assert one.vae_training.steps == TINY.steps and one.vae_objective.untie_steps == 0
        assert other.vae_training.steps + other.vae_objective.untie_steps == TINY.steps

    def test_the_folded_variant_shares_the_first_stage(self, tmp_path):
        first = experiments.trained(experiments.MULTI_BETA, TINY, 0, tmp_path, progress=False)
        folded = experiments.trained(experiments.FOLDED, TINY, 0, tmp_path, progress=False)
        untied = experiments.trained(experiments.UNTIED, TINY, 0, tmp_path, progress=False)
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        decoded = [vae.decode(vae.encode(images, 0.4), 0.4) for vae in (first, folded)]
        torch.testing.assert_close(*decoded, rtol=1e-4, atol=1e-4)
        assert untied.config.sigma_per_channel and not folded.config.sigma_per_channel

    def test_seeds_differ(self, tmp_path):
        pair = [experiments.trained("beta-vae-1", TINY, seed, tmp_path / str(seed), progress=False) for seed in (0, 1)]
        assert not torch.equal(pair[0].encoder.conv_out.weight, pair[1].encoder.conv_out.weight)

    def test_another_study_needs_another_folder(self, tmp_path):
        experiments.claim(tmp_path, TINY)
        experiments.claim(tmp_path, dataclasses.replace(TINY, seeds=(5,)))
        with pytest.raises(ValueError, match=r"another study: steps 4 \(now 5\); choose another folder"):
            experiments.claim(tmp_path, dataclasses.replace(TINY, steps=5))

    def test_unknown_experiment(self, tmp_path):
        with pytest.raises(ValueError, match="experiment must be one of table1, table2"):
            reproduce("table9", TINY, tmp_path)

    def test_images_without_factors(self, tmp_path, monkeypatch):
        monkeypatch.setattr(experiments, "open_data", lambda study: (None, object()))
        with pytest.raises(ValueError, match="table2 needs images with known factors; scenes has none"):
            reproduce("table2", TINY, tmp_path)
