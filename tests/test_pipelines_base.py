"""Models made of parts: what parts they take, moved, saved and loaded."""

import copy
import json
import re
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

import multibeta
from multibeta.latents import LatentMixture
from multibeta.pipelines import (
    BaselineVAE,
    DenoisingMultiBetaVAE,
    DiffusionVAE,
    config_from_dict,
    load_pretrained,
    resolve_pretrained,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count, seed=0):
    return rand(count, 3, 16, 16, seed=seed).clamp(-1, 1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


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


class TestSaving:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_a_loaded_model_is_the_saved_one(self, model, folder):
        loaded = DenoisingMultiBetaVAE.from_pretrained(folder)
        assert loaded.info == {"recipe": "none"}
        assert (loaded.vae.config, loaded.diffusion.config) == (model.vae.config, model.diffusion.config)
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

    def test_a_card_without_a_source_of_images_is_called_like_the_recipe(self, model, tmp_path):
        info = {"recipe": {"name": "photos"}, "changes": {"data.source": ["scenes", "elsewhere"]}}
        DenoisingMultiBetaVAE(model.vae, model.diffusion, info).save_pretrained(tmp_path / "model")
        assert "# photos\n" in (tmp_path / "model" / "README.md").read_text()

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

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_rounded_weights_take_half_the_room_and_are_read_as_they_were(self, model, tmp_path, dtype):
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "rounded", rounded_to=dtype)
        whole, half = ((tmp_path / name / "diffusion.safetensors").stat().st_size for name in ("whole", "rounded"))
        loaded = DenoisingMultiBetaVAE.from_pretrained(tmp_path / "rounded")
        loaded.save_info(tmp_path / "rounded")  # which keeps how they are stored
        loaded = load_pretrained(tmp_path / "rounded")
        assert half < 0.7 * whole and loaded.dtype == torch.float32
        assert f"rounded to {str(dtype).removeprefix('torch.')}" in (tmp_path / "rounded" / "README.md").read_text()
        for name in model.parts:
            for key, value in getattr(model, name).state_dict().items():
                of_network = key.split(".")[0] in ("encoder", "decoder", "unet")
                expected = value.to(dtype).float() if of_network else value  # curves and tables keep every bit
                assert torch.equal(getattr(loaded, name).state_dict()[key], expected)

    def test_rounding_to_what_is_no_half_is_refused(self, model, folder):
        with pytest.raises(ValueError, match=r"rounded_to must be torch\.float16 or torch\.bfloat16, or None"):
            model.save_pretrained(folder, rounded_to=torch.float64)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rounded_to": "int8"}))
        with pytest.raises(ValueError, match="rounded_to must be float16 or bfloat16, got 'int8'"):
            load_pretrained(folder)

    def test_config_round_trip_through_json(self, model):
        for config in (model.vae.config, model.diffusion.config):
            assert config_from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config


def test_a_dtype_may_stand_alone(model):
    moved = copy.deepcopy(model).to(torch.float64)
    assert (moved.dtype, moved.device, model.dtype) == (torch.float64, model.device, torch.float32)


class TestLoadPretrained:
    def test_a_run_stands_for_the_model_in_it(self, baseline, tmp_path):
        baseline.save_pretrained(tmp_path / "run" / "model")
        for folder in (tmp_path / "run", tmp_path / "run" / "model"):
            assert resolve_pretrained(folder) == tmp_path / "run" / "model"
            assert type(load_pretrained(folder)) is type(BaselineVAE.from_pretrained(folder)) is BaselineVAE
        baseline.save_pretrained(tmp_path / "run")  # a model of its own comes first
        assert resolve_pretrained(tmp_path / "run") == tmp_path / "run"

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
