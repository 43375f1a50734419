import copy
import functools
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.autograd import forward_ad

import multibeta
from multibeta import checkpoints
from multibeta.baselines import VAE as OrdinaryVAE
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion, ConditionalDiffusionConfig
from multibeta.latents import LatentMixture
from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import SAMPLERS, DiffusionConfig, NonlinearDiffusion, process_statistics
from multibeta.pipelines import (
    BaselineVAE,
    DenoisingMultiBetaVAE,
    DiffusionVAE,
    config_from_dict,
    load_pretrained,
    resolve_pretrained,
)
from multibeta.sampling import EngineOptions

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
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_groups=4,
    num_steps=STEPS,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


@pytest.fixture(scope="module")
def model():
    """Random weights, but a process that fits its encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, diffusion = MultiBetaVAE(VAE), NonlinearDiffusion(DIFFUSION)
        nn.init.normal_(diffusion.unet.conv_out.weight, std=0.05)  # it starts at zero
    diffusion.set_process(vae.sigmas(), *process_statistics(vae.encode, images(32), STEPS, nodes=10))
    return DenoisingMultiBetaVAE(vae, diffusion, {"recipe": "none"})


class TestGenerate:
    @pytest.mark.parametrize("sampler", ["ode2", "ancestral"])
    def test_an_image_depends_on_its_seed_and_index_alone(self, model, sampler):
        expected = model.generate(8, sampler, 5, seed=3, batch_size=8)
        assert expected.shape == (8, 3, 16, 16) and expected.abs().max() <= 1
        for batch_size in (1, 3):
            found = model.generate(8, sampler, 5, seed=3, batch_size=batch_size)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.generate(3, sampler, 5, seed=3), expected[:3], rtol=0, atol=1e-5)

    def test_seeds_and_indices_give_different_images(self, model):
        first, second = (model.generate(3, steps=5, seed=seed).flatten(1) for seed in (0, 1))
        distances = torch.cdist(torch.cat([first, second]), torch.cat([first, second])) + 10 * torch.eye(6)
        assert distances.min() > 0.05

    def test_output_types(self, model):
        tensor, array, pictures = (model.generate(2, steps=2, output_type=kind) for kind in ("pt", "np", "pil"))
        assert isinstance(array, np.ndarray) and array.dtype == np.float32 and array.shape == (2, 16, 16, 3)
        np.testing.assert_allclose(array, (tensor.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
        assert [(type(picture), picture.size, picture.mode) for picture in pictures] == [(Image.Image, (16, 16), "RGB")] * 2
        assert np.abs(np.asarray(pictures[1]) / 255 - array[1]).max() <= 0.5 / 255 + 1e-6

    def test_callback_counts_over_all_batches(self, model):
        seen = []
        model.generate(5, "heun", 3, batch_size=2, callback=lambda done, total, latent: seen.append((done, total, len(latent))))
        assert [news[:2] for news in seen] == [(done, 15) for done in range(1, 16)]
        assert [news[2] for news in seen] == [2] * 10 + [1] * 5

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_the_callback_of_diffusers_sees_model_step_and_latents(self, model, backend):
        seen, counted = [], []

        def on_step_end(pipeline, index, timestep, given):
            seen.append((pipeline, index, int(timestep), given["latents"]))
            return given

        with multibeta.backend(backend):
            expected = model.generate(3, "ode", 5, batch_size=2)
            found = model.generate(
                3, "ode", 5, batch_size=2, callback=lambda *news: counted.append(news), callback_on_step_end=on_step_end
            )
        assert torch.equal(found, expected)
        assert [news[1:3] for news in seen] == 2 * list(enumerate((50, 40, 30, 20, 10)))
        assert all(pipeline is model for pipeline, *_ in seen) and len(counted) == 10
        close(model.decode(seen[4][3]), expected[:2])  # what was kept is not overwritten

    def test_changed_latents_are_honoured_by_the_plain_loop_and_refused_by_the_engine(self, model):
        def replace_last(pipeline, index, timestep, given):
            return {"latents": torch.zeros_like(given["latents"])} if index == 4 else given

        def write_last(pipeline, index, timestep, given):
            given["latents"].mul_(0 if index == 4 else 1)
            return given

        for change in (replace_last, write_last):
            with pytest.raises(ValueError, match=r"the engine does not take: with multibeta\.backend\("):
                model.generate(2, "ode", 5, callback_on_step_end=change)
            with multibeta.backend("reference"):
                found = model.generate(2, "ode", 5, callback_on_step_end=change)
                close(found, model.decode(torch.zeros(2, 4, 8, 8)))
        with multibeta.backend("reference"), pytest.raises(ValueError, match=r"keep the shape \(2, 4, 8, 8\), got \(1,"):
            model.generate(2, "ode", 5, callback_on_step_end=lambda *news: {"latents": torch.zeros(1, 4, 8, 8)})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_images": 1, "seed": 1, "generator": torch.Generator()}, "a seed or a generator, not both: got seed=1"),
            ({"num_images": 1, "steps": STEPS + 1}, "between 1 and 50 .*got 51"),
            ({"num_images": 1, "sampler": "ddim"}, "got 'ddim'"),
            ({"num_images": 1, "output_type": "jpg"}, "pt, np, pil, got 'jpg'"),
            ({"num_images": 0}, "must be positive, got 0 and 64"),
            ({"num_images": 1, "batch_size": 0}, "must be positive, got 1 and 0"),
        ],
    )
    def test_errors_say_what_is_possible(self, model, arguments, message):
        with pytest.raises(ValueError, match=message):
            model.generate(**arguments)


class TestGenerator:
    """A torch.Generator in the place of the seed, and the bar, in every class."""

    @pytest.fixture(params=["model", "baseline", "refiner"])
    def generate(self, request):
        pipeline = request.getfixturevalue(request.param)
        return functools.partial(pipeline.generate, **({} if request.param == "baseline" else {"steps": 3}))

    def test_its_state_gives_the_seed(self, generate):
        generator = torch.Generator().manual_seed(5)
        first, second = (generate(2, generator=generator) for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-3)
        again = torch.Generator().manual_seed(5)
        assert torch.equal(generate(2, generator=again, batch_size=2), first)
        seed = int(torch.randint(2**63 - 1, (), generator=again))
        assert torch.equal(generate(2, seed=seed), second)

    def test_errors_say_what_is_possible(self, generate):
        with pytest.raises(ValueError, match="a seed or a generator, not both: got seed=3"):
            generate(1, seed=3, generator=torch.Generator())
        with pytest.raises(TypeError, match=r"one torch\.Generator, got a list"):
            generate(1, generator=[torch.Generator()])

    def test_the_bar_is_shown_once_it_is_configured(self, generate, capsys):
        pipeline = generate.func.__self__
        generate(2, batch_size=1)
        assert capsys.readouterr().err == ""
        try:
            pipeline.set_progress_bar_config(desc="walking")
            generate(2, batch_size=1)
            shown = capsys.readouterr().err
            assert "walking: 100%" in shown and (" 6/6 " in shown or " 2/2 " in shown)
            pipeline.set_progress_bar_config(disable=True)
            generate(2)
            assert capsys.readouterr().err == ""
        finally:
            del pipeline._progress


class TestEncode:
    def test_without_seeds_it_is_the_mean(self, model):
        x = images(3)
        assert torch.equal(model.encode(x, 0.4), model.vae.encode(x, 0.4))

    def test_noise_belongs_to_the_seed_of_the_sample(self, model):
        x, seeds = images(4), [7, 7, 2**40, -1]
        together = model.encode(x, 0.4, seeds=seeds)
        torch.testing.assert_close(model.encode(x[2:3], 0.4, seeds=seeds[2:3]), together[2:3], rtol=0, atol=1e-5)
        noise = (together - model.encode(x, 0.4)) / model.vae.sigma(torch.tensor([0.4]))
        torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
        assert (noise[0] - noise[2]).abs().mean() > 0.5

    def test_noise_has_the_deviation_sigma(self, model):
        x = images(1).expand(64, -1, -1, -1)
        for beta in (0.2, 1.0):
            noise = model.encode(x, beta, seeds=range(64)) - model.encode(x, beta)
            expected = float(model.vae.sigma(torch.tensor(beta)))
            assert noise.std().item() == pytest.approx(expected, rel=0.03)

    @pytest.mark.parametrize("beta", [1.3, -0.1, math.nan])
    def test_beta_outside_the_unit_interval(self, model, beta):
        for call in (model.encode, lambda x, b: model.denoise(torch.zeros(1, 4, 8, 8), b)):
            with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
                call(images(1), beta)

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"floats in \[-1, 1\], got torch.uint8 .*to_float"),
            (255 * torch.ones(1, 3, 16, 16), r"floats in \[-1, 1\], got torch.float32 from 255"),
            (torch.zeros(1, 3, 32, 32), r"shape \(N, 3, 16, 16\), got \(1, 3, 32, 32\)"),
            (torch.zeros(3, 16, 16), r"shape \(N, 3, 16, 16\), got \(3, 16, 16\)"),
            (torch.zeros(1, 16, 16, 3), r"shape \(N, 3, 16, 16\), got \(1, 16, 16, 3\)"),
        ],
    )
    def test_images_of_another_kind(self, model, wrong, message):
        with pytest.raises(ValueError, match=message):
            model.encode(wrong, 0.5)

    def test_one_seed_per_image(self, model):
        with pytest.raises(ValueError, match="one seed per sample is needed"):
            model.encode(images(3), 0.5, seeds=[1, 2])


class TestDecode:
    def test_stays_in_the_range_of_images(self, model):
        decoded = model.decode(100 * rand(2, 4, 8, 8))
        assert decoded.shape == (2, 3, 16, 16) and decoded.abs().max() <= 1

    def test_latents_of_another_shape(self, model):
        with pytest.raises(ValueError, match=r"shape \(N, \*\(4, 8, 8\)\), got \(2, 4, 4, 4\)"):
            model.decode(torch.zeros(2, 4, 4, 4))


class TestDenoise:
    def evaluations(self, model, *arguments):
        seen = []
        model.denoise(rand(2, 4, 8, 8), *arguments, callback=lambda done, total, latent: seen.append(total))
        return len(seen)

    @pytest.mark.parametrize("sampler", SAMPLERS)
    def test_at_beta_zero_it_is_the_identity(self, model, sampler):
        latents = rand(2, 4, 8, 8)
        assert torch.equal(model.denoise(latents, 0.0, sampler), latents)

    def test_close_to_zero_it_takes_the_steps_there_are(self, model):
        assert self.evaluations(model, 0.04, "ode", 50) == 2
        assert self.evaluations(model, 0.001, "ode", 50) == 0
        assert self.evaluations(model, 0.5, "ode", 50) == 25
        assert self.evaluations(model, 0.5, "ode", 7) == 7

    def test_more_steps_than_the_grid_has(self, model):
        with pytest.raises(ValueError, match="between 1 and 50, the steps of the grid, got 51"):
            model.denoise(rand(1, 4, 8, 8), 0.5, steps=51)

    def test_seeds_steer_the_ancestral_noise(self, model):
        latents = rand(2, 4, 8, 8)
        default, same, other = (model.denoise(latents, 0.5, "ancestral", 10, seeds) for seeds in (None, [0, 1], [5, 6]))
        assert torch.equal(default, same) and not torch.allclose(default, other)

    def test_inverse_of_the_ode(self, model):
        latents = rand(2, 4, 8, 8)
        noise = model.invert(latents, steps=STEPS)
        error = (model.denoise(noise, 1.0, "ode2", STEPS) - latents).abs().mean()
        assert error < 0.1 * (noise - latents).abs().mean()


class TestEdit:
    def test_no_strength_is_a_reconstruction(self, model):
        x, direction = images(2), rand(4, 8, 8)
        expected = model.decode(model.denoise(model.encode(x, 0.5), 0.5, steps=10))
        assert torch.equal(model.manipulate(x, direction, 0.0, 0.5, steps=10), expected)

    def test_strength_moves_the_image(self, model):
        x, direction = images(2), rand(4, 8, 8)
        still, little, far = (model.manipulate(x, direction, strength, 0.5, steps=5) for strength in (0.0, 0.1, 1.0))
        assert 0 < (little - still).abs().mean() < (far - still).abs().mean()

    def test_directions_come_from_the_encodings(self, model):
        found = model.principal_directions(images(300), 0.5, 3)
        assert found.directions.shape == (3, 4, 8, 8)
        torch.testing.assert_close(found.mean, model.encode(images(300), 0.5).mean(0), rtol=0, atol=1e-5)

    def test_interpolation_ends_at_the_reconstructions(self, model):
        first, second, direction = images(2), images(2, seed=1), torch.zeros(4, 8, 8)
        path = model.interpolate(first, second, [0.0, 0.5, 1.0], 0.4, steps=10)
        assert path.shape == (2, 3, 3, 16, 16)
        for index, end in ((0, first), (2, second)):
            expected = model.manipulate(end, direction, 0.0, 0.4, steps=10)
            torch.testing.assert_close(path[:, index], expected, rtol=0, atol=1e-4)
        middle = model.interpolate(first, second, 0.5, 0.4, steps=10)
        torch.testing.assert_close(path[:, 1], middle, rtol=0, atol=1e-4)

    def test_interpolating_no_channel_stays_at_the_first(self, model):
        first, second = images(1), images(1, seed=1)
        path = model.interpolate(first, second, [0.0, 1.0], 0.4, dims=[], steps=5)
        torch.testing.assert_close(path[:, 0], path[:, 1], rtol=0, atol=1e-5)

    def test_pairs_of_other_shapes(self, model):
        with pytest.raises(ValueError, match="pairs must have one shape"):
            model.interpolate(images(2), images(1), 0.5, 0.5)


class TestSaving:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_a_loaded_model_is_the_saved_one(self, model, folder):
        loaded = DenoisingMultiBetaVAE.from_pretrained(folder)
        assert loaded.info == {"recipe": "none"}
        assert (loaded.vae.config, loaded.diffusion.config) == (VAE, DIFFUSION)
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(3, "ancestral", 5), model.generate(3, "ancestral", 5))
        assert not any(parameter.requires_grad for parameter in loaded.vae.parameters())

    def test_a_model_card_goes_with_it(self, model, folder):
        card = (folder / "README.md").read_text()
        front, _, body = card.removeprefix("---\n").partition("---\n")
        for line in ("library_name: multibeta", "pipeline_tag: unconditional-image-generation", "- variational-autoencoder"):
            assert line in front.splitlines()
        parameters = sum(map(torch.numel, model.diffusion.parameters())) / 1e6
        assert f"| `diffusion` | `NonlinearDiffusion` | {parameters:.2f} |" in body and "16 x 16 pixels" in body
        assert {line.split("`")[1] for line in body.split("## Files")[1].splitlines() if line.startswith("| `")} == {
            path.name for path in folder.iterdir() if path.name != "README.md"
        }
        (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
        names = {}
        exec(code.replace("path/to/this/folder", str(folder)).replace("seed=0", "steps=2"), names)
        assert len(names["pictures"]) == 4

    def test_the_card_shows_no_folder_of_the_machine(self, model, tmp_path):
        recipe = {"name": "photos", "source": "mine", "data": {"source": "/home/lovelace/photos"}}
        command = "multibeta train --recipe photos --data.source '/home/lovelace/my photos' --out ~/runs/x --log=../lovelace/log"
        info = {"recipe": recipe, "command": command}
        DenoisingMultiBetaVAE(model.vae, model.diffusion, info).save_pretrained(tmp_path / "model")
        card = (tmp_path / "model" / "README.md").read_text()
        assert "# photos" in card and "- data: `.../photos`" in card
        assert "--data.source '.../my photos' --out .../x --log=.../log" in card
        assert "lovelace" not in card and str(tmp_path) not in card

    def test_a_card_is_renewed_until_someone_takes_it_over(self, model, folder):
        path = folder / "README.md"
        written = path.read_text()
        path.write_text(written.replace("# none", "# stale"))
        model.save_pretrained(folder)
        assert path.read_text() == written
        path.write_text("my own words")
        model.save_pretrained(folder)
        assert path.read_text() == "my own words"
        assert DenoisingMultiBetaVAE.from_pretrained(folder).info == {"recipe": "none"}

    def test_a_truncated_file_is_reported(self, folder):
        path = folder / "diffusion.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"diffusion\.safetensors is truncated or damaged"):
            DenoisingMultiBetaVAE.from_pretrained(folder)

    def edit(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    def test_another_class_is_reported(self, folder):
        self.edit(folder, lambda config: config.update({"class": "DiffusionVAE"}))
        with pytest.raises(ValueError, match="holds a DiffusionVAE, not a DenoisingMultiBetaVAE"):
            DenoisingMultiBetaVAE.from_pretrained(folder)

    def test_a_field_nobody_knows_is_reported(self, folder):
        self.edit(folder, lambda config: config["vae"].update({"colour": 1}))
        with pytest.raises(ValueError, match="VAEConfig has no field colour; it has activation"):
            DenoisingMultiBetaVAE.from_pretrained(folder)

    def test_weights_of_another_size_are_reported(self, folder):
        self.edit(folder, lambda config: config["vae"].update({"base_channels": 16}))
        with pytest.raises(ValueError, match="is a checkpoint of another recipe"):
            DenoisingMultiBetaVAE.from_pretrained(folder)

    def test_a_missing_folder_is_reported(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
            DenoisingMultiBetaVAE.from_pretrained(tmp_path / "nothing")
        with pytest.raises(FileNotFoundError, match="no folder nothing-here and no shipped model of that name"):
            resolve_pretrained("nothing-here")

    def test_half_precision_keeps_the_curves_in_float32(self, folder):
        loaded = DenoisingMultiBetaVAE.from_pretrained(folder, dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert loaded.diffusion.sigmas.dtype == loaded.vae.sigma.raw_increments.dtype == torch.float32
        generated = loaded.generate(2, steps=3)
        assert generated.dtype == torch.float32 and generated.isfinite().all()
        assert loaded.encode(images(2), 0.5).dtype == torch.float32

    def test_config_round_trip_through_json(self):
        for config in (VAE, DIFFUSION):
            assert config_from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config


def test_stages_that_do_not_fit():
    other = replace(DIFFUSION, latent_resolution=4)
    with pytest.raises(ValueError, match=r"do not fit: the shape of latents is \(4, 8, 8\) and \(4, 4, 4\)"):
        DenoisingMultiBetaVAE(MultiBetaVAE(VAE), NonlinearDiffusion(other))
    for name, value in {"num_steps": 20, "schedule": "sinusoidal", "sigma_per_channel": True}.items():
        message = f"VAE and diffusion do not fit: {name} is {getattr(VAE, name)} and {value}"
        with pytest.raises(ValueError, match=message):
            DenoisingMultiBetaVAE(MultiBetaVAE(VAE), NonlinearDiffusion(replace(DIFFUSION, **{name: value})))


def test_parts_whose_sigmas_differ_are_joined_with_a_word(caplog, model):
    DenoisingMultiBetaVAE(model.vae, model.diffusion)
    assert not caplog.records
    DenoisingMultiBetaVAE(model.vae, NonlinearDiffusion(DIFFUSION))
    assert re.search(r"sigma of VAE and diffusion differ by up to 0\.\d+: NonlinearDiffusion\.set_process", caplog.text)


@pytest.mark.parametrize(("name", "value"), [("schedule", "sinusoidal"), ("num_steps", 20)])
def test_a_saved_model_whose_parts_do_not_fit_is_refused(model, tmp_path, name, value):
    parts = {"vae": replace(VAE, **{name: value}), "diffusion": DIFFUSION}
    weights = {"vae": MultiBetaVAE(parts["vae"]).state_dict(), "diffusion": NonlinearDiffusion(DIFFUSION).state_dict()}
    config = {"class": "DenoisingMultiBetaVAE", **{part: asdict(shape) for part, shape in parts.items()}}
    checkpoints.save_folder(tmp_path / "model", weights, config)
    with pytest.raises(ValueError, match=f"do not fit: {name} is {value} and {getattr(DIFFUSION, name)}"):
        load_pretrained(tmp_path / "model")


class TestWhatACopyWouldNotFollow:
    """Derivatives, hooks and tracing take the plain loop and the decoder itself."""

    def walk(self, model, latents):
        return model.denoise(latents, 0.7, sampler="ode", steps=3)

    def test_derivatives(self, model):
        latents, direction = torch.randn(2, 2, *model.vae.config.latent_shape)
        for function in (lambda z: self.walk(model, z), lambda z: model.decode(z, 0.5)):
            function(latents)  # prepared
            _, tangent = torch.func.jvp(function, (latents,), (direction,))
            with forward_ad.dual_level():
                dual = forward_ad.unpack_dual(function(forward_ad.make_dual(latents, direction))).tangent
            with multibeta.backend("reference"):
                difference = (function(latents + 0.01 * direction) - function(latents - 0.01 * direction)) / 0.02
            for found in (tangent, dual):
                assert (found - difference).norm() < 0.05 * difference.norm()

    def test_hooks(self, model):
        latents, calls = torch.randn(1, *model.vae.config.latent_shape), []
        part = model.diffusion.unet.middle[0]
        hook = part.register_forward_hook(lambda *_: calls.append(1))
        try:
            self.walk(model, latents)
        finally:
            hook.remove()
        assert len(calls) == 3
        self.walk(model, latents)
        assert len(calls) == 3

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("accelerated", [False, True])
    @pytest.mark.parametrize("make", ["model", "baseline", "refiner"])
    def test_quantised_parts(self, make, accelerated, request):
        model = copy.deepcopy(request.getfixturevalue(make))
        walk = {"steps": 3} if hasattr(model, "diffusion") else {}
        plain = model.generate(2, **walk)
        for name in model.parts:
            part = getattr(model, name)
            part = multibeta.accelerate(part) if accelerated else part
            setattr(model, name, torch.ao.quantization.quantize_dynamic(part, {nn.Linear}))
        found = model.generate(2, **walk)
        with multibeta.backend("reference"):
            expected = model.generate(2, **walk)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert not torch.equal(found, plain)

    def test_another_decoder(self, model):
        model, latents = copy.deepcopy(model), torch.randn(1, *model.vae.config.latent_shape)
        before = model.decode(latents, 0.5)
        model.vae.decoder = torch.compile(copy.deepcopy(model.vae.decoder), backend="eager")
        torch.testing.assert_close(model.decode(latents, 0.5), before, rtol=1e-3, atol=1e-3)
        model.vae.decoder.conv_out.bias.data.add_(0.5)
        with multibeta.backend("reference"):
            expected = model.decode(latents, 0.5)
        torch.testing.assert_close(model.decode(latents, 0.5), expected, rtol=1e-3, atol=1e-3)
        assert (expected - before).abs().max() > 0.4

    def test_a_compiled_decode(self, model):
        latents = torch.randn(1, *model.vae.config.latent_shape)
        decode = torch.compile(lambda z: model.decode(z, 0.5), backend="eager")
        with multibeta.backend("reference"):
            expected = model.decode(latents, 0.5)
        torch.testing.assert_close(decode(latents), expected, rtol=1e-3, atol=1e-3)

    def test_latents_that_are_no_real_numbers(self, model):
        latents = torch.ones(1, *model.vae.config.latent_shape)
        for dtype in (torch.int64, torch.complex64):
            with pytest.raises(ValueError, match=f"latents must be of floating point, got {dtype}"):
                self.walk(model, latents.to(dtype))
            with pytest.raises(ValueError, match=f"latents must be of floating point, got {dtype}"):
                model.decode(latents.to(dtype))

    def test_seeds_that_are_no_integers(self, model):
        latents = torch.ones(2, *model.vae.config.latent_shape)
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got 0\.5"):
            model.denoise(latents, 0.7, steps=2, seeds=[0.5, 1.5])

    def test_no_images_are_none(self, model):
        assert model.decode(torch.empty(0, *model.vae.config.latent_shape)).shape[0] == 0
        images = torch.empty(0, model.vae.config.image_channels, *[model.vae.config.resolution] * 2)
        assert model.encode(images, 0.5).shape == (0, *model.vae.config.latent_shape)


@pytest.fixture(scope="module")
def baseline():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BaselineVAE(OrdinaryVAE(VAE), {"method": "beta-vae-4"})  # a config of the multi-beta VAE will do


class TestParts:
    """What is no part of a model is refused by what the parts must be; wrappers that pass all on are."""

    def test_swapped_or_of_another_system(self, model, baseline, refiner):
        first, second = (
            r"parts of a DenoisingMultiBetaVAE are \(vae: MultiBetaVAE, diffusion: NonlinearDiffusion\), got a {} as {}",
            r"parts of a DiffusionVAE are \(vae: CapacityVAE, diffusion: ConditionalDiffusion\), got a {} as {}",
        )
        cases = (
            (DenoisingMultiBetaVAE, (model.diffusion, model.vae), first.format("NonlinearDiffusion", "vae")),
            (DenoisingMultiBetaVAE, (refiner.vae, refiner.diffusion), first.format("CapacityVAE", "vae")),
            (DenoisingMultiBetaVAE, (model.vae, refiner.diffusion), first.format("ConditionalDiffusion", "diffusion")),
            (DenoisingMultiBetaVAE, (model.vae, model.diffusion.unet), first.format("UNet", "diffusion")),
            (DenoisingMultiBetaVAE, (baseline.vae, model.diffusion), first.format("VAE", "vae")),
            (DenoisingMultiBetaVAE, (None, None), first.format("NoneType", "vae")),
            (DiffusionVAE, (model.vae, model.diffusion), second.format("MultiBetaVAE", "vae")),
            (DiffusionVAE, (refiner.vae, model.diffusion), second.format("NonlinearDiffusion", "diffusion")),
            (DiffusionVAE, (refiner.diffusion, refiner.vae), second.format("ConditionalDiffusion", "vae")),
            (DiffusionVAE, (baseline.vae, refiner.diffusion), second.format("VAE", "vae")),
            (
                DiffusionVAE,
                (refiner.vae, refiner.diffusion, None, "prior"),
                "mixture must be a LatentMixture, or None, got a str",
            ),
            (BaselineVAE, (baseline.vae, "beta-vae"), "info must be a dict, or None, got a str"),
        )
        for kind, parts, message in cases:
            with pytest.raises(TypeError, match=message):
                kind(*parts)

    @pytest.mark.parametrize("make", ["model", "baseline", "refiner"])
    def test_compiled(self, make, request):
        pipeline = request.getfixturevalue(make)
        wrapped = {name: torch.compile(getattr(pipeline, name), backend="eager") for name in pipeline.parts}
        latents = rand(1, *pipeline.vae.config.latent_shape)
        close(type(pipeline)(**wrapped).decode(latents), pipeline.decode(latents))


@pytest.mark.parametrize("make", ["model", "baseline", "refiner"])
class TestMixedDtypes:
    """Each network is given its input in its own dtype, in every verb and however it walks, also after saving."""

    @pytest.mark.parametrize("changed", ["encoder", "decoder", "unet"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
    def test_one_network(self, make, changed, dtype, request, tmp_path):
        plain = request.getfixturevalue(make)
        if changed == "unet" and make == "baseline":
            pytest.skip("has none")
        x, latents = images(2), rand(2, *plain.vae.config.latent_shape)
        encode = {"encode": lambda one: one.encode(x, *([0.5] if make == "model" else []), seeds=[1, 2])}
        walk = {
            "model": {
                "denoise": lambda one: one.denoise(latents, 0.5, steps=3),
                "generate": lambda one: one.generate(2, steps=2),
            },
            "refiner": {"refine": lambda one: one.refine(x, steps=2), "generate": lambda one: one.generate(2, steps=2)},
            "baseline": {"generate": lambda one: one.generate(2)},
        }[make]
        verbs = encode | {"decode": lambda one: one.decode(latents)} | walk
        mixed = copy.deepcopy(plain)
        mixed.decode(latents)  # prepared before its dtype changes
        getattr(mixed.diffusion if changed == "unet" else mixed.vae, changed).to(dtype)
        mixed.save_pretrained(tmp_path)
        loaded = load_pretrained(tmp_path)
        if make == "refiner":
            loaded = DiffusionVAE(loaded.vae, loaded.diffusion, engine_options=plain.engine.options)
        untouched = {"encoder": "decode", "decoder": "encode", "unet": "decode"}[changed]
        for backend in ("auto", "reference"):
            with multibeta.backend(backend):
                for name, verb in verbs.items():
                    found = verb(mixed)
                    assert found.dtype == torch.float32 and torch.equal(found, verb(loaded)), name
                assert torch.equal(verbs[untouched](mixed), verbs[untouched](plain))

    def test_are_shown(self, make, request):
        mixed = copy.deepcopy(request.getfixturevalue(make))
        mixed.vae.decoder.to(torch.bfloat16)
        assert ", bfloat16, float32 on cpu)" in repr(mixed)


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


BLOCKS = BlockAutoencoderConfig(
    resolution=16, encoder_blocks="16d2,16t8,8d8,8t1,1x1", decoder_blocks="1u8,1t8,8u2,8t16,16x1", channels="16:8,8:8,1:6"
)
REFINER = ConditionalDiffusionConfig(
    resolution=16,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=2,
    dropout=0.0,
    num_groups=4,
    num_steps=STEPS,
)


def two_stages(**changes):
    """Random weights, none of them zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        diffusion = ConditionalDiffusion(replace(REFINER, **changes))
        for parameter in diffusion.parameters():
            nn.init.normal_(parameter, std=0.2)
        vae = CapacityVAE(BLOCKS)
        for conv in (*vae.decoder.modules(), vae.encoder.mean):
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.5)
        vae.encoder.mean.weight.data *= 20  # images must differ in their latents
    return DiffusionVAE(vae, diffusion, {"recipe": "none"}, engine_options=EngineOptions(dtype=torch.float32))


