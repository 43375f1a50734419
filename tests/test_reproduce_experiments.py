"""The experiments of the papers: that each runs through and keeps its numbers."""

import dataclasses
import json

import pytest

from multibeta import evaluation
from multibeta.reproduce import codes, experiments, latent_diffusion, tables
from multibeta.reproduce.experiments import EXPERIMENTS, claim, reproduce
from multibeta.reproduce.printed import PRINTED


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two betas, and features that need no training."""
    monkeypatch.setattr(tables, "SHARPNESS_BETAS", (0.5, 0.9))
    monkeypatch.setattr(latent_diffusion, "NETWORKS", "scenes64-isotropic")
    monkeypatch.setattr(latent_diffusion, "SAMPLING_STEPS", {"ode2": (3,), "ddim": (3,)})
    features = evaluation.Features("pixels", lambda x: x.flatten(1)[:, ::97])
    monkeypatch.setattr(evaluation, "usual_features", lambda *sets, progress=True: features)


class TestReproduce:
    @pytest.mark.parametrize("name", EXPERIMENTS)
    def test_runs_through_and_keeps_everything(self, tiny_study, name, tmp_path, monkeypatch):
        families = {key: tables.TABLE2_METHODS[key] for key in ("VAE", "multi-beta VAE", "multi-beta VAE, sigma per channel")}
        monkeypatch.setattr(tables, "TABLE2_METHODS", families)
        monkeypatch.setitem(tables.TABLE1_METHODS, "beta-VAE, best of 5", (("beta-vae-1", "beta-vae-2"), "trained", None))
        monkeypatch.setattr(tables, "SAMPLING", {"sampler": "ddim", "steps": 3})
        names = ("disentanglement", "completeness", "informativeness_test")
        monkeypatch.setattr(codes, "dci_from_codes", lambda *args, **options: dict.fromkeys(names, 0.5))  # minutes else
        one_seed = dataclasses.replace(tiny_study, seeds=(0,))
        text = reproduce(name, one_seed, tmp_path, progress=False, command="typed")
        record = json.loads((tmp_path / f"{name}.json").read_text(), parse_constant=lambda value: pytest.fail(value))
        assert record["command"] == "typed" and record["study"]["steps"] == 4 and record["rows"]
        assert (tmp_path / f"{name}.md").read_text().strip() == text
        assert ("As printed" in text) == (name in PRINTED)
        assert (tmp_path / f"{name}.png").exists() == (name in ("figure4", "headline", "latent_diffusion"))

    def test_another_study_needs_another_folder(self, tiny_study, tmp_path):
        claim(tmp_path, tiny_study)
        claim(tmp_path, dataclasses.replace(tiny_study, seeds=(5,)))
        with pytest.raises(ValueError, match=r"another study: steps 4 \(now 5\); choose another folder"):
            claim(tmp_path, dataclasses.replace(tiny_study, steps=5))

    def test_the_images_of_a_study_are_the_same_from_any_folder(self, tiny_study, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        claim(tmp_path, dataclasses.replace(tiny_study, source="celeba:faces"))
        monkeypatch.chdir("/")
        assert json.loads((tmp_path / "study.json").read_text())["source"] == f"celeba:{tmp_path}/faces"
        claim(tmp_path, dataclasses.replace(tiny_study, source=f"celeba:{tmp_path}/faces"))
        with pytest.raises(ValueError, match="another study: source"):
            claim(tmp_path, dataclasses.replace(tiny_study, source="celeba:faces"))

    def test_a_study_of_yesterday_goes_on(self, tiny_study, tmp_path):
        claim(tmp_path, tiny_study)
        shared = json.loads((tmp_path / "study.json").read_text())
        (tmp_path / "study.json").write_text(json.dumps({key: shared[key] for key in shared if key not in ("networks", "vae")}))
        claim(tmp_path, tiny_study)

    def test_networks_are_of_one_experiment(self, tiny_study, tmp_path):
        for own in ({"networks": "scenes32"}, {"vae": "scenes32"}):
            with pytest.raises(ValueError, match="networks and vae are of latent_diffusion, table2 has networks of its own"):
                reproduce("table2", dataclasses.replace(tiny_study, **own), tmp_path)

    def test_unknown_experiment(self, tiny_study, tmp_path):
        with pytest.raises(ValueError, match="experiment must be one of table1, table2"):
            reproduce("table9", tiny_study, tmp_path)

    def test_images_without_factors(self, tiny_study, tmp_path, monkeypatch):
        monkeypatch.setattr(experiments, "study_images", lambda study: (None, object()))
        with pytest.raises(ValueError, match="table2 needs images with known factors; scenes has none"):
            reproduce("table2", tiny_study, tmp_path)

    def test_dci_needs_as_many_images_as_it_asks_for(self, tiny_study, tmp_path):
        with pytest.raises(ValueError, match="dci_train \\+ dci_test = 140 must be at most num_images, the 100 held-out"):
            reproduce("table2", dataclasses.replace(tiny_study, dci_train=100), tmp_path)
