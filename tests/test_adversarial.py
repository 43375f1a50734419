import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multibeta import adversarial
from multibeta.adversarial import (
    AdversarialObjective,
    AdversarialOptions,
    DecoderObjective,
    DiscriminatorObjective,
    against_discriminator,
)
from multibeta.metrics.lpips import LPIPS
from multibeta.multibeta_vae import MultiBetaObjective, MultiBetaVAE, Reconstruction, VAEConfig
from multibeta.training import Batch
from multibeta.variational import gaussian_log_density

TOY = VAEConfig(
    architecture="toy",
    resolution=16,
    latent_channels=4,
    base_channels=8,
    channel_multipliers=(1, 1),
    num_groups=4,
    embedding_channels=8,
    num_steps=20,
)
OPTIONS = AdversarialOptions(discriminator_channels=4, discriminator_layers=1)


def batch(count=6, progress=0.5, **fields):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    return Batch(images, torch.arange(count), 10, progress, **fields)


def generator():
    return torch.Generator().manual_seed(7)


def contest(options=OPTIONS, **fields):
    torch.manual_seed(0)
    vae = MultiBetaVAE(TOY)
    for parameter in vae.parameters():  # last layers start at zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return against_discriminator(MultiBetaObjective(vae), vae, dataclasses.replace(options, **fields), 0)


class Made:
    """Reconstructions that are said, at betas that are said."""

    def __init__(self, images, beta):
        self.module = nn.Linear(1, 1)
        self.made = Reconstruction(beta, beta, beta, beta, images)

    def reconstruct(self, images, generator):
        return self.made


class Bright(nn.Module):
    """A discriminator that is a line: the mean of an image times a number, and another."""

    def __init__(self, slope=1.0, shift=0.0):
        super().__init__()
        self.slope, self.shift = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(shift))

    def forward(self, images):
        return self.slope * images.mean((1, 2, 3), keepdim=True) + self.shift


class TestGenerator:
    def test_the_verdict_weighs_as_much_as_the_reconstruction_in_the_last_layer(self):
        """Against gradients of both parts that are computed apart."""
        objective = contest(weight=0.7)
        vae, reconstruction = objective.module, objective.reconstruction
        layer = vae.decoder.conv_out.weight
        loss, scalars = objective(batch(), generator())
        (whole,) = torch.autograd.grad(loss, layer)

        made = reconstruction.reconstruct(batch().images, generator())
        (content,) = torch.autograd.grad(reconstruction.judge(batch(), made)[0], layer, retain_graph=True)
        logits = objective.discriminator(made.image).mean((1, 2, 3))
        verdict = -((1 - made.beta) * logits).mean()
        (other,) = torch.autograd.grad(verdict, layer)
        weight = 0.7 * content.norm() / (other.norm() + 1e-4)
        torch.testing.assert_close(scalars["adversarial_weight"], weight)
        torch.testing.assert_close(scalars["adversarial_loss"], verdict)
        torch.testing.assert_close(whole, content + weight * other)
        assert not scalars["adversarial_weight"].requires_grad

    @pytest.mark.parametrize("factor, expected", [(1e-3, None), (1e6, 1e4)])
    def test_the_weight_is_bounded_where_the_verdict_has_no_gradient(self, factor, expected):
        objective = contest(weight=1.0)
        for parameter in objective.discriminator.parameters():
            parameter.data.zero_()
        judge = objective.reconstruction.judge
        objective.reconstruction.judge = lambda *arguments: (factor * judge(*arguments)[0], {})
        loss, made, _ = objective.judge(batch(), generator())
        content = objective.gradients(loss, objective.verdict(made))["content"].norm()
        weight = objective(batch(), generator())[1]["adversarial_weight"]
        torch.testing.assert_close(weight, content / 1e-4 if expected is None else torch.tensor(expected))

    @pytest.mark.parametrize("changed", [{"progress": 0.2}, {"held_out": True}])
    def test_before_its_start_and_in_validation_the_reconstruction_counts_alone(self, changed):
        objective = contest(start=0.3)
        loss, scalars = objective(batch(**changed), generator())
        torch.testing.assert_close(loss, MultiBetaObjective(objective.module)(batch(**changed), generator())[0])
        assert "adversarial_loss" not in scalars and objective.gather(batch(**changed), generator()) == {}
        assert "adversarial_loss" in objective(batch(progress=0.3), generator())[1]

    def test_at_beta_one_nothing_is_judged_unless_all_is(self):
        made = Reconstruction(torch.ones(2), *[torch.ones(2)] * 3, torch.randn(2, 3, 16, 16))
        assert contest().verdict(made) == 0
        assert contest(beta_weighted=False).verdict(made) != 0

    def test_lpips_counts_once_for_every_value(self):
        torch.manual_seed(0)
        vae = MultiBetaVAE(TOY)
        objective = against_discriminator(MultiBetaObjective(vae), vae, AdversarialOptions(weight=0.0, perceptual_weight=2.0), 0)
        plain = objective(batch(), generator())[0]
        objective.lpips = SimpleNamespace(distance=lambda image, other: torch.full((len(image),), 0.1))
        loss, scalars = objective(batch(), generator())
        made = objective.reconstruction.reconstruct(batch().images, generator())
        options, pixels = objective.reconstruction.options, 3 * 16 * 16
        balance = objective.reconstruction.balance_at(0.5, pixels, 4) * 4 / pixels
        weight = ((1 - made.beta + options.decoder_weight) * balance).mean()
        torch.testing.assert_close(loss - plain, weight * 2.0 * pixels * 0.1 / 4)
        assert scalars["lpips"] == pytest.approx(0.1) and objective.opponent is None

    def test_lpips_teaches_the_decoder(self):
        torch.manual_seed(0)
        lpips = LPIPS()
        for head in lpips.heads.values():
            head.uniform_()
        vae = MultiBetaVAE(TOY)
        objective = AdversarialObjective(DecoderObjective(vae), None, AdversarialOptions(weight=0.0), lpips)
        loss, scalars = objective(batch(), generator())
        made = objective.reconstruction.reconstruct(batch().images, generator())
        torch.testing.assert_close(scalars["lpips"], lpips(batch().images, made.image).mean())
        torch.testing.assert_close(loss, DecoderObjective(vae)(batch(), generator())[0] + scalars["lpips"])  # per value
        (plain,) = torch.autograd.grad(DecoderObjective(vae)(batch(), generator())[0], vae.decoder.conv_out.weight)
        (taught,) = torch.autograd.grad(loss, vae.decoder.conv_out.weight)
        assert (taught - plain).abs().max() > 0 and all(weight.grad is None for weight in lpips.parameters())

    def test_a_discriminator_belongs_to_a_weight(self):
        vae = MultiBetaVAE(TOY)
        with pytest.raises(ValueError, match="a discriminator belongs to a weight above 0"):
            AdversarialObjective(MultiBetaObjective(vae), None, OPTIONS)