@pytest.fixture(scope="module", params=["form1", "form2", "eq7"])
def any_form(request):
    return two_stages(form=request.param)


@pytest.fixture(scope="module")
def refiner():
    return two_stages()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestDiffusionVAE:
    """The verbs of the second system."""

    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm"}, {"eta": 0.5, "guidance": 0.3, "shared_noise": True}])
    def test_a_generated_image_depends_on_its_seed_and_index_alone(self, any_form, walk):
        expected = any_form.generate(5, steps=5, seed=3, **walk)
        assert expected.shape == (5, 3, 16, 16) and expected.abs().max() <= 1
        close(any_form.generate(5, steps=5, seed=3, batch_size=2, **walk), expected)
        close(any_form.generate(2, steps=5, seed=3, **walk), expected[:2])
        assert not torch.allclose(any_form.generate(2, steps=5, seed=4, **walk), expected[:2], atol=1e-2)

    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm"}, {"guidance": 0.5}])
    def test_the_engine_makes_the_images_of_the_plain_loop(self, any_form, walk):
        found = any_form.generate(3, steps=5, seed=3, **walk)
        with multibeta.backend("reference"):
            close(found, any_form.generate(3, steps=5, seed=3, **walk))

    def test_generating_is_drawing_decoding_and_denoising(self, any_form):
        seeds = multibeta.ops.sample_seeds(3, torch.arange(4))
        expected = any_form.denoise(any_form.decode(any_form.draw_latents(seeds)), "ddpm", 5, seeds)
        close(any_form.generate(4, "ddpm", 5, seed=3), expected)

    def test_callback_counts_over_all_batches(self, refiner):
        seen = []
        refiner.generate(5, steps=3, batch_size=2, callback=lambda done, total, latent: seen.append((done, total, len(latent))))
        assert [news[:2] for news in seen] == [(done, 9) for done in range(1, 10)]
        assert [news[2] for news in seen] == [2] * 6 + [1] * 3

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_the_callback_of_diffusers_sees_model_step_and_latents(self, refiner, backend):
        seen = []
        with multibeta.backend(backend):
            refiner.generate(
                3, "ddpm", 5, spacing="uniform", batch_size=2, callback_on_step_end=lambda *news: seen.append(news) or news[-1]
            )
        assert [(index, int(step)) for _, index, step, _ in seen] == 2 * list(enumerate((40, 30, 20, 10, 0)))
        assert [given["latents"].shape[0] for *_, given in seen] == [2] * 5 + [1] * 5

    def test_output_types(self, refiner):
        assert refiner.generate(2, steps=2, output_type="np").shape == (2, 16, 16, 3)
        assert [picture.size for picture in refiner.generate(2, steps=2, output_type="pil")] == [(16, 16)] * 2

    def test_encodes_to_the_mean_or_to_a_sample_of_the_seed(self, refiner):
        x = images(4)
        posterior = refiner.vae.posterior(x)
        assert torch.equal(refiner.encode(x), posterior.mean)
        noise = (refiner.encode(x, seeds=[7, 7, 8, 9]) - posterior.mean) / posterior.stddev
        torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=1e-3)
        assert (noise[0] - noise[2]).abs().mean() > 0.3

    def test_images_made_anew_do_not_depend_on_their_batch(self, any_form):
        x, seeds = images(4), [5, 6, 7, 8]
        for verb in (any_form.refine, any_form.reconstruct):
            together = verb(x, seeds, sampler="ddpm", steps=5)
            close(verb(x[2:3], seeds[2:3], sampler="ddpm", steps=5), together[2:3])

    def test_a_reconstruction_starts_from_a_trace_of_the_image(self, any_form):
        x, trace = images(3), float(any_form.diffusion.process.alpha_bars[-1].sqrt())
        seen, x_hat = {}, any_form.decode(any_form.encode(x, seeds=[0, 1, 2]))
        for verb in ("refine", "reconstruct"):
            any_form._reverse = lambda rows, initial, *rest, verb=verb, **_: seen.update({verb: initial}) or initial
            try:
                getattr(any_form, verb)(x, steps=5)
            finally:
                del any_form._reverse
        noise, initial = seen["refine"], seen["reconstruct"]
        residual = any_form.diffusion.process.residual(x, x_hat)
        torch.testing.assert_close(initial, trace * residual + (1 - trace**2) ** 0.5 * noise)

    def test_one_seed_shares_all_noise(self, any_form):
        x_hat = any_form.decode(any_form.encode(images(3)))
        walk = {"sampler": "ddpm", "steps": 5}
        shared = any_form.denoise(x_hat, seeds=[4, 5, 6], shared_noise=True, **walk)
        close(shared, any_form.denoise(x_hat, seeds=[4, 4, 4], **walk))
        alike = any_form.denoise(x_hat[:1].repeat(3, 1, 1, 1), shared_noise=True, **walk)
        close(alike, alike[:1].expand_as(alike))

    def test_temperature_scales_the_initial_noise(self, refiner):
        x_hat, noise = refiner.decode(refiner.encode(images(2))), rand(2, 3, 16, 16)
        warm, cold = (refiner.denoise(x_hat, steps=5, noise=scale * noise) for scale in (1, 0.5))
        close(refiner.denoise(x_hat, steps=5, noise=noise, temperature=0.5), cold)
        assert not torch.allclose(warm, cold, atol=1e-2)

    def test_an_unconditional_model_does_not_see_the_reconstruction(self):
        model, seeds = two_stages(conditional=False), [1, 2, 3]
        first, second = (model.decode(model.encode(images(3, seed))) for seed in (0, 1))
        assert torch.equal(model.denoise(first, steps=5, seeds=seeds), model.denoise(second, steps=5, seeds=seeds))

    @pytest.mark.parametrize("how", ["lerp", "slerp"])
    @pytest.mark.parametrize("walk", [{}, {"sampler": "ddpm", "shared_noise": True}])
    def test_interpolation_ends_are_the_ends(self, any_form, how, walk):
        first, second, seeds = images(2), images(2, seed=1), [8, 9]
        path = any_form.interpolate(first, second, [0.0, 0.3, 1.0], how=how, seeds=seeds, steps=5, **walk)
        assert path.shape == (2, 3, 3, 16, 16)
        for index, end in ((0, first), (2, second)):
            x_hat = any_form.decode(any_form.encode(end))
            close(path[:, index], any_form.denoise(x_hat, seeds=seeds, steps=5, **walk))
        close(any_form.interpolate(first, second, 0.3, how=how, seeds=seeds, steps=5, **walk), path[:, 1])
        latents = any_form.encode(first), any_form.encode(second)
        close(any_form.interpolate(*latents, [0.0, 0.3, 1.0], how=how, seeds=seeds, steps=5, **walk), path)

    @pytest.mark.parametrize("how", ["lerp", "slerp"])
    def test_interpolation_of_the_noise_ends_at_the_ends(self, any_form, how):
        x, ends = images(2), ([8, 9], [10, 11])
        path = any_form.interpolate_noise(x, *ends, [0.0, 0.5, 1.0], how, steps=5)
        x_hat = any_form.decode(any_form.encode(x))
        for index, seeds in ((0, ends[0]), (2, ends[1])):
            close(path[:, index], any_form.denoise(x_hat, seeds=seeds, steps=5))
        close(any_form.interpolate_noise(x, *ends, 0.5, how, steps=5), path[:, 1])
        close(any_form.interpolate_noise(x, ends[0], ends[0], 0.5, how, steps=5), path[:, 0])

    def test_shared_noise_makes_neighbours_alike(self, refiner):
        """Fig. 7. The network is fixed, so that of the two walks only the noise differs."""
        first, second = images(4), images(4, seed=1)
        distances = []
        for shared in (True, False):
            path = refiner.interpolate(
                first, second, torch.linspace(0, 1, 6).tolist(), sampler="ddpm", steps=25, spacing="uniform", shared_noise=shared
            )
            distances.append(path.diff(dim=1).abs().mean())
        assert distances[0] < 0.5 * distances[1]

    def test_moving_along_a_direction(self, refiner):
        x, other = images(2), images(3, seed=1)
        direction = refiner.attribute_direction(other, x)
        assert direction.shape == (6, 1, 1)
        close(direction, refiner.encode(other).mean(0) - refiner.encode(x).mean(0))
        close(refiner.attribute_direction(x, x), torch.zeros(6, 1, 1))
        still = refiner.manipulate(x, direction, 0.0, steps=5)
        close(still, refiner.denoise(refiner.decode(refiner.encode(x)), steps=5))
        moved = refiner.manipulate(x, direction, 30.0, steps=5)
        close(moved, refiner.denoise(refiner.decode(refiner.encode(x) + 30 * direction), steps=5))
        close(refiner.manipulate(refiner.encode(x), direction, 30.0, steps=5), moved)
        assert not torch.allclose(moved, still, atol=1e-2)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda model: model.encode(images(1), 0.0), "one representation and takes no beta, got 0.0"),
            (lambda model: model.encode(torch.zeros(1, 3, 32, 32)), r"shape \(N, 3, 16, 16\), got \(1, 3, 32, 32\)"),
            (lambda model: model.decode(torch.zeros(1, 4, 1, 1)), r"shape \(N, \*\(6, 1, 1\)\), got \(1, 4, 1, 1\)"),
            (lambda model: model.denoise(2 * torch.ones(1, 3, 16, 16)), r"floats in \[-1, 1\], got torch.float32 from 2"),
            (lambda model: model.denoise(images(2), steps=5, seeds=[1]), "one seed per sample is needed"),
            (lambda model: model.generate(1, "ode2"), "ddpm, ddim, got 'ode2'"),
            (lambda model: model.generate(1, steps=STEPS + 1), "between 1 and 50, got 51"),
            (lambda model: model.generate(0), "must be positive, got 0 and 64"),
            (lambda model: model.interpolate(images(2), images(1), 0.5), "pairs must have one shape"),
            (lambda model: model.interpolate(images(1), images(1), 0.5, how="cubic"), "lerp, slerp, got 'cubic'"),
            (lambda model: model.interpolate(images(1), images(1), 0.5, "slerp"), "lerp, slerp, got 'slerp' as beta"),
            (lambda model: model.attribute_direction(images(3), images(0)), "both sides, got 3 with and 0 without"),
            (lambda model: model.fit_latents(images(3), 4), "between 1 and the 3 encodings, got 4"),
        ],
    )
    def test_errors_say_what_is_possible(self, refiner, call, message):
        with pytest.raises(ValueError, match=message):
            call(refiner)

    def test_stages_that_do_not_fit(self):
        for name, value in {"resolution": 8, "image_channels": 1}.items():
            diffusion = ConditionalDiffusion(replace(REFINER, **{name: value}))
            with pytest.raises(ValueError, match=f"VAE and diffusion do not fit: {name} is {getattr(BLOCKS, name)} and {value}"):
                DiffusionVAE(CapacityVAE(BLOCKS), diffusion)

    def test_a_mixture_over_other_latents(self, refiner):
        other = LatentMixture(torch.ones(1), torch.zeros(1, 4, 1, 1), torch.ones(1, 4))
        with pytest.raises(ValueError, match=r"VAE and mixture do not fit: .* \(6, 1, 1\) and \(4, 1, 1\)"):
            DiffusionVAE(refiner.vae, refiner.diffusion, mixture=other)


