import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import multibeta
from multibeta import ops
from multibeta.flow_map import FlowMap
from multibeta.interop.scheduler import NonlinearDiffusionScheduler
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import UNet
from multibeta.nonlinear_diffusion import PARAMETERIZATIONS, SAMPLERS, DiffusionConfig, NonlinearDiffusion, process_statistics
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.pipelines.base import INITIAL_STREAM
from multibeta.sampling import sample

STEPS = 50
VAE = VAEConfig(
    resolution=16,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    mid_attention=False,
    num_groups=4,
    embedding_channels=16,
    num_steps=STEPS,
)
DIFFUSION = DiffusionConfig(
    latent_resolution=8,
    base_channels=8,
    channel_multipliers=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    head_channels=8,
    num_groups=4,
    num_steps=STEPS,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def foreign_unet():
    """A small `UNet2DModel` of diffusers with two heads."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


def process(unet=None, **changes):
    """A model of random weights whose process fits a random encoder; every number of its tables differs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, diffusion = MultiBetaVAE(VAE), NonlinearDiffusion(replace(DIFFUSION, **changes), unet)
        if unet is None:
            nn.init.normal_(diffusion.unet.conv_out.weight, std=0.05)  # it starts at zero
    sigmas = vae.sigmas()
    if diffusion.config.sigma_per_channel:
        sigmas = sigmas[:, None] ** torch.tensor([0.8, 1.0, 1.3, 2.0])
    images = rand(16, 3, 16, 16, seed=3).clamp(-1, 1)
    diffusion.set_process(sigmas, *process_statistics(vae.encode, images, STEPS, nodes=10))
    return vae, diffusion.eval().requires_grad_(False)


def run(scheduler, unet, latent, steps, **options):
    """The loop of every pipeline of diffusers."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(latent, timestep), timestep.expand(len(latent)))
            latent = scheduler.step(getattr(output, "sample", output), timestep, latent, **options).prev_sample
    return latent


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


class TestWalk:
    @pytest.mark.parametrize("sampler", SAMPLERS)
    @pytest.mark.parametrize(
        "changes", [*({"parameterization": name} for name in PARAMETERIZATIONS), {"sigma_per_channel": True}], ids=str
    )
    def test_is_the_plain_loop_on_the_models_prediction(self, sampler, changes):
        _, diffusion = process(**changes)
        seeds, noise = torch.tensor([3, 2**40]), rand(2, 4, 8, 8)
        rows = multibeta.nonlinear_diffusion.sampler_rows(diffusion.sigmas, sampler, 7)
        expected = sample(diffusion.predict, rows, diffusion.initial(noise), seeds)
        scheduler = NonlinearDiffusionScheduler.from_model(diffusion, sampler)
        scheduler.seeds = seeds
        assert torch.equal(scheduler.initial(noise), diffusion.initial(noise))
        centred = diffusion.config.parameterization != "residual"  # whose latents at beta = 1 have a mean
        start = noise * scheduler.init_noise_sigma if centred else scheduler.initial(noise)
        actual = run(scheduler, diffusion.unet, start, 7)
        close(actual, expected)
        assert (actual - noise).abs().max() > 0.1

    def test_part_of_the_way_is_denoise(self):
        model = DenoisingMultiBetaVAE(*process())
        latent, scheduler = rand(2, 4, 8, 8), NonlinearDiffusionScheduler.from_model(model.diffusion, "ode2")
        actual = latent
        scheduler.set_timesteps(5, beta=0.5)
        for timestep in scheduler.timesteps:
            output = model.diffusion.unet(scheduler.scale_model_input(actual, timestep), timestep.expand(2))
            (actual,) = scheduler.step(output, timestep, actual, return_dict=False)
        with multibeta.backend("reference"):
            close(actual, model.denoise(latent, 0.5, "ode2", 5))

    def test_noise_is_of_the_seeds_or_of_the_generator(self):
        _, diffusion = process()
        scheduler, noise = NonlinearDiffusionScheduler.from_model(diffusion, "ancestral"), rand(3, 4, 8, 8)
        default = run(scheduler, diffusion.unet, noise, 5)
        assert torch.equal(run(scheduler, diffusion.unet, noise, 5), default)
        scheduler.seeds = torch.tensor([2])
        close(run(scheduler, diffusion.unet, noise[2:], 5), default[2:])  # not of the batch

        scheduler.seeds = None
        first, second, other = (
            run(scheduler, diffusion.unet, noise, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert torch.equal(first, second) and not torch.allclose(first, other) and not torch.allclose(first, default)
        ode = NonlinearDiffusionScheduler.from_config(scheduler.config, sampler="ode")
        generator = torch.Generator().manual_seed(0)
        close(run(ode, diffusion.unet, noise, 5, generator=generator), run(ode, diffusion.unet, noise, 5))
        assert torch.equal(torch.randn(1, generator=generator), rand(1))  # nothing was drawn

    def test_the_noise_of_a_generator_has_the_rows_deviation(self):
        _, diffusion = process()
        scheduler, latent = NonlinearDiffusionScheduler.from_model(diffusion, "resample"), torch.zeros(64, 4, 8, 8)
        scheduler.set_timesteps(5)
        given = torch.zeros(64, 8, 8, 8), scheduler.timesteps[0], latent
        spread = scheduler.step(*given, generator=torch.Generator().manual_seed(0)).prev_sample.std()
        assert float(spread) == pytest.approx(float(diffusion.sigmas[40]), rel=0.03)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_latents_keep_their_dtype(self, dtype):
        _, diffusion = process()
        scheduler = NonlinearDiffusionScheduler.from_model(diffusion, "ancestral")
        scheduler.set_timesteps(2)
        latent = scheduler.initial(rand(2, 4, 8, 8).to(dtype))
        seen = scheduler.scale_model_input(latent, scheduler.timesteps[0])
        after = scheduler.step(torch.zeros(2, 8, 8, 8), scheduler.timesteps[0], latent).prev_sample
        assert latent.dtype == seen.dtype == after.dtype == diffusion.initial(latent).dtype == dtype

    def test_any_integer_is_a_seed(self):
        _, diffusion = process()
        scheduler, noise = NonlinearDiffusionScheduler.from_model(diffusion, "ancestral"), rand(2, 4, 8, 8)
        scheduler.seeds = [2**64 - 1, 2**63]
        actual = run(scheduler, diffusion.unet, noise, 3)
        scheduler.seeds = torch.tensor([-1, -(2**63)])
        assert torch.equal(run(scheduler, diffusion.unet, noise, 3), actual)

    def test_errors_say_what_is_possible(self):
        _, diffusion = process()
        scheduler, latent = NonlinearDiffusionScheduler.from_model(diffusion, "ode"), torch.zeros(2, 4, 8, 8)
        output = torch.zeros(2, 8, 8, 8)
        scheduler.set_timesteps(2)
        first, second = scheduler.timesteps
        with pytest.raises(ValueError, match=r"both heads, \(2, 8, 8, 8\), got \(2, 4, 8, 8\)"):
            scheduler.step(latent, first, latent)
        for wrong, message in (
            (latent[0], r"latents must have shape \(N, 4, H, W\), got \(4, 8, 8\)"),
            (latent[:, :1], r"latents must have shape \(N, 4, H, W\), got \(2, 1, 8, 8\)"),
            (latent.long(), r"latents must be of floating point, got torch\.int64"),
        ):
            for call in (
                lambda wrong: scheduler.step(output, first, wrong),
                lambda wrong: scheduler.scale_model_input(wrong, first),
                scheduler.initial,
            ):
                with pytest.raises(ValueError, match=message):
                    call(wrong)
        scheduler.seeds = [0.5, 1.5]
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got 0\.5"):
            scheduler.step(output, first, latent)
        scheduler.seeds = None
        with pytest.raises(ValueError, match="the next timestep is 1000, got 500"):
            scheduler.step(output, second, latent)
        scheduler.seeds = torch.arange(3)
        with pytest.raises(ValueError, match=r"one seed per sample is needed, got \(3,\) for 2"):
            scheduler.step(output, first, latent)
        scheduler.seeds = None
        for timestep in (first, second):
            scheduler.step(output, timestep, latent)
        with pytest.raises(ValueError, match="the walk is over"):
            scheduler.step(output, second, latent)
        with pytest.raises(ValueError, match="steps must lie between 1 and 50"):
            scheduler.set_timesteps(51)
        with pytest.raises(NotImplementedError, match=r"use model\.encode\(images, beta"):
            scheduler.add_noise(latent, latent, first)
        with pytest.raises(ValueError, match="resample, ancestral, ode, ode2, heun, map, map_noise, got 'ddim'"):
            NonlinearDiffusionScheduler.from_model(diffusion, "ddim")
        diffusion.latent_mean[-1] = 1
        with pytest.raises(ValueError, match=r"start from scheduler\.initial"):
            _ = NonlinearDiffusionScheduler.from_model(diffusion).init_noise_sigma


class TestConfig:
    @pytest.mark.parametrize("sigma_per_channel", [False, True])
    def test_a_loaded_scheduler_is_the_saved_one(self, tmp_path, sigma_per_channel):
        _, diffusion = process(sigma_per_channel=sigma_per_channel)
        saved = NonlinearDiffusionScheduler.from_model(diffusion, "heun", delta_sign=-1)
        saved.save_pretrained(tmp_path / "model" / "scheduler")
        loaded = NonlinearDiffusionScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
        assert loaded.config == saved.config and repr(loaded) == repr(saved)
        assert loaded.config.num_train_timesteps == len(loaded) == STEPS and loaded.order == 2
        noise = rand(2, 4, 8, 8)
        assert torch.equal(run(loaded, diffusion.unet, noise, 4), run(saved, diffusion.unet, noise, 4))
        assert [path.name for path in (tmp_path / "model" / "scheduler").iterdir()] == ["scheduler_config.json"]

    def test_what_is_no_scheduler_of_ours(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing"):
            NonlinearDiffusionScheduler.from_pretrained(tmp_path)
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
        with pytest.raises(ValueError, match="of a DDPMScheduler, not of a NonlinearDiffusionScheduler"):
            NonlinearDiffusionScheduler.from_pretrained(tmp_path)

    def test_a_damaged_file_is_named(self, tmp_path):
        _, diffusion = process()
        NonlinearDiffusionScheduler.from_model(diffusion).save_pretrained(tmp_path)
        path = tmp_path / "scheduler_config.json"
        whole = json.loads(path.read_text())
        damaged = [3, [whole], "text", {}, *({key: value for key, value in whole.items() if key != name} for name in ("sigmas",))]
        for name in ("sigmas", "latent_mean", "velocity_rms"):
            damaged += [whole | {name: value} for value in (None, "a", 3, [], [[1.0], [1.0, 2.0]], [math.nan] * (STEPS + 1))]
        for name in ("sampler", "parameterization", "schedule", "delta_sign"):
            damaged += [whole | {name: value} for value in (None, "foo", [1, 1], {})]
        for config in damaged:
            path.write_text(json.dumps(config))
            with pytest.raises(ValueError, match=r"scheduler_config\.json does not describe a NonlinearDiffusionScheduler"):
                NonlinearDiffusionScheduler.from_pretrained(tmp_path)


class TestDiffusers:
    def test_its_unet_in_our_pipeline_walks_plainly(self):
        unet = foreign_unet()
        model = DenoisingMultiBetaVAE(*process(unet))
        assert model.engine.explain().endswith("the UNet of multibeta, the network is a UNet2DModel")
        images = model.generate(3, "ancestral", 5, seed=4)
        close(model.generate(3, "ancestral", 5, seed=4, batch_size=2), images)

        seeds = ops.sample_seeds(4, torch.arange(3))
        scheduler = NonlinearDiffusionScheduler.from_model(model.diffusion, "ancestral")
        scheduler.seeds = seeds
        noise = scheduler.initial(ops.standard_normal(seeds, STEPS, (4, 8, 8), stream=INITIAL_STREAM))
        close(model.decode(run(scheduler, unet, noise, 5)), images)

    def test_its_unet_may_be_set_later(self):
        model, unet = DenoisingMultiBetaVAE(*process()), foreign_unet().eval()
        before = model.generate(2, steps=3)
        ours, model.diffusion.unet = model.diffusion.unet, unet
        expected = DenoisingMultiBetaVAE(model.vae, model.diffusion).generate(2, steps=3)
        actual = model.generate(2, steps=3)
        close(actual, expected)  # two decoders may measure, and so round, differently
        assert not torch.allclose(actual, before, atol=1e-3)
        model.diffusion.unet = ours
        close(model.generate(2, steps=3), before)
        assert isinstance(model.engine.network, UNet)

    def test_its_unet_is_trained_as_ours(self):
        vae, diffusion = process(foreign_unet())
        diffusion.requires_grad_(True)
        objective = multibeta.nonlinear_diffusion.NonlinearDiffusionObjective(diffusion, vae.encode)
        batch = type("Batch", (), {"images": rand(2, 3, 16, 16).clamp(-1, 1)})
        loss, _ = objective(batch, torch.Generator().manual_seed(0))
        loss.backward()
        assert all(parameter.grad is not None for parameter in diffusion.unet.conv_out.parameters())

    def test_a_model_around_its_unet_is_not_saved(self, tmp_path):
        with pytest.raises(ValueError, match=r"a UNet2DModel cannot be saved.*NonlinearDiffusion\(config, unet=UNet2DModel"):
            DenoisingMultiBetaVAE(*process(foreign_unet())).save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
        vae, diffusion = process(foreign_unet())
        _, other = process(foreign_unet())
        other.load_state_dict(diffusion.state_dict())  # as the message says
        models = [DenoisingMultiBetaVAE(vae, stage) for stage in (diffusion, other)]
        assert torch.equal(*(model.generate(2, steps=3) for model in models))

    def test_its_unet_must_have_two_heads(self):
        diffusers = pytest.importorskip("diffusers")
        unet = diffusers.UNet2DModel(in_channels=4, out_channels=4, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                                     up_block_types=("UpBlock2D",))  # fmt: skip
        with pytest.raises(ValueError, match="read 4 and return 8 channels, got 4 and 4"):
            NonlinearDiffusion(DIFFUSION, unet)

    @pytest.mark.parametrize("sampler", ["ode2", "heun"])
    def test_its_ddpm_pipeline_walks_our_process(self, sampler):
        """The unchanged pipeline: of a "literal" process the network reads the latent as it is, from N(0, I)."""
        diffusers = pytest.importorskip("diffusers")
        unet = foreign_unet().eval()
        _, diffusion = process(unet, parameterization="literal")
        scheduler = NonlinearDiffusionScheduler.from_model(diffusion, sampler)
        pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        actual = pipeline(batch_size=2, generator=generator, num_inference_steps=6, output_type="np").images
        rows = multibeta.nonlinear_diffusion.sampler_rows(diffusion.sigmas, sampler, 6)
        expected = sample(diffusion.predict, rows, rand(2, 4, 8, 8), torch.arange(2))
        close(torch.from_numpy(actual).permute(0, 3, 1, 2), (expected / 2 + 0.5).clamp(0, 1))


class TestFlowMap:
    @pytest.mark.parametrize("sampler", ["map", "map_noise"])
    def test_its_walk_is_that_of_the_model(self, sampler, tmp_path):
        vae, diffusion = process()
        flow_map = FlowMap.of(diffusion.unet, diffusion.config, STEPS, span_channels=8, paths=((20,),), noise_paths=((10, 15),))
        nn.init.normal_(flow_map.unet.span_layers[-1].weight, std=0.5)
        model = DenoisingMultiBetaVAE(vae, diffusion, flow_map=flow_map)
        NonlinearDiffusionScheduler.from_model(diffusion, sampler, flow_map=flow_map).save_pretrained(tmp_path)
        scheduler, latent = NonlinearDiffusionScheduler.from_pretrained(tmp_path), rand(2, 4, 8, 8)
        for steps in (1, 2, 3):
            actual = latent
            scheduler.set_timesteps(steps)
            assert tuple(scheduler.timesteps.shape) == (steps, 2)
            for timestep in scheduler.timesteps:
                output = flow_map.unet(scheduler.scale_model_input(actual, timestep), timestep.expand(2, 2))
                actual = scheduler.step(output, timestep, actual).prev_sample
            with multibeta.backend("reference"):
                close(actual, model.denoise(latent, 1.0, sampler, steps))

    def test_what_cannot_be_is_refused(self):
        _, diffusion = process(parameterization="literal")
        with pytest.raises(ValueError, match='which parameterization "literal" has not'):
            NonlinearDiffusionScheduler.from_model(diffusion, "map")
        _, diffusion = process()
        with pytest.raises(ValueError, match="delta_sign must be 1, got -1"):
            NonlinearDiffusionScheduler.from_model(diffusion, "map", -1)
        scheduler = NonlinearDiffusionScheduler.from_model(diffusion, "map")
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match=r"the next timestep is 1000, 500, got 500, 500"):
            scheduler.step(rand(1, 8, 8, 8), scheduler.timesteps[1], rand(1, 4, 8, 8))
