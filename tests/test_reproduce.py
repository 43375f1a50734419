"""The experiments of the papers: that each runs through and keeps what it found."""

import dataclasses
import json

import pytest

from multibeta import reproduce as experiments
from multibeta.reproduce import reproduce, spread, study, summarise


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two betas, and features that need no training."""
    monkeypatch.setattr(experiments, "HEADLINE_BETAS", (0.5, 0.9))
    features = experiments.evaluation.Features("pixels", lambda x: x.flatten(1)[:, ::97])
    monkeypatch.setattr(experiments.evaluation, "usual_features", lambda *sets, progress=True: features)


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
    def test_runs_through_and_keeps_everything(self, tiny_study, name, tmp_path, monkeypatch):
        families = {key: experiments.FAMILIES[key] for key in ("VAE", "multi-beta VAE", "multi-beta VAE, sigma per channel")}
        monkeypatch.setattr(experiments, "FAMILIES", families)
        monkeypatch.setattr(experiments, "SEPARATE_BETAS", (1,))
        monkeypatch.setitem(experiments.TABLE1, "beta-VAE, best of 5", (("beta-vae-1", "beta-vae-2"), "trained", None))
        monkeypatch.setattr(experiments, "REFINING", {"sampler": "ddim", "steps": 3})
        names = ("disentanglement", "completeness", "informativeness_test")
        monkeypatch.setattr(study, "dci_from_codes", lambda *args, **options: dict.fromkeys(names, 0.5))  # minutes else
        one_seed = dataclasses.replace(tiny_study, seeds=(0,))
        text = reproduce(name, one_seed, tmp_path, progress=False, command="typed")
        record = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=lambda value: pytest.fail(value))
        assert record["command"] == "typed" and record["study"]["steps"] == 4 and record["rows"]
        assert (tmp_path / f"{name}.md").read_text().strip() == text
        assert ("As printed" in text) == (name in experiments.PRINTED)
        assert (tmp_path / f"{name}.png").exists() == (name in ("figure4", "headline"))

    def test_another_study_needs_another_folder(self, tiny_study, tmp_path):
        experiments.claim(tmp_path, tiny_study)
        experiments.claim(tmp_path, dataclasses.replace(tiny_study, seeds=(5,)))
        with pytest.raises(ValueError, match=r"another study: steps 4 \(now 5\); choose another folder"):
            experiments.claim(tmp_path, dataclasses.replace(tiny_study, steps=5))

    def test_the_images_of_a_study_are_the_same_from_any_folder(self, tiny_study, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        experiments.claim(tmp_path, dataclasses.replace(tiny_study, source="celeba:faces"))
        monkeypatch.chdir("/")
        assert json.loads((tmp_path / "study.json").read_text())["source"] == f"celeba:{tmp_path}/faces"
        experiments.claim(tmp_path, dataclasses.replace(tiny_study, source=f"celeba:{tmp_path}/faces"))
        with pytest.raises(ValueError, match="another study: source"):
            experiments.claim(tmp_path, dataclasses.replace(tiny_study, source="celeba:faces"))

    def test_unknown_experiment(self, tiny_study, tmp_path):
        with pytest.raises(ValueError, match="experiment must be one of table1, table2"):
            reproduce("table9", tiny_study, tmp_path)

    def test_images_without_factors(self, tiny_study, tmp_path, monkeypatch):
        monkeypatch.setattr(experiments, "open_data", lambda study: (None, object()))
        with pytest.raises(ValueError, match="table2 needs images with known factors; scenes has none"):
            reproduce("table2", tiny_study, tmp_path)

    def test_dci_needs_as_many_images_as_it_asks_for(self, tiny_study, tmp_path):
        with pytest.raises(ValueError, match="dci_train \\+ dci_test = 140 must be at most num_images, the 100 held-out"):
            reproduce("table2", dataclasses.replace(tiny_study, dci_train=100), tmp_path)
