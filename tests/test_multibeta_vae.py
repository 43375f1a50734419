import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from multibeta.multibeta_vae import (
    MultiBetaObjective,
    MultiBetaVAE,
    TrainingCollapsed,
    VAEConfig,
    fold_principal_axes,
    gaussian_log_density,
    kl_to_standard_normal,
    multibeta_objective,
    scale_gradient,
    slope_ratio,
    untie_sigma,
)

TINY = VAEConfig(
    resolution=16,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    mid_attention=False,
    num_groups=4,
    embedding_channels=16,
    num_steps=50,
)
TINY_TOY = dataclasses.replace(TINY, architecture="toy", latent_channels=6, activation="sigmoid")


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def build(config=TINY):
    torch.manual_seed(0)
    return MultiBetaVAE(config).eval()


class TestObjective:
    BETA = torch.tensor([0.0, 0.4, 1.0])

    def terms(self, seed=0):
        return {
            "image": rand(3, 3, 8, 8, seed=seed),
            "reconstruction": rand(3, 3, 8, 8, seed=seed + 1),
            "mean": rand(3, 4, 2, 2, seed=seed + 2),
            "sigma": torch.tensor([0.1, 0.5, 1.0]),
            "decoder_sigma": torch.tensor([0.1, 0.3, 0.7]),
            "beta": self.BETA,
        }

    def test_is_equation_4(self):
        terms = self.terms()
        log_likelihood = gaussian_log_density(terms["image"], terms["reconstruction"], terms["decoder_sigma"])
        kl = kl_to_standard_normal(terms["mean"], terms["sigma"])
        for beta_max in (1.0, 2.0):
            expected = -(beta_max - self.BETA) * log_likelihood + self.BETA * kl
            torch.testing.assert_close(multibeta_objective(**terms, beta_max=beta_max), expected)

    def test_beta_zero_ignores_the_kl(self):
        terms = self.terms()
        other = {**terms, "mean": 5 * terms["mean"], "sigma": 2 * terms["sigma"]}
        same = multibeta_objective(**terms) == multibeta_objective(**other)
        assert same.tolist() == [True, False, False]

    def test_beta_one_ignores_the_reconstruction(self):
        terms = self.terms()
        other = {**terms, "reconstruction": terms["reconstruction"] + 1, "decoder_sigma": 2 * terms["decoder_sigma"]}
        same = multibeta_objective(**terms) == multibeta_objective(**other)
        assert same.tolist() == [False, False, True]

    def test_the_printed_sums_are_a_balance_of_pixels_to_latent_dimensions(self):
        terms = self.terms()
        printed = multibeta_objective(**terms)
        torch.testing.assert_close(multibeta_objective(**terms, balance=192 / 16), printed)

    def test_balance_one_weighs_a_pixel_as_a_latent_dimension(self):
        terms = self.terms()
        per_pixel = gaussian_log_density(terms["image"], terms["reconstruction"], terms["decoder_sigma"]) / 192
        per_dimension = kl_to_standard_normal(terms["mean"], terms["sigma"]) / 16
        for balance in (1.0, 3.0):
            expected = 16 * (self.BETA * per_dimension - (1 - self.BETA) * balance * per_pixel)
            torch.testing.assert_close(multibeta_objective(**terms, balance=balance), expected)

    def test_kl_at_beta_one_is_zero_exactly_for_the_prior(self):
        terms = {**self.terms(), "mean": torch.zeros(3, 4, 2, 2)}
        assert multibeta_objective(**terms)[2] == 0


