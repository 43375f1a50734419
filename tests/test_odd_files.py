"""JSON that was edited or damaged: whatever a file says, reading it gives something whole or an error that names the file."""

import copy
import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_training import Denoise

from multibeta import pipelines, recipes
from multibeta.checkpoints import load_folder
from multibeta.evaluation.records import recorded_training
from multibeta.recipes import recipe as recipe_files
from multibeta.training import TrainingOptions, checkpointing, train
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion

OF_A_MODEL = "/config.json does not describe a DenoisingMultiBetaVAE"
REMOVED, NESTED = "removed", "nested"
ODD = (
    *(None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, 2**63, 10**4299),
    *("", "x", "3", [], [None], [-1], ["x"], [[1]], {}, {"a": 1}, REMOVED, NESTED),
)


def places(value, place=()):
    """Where the values of a JSON document are."""
    if place:
        yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*place, key))


def mutated(document, count, seed):
    """`count` texts of a document, in each of which another value stands in one place."""
    random_, there = random.Random(seed), list(places(document))
    for _ in range(count):
        changed, (*above, last), odd = copy.deepcopy(document), random_.choice(there), random_.choice(ODD)
        holder = changed
        for key in above:
            holder = holder[key]
        holder[last] = odd
        if odd == REMOVED:
            del holder[last]
        text = json.dumps(changed).replace("Infinity", "1e400")  # which no float holds
        yield text.replace(json.dumps(NESTED), "[" * 50_000 + "]" * 50_000)


def refused(path, read, texts):
    """How many of these texts `read` refuses in the file; anything but an error that names it fails the test."""
    count = 0
    for text in texts:
        path.write_text(text)
        try:
            read()
        except (ValueError, FileNotFoundError) as error:
            assert str(path.parent) in str(error), text[:2000]
            count += 1
    return count


@pytest.mark.parametrize("made", [tiny, tiny_latent_diffusion, tiny_diffusion_vae])
def test_recipes(made, tmp_path):
    recipe_files.record(made(), tmp_path)
    path = tmp_path / recipe_files.RECORD
    texts = list(mutated(json.loads(path.read_text()), 60, 0))
    assert refused(path, lambda: recipes.recorded_recipe(tmp_path).plan(), texts) > 10


def test_models(model, tmp_path, monkeypatch):
    """Also what a model says of its training, which is told of it."""
    model = copy.deepcopy(model)
    steps = {"steps": 3, "batch_size": 4}
    recipe = {"name": "tiny", "data": {"source": "scenes"}, "vae_training": steps, "vae_objective": {"untie_steps": 0}}
    model.info = {"recipe": recipe | {"diffusion_training": steps}, "images": {"training": 16, "held_out": 8}, "flow_map": steps}
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    weights = load_folder(tmp_path)[0]
    monkeypatch.setattr("multibeta.checkpoints._load_tensors", lambda path: weights[Path(path).stem])

    def read():
        loaded = pipelines.load_pretrained(tmp_path)
        recorded_training(loaded)
        loaded._model_card(loaded._weights())

    assert refused(path, read, mutated(json.loads(path.read_text()), 40, 0)) > 10


class Few:
    resolution, channels, fingerprint = 8, 3, "few"

    def __len__(self):
        return 8

    def images(self, indices):
        return torch.zeros(len(indices), 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"step": -1}, "step must be at least 1, got -1"),
        ({"step": 2.0}, "step of Progress must be of type int, got 2.0"),
        ({"seconds": -1}, "seconds must be finite and at least 0, got -1"),
        ({"seconds": float("nan")}, "seconds of Progress must be of type float, got nan"),
        ({"seconds": float("inf")}, "seconds of Progress must be of type float, got inf"),
        ({"averaged": "3"}, "averaged of Progress must be of type int | None, got '3'"),
        ({"averaged": -1}, "averaged must be at least 0, got -1"),
        ({"averaged": 3}, "averaged must be at most 2, got 3"),
        ({"validated": None}, "validated: the fields of Validated must be given by name, got None"),
        ({"validated": {"step": 10**30}}, "validated.step must be at most 2"),
        ({"validated": {"loss": "x"}}, "validated: loss of Validated must be of type float | None, got 'x'"),
        ({"best": {}}, "best needs step and loss, which are missing"),
        ({"guard": []}, "guard: the fields of Guarded must be given by name, got []"),
        ({"guard": {"left_out": -1}}, "guard.left_out must be at least 0, got -1"),
        ({"guard": {"left_out": True}}, "guard: left_out of Guarded must be of type int, got True"),
        ({"guard": {"norms": ["x"]}}, "guard: norms of Guarded must be of type tuple[float, ...], got ('x',)"),
        ({"options": {}}, "options.steps must be an integer, got None"),
        ({"options": None}, "options.steps must be an integer, got None"),
    ],
)
def test_a_checkpoint_that_does_not_say_how_far_it_came_is_passed_over(changes, message, tmp_path, caplog):
    choice = TrainingOptions(steps=2, batch_size=4, precision="fp32", checkpoint_every=1, keep_checkpoints=2)
    train(Denoise(), Few(), choice, tmp_path, progress=False)
    path = tmp_path / "checkpoint" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))
    words = re.escape(str(path)) + ".*" + re.escape(message)
    with pytest.raises(ValueError, match=words):
        checkpointing.require_progress(path.parent, json.loads(path.read_text()))
    if "options" not in changes:
        train(Denoise(), Few(), dataclasses.replace(choice, steps=3), tmp_path, progress=False, resume=True)
        assert re.search(f"{re.escape(str(path))} .*Going on from {re.escape(str(tmp_path))}", caplog.text)
        assert json.loads(path.read_text())["step"] == 3


