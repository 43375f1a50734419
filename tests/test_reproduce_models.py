"""What the experiments train: one budget, refused where it is none, and models that are trained once."""

import pytest
import torch

from multibeta.reproduce.models import FOLDED, MULTI_BETA, UNTIED, Study, trained_vae


class TestBudget:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"seeds": ()}, "at least one seed"),
            ({"seeds": (0, True)}, r"a seed must be an integer .*, got True"),
            ({"seeds": (0.5,)}, r"a seed must be an integer .*, got 0.5"),
            ({"steps": -5}, "steps must be at least 1, got -5"),
            ({"diffusion_steps": 2.5}, "diffusion_steps must be an integer, got 2.5"),
            ({"num_images": 0}, "num_images must be at least 1, got 0"),
            ({"learning_rate": float("nan")}, "learning_rate must be finite"),
            ({"networks": "scenes"}, "no recipe called 'scenes'; there are"),
            (
                {"networks": "diffusion-vae-scenes32"},
                "must be a recipe of the first system, got 'diff.*' of a DiffusionVAE",
            ),
        ],
    )
    def test_nonsense_is_refused_before_any_training(self, wrong, message):
        with pytest.raises(ValueError, match=message):
            Study(**wrong)


class TestModels:
    def test_every_method_has_the_same_budget(self, tiny_study):
        one, other = (tiny_study.recipe(0, untie=untie) for untie in (False, True))
        assert one.vae_training.steps == tiny_study.steps and one.vae_objective.untie_steps == 0
        assert other.vae_training.steps + other.vae_objective.untie_steps == tiny_study.steps

    def test_the_folded_variant_shares_the_first_stage(self, tiny_study, tmp_path):
        first = trained_vae(MULTI_BETA, tiny_study, 0, tmp_path, progress=False)
        folded = trained_vae(FOLDED, tiny_study, 0, tmp_path, progress=False)
        untied = trained_vae(UNTIED, tiny_study, 0, tmp_path, progress=False)
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        decoded = [vae.decode(vae.encode(images, 0.4), 0.4) for vae in (first, folded)]
        torch.testing.assert_close(*decoded, rtol=1e-4, atol=1e-4)
        assert untied.config.sigma_per_channel and not folded.config.sigma_per_channel

    def test_seeds_differ(self, tiny_study, tmp_path):
        pair = [trained_vae("beta-vae-1", tiny_study, seed, tmp_path / str(seed), progress=False) for seed in (0, 1)]
        assert not torch.equal(pair[0].encoder.conv_out.weight, pair[1].encoder.conv_out.weight)
