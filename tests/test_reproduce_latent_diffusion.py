"""The first system beside plain latent diffusion: one VAE, equal images, equal time, trained once."""

import dataclasses
import json

import pytest
import torch

from multibeta import evaluation, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE, LatentDiffusion, load_pretrained
from multibeta.reproduce import latent_diffusion, reproduce
from multibeta.reproduce.latent_diffusion import AS_MANY_IMAGES, AS_MUCH_TIME, OURS


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(latent_diffusion, "NETWORKS", "scenes64-isotropic")
    monkeypatch.setattr(latent_diffusion, "SAMPLING_STEPS", {"ode2": (3, 50), "ddim": (4,)})
    features = evaluation.Features("pixels", lambda x: x.flatten(1)[:, ::97])
    monkeypatch.setattr(evaluation, "usual_features", lambda *sets, progress=True: features)


def measured(study, folder):
    text = reproduce("latent_diffusion", study, folder, progress=False)
    return text, json.loads((folder / "latent_diffusion.json").read_text())


def models_of(folder):
    return {path.parent.name: load_pretrained(path) for path in folder.glob("latent-diffusion/seed-0/*/model")}


def test_both_learn_on_one_vae_and_only_once(tiny_study, tmp_path, monkeypatch):
    text, record = measured(tiny_study, tmp_path)
    rows = record["rows"]
    assert [row["name"] for row in rows if row["seed"] == 0] == [OURS, OURS, AS_MANY_IMAGES, AS_MUCH_TIME]
    assert [row["sampler"] for row in rows[:3]] == ["ode2 3", "ode2 20", "ddim 4"]  # no more steps than the grid has
    assert {row["steps"] for row in rows if row["name"] in (OURS, AS_MANY_IMAGES)} == {tiny_study.diffusion_steps}
    first = {row["name"]: row for row in rows if row["seed"] == 0}
    log = tmp_path / "latent-diffusion/seed-0" / AS_MANY_IMAGES.replace(", ", "-") / "diffusion/metrics.jsonl"
    of_step = json.loads(log.read_text().splitlines()[0])["cpu_seconds_per_step"]
    spare = (first[OURS]["cpu_seconds"] - first[AS_MANY_IMAGES]["cpu_seconds"]) / of_step
    planned = max(1, tiny_study.diffusion_steps + round(spare))
    assert {row["steps"] for row in rows if row["name"] == AS_MUCH_TIME} == {planned}  # once, for all seeds
    assert all(row["images"] == 4 * row["steps"] and row["cpu_seconds"] > 0 for row in rows)
    assert [row["name"] for row in record["floors"]] == ["training images", "training images, decoded at beta = 0"]
    assert f"from above: held-out images; {OURS}, ode2 3; {AS_MANY_IMAGES}, ddim 4; {AS_MUCH_TIME}, ddim 4." in text

    models = models_of(tmp_path)
    assert sorted(type(each).__name__ for each in models.values()) == ["DenoisingMultiBetaVAE", *["LatentDiffusion"] * 2]
    assert models[OURS].spectrum is None  # whose seconds latent diffusion has no part in
    weights = [each.vae.encoder.conv_out.weight for each in models.values()]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    unets = [sum(map(torch.numel, each.diffusion.unet.res_blocks.pop().parameters())) for each in models.values()]
    assert len(set(unets)) == 1  # of one shape

    monkeypatch.setattr(recipes, "train_diffusion", None)
    assert measured(tiny_study, tmp_path)[1]["rows"] == rows
    as_before = latent_diffusion.fitted(tiny_study)
    other = dataclasses.replace(as_before.diffusion_objective, noise_draws=3)
    monkeypatch.setattr(latent_diffusion, "fitted", lambda _: dataclasses.replace(as_before, diffusion_objective=other))
    with pytest.raises(ValueError, match=r"trained differently: context\.diffusion_objective\.noise_draws"):
        measured(tiny_study, tmp_path)  # what one recipe began is not finished by another


def test_scenes_are_not_mirrored_which_is_said(tiny_study, caplog):
    study = dataclasses.replace(tiny_study, networks="photos32")
    assert recipes.find("photos32").data.mirror and not latent_diffusion.fitted(study).data.mirror
    assert "scenes knows floor_hue" in caplog.text and "not mirrored" in caplog.text


def test_takes_a_trained_vae_with_its_images(tiny_study, tmp_path):
    recipe = tiny_study.recipe(5)
    model = recipes.run(dataclasses.replace(recipe, name="mine"), tmp_path / "run", progress=False)
    study = dataclasses.replace(tiny_study, seeds=(0,), vae=str(tmp_path / "run" / "model"))
    _, record = measured(study, tmp_path / "study")
    assert record["recipe"]["name"] == "mine" and record["num_train"] == 40
    assert not (tmp_path / "study/latent-diffusion/vae").exists()
    for each in models_of(tmp_path / "study").values():
        assert torch.equal(each.vae.decoder.conv_out.weight, model.vae.decoder.conv_out.weight)
        assert isinstance(each, DenoisingMultiBetaVAE | LatentDiffusion)
    refused = {
        "give .*model or networks='scenes32', not both": {"networks": "scenes32"},
        "was trained on scenes, the source of the study is /.*elsewhere": {"source": "elsewhere"},
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            measured(dataclasses.replace(study, **changes), tmp_path / message[:3])


def test_other_models_have_no_vae_to_take(tiny_study, tmp_path, refiner):
    refiner.save_pretrained(tmp_path / "refiner")
    study = dataclasses.replace(tiny_study, vae=str(tmp_path / "refiner"))
    with pytest.raises(ValueError, match=r"vae must be a DenoisingMultiBetaVAE that .*, .* holds a DiffusionVAE"):
        measured(study, tmp_path / "study")


def test_a_folder_of_few_images_is_taken_whole(tiny_study, tmp_path, photos, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    study = dataclasses.replace(tiny_study, seeds=(0,), source=str(photos))
    _, record = measured(study, tmp_path / "study")
    assert record["num_train"] == 10 and record["num_images"] == 2


def test_a_killed_training_has_no_seconds_to_tell(tiny_study, tmp_path):
    study = dataclasses.replace(tiny_study, seeds=(0,))
    measured(study, tmp_path)
    place = tmp_path / "latent-diffusion/seed-0" / OURS
    for path in [*(place / "model").iterdir(), place / "cpu_seconds.json"]:
        path.unlink()
    with pytest.raises(ValueError, match=r"was killed and left no record of its CPU seconds: remove that folder"):
        measured(study, tmp_path)