class TestDiscriminator:
    def test_its_loss_is_the_hinge_of_both(self):
        made, beta = torch.full((6, 3, 16, 16), -0.3), torch.linspace(0, 0.9, 6)
        objective = DiscriminatorObjective(Bright(2.0, 0.1), Made(made, beta), AdversarialOptions())
        loss, scalars = objective(batch(), generator())
        real = 2 * batch().images.mean((1, 2, 3)) + 0.1
        hinge = 0.5 * (F.relu(1 - real) + F.relu(1 + torch.full((6,), -0.5)))
        torch.testing.assert_close(loss, ((1 - beta) * hinge).mean())
        torch.testing.assert_close(scalars["discriminator_loss"], ((1 - beta) * hinge).sum() / (1 - beta).sum())
        torch.testing.assert_close(scalars["discriminator_real"], real.mean())
        torch.testing.assert_close(scalars["discriminator_fake"], torch.tensor(-0.5))

    def test_the_penalty_is_its_squared_slope(self):
        """Of a line in the mean of an image: slope^2 over the number of values."""
        made, beta = torch.zeros(6, 3, 16, 16), torch.zeros(6)
        plain, penalised = (
            DiscriminatorObjective(Bright(2.0), Made(made, beta), AdversarialOptions(penalty=penalty)) for penalty in (0.0, 6.0)
        )
        loss, scalars = penalised(batch(), generator())
        torch.testing.assert_close(scalars["discriminator_slope"], torch.tensor(4 / 768))
        without = plain(batch(), generator())[0]
        torch.testing.assert_close(loss - without, torch.tensor(3 * 4 / 768))
        own, other = (torch.autograd.grad(each, of.module.slope)[0] for each, of in ((loss, penalised), (without, plain)))
        torch.testing.assert_close(own - other, torch.tensor(3 * 2 * 2.0 / 768), rtol=1e-3, atol=0)

    def test_it_teaches_the_autoencoder_nothing(self):
        objective = contest()
        objective.opponent(batch(), generator())[0].backward()
        assert all(parameter.grad is None for parameter in objective.module.parameters())
        assert all(weight.grad.abs().max() > 0 for name, weight in objective.discriminator.named_parameters() if "weight" in name)

    def test_before_its_start_it_stays(self):
        objective = contest(start=0.3)
        loss, scalars = objective.opponent(batch(progress=0.2), generator())
        loss.backward()
        assert not scalars and all(parameter.grad.abs().max() == 0 for parameter in objective.discriminator.parameters())

    def test_it_learns_to_tell_dark_from_bright(self):
        dark = Made(torch.full((6, 3, 16, 16), -0.8), torch.zeros(6))
        objective = DiscriminatorObjective(Bright(0.0), dark, AdversarialOptions())
        optimizer = torch.optim.Adam(objective.parameter_groups()[0]["params"], lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            loss, scalars = objective(batch(), generator())
            loss.backward()
            optimizer.step()
        assert scalars["discriminator_real"] > 0.9 and scalars["discriminator_fake"] < -0.9


class TestGuard:
    def train(self, monkeypatch, slope, shift=0.0, updates=60):
        monkeypatch.setattr(adversarial, "PATIENCE", 30)
        objective = DiscriminatorObjective(Bright(slope, shift), Made(torch.full((6, 3, 16, 16), -0.5), torch.zeros(6)), OPTIONS)
        for step in range(1, updates + 1):
            objective(dataclasses.replace(batch(), images=torch.full((6, 3, 16, 16), 0.5)), generator())
            if step % 10 == 0:
                objective.check(step)
        return objective

    @pytest.mark.parametrize("slope, words", [(0.0, "tells nothing apart since step 0"), (4.0, "is not fooled by anything")])
    def test_a_discriminator_that_is_no_use_is_named_once(self, slope, words, monkeypatch, caplog):
        self.train(monkeypatch, slope)
        assert len(caplog.messages) == 1 and words in caplog.text and "discriminator_rate" in caplog.text

    @pytest.mark.parametrize("slope, updates", [(0.5, 60), (0.0, 20)])  # one that tells something, and a short while
    def test_another_is_not(self, slope, updates, monkeypatch, caplog):
        self.train(monkeypatch, slope, updates=updates)
        assert not caplog.messages

    def test_a_start_is_waited_for(self, monkeypatch, caplog):
        monkeypatch.setattr(adversarial, "PATIENCE", 30)
        objective = contest(start=0.9).opponent
        for step in (100, 200, 300):
            objective(batch(), generator())
            objective.check(step)
        assert not caplog.messages


class TestDecoder:
    def test_its_loss_is_the_likelihood_of_what_it_decodes_at_zero(self):
        vae = MultiBetaVAE(TOY)
        objective = DecoderObjective(vae)
        made = objective.reconstruct(batch().images, generator())
        assert torch.equal(made.beta, torch.zeros(6))
        torch.testing.assert_close(made.mean, vae.encode(batch().images, 0.0))
        noise = torch.randn(6, 4, 1, 1, generator=self.after_betas())
        torch.testing.assert_close(made.image, vae.decode(made.mean + made.sigma[:, None, None, None] * noise, 0.0))
        loss, scalars = objective(batch(), generator())
        likelihood = gaussian_log_density(batch().images, made.image, vae.decoder_sigma(torch.zeros(6)))
        torch.testing.assert_close(loss, -likelihood.mean() / 768)
        torch.testing.assert_close(scalars["mse"], (made.image - batch().images).square().mean())

    def after_betas(self):
        source = generator()
        torch.rand(6, generator=source)
        return source

    def test_only_the_decoder_learns(self):
        vae = MultiBetaVAE(dataclasses.replace(TOY, architecture="ldm", embedding_mlp=True, num_res_blocks=1))
        objective = DecoderObjective(vae, 0.5)
        learning = {id(parameter) for group in objective.parameter_groups() for parameter in group["params"]}
        names = {name for name, parameter in vae.named_parameters() if id(parameter) in learning}
        embedding = {name for name, _ in vae.named_parameters() if name.startswith("decoder.embedding.")}
        assert embedding and names == {name for name, _ in vae.named_parameters() if name.startswith("decoder.")} - embedding
        objective(batch(), generator())[0].backward()
        assert all(parameter.grad is None for parameter in vae.encoder.parameters())

    def test_betas_reach_up_to_the_largest(self):
        made = DecoderObjective(MultiBetaVAE(TOY), 0.5).reconstruct(torch.zeros(400, 3, 16, 16), generator())
        assert made.beta.min() < 0.01 and 0.49 < made.beta.max() < 0.5
        with pytest.raises(ValueError, match="largest_beta must be"):
            DecoderObjective(MultiBetaVAE(TOY), 1.0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("weight", -1.0),
        ("start", 1.1),
        ("penalty", float("nan")),
        ("perceptual_weight", -0.1),
        ("discriminator_rate", -1.0),
        ("discriminator_channels", 5),
        ("discriminator_layers", 0),
        ("heads", "heads.pth"),
        ("beta_weighted", 1),
    ],
)
def test_impossible_options_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        AdversarialOptions(**{field: value})


def test_a_discriminator_fits_its_images():
    with pytest.raises(ValueError, match=r"discriminator_layers must be at most 2 for 16 x 16 pixels, got 3"):
        AdversarialOptions().discriminator(3, 16)
    assert AdversarialOptions(discriminator_layers=2).discriminator(3, 16)(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 2, 2)


def test_weights_of_lpips_are_of_colours(tmp_path):
    with pytest.raises(ValueError, match="vgg belongs to images of 3 channels, these have 1"):
        AdversarialOptions(vgg=str(tmp_path)).lpips(1)


def test_what_is_left_out_is_said(caplog):
    caplog.set_level(logging.INFO, logger="multibeta")
    AdversarialOptions(weight=0.0).say_what_is_left_out()
    AdversarialOptions(vgg="vgg.pth").say_what_is_left_out()
    assert not caplog.messages
    AdversarialOptions().say_what_is_left_out()
    assert "training goes on without it" in caplog.text
