"""Compiled or computed again, blocks learn what they learn otherwise: bitwise where they are computed again."""

import copy
import dataclasses
import functools
from unittest import mock

import pytest
import torch
from processes import in_processes
from torch import nn

from multibeta import checkpoints, data, draws, training
from multibeta.adversarial import AdversarialOptions, against_discriminator
from multibeta.blocks import ResBlock
from multibeta.recipes.recipe import build
from multibeta.training import TrainingOptions
from multibeta.training.blockwise import blocks_of, reset_forwards, set_forwards
from tiny_recipes import tiny, tiny_diffusion_vae

SCENES = data.Subset(data.Scenes(16), range(24))
OPTIONS = TrainingOptions(steps=4, batch_size=7, accumulate=2, precision="fp32", warmup_steps=1, validate_every=2, log_every=1)
SHORT = dataclasses.replace(OPTIONS, steps=2)
EAGER = functools.partial(torch.compile, backend="aot_eager")  # traces as the compiler does, and is quick


def compile_quickly(function, *, options, **others):
    """What `torch.compile` would trace, run without its code generator."""
    return EAGER(function, **others)


def objective_of(stage, dropout=0.0):
    """The objective of a stage, of the first system or, with dropout, of the second."""
    recipe = tiny_diffusion_vae() if dropout else tiny()
    recipe = dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, dropout=dropout))
    vae, diffusion = build(recipe)
    for block in blocks_of(diffusion):
        if isinstance(block, ResBlock):  # as built it is its skip path, whatever its dropout
            nn.init.normal_(block.conv2.weight, std=0.1)
    if stage == "against":  # a discriminator, by gradients of the last layer
        options = AdversarialOptions(discriminator_channels=4, discriminator_layers=1)
        return against_discriminator(recipe.first_objective(vae), vae, options, 0)
    if stage == 1:
        return recipe.first_objective(vae)
    vae.eval().requires_grad_(False)
    return recipe.second_objective(vae, diffusion)


def trained(folder, stage=1, dropout=0.0, options=OPTIONS, **others):
    torch.manual_seed(0)
    common = {"validation": SCENES, "progress": False, "resume": checkpoints.exists(folder / "checkpoint")}
    return training.train(objective_of(stage, dropout), SCENES, options, folder, **common, **others)


def apart(state, other):
    """Distance of two states relative to their norm, all tensors as one vector."""
    both = [torch.cat([value.flatten().double() for value in each.values()]) for each in (state, other)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize("stage, dropout", [(1, 0.0), (2, 0.5), ("against", 0.0)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_what_is_computed_again_learns_the_same_bitwise(stage, dropout, pieces, tmp_path):
    options = dataclasses.replace(OPTIONS, accumulate=pieces)
    plain = trained(tmp_path / "plain", stage, dropout, options)
    again = trained(tmp_path / "again", stage, dropout, dataclasses.replace(options, recompute=True))
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


@pytest.mark.parametrize("stage, dropout", [(1, 0.0), (2, 0.5)])
def test_compiled_blocks_learn_the_same_to_rounding(stage, dropout, tmp_path):
    plain = trained(tmp_path / "plain", stage, dropout)
    with mock.patch("torch.compile", compile_quickly):
        options = dataclasses.replace(OPTIONS, compile=True, recompute=True)
        assert apart(trained(tmp_path / "compiled", stage, dropout, options), plain) < 1e-5


def test_the_compiler_itself_draws_the_masks_of_eager_dropout():
    block, x, embedding = ResBlock(8, 8, 16, num_groups=4, dropout=0.5), torch.randn(3, 8, 4, 4), torch.randn(3, 16)
    expected = _of_seed(lambda: block(x, embedding))
    set_forwards(block, compiled=True, recomputed=False)
    torch.testing.assert_close(_of_seed(lambda: block(x, embedding)), expected)
    with torch.no_grad():  # pictures and validation are not compiled for each of their shapes
        assert torch.equal(_of_seed(lambda: block(x, embedding)), expected)


def _of_seed(compute):
    torch.manual_seed(3)
    return compute()


def test_two_processes_share_what_is_computed_again_and_compiled(tmp_path):
    one = trained(tmp_path / "one", options=SHORT)
    for state in in_processes(2, train_both_ways, tmp_path, folder=tmp_path)[0]:
        assert apart(state, one) < 1e-4


def train_both_ways(folder):
    again = trained(folder / "ddp", options=dataclasses.replace(SHORT, recompute=True))
    with mock.patch("torch.compile", compile_quickly):
        options = dataclasses.replace(SHORT, recompute=True, compile=True)
        return again, trained(folder / "fsdp", options=options, parallel="fsdp")


def test_a_run_is_resumed_with_another_choice(tmp_path):
    again = dataclasses.replace(SHORT, recompute=True)
    trained(tmp_path / "first", options=SHORT)
    trained(tmp_path / "second", options=again)
    first = trained(tmp_path / "first", options=dataclasses.replace(again, steps=3))
    second = trained(tmp_path / "second", options=dataclasses.replace(SHORT, steps=3))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_module_is_given_back_as_it_came(tmp_path):
    objective = objective_of(1)
    training.train(objective, SCENES, dataclasses.replace(OPTIONS, recompute=True), tmp_path, progress=False)
    blocks = blocks_of(objective.module)
    assert blocks and not any("forward" in vars(block) for block in blocks)
    copy.deepcopy(objective.module)


def test_recomputation_keeps_less():
    recipe = tiny()
    vae, _ = build(recipe)
    images, kept = torch.zeros(4, 3, 16, 16), []
    for recomputed in (False, True):
        set_forwards(vae, compiled=False, recomputed=recomputed)
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.setdefault(x.data_ptr(), x), lambda x: x):
            vae.decode(vae.encode(images, 0.5), 0.5)
        kept.append(sum(tensor.numel() for tensor in saved.values()))
    reset_forwards(vae)
    assert kept[1] < kept[0] / 2


def test_masks_of_a_piece_are_drawn_again():
    x = torch.ones(2, 5)
    with draws.PieceDropout(3, 1, 2, 4):
        nn.functional.dropout(x)
        later = draws.again()
        mask = nn.functional.dropout(x)
    nn.functional.dropout(x)
    with later:
        assert torch.equal(nn.functional.dropout(x), mask)


def test_a_module_without_blocks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"compile and recompute must be False: a Conv2d has no blocks \(ResBlock"):
        set_forwards(nn.Conv2d(3, 3, 1), compiled=False, recomputed=True)
    with pytest.raises(ValueError, match="recompute must be True or False, got 'yes'"):
        TrainingOptions(steps=1, recompute="yes")