class TestLatentsOfDiffusionVAE:
    def test_are_of_the_prior(self, refiner):
        drawn = refiner.draw_latents(range(2000))
        assert drawn.shape == (2000, 6, 1, 1)
        assert abs(drawn.mean()) < 0.03 and drawn.std().item() == pytest.approx(1, abs=0.02)
        assert torch.equal(refiner.draw_latents([7]), drawn[7:8])

    @pytest.mark.parametrize("covariance_type", ["diag", "full"])
    def test_or_of_a_mixture_fitted_to_encodings(self, covariance_type):
        model, x = two_stages(), images(400)
        before = model.generate(3, steps=5)
        model.fit_latents(x, 2, covariance_type)
        drawn, encoded = model.draw_latents(range(4000)), model.encode(x, seeds=multibeta.ops.sample_seeds(0, torch.arange(400)))
        torch.testing.assert_close(drawn.mean(0), encoded.mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close(drawn.std(0), encoded.std(0), rtol=0.06, atol=0)
        assert torch.equal(model.draw_latents([7]), drawn[7:8])
        after = model.generate(3, steps=5)
        assert not torch.allclose(after, before, atol=1e-2)
        close(model.generate(3, steps=5, batch_size=1), after)

    def test_batches_are_fitted_as_one_set(self):
        model, x = two_stages(), images(40)
        drawn = []
        for given in (x, x.split(7)):
            model.fit_latents(given, 2)
            drawn.append(model.draw_latents(range(5)))
        close(*drawn)


class TestSavingDiffusionVAE:
    @pytest.mark.parametrize("mixture", [False, True])
    def test_a_loaded_model_is_the_saved_one(self, tmp_path, mixture):
        model = two_stages(form="eq7")
        if mixture:
            model.fit_latents(images(40), 2)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "mixture.safetensors").exists() == mixture
        loaded = load_pretrained(tmp_path)
        assert isinstance(loaded, DiffusionVAE) and loaded.info == {"recipe": "none"}
        assert (loaded.vae.config, loaded.diffusion.config) == (BLOCKS, replace(REFINER, form="eq7"))
        with multibeta.backend("reference"):  # two engines may measure, and so round, differently
            assert torch.equal(loaded.generate(3, "ddpm", 5), model.generate(3, "ddpm", 5))

    def test_half_precision_refines_in_float32(self, tmp_path):
        model = two_stages()
        model.fit_latents(images(40), 2)
        model.save_pretrained(tmp_path)
        half = DiffusionVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert half.dtype == half.diffusion.unet.conv_out.weight.dtype == torch.bfloat16
        generated = half.generate(2, steps=5)
        assert generated.dtype == half.encode(images(1)).dtype == torch.float32 and generated.isfinite().all()

    def test_classes_refuse_the_folders_of_others(self, model, baseline, refiner, tmp_path):
        for saved in (model, baseline, refiner):
            saved.save_pretrained(tmp_path)
            for kind in {DenoisingMultiBetaVAE, BaselineVAE, DiffusionVAE} - {type(saved)}:
                with pytest.raises(ValueError, match=f"holds a {type(saved).__name__}, not a {kind.__name__}"):
                    kind.from_pretrained(tmp_path)


