"""How a batch is cut into pieces changes neither its random numbers nor what any objective learns from it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multibeta import data, disco, draws
from multibeta.adversarial import AdversarialOptions, DecoderObjective, against_discriminator
from multibeta.baselines import (
    VAE,
    AnnealedVAEObjective,
    BetaTCVAEObjective,
    BetaVAEObjective,
    FactorVAEObjective,
    InfoVAEObjective,
)
from multibeta.diffusion_vae import (
    CapacityObjective,
    CapacityVAE,
    ConditionalDiffusion,
    ConditionalDiffusionConfig,
    ConditionalDiffusionObjective,
)
from multibeta.metrics.factor_classifier import FactorClassifier, FactorClassifierObjective
from multibeta.multibeta_vae import MultiBetaObjective, MultiBetaVAE, VAEConfig
from multibeta.networks import BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, NonlinearDiffusionObjective
from multibeta.schedules import stratified_steps
from multibeta.training import TrainingOptions
from multibeta.training.batches import generator_of
from multibeta.training.run import Run

SCENES = data.Subset(data.Scenes(16), range(10))
SMALL = {"base_channels": 8, "channel_multipliers": (1, 1), "num_groups": 4}
TOY = VAEConfig(architecture="toy", resolution=16, latent_channels=4, embedding_channels=8, num_steps=20, **SMALL)
DEEP = dataclasses.replace(TOY, architecture="ldm", num_res_blocks=1, mid_attention=False, dropout=0.3)
BLOCKS = BlockAutoencoderConfig(
    resolution=16,
    encoder_blocks="16d2,16t8,8d8,8t1,1x1",
    decoder_blocks="1u8,1t8,8u2,8t16,16x1",
    channels="16:8,8:8,1:6",
)
UNET = {**SMALL, "num_res_blocks": 1, "attention_resolutions": (), "head_channels": None, "num_heads": 2, "dropout": 0.3}


def baseline(objective, **options):
    return objective(VAE(TOY), **options)


def diffusion():
    vae = MultiBetaVAE(DEEP).eval()
    model = NonlinearDiffusion(DiffusionConfig(latent_resolution=8, num_steps=20, **UNET))
    return NonlinearDiffusionObjective(model, vae.encode, noise_draws=3)


def refiner(dropout):
    config = ConditionalDiffusionConfig(form="eq7", resolution=16, num_steps=20, **UNET)
    return ConditionalDiffusionObjective(ConditionalDiffusion(config), CapacityVAE(BLOCKS).reconstruct, condition_dropout=dropout)


def capacity(reduction, at):
    """One whose KL per image differs, and lies on both sides of C."""
    vae = CapacityVAE(BLOCKS)
    vae.encoder.mean.weight.data *= 100
    return CapacityObjective(vae, gamma=3.0, capacity=at, warmup=1e-9, reduction=reduction)


def contest(reconstruction, config=TOY):
    options = AdversarialOptions(penalty=1.0, discriminator_channels=4, discriminator_layers=1)
    vae = MultiBetaVAE(config)
    return against_discriminator(reconstruction(vae), vae, options, 0)


OBJECTIVES = {
    "multi-beta": lambda: MultiBetaObjective(MultiBetaVAE(TOY)),
    "multi-beta, dropout": lambda: MultiBetaObjective(MultiBetaVAE(DEEP)),
    "multi-beta, against a discriminator": lambda: contest(MultiBetaObjective),
    "the same, dropout": lambda: contest(MultiBetaObjective, DEEP),
    "decoder, against a discriminator": lambda: contest(lambda vae: DecoderObjective(vae, 0.5)),
    "diffusion, three draws of noise": diffusion,
    "refiner": lambda: refiner(0.0),
    "refiner, half of the steps without condition": lambda: refiner(0.5),
    "capacity of an image": lambda: capacity("batch_mean", 1.5),
    "capacity of a batch": lambda: capacity("batch_sum", 15.0),
    "vae": lambda: baseline(BetaVAEObjective),
    "annealed": lambda: baseline(AnnealedVAEObjective, gamma=3.0, capacity=0.1, warmup=1e-9),
    "total correlation": lambda: baseline(BetaTCVAEObjective, dataset_size=100),
    "total correlation, weighted": lambda: baseline(BetaTCVAEObjective, dataset_size=100, estimator="weighted"),
    "total correlation, as published": lambda: baseline(BetaTCVAEObjective, dataset_size=100, estimator="as_published"),
    "factor": lambda: baseline(FactorVAEObjective, width=16, depth=2),
    "info": lambda: baseline(InfoVAEObjective),
    "classifier": lambda: FactorClassifierObjective(
        FactorClassifier(SCENES.factor_sizes, 16, width=8), SCENES, SCENES, pixel_noise=0.2
    ),
}


def update(name, accumulate, folder, batch_size=10):
    """(loss, gradients, validation loss) of one update of an objective, computed in pieces."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]()
    for parameter in objective.module.parameters():  # last layers start at zero, and hide what lies before them
        parameter.data += 0.05 * torch.randn_like(parameter)
    options = TrainingOptions(steps=2, batch_size=batch_size, accumulate=accumulate, precision="fp32")
    run = Run(objective, SCENES, options, folder, None)
    run.step = 1  # capacities that warm up are no longer 0
    run.module.train()
    loss, *_ = [run.accumulate_gradients(*run.fetch(1), number) for number in range(len(run.learners))]
    named = [each for learner in run.learners for each in learner.plain.named_parameters(learner.prefix)]
    gradients = {key: parameter.grad for key, parameter in named if parameter.grad is not None}
    run.module.eval()
    with torch.no_grad():
        return loss, gradients, run.validation_loss(SCENES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_learned_does_not_depend_on_how_the_work_is_cut(name, tmp_path):
    loss, gradients, validation = update(name, 1, tmp_path)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    for pieces in (2, 4, 10):  # equal halves, 3 3 2 2, single images
        other_loss, others, other_validation = update(name, pieces, tmp_path)
        torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=1e-6)
        assert other_validation == pytest.approx(validation, rel=1e-4)
        assert others.keys() == gradients.keys()
        for key, gradient in gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(others[key], gradient, rtol=1e-3, atol=2e-4 * scale + 1e-7)