class TestTrainingObjective:
    def gradients(self, decoder_weight):
        vae = build().train()
        objective = MultiBetaObjective(vae, decoder_weight=decoder_weight)
        batch = SimpleNamespace(images=images(16), progress=1.0)
        loss, scalars = objective(batch, torch.Generator().manual_seed(0))
        loss.backward()
        assert loss.isfinite() and all(torch.isfinite(torch.as_tensor(value)) for value in scalars.values())
        parts = {"encoder": vae.encoder, "sigma": vae.sigma, "decoder": vae.decoder}
        return {
            name: torch.cat([parameter.grad.flatten() for parameter in module.parameters()]) for name, module in parts.items()
        }

    def test_decoder_weight_is_felt_by_the_decoder_alone(self):
        without, with_it = self.gradients(0.0), self.gradients(0.1)
        for part in ("encoder", "sigma"):
            difference = (with_it[part] - without[part]).norm() / without[part].norm()
            assert difference < 1e-4, part
        growth = with_it["decoder"].norm() / without["decoder"].norm()
        assert growth > 1.05

    def test_scale_gradient_changes_the_gradient_and_not_the_value(self):
        x, factor = rand(3, 2, 2, 2).requires_grad_(), torch.tensor([0.0, 0.3, 1.0])
        y = scale_gradient(x, factor)
        torch.testing.assert_close(y, x)
        weight = rand(3, 2, 2, 2, seed=1)
        (y * weight).sum().backward()
        torch.testing.assert_close(x.grad, weight * factor.view(3, 1, 1, 1))

    def test_balance_anneals_geometrically_from_the_printed_sums(self):
        objective = MultiBetaObjective(build(), balance=2.0, anneal=0.25)
        values = [objective.balance_at(progress, 768, 64) for progress in (0.0, 0.125, 0.25, 0.6, 1.0)]
        assert values == pytest.approx([12, math.sqrt(12 * 2), 2, 2, 2])

    def test_no_anneal_and_no_balance(self):
        assert MultiBetaObjective(build(), balance=3.0, anneal=0.0).balance_at(0.0, 768, 64) == 3.0
        assert MultiBetaObjective(build(), balance=None).balance_at(0.0, 768, 64) is None

    def test_losses_compare_once_the_balance_stays(self):
        objective = MultiBetaObjective(build(), balance=2.0, anneal=0.25)
        since = objective.comparable_from
        assert objective.balance_at(since, 768, 64) == objective.balance_at(1.0, 768, 64) != objective.balance_at(0.2, 768, 64)
        assert MultiBetaObjective(build(), balance=None).comparable_from == 0

    def test_the_curves_have_their_own_learning_rate_and_nothing_is_left_out(self):
        vae = build()
        networks, curves = MultiBetaObjective(vae, curve_learning_rate=7.0).parameter_groups()
        assert (networks["learning_rate_scale"], curves["learning_rate_scale"]) == (1.0, 7.0)
        assert {id(p) for p in curves["params"]} == {id(vae.sigma.raw_increments), id(vae.decoder_sigma.log_s)}
        assert {id(p) for group in (networks, curves) for p in group["params"]} == {id(p) for p in vae.parameters()}

    def test_collapse_stops_training_with_advice(self):
        vae = build()
        objective = MultiBetaObjective(vae, collapse_step=500)
        objective(SimpleNamespace(images=images(8), progress=1.0), torch.Generator().manual_seed(0))
        with torch.no_grad():
            vae.encoder.conv_out.weight.mul_(20)  # encodings that differ between images
        objective.check(500)
        with torch.no_grad():
            vae.encoder.conv_out.weight.zero_()
        objective.check(499)
        with pytest.raises(TrainingCollapsed, match=r"at step 500 .* 0\.0000 .*Raise the balance \(now 2\.0\)"):
            objective.check(500)

    def test_collapse_is_seen_over_pieces_of_one_image(self):
        vae = build()
        objective = MultiBetaObjective(vae)
        with torch.no_grad():
            vae.encoder.conv_out.weight.zero_()
        for image in images(4).split(1):
            objective(SimpleNamespace(images=image, progress=1.0), torch.Generator().manual_seed(0))
        with pytest.raises(TrainingCollapsed):
            objective.check(500)


class TestFold:
    @pytest.mark.parametrize("config", [TINY, TINY_TOY], ids=["ldm", "toy"])
    def test_a_single_channel_is_its_own_axis(self, config):
        vae, x = build(dataclasses.replace(config, latent_channels=1)), images(8)
        with torch.no_grad():
            codes = vae.encode(x, 0.5)
            assert fold_principal_axes(vae, codes).tolist() == [[1.0]]
            torch.testing.assert_close(vae.encode(x, 0.5), codes)

    @pytest.mark.parametrize("config", [TINY, TINY_TOY], ids=["ldm", "toy"])
    def test_leaves_the_function_of_the_vae_unchanged(self, config):
        vae, x = build(config), images(64)
        betas = (0.0, 0.3, 0.7, 1.0)
        with torch.no_grad():
            codes = {beta: vae.encode(x, beta) for beta in betas}
            decoded = {beta: vae.decode(codes[beta], beta) for beta in betas}
            rotation = fold_principal_axes(vae, vae.encode(x, 0.5))
            for beta in betas:
                rotated = torch.einsum("cd,nchw->ndhw", rotation, codes[beta])
                torch.testing.assert_close(vae.encode(x, beta), rotated, rtol=0, atol=1e-5)
                torch.testing.assert_close(vae.decode(vae.encode(x, beta), beta), decoded[beta], rtol=0, atol=1e-5)
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(len(rotation)), rtol=0, atol=1e-6)
        assert not torch.allclose(rotation, torch.eye(len(rotation)), atol=0.1)

    @pytest.mark.parametrize("config", [TINY, TINY_TOY], ids=["ldm", "toy"])
    def test_puts_the_largest_variance_first(self, config):
        vae, x = build(config), images(64)
        with torch.no_grad():
            fold_principal_axes(vae, vae.encode(x, 0.5))
            covariance = torch.cov(vae.encode(x, 0.5).transpose(0, 1).flatten(1))
        variances = covariance.diagonal()
        assert (covariance - variances.diag()).abs().max() < 1e-5 * variances.max()
        assert (variances.diff() <= 0).all()