def test_a_dtype_may_stand_alone(model):
    moved = copy.deepcopy(model).to(torch.float64)
    assert (moved.dtype, moved.device, model.dtype) == (torch.float64, model.device, torch.float32)


class TestLoadPretrained:
    def test_finds_the_class(self, model, baseline, tmp_path):
        for saved in (model, baseline):
            saved.save_pretrained(tmp_path / type(saved).__name__)
            assert type(load_pretrained(tmp_path / type(saved).__name__)) is type(saved)
        with pytest.raises(ValueError, match="holds a BaselineVAE, not a DenoisingMultiBetaVAE"):
            DenoisingMultiBetaVAE.from_pretrained(tmp_path / "BaselineVAE")

    @pytest.mark.parametrize(
        ("found", "shown"), [("DiffusionVA", "holds a DiffusionVA,"), (None, "holds a training checkpoint,")]
    )
    def test_an_unknown_class_is_reported(self, baseline, tmp_path, found, shown):
        baseline.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("class")
        (tmp_path / "config.json").write_text(json.dumps(config | ({"class": found} if found else {})))
        with pytest.raises(ValueError, match=f"{shown} .*DenoisingMultiBetaVAE, BaselineVAE"):
            load_pretrained(tmp_path)

    @pytest.mark.parametrize("make", ["model", "baseline", "refiner"])
    def test_a_damaged_or_foreign_config_is_named(self, make, request, tmp_path):
        pipeline = request.getfixturevalue(make)
        pipeline.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        whole = json.loads(path.read_text())

        def without(name):
            return {key: value for key, value in whole.items() if key != name}

        def changed(**fields):
            return whole | {"vae": whole["vae"] | fields}

        damaged = [
            1,
            [whole],
            "networks class vae",
            without("files"),
            *(whole | {"files": files} for files in (None, "vae", {}, [], [1], ["vae", "../vae"], ["vae", "other"])),
            *(whole | {"class": kind} for kind in ([], {}, 3)),
            *(whole | {"info": info} for info in ([1], "x")),
            *(without(name) for name in pipeline.parts),
            *(whole | {name: value} for name in pipeline.parts for value in (None, [1], "vae", 3)),
            *(changed(resolution=value) for value in ("a", 16.0, None, True, [16], -16, 0)),
            *(changed(image_channels=value) for value in (-1, 0, 2, 10**6)),
            changed(other=1),
        ]
        if make == "refiner":
            damaged += [changed(channels="16:8"), changed(encoder_blocks=[]), changed(encoder_blocks="")]
        else:
            damaged += [changed(base_channels=value) for value in (-1, 0, 10**6, "8")]
            damaged += [changed(num_groups=0), changed(activation="relu"), changed(channel_multipliers=[1, 2.5])]
            damaged += [changed(channel_multipliers=[]), changed(channel_multipliers=2)]
        if make == "model":
            damaged += [changed(schedule="foo"), changed(num_steps=10**9), changed(collapse_exponent="8")]
        for config in damaged:
            path.write_text(json.dumps(config))
            for load in (load_pretrained, type(pipeline).from_pretrained):
                with pytest.raises((ValueError, FileNotFoundError)) as raised:
                    load(tmp_path)
                assert str(tmp_path) in str(raised.value), config
        path.write_text(json.dumps(whole))
        assert repr(load_pretrained(tmp_path)) == repr(pipeline)

    def test_a_damaged_mixture_is_named(self, refiner, tmp_path):
        mixture = LatentMixture(torch.ones(1), torch.zeros(1, 6, 1, 1), torch.ones(1, 6))
        DiffusionVAE(refiner.vae, refiner.diffusion, mixture=mixture).save_pretrained(tmp_path)
        assert load_pretrained(tmp_path).mixture is not None
        for wrong in ({"weights": torch.ones(1)}, mixture.state_dict() | {"scales": torch.ones(2, 6)}, {"x": torch.ones(1)}):
            save_file(wrong, tmp_path / "mixture.safetensors")
            with pytest.raises(ValueError, match=r"mixture\.safetensors does not describe a LatentMixture"):
                load_pretrained(tmp_path)


