"""The engine on the Triton kernels walks as the plain loop on the references: run by tests/test_kernels_triton.py."""

import dataclasses

import pytest
import torch
import triton

import multibeta
from multibeta import diffusion_vae, ops
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion, sampler_rows
from multibeta.sampling import Engine, EngineOptions, sample

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
torch.backends.cudnn.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue], TF32 is three digits
CONFIG = DiffusionConfig(
    latent_channels=4, latent_resolution=4, base_channels=16, channel_multipliers=(1,), num_res_blocks=1,
    attention_resolutions=(), head_channels=8, num_groups=4, num_steps=20,
)  # fmt: skip


def test_the_network_runs_and_walks_under_triton_alone():
    """What has no kernel of Triton, attention and the first noise, stays on auto, or is chosen by its name."""
    generator = torch.Generator().manual_seed(0)
    diffusion = NonlinearDiffusion(dataclasses.replace(CONFIG, attention_resolutions=(4,))).eval().requires_grad_(False)
    for parameter in diffusion.unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1, generator=generator)
    rows, seeds = sampler_rows(diffusion.sigmas + 0.05, "ancestral", 3), torch.tensor([5, -1])
    initial = torch.randn(2, 4, 4, 4, generator=generator)
    with multibeta.backend("reference"):
        expected = sample(diffusion.predict, rows, initial, seeds)
    diffusion = diffusion.to(DEVICE)
    engine = Engine(diffusion.unet, EngineOptions(dtype=torch.float32))
    schedule = rows, diffusion.head_rows(rows.steps).cpu(), rows.steps * 50.0
    for chosen in ({}, {"attention": "sdpa"}, {"attention": "reference"}):
        with multibeta.backend("triton", **chosen):
            walks = [sample(diffusion.predict, rows, initial.to(DEVICE), seeds.to(DEVICE))]
            walks.append(engine.sample(*schedule, initial.to(DEVICE), seeds.to(DEVICE)))
            norm = next(iter(ops.find("group_norm_act").examples()))
            moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in norm[1].items()}
            served = ops.explain(
                "group_norm_act", *(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in norm[0]), **moved
            )
            assert served == "group_norm_act: triton"
        for walked in walks:
            assert (walked.cpu() - expected).norm() < 1e-4 * expected.norm()
    with multibeta.backend("triton", attention="triton"), pytest.raises(RuntimeError, match="attention: no triton kernel"):
        diffusion.unet(initial.to(DEVICE), torch.tensor([3, 5], device=DEVICE))


@pytest.mark.parametrize("sampler", ["ode2", "ancestral"])
def test_the_same_seeds_give_the_same_latents(sampler):
    generator = torch.Generator().manual_seed(0)
    diffusion = NonlinearDiffusion(CONFIG).eval().requires_grad_(False)
    for parameter in diffusion.unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1, generator=generator)
    rows = sampler_rows(diffusion.sigmas + 0.05, sampler, 4)
    initial, seeds = torch.randn(3, 4, 4, 4, generator=generator), torch.tensor([5, -1, 2**40])
    with multibeta.backend("reference"):
        expected = sample(diffusion.predict, rows, initial, seeds)
    engine = Engine(diffusion.unet.to(DEVICE), EngineOptions(dtype=torch.float32))
    schedule = rows, diffusion.head_rows(rows.steps), rows.steps * 50.0
    result = engine.sample(*schedule, initial.to(DEVICE), seeds.to(DEVICE)).cpu()
    assert (result - expected).norm() < 1e-4 * expected.norm()
    tensors = next(iter(ops.find("sampler_step").examples()))[0]
    assert ops.explain("sampler_step", *(tensor.to(DEVICE) for tensor in tensors)).startswith("sampler_step: triton")


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_one_head_beside_a_condition_gives_the_same_images(guidance):
    config = diffusion_vae.ConditionalDiffusionConfig(
        form="eq7", resolution=4, base_channels=16, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
        num_heads=2, num_groups=4,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    diffusion = diffusion_vae.ConditionalDiffusion(config).eval().requires_grad_(False)
    for parameter in diffusion.parameters():
        parameter.normal_(std=0.2, generator=generator)
    rows = diffusion_vae.sampler_rows(diffusion.process.alpha_bars, "ddpm", 4)
    initial, reconstruction = torch.randn(2, 3, 3, 4, 4, generator=generator).clamp(-1, 1)
    seeds = torch.tensor([5, -1, 2**40])
    with multibeta.backend("reference"):
        expected = sample(diffusion.predictor(reconstruction, guidance=guidance), rows, initial, seeds)
    engine = Engine(diffusion.unet.to(DEVICE), EngineOptions(dtype=torch.float32))
    result = engine.sample(
        rows,
        diffusion.head_rows(rows.steps),
        rows.steps,
        initial.to(DEVICE),
        seeds.to(DEVICE),
        condition=reconstruction.to(DEVICE),
        guidance_rows=diffusion.guidance_rows(rows.steps, guidance) if guidance else None,
    ).cpu()
    assert (result - expected).norm() < 1e-4 * expected.norm()
