"""The verbs of a baseline."""

import pytest
import torch

from multibeta.networks import AutoencoderConfig
from multibeta.pipelines import (
    BaselineVAE,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


class TestBaseline:
    def test_encodes_to_the_mean_or_to_a_sample_of_the_seed(self, baseline):
        x = images(4)
        posterior = baseline.vae.posterior(x)
        assert torch.equal(baseline.encode(x), posterior.mean)
        noise = (baseline.encode(x, seeds=[7, 7, 8, 9]) - posterior.mean) / posterior.stddev
        torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
        assert (noise[0] - noise[2]).abs().mean() > 0.5
        assert noise.std().item() == pytest.approx(1, abs=0.1)

    def test_decodes_to_images(self, baseline):
        decoded = baseline.decode(100 * rand(2, 4, 8, 8))
        assert decoded.shape == (2, 3, 16, 16) and decoded.abs().max() <= 1

    def test_a_generated_image_depends_on_its_seed_and_index_alone(self, baseline):
        expected = baseline.generate(5, seed=3)
        torch.testing.assert_close(baseline.generate(5, seed=3, batch_size=2), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(baseline.generate(2, seed=3), expected[:2], rtol=0, atol=1e-5)
        assert not torch.allclose(baseline.generate(2, seed=4), expected[:2], atol=1e-3)
        assert baseline.generate(2, output_type="np").shape == (2, 16, 16, 3)

    def test_has_no_beta(self, baseline):
        for call in (lambda: baseline.encode(images(1), 0.0), lambda: baseline.decode(rand(1, 4, 8, 8), 0.5)):
            with pytest.raises(ValueError, match="one representation and takes no beta"):
                call()

    def test_refuses_what_the_other_model_refuses(self, baseline):
        with pytest.raises(ValueError, match=r"shape \(N, 3, 16, 16\)"):
            baseline.encode(torch.zeros(1, 3, 32, 32))
        with pytest.raises(ValueError, match=r"shape \(N, \*\(4, 8, 8\)\)"):
            baseline.decode(torch.zeros(2, 4, 4, 4))
        with pytest.raises(ValueError, match="pt, np, pil, got 'jpg'"):
            baseline.generate(1, output_type="jpg")
        with pytest.raises(ValueError, match="must be positive, got 0 and 64"):
            baseline.generate(0)

    def test_a_loaded_model_is_the_saved_one(self, baseline, tmp_path):
        baseline.save_pretrained(tmp_path)
        loaded = BaselineVAE.from_pretrained(tmp_path)
        assert loaded.info == {"method": "beta-vae-4"}
        assert type(loaded.vae.config) is AutoencoderConfig
        assert torch.equal(loaded.generate(2), baseline.generate(2))
        half = BaselineVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16 and half.encode(images(2)).dtype == half.generate(1).dtype == torch.float32