BACKENDS = ("auto", "reference")
LATENTS = {
    "a batch is missing": (rand(4, 8, 8), r"latents must have shape \(N, \*\(4, 8, 8\)\), got \(4, 8, 8\)"),
    "too small": (rand(2, 4, 4, 4), r"latents must have shape \(N, \*\(4, 8, 8\)\), got \(2, 4, 4, 4\)"),
    "a channel": (rand(2, 1, 8, 8), r"latents must have shape .* got \(2, 1, 8, 8\)"),
    "integers": (torch.ones(2, 4, 8, 8, dtype=torch.int64), "latents must be of floating point, got torch.int64"),
    "complex": (rand(2, 4, 8, 8) * 1j, "latents must be of floating point, got torch.complex64"),
    "nan": (rand(2, 4, 8, 8).index_fill(0, torch.tensor(1), torch.nan), "latents must be finite, got 256 numbers that are not"),
    "infinite": (rand(2, 4, 8, 8).index_fill(1, torch.tensor(1), torch.inf), "latents must be finite, got 128 numbers that"),
}


@pytest.mark.parametrize("backend", BACKENDS)
class TestEveryVerbChecksAlike:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x * 1j, "complex64.*float32"),
            (lambda x: x.to(torch.float8_e4m3fn), "float8_e4m3fn.*float32"),
            (lambda x: x.to_sparse(), r"dense tensor \(torch\.strided\), got torch\.sparse_coo"),
            (lambda x: x.to("meta"), "must have values, got a tensor on the meta device"),
            (lambda x: torch.nested.nested_tensor(list(x)), "dense .*, got a nested tensor"),
            (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "qint8.*float32"),
        ],
    )
    def test_tensors_that_hold_no_plain_numbers(self, model, refiner, baseline, backend, change, message):
        x, latents, vectors = images(2), rand(2, 4, 8, 8), rand(2, 6, 1, 1)
        of_images = (
            lambda x: model.encode(x, 0.5),
            lambda x: model.manipulate(x, latents[0], 1.0, 0.5, steps=3),
            lambda x: model.interpolate(x, images(2), 0.5, 0.5, steps=3),
            lambda x: model.interpolate(images(2), x, 0.5, 0.5, steps=3),
            lambda x: model.principal_directions(x, 0.5),
            refiner.encode,
            lambda x: refiner.denoise(x, steps=3),
            lambda x: refiner.denoise(images(2), steps=3, noise=x),
            lambda x: refiner.refine(x, steps=3),
            lambda x: refiner.reconstruct(x, steps=3),
            lambda x: refiner.manipulate(x, vectors[0], 1.0, steps=3),
            lambda x: refiner.interpolate(x, images(2), 0.5, steps=3),
            lambda x: refiner.interpolate_noise(x, [1, 2], [3, 4], 0.5, steps=3),
            lambda x: refiner.attribute_direction(x, images(2)),
            lambda x: refiner.attribute_direction(images(2), x),
            baseline.encode,
        )
        of_latents = (
            lambda z: model.decode(z, 0.5),
            lambda z: model.denoise(z, 0.5, steps=3),
            lambda z: model.denoise(z, 0.0),
            lambda z: model.invert(z, steps=3),
            lambda z: model.manipulate(x, z, 1.0, 0.5, steps=3),
            baseline.decode,
        )
        of_vectors = (
            refiner.decode,
            lambda z: refiner.manipulate(z, vectors[0], 1.0, steps=3),
            lambda z: refiner.manipulate(x, z, 1.0, steps=3),
            lambda z: refiner.interpolate(z, vectors, 0.5, steps=3),
            lambda z: refiner.interpolate_noise(z, [1, 2], [3, 4], 0.5, steps=3),
        )
        of_numbers = (
            lambda each: model.encode(x, each),
            lambda each: model.decode(latents, each),
            lambda each: model.denoise(latents, each, steps=3),
            lambda each: model.manipulate(x, latents[0], each, 0.5, steps=3),
            lambda each: refiner.manipulate(x, vectors[0], each, steps=3),
            lambda each: refiner.interpolate(x, x, each, steps=3),
        )
        numbers = torch.full((2,), 0.5)
        with multibeta.backend(backend):
            for verbs, given in ((of_images, x), (of_latents, latents), (of_vectors, vectors), (of_numbers, numbers)):
                if given is numbers and "float8" in message:
                    continue
                for verb in verbs:
                    with pytest.raises(ValueError, match=message):
                        verb(change(given))

    def test_several_numbers_where_one_is_needed(self, model, refiner, backend):
        latents, x = rand(2, 4, 8, 8), images(2)
        for several in (torch.tensor([1, 1]), np.array([1, 1]), [1, 1]):
            with multibeta.backend(backend):
                for name, verb in {
                    "delta_sign": lambda n: model.generate(1, steps=2, delta_sign=n),
                    "num_directions": lambda n: model.principal_directions(x, 0.5, n),
                    "steps": lambda n: model.denoise(latents, 0.5, steps=n),
                    "step.": lambda n: model.generate(1, steps=n),
                    ".*steps": lambda n: model.invert(latents, steps=n),
                    "steps.*": lambda n: refiner.denoise(x, steps=n),
                    "beta": lambda n: model.denoise(latents, n, steps=2),
                    "eta": lambda n: refiner.denoise(x, steps=3, eta=n),
                    "guidance": lambda n: refiner.denoise(x, steps=3, guidance=n),
                    "temperature": lambda n: refiner.denoise(x, steps=3, temperature=n),
                    "num_images": lambda n: model.generate(n, steps=2),
                    "num_components": lambda n: refiner.fit_latents(images(4), n),
                }.items():
                    with pytest.raises(ValueError, match=f"{name}.* must .*, got"):
                        verb(several)

    @pytest.mark.parametrize("case", LATENTS)
    def test_latents(self, model, backend, case):
        latents, message = LATENTS[case]
        with multibeta.backend(backend):
            for verb in (
                lambda: model.denoise(latents, 0.5, steps=3),
                lambda: model.denoise(latents, 0.0),
                lambda: model.denoise(latents, 0.5, "ancestral", 3, seeds=[1, 2]),
                lambda: model.invert(latents, steps=3),
                lambda: model.decode(latents, 0.5),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()

    def test_latents_of_one_representation(self, refiner, baseline, backend):
        with multibeta.backend(backend):
            for pipeline in (refiner, baseline):
                shape = pipeline.vae.config.latent_shape
                for latents, message in (
                    (rand(*shape), r"latents must have shape \(N, \*"),
                    (torch.ones(2, *shape, dtype=torch.int64), r"latents must be of floating point, got torch\.int64"),
                    (torch.full((2, *shape), torch.nan), "latents must be finite"),
                ):
                    with pytest.raises(ValueError, match=message):
                        pipeline.decode(latents)
            latents = torch.full((2, *refiner.vae.config.latent_shape), torch.inf)
            for verb in (
                lambda: refiner.manipulate(latents, torch.ones(6, 1, 1), 1.0, steps=3),
                lambda: refiner.interpolate(latents, latents, 0.5, steps=3),
                lambda: refiner.interpolate_noise(latents, [1, 2], [3, 4], 0.5, steps=3),
            ):
                with pytest.raises(ValueError, match="latents must be finite"):
                    verb()

    def test_images(self, model, refiner, baseline, backend):
        x = images(2)
        verbs = (
            lambda x: model.encode(x, 0.5),
            lambda x: model.manipulate(x, torch.ones(4, 8, 8), 1.0, 0.5, steps=3),
            lambda x: model.interpolate(x, images(2), 0.5, 0.5, steps=3),
            lambda x: model.interpolate(images(2), x, 0.5, 0.5, steps=3),
            lambda x: model.principal_directions(x, 0.5),
            refiner.encode,
            lambda x: refiner.denoise(x, steps=3),
            lambda x: refiner.refine(x, steps=3),
            lambda x: refiner.reconstruct(x, steps=3),
            lambda x: refiner.manipulate(x, torch.ones(6, 1, 1), 1.0, steps=3),
            lambda x: refiner.interpolate(x, images(2), 0.5, steps=3),
            lambda x: refiner.interpolate_noise(x, [1, 2], [3, 4], 0.5, steps=3),
            lambda x: refiner.attribute_direction(x, images(2)),
            baseline.encode,
        )
        cases = (
            (x[0], r"images must have shape \(N, 3, 16, 16\), got \(3, 16, 16\)"),
            (x[:, :1], r"images must have shape \(N, 3, 16, 16\), got \(2, 1, 16, 16\)"),
            (x[..., ::2], r"images must have shape \(N, 3, 16, 16\), got \(2, 3, 16, 8\)"),
            ((x * 127).to(torch.uint8), r"images must be floats in \[-1, 1\], got torch\.uint8"),
            (x * torch.nan, r"images must be floats in \[-1, 1\], got torch\.float32 from nan"),
            (x / 0, r"images must be floats in \[-1, 1\]"),
        )
        with multibeta.backend(backend):
            for verb in verbs:
                for given, message in cases:
                    with pytest.raises(ValueError, match=message):
                        verb(given)
                with pytest.raises(TypeError, match=r"images must be a tensor \(N, 3, 16, 16\), got ndarray"):
                    verb(x.numpy())

    @pytest.mark.parametrize(
        ("beta", "message"),
        [
            (None, r"beta must be a number in \[0, 1\], or one for each sample, got None"),
            ("high", r"beta must be a number in \[0, 1\]"),
            (1.5, r"beta must lie in \[0, 1\], got 1\.5"),
            (math.nan, r"beta must lie in \[0, 1\], got nan"),
            (torch.tensor([0.5, 2.0]), r"beta must lie in \[0, 1\], got 2"),
        ],
    )
    def test_betas(self, model, backend, beta, message):
        latents = rand(2, 4, 8, 8)
        with multibeta.backend(backend):
            for verb in (
                lambda: model.encode(images(2), beta),
                lambda: model.encode(images(2), beta, seeds=[1, 2]),
                lambda: model.decode(latents, beta),
                lambda: model.denoise(latents, beta, steps=3),
                lambda: model.manipulate(images(2), rand(4, 8, 8), 1.0, beta),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()

    def test_a_beta_for_each_sample_is_for_networks_and_not_for_a_walk(self, model, backend):
        beta, x = torch.tensor([0.2, 0.7, 0.7]), images(3)
        with multibeta.backend(backend):
            latents = model.encode(x, beta, seeds=[1, 2, 3])
            alone = [model.encode(x[i : i + 1], float(beta[i]), seeds=[i + 1]) for i in range(3)]
            close(latents, torch.cat(alone))
            close(model.decode(latents, beta), torch.cat([model.decode(z, float(b)) for z, b in zip(alone, beta, strict=True)]))
            for verb in (model.encode, model.decode):
                given = x if verb == model.encode else latents
                with pytest.raises(ValueError, match=r"beta must be one number, or one for each of 3 samples, got \(2,\)"):
                    verb(given, beta[:2])
            with pytest.raises(ValueError, match=r"beta must be one number for all samples here, got \(3,\)"):
                model.denoise(latents, beta, steps=3)
            close(model.denoise(latents, torch.tensor(0.7), steps=3), model.denoise(latents, 0.7, steps=3))

    def test_numbers(self, model, refiner, backend):
        x, latents, direction = images(2), rand(2, 4, 8, 8), rand(4, 8, 8)
        with multibeta.backend(backend):
            for verb, message in (
                (lambda: model.denoise(latents, 0.5, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: model.denoise(latents, 0.5, steps=0), "steps must lie between 1 and 50"),
                (lambda: model.denoise(latents, 0.0, steps=0), "steps must lie between 1 and 50"),
                (lambda: model.invert(latents, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: model.denoise(latents, 0.5, steps=None), "steps must be an integer, got None"),
                (lambda: model.generate(2, steps=3, delta_sign=0), "delta_sign must be 1 or -1, got 0"),
                (lambda: model.generate(2.5, steps=3), "num_images and batch_size must be integers, got 2.5 and 64"),
                (lambda: model.manipulate(x, direction[None].expand(3, -1, -1, -1), 1.0, 0.5), r"got \(3, 4, 8, 8\)"),
                (lambda: model.manipulate(x, direction[None, None], 1.0, 0.5), r"shape \(4, 8, 8\), got \(1, 1, 4, 8, 8\)"),
                (lambda: model.manipulate(x, direction / 0, 1.0, 0.5), "direction must be of finite real numbers"),
                (lambda: model.manipulate(x, direction, math.inf, 0.5), "strength must be finite, got inf"),
                (lambda: model.manipulate(x, direction, torch.ones(3), 0.5), r"strength must be one number, or .* 2 samples"),
                (
                    lambda: model.interpolate(x, x, math.nan, 0.5),
                    "weights must be a finite number or a sequence of them, got nan",
                ),
                (lambda: model.interpolate(x, x, [], 0.5), r"weights must be a finite number or a sequence of them, got \[\]"),
                (lambda: model.interpolate(x, x, None, 0.5), "weights must be a finite number or a sequence of them, got None"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[4]), r"dims must lie between 0 and 3, got \[4\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[0.5]), r"dims must lie between 0 and 3, got \[0\.5\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=[1, 1]), r"dims must name each channel once, got \[1, 1\]"),
                (lambda: model.interpolate(x, x, 0.5, 0.5, dims=1), "dims must be a sequence of channels, got 1"),
                (lambda: refiner.denoise(x, steps=2.5), "steps must be an integer, got 2.5"),
                (lambda: refiner.denoise(x, steps=3, guidance=math.nan), "guidance must be a finite number, got nan"),
                (lambda: refiner.denoise(x, steps=3, temperature=math.inf), "temperature must be a finite number, got inf"),
                (lambda: refiner.denoise(x, steps=3, eta=math.nan), "eta must be a finite number, got nan"),
                (lambda: refiner.denoise(x, steps=3, noise=x[:1]), "noise must be one for each of 2 reconstructions, got 1"),
                (lambda: refiner.denoise(x, steps=3, noise=x[:, :1]), r"noise must have shape \(N, \*\(3, 16, 16\)\), got"),
                (lambda: refiner.denoise(x, steps=3, noise=x * torch.nan), "noise must be finite"),
            ):
                with pytest.raises(ValueError, match=message):
                    verb()
            paths = [model.interpolate(x, x.flip(0), weights, 0.5, steps=3) for weights in ([0.0, 0.5], np.array([0, 0.5]))]
            close(*paths)
            close(model.interpolate(x, x.flip(0), np.float32(0.5), 0.5, steps=3), paths[0][:, 1])


class TestSeeds:
    @pytest.fixture(params=["model", "baseline", "refiner"])
    def generate(self, request):
        pipeline = request.getfixturevalue(request.param)
        return functools.partial(pipeline.generate, **({} if request.param == "baseline" else {"steps": 2}))

    def test_any_integer_is_one(self, generate):
        for seed, same in ((2**63, -(2**63)), (2**64 + 3, 3), (-1, 2**64 - 1), (np.uint64(2**63), 2**63), (torch.tensor(3), 3)):
            assert torch.equal(generate(2, seed=seed), generate(2, seed=same))

    @pytest.mark.parametrize("seed", [None, 1.5, 1.0, True, "1", [1]])
    def test_nothing_else_is(self, generate, seed):
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got "):
            generate(1, seed=seed)

    def test_of_samples(self, model, refiner):
        latents, x = rand(2, 4, 8, 8), images(2)
        walks = (
            lambda seeds: model.encode(x, 0.5, seeds=seeds),
            lambda seeds: model.denoise(latents, 0.5, "ancestral", 3, seeds=seeds),
            lambda seeds: refiner.denoise(x, "ddpm", 3, seeds=seeds),
            lambda seeds: refiner.refine(x, seeds, steps=3),
            lambda seeds: refiner.interpolate_noise(x, seeds, seeds, 0.5, steps=3),
            refiner.draw_latents,
        )
        for walk in walks:
            expected = walk([-1, 5])
            for seeds in ((2**64 - 1, 5), np.array([-1, 5]), torch.tensor([-1, 5], dtype=torch.int32), [-1, 5 + 2**64]):
                assert torch.equal(walk(seeds), expected)
            for seeds in ([0.5, 1.0], [True, False], torch.ones(2), [None, 1]):
                with pytest.raises(ValueError, match=r"must be (an integer|integers)"):
                    walk(seeds)
            with pytest.raises(ValueError, match="seeds must be integers, one for each sample, got 3"):
                walk(3)

    def test_of_a_mixture(self, refiner):
        fitted = DiffusionVAE(refiner.vae, refiner.diffusion)
        for seed in (-1, 2**64 - 1):
            fitted.fit_latents(images(8), 2, "diag", seed=seed)
            assert torch.equal(fitted.mixture.means, fitted.mixture.means) and fitted.draw_latents([0]).isfinite().all()
        with pytest.raises(ValueError, match=r"a seed must be an integer .*got 0\.5"):
            fitted.fit_latents(images(8), 2, seed=0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16, torch.float16], ids=str)
class TestDtypes:
    """What verbs return does not depend on the dtype of the weights or on what walks."""

    def test_first_system(self, model, backend, weights):
        copied = copy.deepcopy(model).to(dtype=weights)
        with multibeta.backend(backend):
            encoded = copied.encode(images(2), 0.5, seeds=[1, 2])
            assert encoded.dtype == torch.float32
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                latents = encoded.to(dtype)
                for walked in (
                    copied.denoise(latents, 0.5, steps=2),
                    copied.denoise(latents, 0.5, "ancestral", 2),
                    copied.denoise(latents, 0.0),
                    copied.invert(latents, steps=2),
                ):
                    assert walked.dtype == dtype and walked.isfinite().all()
                assert copied.decode(latents, 0.5).dtype == torch.float32
            direction = rand(4, 8, 8).double()
            for made in (
                copied.generate(2, steps=2),
                copied.manipulate(images(2), direction, 1.0, 0.5, steps=2),
                copied.interpolate(images(2), images(2, 1), 0.5, 0.5, steps=2),
            ):
                assert made.dtype == torch.float32 and made.isfinite().all()

    def test_second_system(self, refiner, backend, weights):
        copied = copy.deepcopy(refiner).to(dtype=weights)
        with multibeta.backend(backend):
            latents = copied.encode(images(2), seeds=[1, 2])
            for dtype in (torch.float64, torch.bfloat16):
                made = (
                    copied.decode(latents.to(dtype)),
                    copied.denoise(images(2).to(dtype), steps=2),
                    copied.denoise(images(2), steps=2, noise=rand(2, 3, 16, 16).to(dtype)),
                    copied.manipulate(latents.to(dtype), latents[0].to(dtype), 1.0, steps=2),
                    copied.interpolate(latents.to(dtype), latents, 0.5, steps=2),
                )
                assert all(one.dtype == torch.float32 and one.isfinite().all() for one in (latents, *made))
            assert all(
                one.dtype == torch.float32
                for one in (
                    copied.refine(images(1), steps=2),
                    copied.reconstruct(images(1), steps=2),
                    copied.generate(1, steps=2),
                )
            )