class TestUntie:
    @pytest.mark.parametrize("config", [TINY, TINY_TOY])
    def test_starts_as_the_shared_curve(self, config):
        vae = build(config)
        untied, x = untie_sigma(vae), images(3)
        assert untied.config.sigma_per_channel and not vae.config.sigma_per_channel
        assert untied.sigmas().shape == (config.num_steps + 1, config.latent_channels)
        torch.testing.assert_close(untied.sigmas(), vae.sigmas()[:, None].expand_as(untied.sigmas()))
        assert torch.equal(untied.encode(x, 0.3), vae.encode(x, 0.3))
        batch = SimpleNamespace(images=x, progress=1.0)
        losses = [MultiBetaObjective(v)(batch, torch.Generator().manual_seed(0))[0] for v in (vae, untied)]
        torch.testing.assert_close(*losses)

    def test_every_curve_learns_by_itself_and_stays_pinned(self):
        vae = untie_sigma(build(TINY_TOY))
        loss, _ = MultiBetaObjective(vae)(SimpleNamespace(images=images(8), progress=1.0), torch.Generator().manual_seed(0))
        loss.backward()
        gradient = vae.sigma.raw_increments.grad
        assert gradient.abs().sum(1).ne(0).all() and len(gradient.sum(1).unique()) == 6
        with torch.no_grad():
            vae.sigma.raw_increments -= 10 * gradient
        sigmas = vae.sigmas()
        assert (sigmas.diff(dim=0) > 0).all() and (sigmas[-1] == 1).all()

    def test_axes_with_their_own_noise_cannot_be_rotated(self):
        vae = untie_sigma(build())
        with pytest.raises(ValueError, match="fold them before untie_sigma"):
            fold_principal_axes(vae, vae.encode(images(8), 0.5))
        with pytest.raises(ValueError, match="already"):
            untie_sigma(vae)


class TestSmoothness:
    IMAGES = images(16)

    def ratios(self, **changed):
        vae = build(dataclasses.replace(TINY, **changed))
        return [slope_ratio(vae, self.IMAGES, beta) for beta in (0.1, 0.3, 0.5, 0.7)]

    def test_encoder_is_smooth_in_beta(self):
        assert max(self.ratios()) < 2

    def test_a_time_step_embedding_makes_it_oscillate(self):
        assert min(self.ratios(embedding_max_frequency=200 * math.pi)) > 3


class TestVAE:
    @pytest.mark.parametrize("config", [TINY, TINY_TOY], ids=["ldm", "toy"])
    def test_one_beta_a_sample_equals_a_single_beta(self, config):
        vae, x, betas = build(config), images(3), torch.tensor([0.0, 0.37, 1.0])
        with torch.no_grad():
            codes = vae.encode(x, betas)
            assert codes.shape == (3, *config.latent_shape)
            decoded = vae.decode(codes, betas)
            assert decoded.shape == x.shape
            for index, beta in enumerate(betas.tolist()):
                alone = vae.encode(x[index : index + 1], beta)
                torch.testing.assert_close(codes[index : index + 1], alone, rtol=1e-4, atol=1e-5)
                again = vae.decode(alone, beta)
                torch.testing.assert_close(decoded[index : index + 1], again, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("config", [TINY, TINY_TOY], ids=["ldm", "toy"])
    def test_at_beta_one_the_posterior_is_the_prior(self, config):
        vae, x = build(config), images(3)
        one = torch.ones(3)
        with torch.no_grad():
            assert not vae.encode(x, 1.0).any()
            assert not kl_to_standard_normal(vae.encode(x, one), vae.sigma(one)).any()
            as_printed = build(dataclasses.replace(config, collapse_exponent=None))
            assert as_printed.encode(x, 1.0).any()
            torch.testing.assert_close(vae.encode(x, 0.5), (1 - 0.5**8) * as_printed.encode(x, 0.5))
            assert torch.equal(vae.encode(x, 0.0), as_printed.encode(x, 0.0))

    @pytest.mark.parametrize("beta", [1.3, -0.1, math.nan, torch.tensor([0.5, 1.3])])
    def test_beta_outside_the_unit_interval(self, beta):
        vae = build()
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
            vae.encode(images(2), beta)
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
            vae.decode(torch.zeros(2, *TINY.latent_shape), beta)

    def test_sigmas_lie_on_the_grid_of_the_schedule(self):
        for schedule in ("linear", "sinusoidal"):
            vae = build(dataclasses.replace(TINY, schedule=schedule))
            sigmas = vae.sigmas()
            assert sigmas.shape == (51,) and not sigmas.requires_grad
            middle = 0.5 if schedule == "linear" else math.sin(math.pi / 4)
            torch.testing.assert_close(sigmas[25], vae.sigma(torch.tensor(middle)).detach(), rtol=1e-4, atol=0)
            assert sigmas[-1] == 1

    @pytest.mark.parametrize(("architecture", "multiple"), [("ldm", 4), ("toy", 8)])
    def test_resolution_must_suit_the_levels(self, architecture, multiple):
        with pytest.raises(ValueError, match=f"multiple of {multiple}, got 18"):
            MultiBetaVAE(dataclasses.replace(TINY, architecture=architecture, resolution=18, channel_multipliers=(1, 1, 1)))
