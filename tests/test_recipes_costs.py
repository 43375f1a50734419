"""What is said before a training of its operations and memory is what it takes."""

import dataclasses
from pathlib import Path

import pytest
import torch

import multibeta
from multibeta import data, recipes
from multibeta.recipes import costs
from multibeta.recipes.recipe import build
from multibeta.training.operations import counted
from multibeta.training.run import Run
from tiny_recipes import tiny, tiny_diffusion_vae, tiny_latent_diffusion

pytest.importorskip("tyro")
from multibeta.cli import main

SCENES = data.Subset(data.Scenes(16), range(16))
TINY = {"multibeta": tiny, "latent": tiny_latent_diffusion, "refiner": tiny_diffusion_vae}


def runs_of(recipe):
    """The trainings of both stages, ready for a step."""
    vae, diffusion = build(recipe)
    yield "vae_training", Run(recipe.first_objective(vae), SCENES, recipe.vae_training, Path("never written"), None)
    vae.eval().requires_grad_(False)
    kept = {"encodings": torch.zeros(16, *recipe.vae.latent_shape)} if isinstance(recipe, recipes.LatentDiffusionRecipe) else {}
    objective = recipe.second_objective(vae, diffusion, **kept)
    yield "diffusion_training", Run(objective, SCENES, recipe.diffusion_training, Path("never written"), None)


@pytest.mark.parametrize("system", TINY)
def test_operations_are_those_that_a_step_makes(system):
    recipe = TINY[system]()
    expected = costs.costs(recipe)
    with multibeta.backend("reference"):
        for name, run in runs_of(recipe):
            run.advance()
            assert run.flops[0] == expected[name].flops, name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_that_which_a_step_holds(precision, recompute):
    recipe = tiny()
    options = {"precision": precision, "recompute": recompute, "batch_size": 8}
    recipe = dataclasses.replace(recipe, vae_training=dataclasses.replace(recipe.vae_training, **options))
    cost = costs.costs(recipe)["vae_training"]
    _, run = next(runs_of(recipe))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with multibeta.backend("reference"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run.advance()
    parameters = list(run.module.parameters())
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held, size = cost.memory(), 4 * sum(parameter.numel() for parameter in parameters)
    moments = [slot for state in run.own.optimizer.state.values() for name, slot in state.items() if name != "step"]
    assert held["weights"] == held["gradients"] == held["averages"] == size
    assert held["moments"] == sum(4 * slot.numel() for slot in moments)
    measured = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert held["activations"] < measured < 1.5 * held["activations"]  # and the tensors of the loss


def test_of_shards_each_process_holds_its_part():
    cost = costs.costs(tiny())["vae_training"]
    alone, ddp, fsdp = cost.memory(), cost.memory(4), cost.memory(4, "fsdp")
    assert ddp["gradients"] == 2 * alone["gradients"] and ddp["weights"] == alone["weights"]
    assert all(fsdp[name] == alone[name] / 4 for name in ("gradients", "moments", "averages"))
    assert fsdp["weights"] - alone["weights"] / 4 == alone["weights"] + 8 * cost.largest_block
    assert ddp["activations"] == fsdp["activations"] == cost.kept + cost.cast  # of 4 images one each
    assert alone["activations"] == 4 * cost.kept + cost.cast


def test_days_are_operations_over_what_is_reached():
    cost = costs.costs(tiny())["vae_training"]
    assert cost.days(8, 0.5, 100.0) == pytest.approx(cost.steps * 4 * cost.flops / (8 * 50e12) / (24 * 3600))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0591, "0.0591 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7200, "2 hours"),
        (47 * 3600, "47 hours"),
        (7e6, "81 days"),
    ],
)
def test_a_time_is_said_in_a_unit_that_fits_it(seconds, words):
    assert costs.duration(seconds / 86400) == words


def test_images_that_are_encoded_before_cost_stage_2_nothing():
    recipe = tiny()
    nodes = dataclasses.replace(recipe, diffusion_objective=dataclasses.replace(recipe.diffusion_objective, nodes=1))
    assert nodes.encodes_before(recipe.data.num_train) is False and nodes.encodes_before(1)
    few = dataclasses.replace(nodes, data=dataclasses.replace(nodes.data, num_train=1))
    encoding = costs.costs(nodes)["diffusion_training"].flops - costs.costs(few)["diffusion_training"].flops
    vae, _ = build(recipe)
    with counted() as counter, torch.no_grad(), multibeta.backend("reference"):
        vae.encode(torch.zeros(1, 3, 16, 16), 0.5)
    assert encoding == 2 * counter.total


def test_a_dry_run_tells_the_cost_beside_the_recipe(capsys, caplog, monkeypatch):
    monkeypatch.setattr(costs, "costs", lambda recipe: {"vae_training": COST, "diffusion_training": COST})
    arguments = ["train", "--dry-run", "--recipe", "scenes32-small"]
    assert main([*arguments, "--gpus", "2", "--mfu", "0.5", "--peak-tflops", "10"]) == 0
    assert capsys.readouterr().out.startswith("{")
    lines = caplog.text.splitlines()
    time = costs.duration(COST.days(2, 0.5, 10.0))
    assert sum(line.endswith(f" {time}") for line in lines) == 2 and "--gpus 2, --mfu 0.5, --peak-tflops 10 each" in caplog.text
    assert [line.split()[2] for line in lines if "fsdp" in line or " ddp" in line] == ["ddp", "fsdp"] * 2
    for wrong, words in ((["--gpus", "0"], "gpus must be at least 1"), (["--mfu", "0.3"], "give --dry-run and --gpus")):
        assert main([*arguments, *wrong]) != 0
        assert words in capsys.readouterr().err + caplog.text


COST = costs.StageCost(recipes.find("scenes32-small").vae_training, 1000, 10**6, 0, 10**5, 10**12, 10**6, 0)