def test_a_capacity_of_the_batch_is_divided_by_the_update_and_not_by_the_piece(tmp_path):
    options = TrainingOptions(steps=1, batch_size=8, accumulate=1, precision="fp32")
    for pieces in (1, 2, 4):
        objective = capacity("batch_sum", 24.0)
        changed = dataclasses.replace(options, accumulate=pieces)
        run = Run(objective, SCENES, changed, tmp_path, None)
        run.step = 1
        run.accumulate_gradients(*run.fetch(0))
        assert float(run.totals["capacity"][0] / run.totals["capacity"][1]) == pytest.approx(3.0)


def test_one_piece_draws_what_it_always_drew(tmp_path):
    """The noise of trainings without `accumulate` stays: models that were trained can be trained again."""
    seen = []

    class Listen:
        module = nn.Linear(1, 1)

        def __call__(self, batch, generator):
            seen.append((torch.randn(3, generator=generator), torch.rand(2)))
            return self.module.weight.sum(), {}

    run = Run(Listen(), SCENES, TrainingOptions(steps=3, batch_size=4, seed=5), tmp_path, None)
    run.step = 2
    run.accumulate_gradients(*run.fetch(2))
    torch.testing.assert_close(seen[0][0], torch.randn(3, generator=generator_of("objective", 5, "train", 2, 0)))
    torch.testing.assert_close(seen[0][1], torch.rand(2, generator=generator_of("global", 5, "train", 2, 0)))


def test_pieces_of_a_foreign_objective_draw_numbers_of_their_own(tmp_path):
    seen = []

    class Foreign:
        module = nn.Linear(1, 1)

        def __call__(self, batch, generator):
            seen.extend([torch.randn(4, generator=generator), torch.randn(4)])
            return self.module.weight.sum(), {}

    options = TrainingOptions(steps=1, batch_size=8, accumulate=4)
    run = Run(Foreign(), SCENES, options, tmp_path, None)
    run.accumulate_gradients(*run.fetch(0))
    assert len({tuple(numbers.tolist()) for numbers in seen}) == 8


@pytest.mark.parametrize("cut", [(4,), (1, 3), (2, 1, 1)])
def test_rows_of_pieces_are_rows_of_the_whole(cut):
    def everything(count, generator):
        steps = stratified_steps(count, 0, 50, generator)
        noise = draws.noise_like(torch.empty(count, 2, 3), generator)
        return steps, noise, torch.rand((), generator=draws.shared(generator))

    whole = everything(4, torch.Generator().manual_seed(3))
    starts = [sum(cut[:piece]) for piece in range(len(cut))]
    generators = [draws.PieceGenerator.of(7 + start, 3, start, 4) for start in starts]
    found = [everything(count, generator) for count, generator in zip(cut, generators, strict=True)]
    assert torch.equal(torch.cat([steps for steps, _, _ in found]), whole[0])
    assert torch.equal(torch.cat([noise for _, noise, _ in found]), whole[1])
    assert all(torch.equal(number, whole[2]) for _, _, number in found)


def test_dropout_of_pieces_is_that_of_the_whole():
    x, dropout = torch.randn(6, 5, 2, 2), nn.Dropout(0.4)  # two rows an image, all three images in turn
    torch.manual_seed(11)
    whole = dropout(x), dropout(x)
    for start, count in ((0, 1), (1, 2)):
        own = x.unflatten(0, (2, 3))[:, start : start + count].flatten(0, 1)
        with draws.PieceDropout(11, start, count, 3):
            found = dropout(own), dropout(own)
        for piece, expected in zip(found, whole, strict=True):
            assert torch.equal(piece, expected.unflatten(0, (2, 3))[:, start : start + count].flatten(0, 1))
    with draws.PieceDropout(11, 0, 1, 3):
        assert torch.equal(F.dropout(x, 0.4, training=False), x)


def test_objectives_that_compare_every_image_with_every_other_refuse_pieces(tmp_path):
    module = disco.DisCo(disco.Navigator((4,)), disco.Contrastor(1, 8, width=4))
    objective = disco.DisCoObjective(module, lambda latents: latents, lambda batch, generator: None)
    with pytest.raises(ValueError, match=r"got accumulate=2 in 1 processes: DisCo compares every latent"):
        Run(objective, SCENES, TrainingOptions(steps=1, batch_size=4, accumulate=2), tmp_path, None)


def test_a_norm_over_the_batch_is_named(tmp_path, caplog):
    class Normalised:
        module = nn.Sequential(nn.BatchNorm2d(3))

    Run(Normalised(), SCENES, TrainingOptions(steps=1, batch_size=4), tmp_path, None)
    assert not caplog.text
    Run(Normalised(), SCENES, TrainingOptions(steps=1, batch_size=4, accumulate=2), tmp_path, None)
    assert "batch normalisation sees one of the pieces at a time, accumulate=2" in caplog.text