def test_checkpoints(tmp_path):
    def run(steps, **options):
        choice = TrainingOptions(steps=steps, batch_size=4, precision="fp32", spike_factor=10.0)
        train(Denoise(), Few(), choice, tmp_path / "run", validation=Few(), progress=False, context={"n": 3}, **options)

    def read():
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "saved", tmp_path / "run")
        path.write_text(texts[-1])
        run(3, resume=True)

    run(2)
    shutil.copytree(tmp_path / "run", tmp_path / "saved")
    path, texts = tmp_path / "run" / "checkpoint" / "config.json", []
    count = 0
    for text in mutated(json.loads(path.read_text()), 40, 0):
        texts.append(text)
        count += refused(path, read, [text])
    assert count > 10


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("vae_training", "steps"), "3", "vae_training: steps of TrainingOptions must be of type int, got '3'"),
        (("flow_map", "shares", 0), 10**400, "flow_map: shares of DistillationOptions must be of type"),
        (("data",), [1], "data of MultiBetaRecipe must be of type DataOptions, got (1,)"),
        (("vae",), REMOVED, "MultiBetaRecipe needs vae, which is missing"),
        (("data",), None, "data of MultiBetaRecipe must be of type DataOptions, got None"),
        (("vae_training",), "3", "vae_training of MultiBetaRecipe must be of type TrainingOptions, got '3'"),
        (("adversarial",), [], "adversarial of MultiBetaRecipe must be of type AdversarialOptions, got ()"),
        (("name",), {}, "name of MultiBetaRecipe must be of type str, got {}"),
        (("data", "num_train"), -1, "data: num_train must be at least 1, got -1"),
        (("vae_training", "learning_rate"), -1, "vae_training: learning_rate must be finite and at least 0"),
        (("flow_map", "validate_every"), -1, "flow_map: validate_every must be at least 1, got -1"),
        (("decoder_tuning", "learning_rate"), -1, "decoder_tuning: learning_rate must be finite and at least 0"),
        (("model",), ["x"], "the model of a recipe must be DenoisingMultiBetaVAE, LatentDiffusion, DiffusionVAE, got ['x']"),
    ],
)
def test_the_error_names_file_and_field(place, value, message, tmp_path):
    document = recipes.to_dict(tiny())
    holder = document = json.loads(json.dumps(document))
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    if value == REMOVED:
        del holder[place[-1]]
    path = tmp_path / recipe_files.RECORD
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=re.escape(f"{path} does not describe a recipe: {message}")):
        recipes.recorded_recipe(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("class",), "", " holds a model whose class is not said, which is none of the models known here: DenoisingMultiBetaVAE"),
        (("class",), [], "/config.json is damaged or of another kind: class must not be []"),
        (("diffusion", "latent_resolution"), -1, f"{OF_A_MODEL}: latent_resolution must be at least 1, got -1"),
        (("info", "images"), [1], f"{OF_A_MODEL}: info.images must hold entries by name, got a list"),
        (("info", "changes"), "x", f"{OF_A_MODEL}: info.changes must hold entries by name, got a str"),
    ],
)
def test_the_error_of_a_model_names_file_and_field(place, value, message, model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    holder = config = json.loads(path.read_text()) | {"info": {}}
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}{message}")):
        pipelines.load_pretrained(tmp_path)
