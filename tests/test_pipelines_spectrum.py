"""What each beta keeps of an image is measured, stored with the model, and chooses the beta of edits."""

import copy
import json

import pytest
import torch
from torch import nn

from multibeta import checkpoints, data
from multibeta.pipelines import load_pretrained, resolve_pretrained
from multibeta.pipelines.spectrum import MEASURED, highest_beta, identity, with_row_at

SCENES = data.Scenes(32)
LEVEL = dict.fromkeys(MEASURED, 1.0)


def images(count, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def rows(*identities):
    """Levels from beta 0 to 1 with these identities."""
    betas = [index / (len(identities) - 1) for index in range(len(identities))]
    return [LEVEL | {"beta": b, "identity": kept} for b, kept in zip(betas, identities, strict=True)]


@pytest.fixture
def fresh(model):
    """The small model, whose records may be changed."""
    fresh = copy.copy(model)
    fresh.info = {}
    return fresh


@pytest.fixture
def measured(fresh):
    fresh.info["spectrum"] = {"num_images": 1, "levels": rows(1.0, 0.95, 0.5)}
    return fresh


@pytest.fixture(scope="module")
def scenes32():
    return load_pretrained("scenes32")


class TestIdentity:
    def test_of_the_images_themselves_it_is_whole(self):
        assert identity(images(3), images(3)) == 1

    def test_of_other_images_there_is_none(self):
        assert identity(images(3), images(3, seed=1)) == 0

    def test_a_shade_over_everything_costs_nothing_and_a_blur_does(self):
        originals = data.to_float(SCENES.images([0, 100_000, 200_000])) / 2
        blurred = nn.functional.avg_pool2d(originals, 3, 1, 1)
        assert identity(originals + 0.3, originals) == pytest.approx(1)
        assert 0.3 < identity(blurred, originals) < 0.9

    def test_another_shape_of_a_small_object_costs_more_than_a_shade_of_the_floor(self):
        def scene(**changes):
            factors = {"floor_hue": 3, "wall_hue": 3, "object_hue": 0, "scale": 0, "shape": 0, "orientation": 7} | changes
            return data.to_float(SCENES.images(SCENES.indices([list(factors.values())])))

        reshaped, dyed = scene(shape=2), scene(floor_hue=4)
        assert (reshaped - scene()).square().mean() < (dyed - scene()).square().mean() / 2
        assert identity(reshaped, scene()) < identity(dyed, scene())


class TestHighestBeta:
    def test_lies_where_the_identity_is_interpolated(self):
        assert highest_beta(rows(1.0, 0.9)) == 0.5
        assert highest_beta(rows(1.0, 1.0, 0.8), least=0.9) == 0.75

    def test_ends_at_the_first_fall(self):
        assert highest_beta(rows(1.0, 0.5, 1.0)) == pytest.approx(0.05)

    def test_may_be_all_or_nothing(self):
        assert highest_beta(rows(1.0, 1.0)) == 1 and highest_beta(rows(0.9, 0.9)) == 0

    def test_is_a_row_among_the_measured(self):
        levels = rows(1.0, 0.9)
        assert [row["beta"] for row in with_row_at(levels, 0.5)] == [0, 0.5, 1]
        assert with_row_at(levels, 0.5)[1]["identity"] == pytest.approx(0.95)
        assert with_row_at(levels, 1.0) == levels


class TestMeasuring:
    def test_tells_what_decoding_and_denoising_keep(self, fresh):
        x = images(8)
        levels = fresh.measure_spectrum(x, (0.4, 0.9))
        assert [row["beta"] for row in levels] == [0, 0.4, 0.9] and all([*row] == [*MEASURED] for row in levels)
        assert levels[0]["identity"] == 1
        kept = fresh.decode(fresh.encode(x, 0.0))
        moved = fresh.decode(fresh.denoise(fresh.encode(x, 0.4), 0.4, **fresh.usual_sampling))
        assert levels[1]["identity"] == pytest.approx(identity(moved, kept), abs=1e-3)
        assert levels[1]["denoised_mse"] == pytest.approx(float((moved - x).square().mean()), rel=1e-3)
        assert fresh.info["spectrum"] == {"num_images": 8, "sampler": "ode2", "steps": 20, "levels": levels}
        assert fresh.spectrum == levels and fresh.auto_beta == highest_beta(levels)

    def test_is_saved_with_the_model_and_of_older_ones_added_to_it(self, fresh, tmp_path):
        fresh.save_pretrained(tmp_path)
        weights = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
        assert load_pretrained(tmp_path).spectrum is None
        pixels = data.to_uint8(images(4))
        levels = fresh.measure_spectrum(pixels, (0.5,))
        assert levels == fresh.measure_spectrum(data.to_float(pixels), (0.5,))
        fresh.save_info(tmp_path)
        assert load_pretrained(tmp_path).spectrum == levels
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == weights
        assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", *sorted(weights)]

    def test_is_added_to_no_other_model(self, fresh, refiner, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
            fresh.save_info(tmp_path / "nothing")
        refiner.save_pretrained(tmp_path / "refiner")
        with pytest.raises(ValueError, match="holds a DiffusionVAE, not this DenoisingMultiBetaVAE"):
            fresh.save_info(tmp_path / "refiner")
        fresh.save_pretrained(tmp_path / "model")
        config = checkpoints.load_config(tmp_path / "model")
        config["vae"]["base_channels"] = 16
        checkpoints.replace_config(tmp_path / "model", config)
        with pytest.raises(ValueError, match="another DenoisingMultiBetaVAE: the shape of its vae differs"):
            fresh.save_info(tmp_path / "model")


class TestAuto:
    def test_every_verb_takes_it(self, measured):
        x, beta = images(4), 0.5
        latents, direction = measured.encode(x, beta), torch.ones(4, 8, 8)
        assert measured.auto_beta == beta
        for verb in (
            lambda b: measured.encode(x, b),
            lambda b: measured.encode(x, b, seeds=range(4)),
            lambda b: measured.decode(latents, b),
            lambda b: measured.denoise(latents, b, steps=3),
            lambda b: measured.render(latents, b, denoise=True, steps=3),
            lambda b: measured.manipulate(x, direction, 1.0, b, steps=3),
            lambda b: measured.interpolate(x[:2], x[2:], 0.5, b, steps=3),
            lambda b: measured.principal_directions(x, b).directions,
            lambda b: measured.attribute_direction(x[:2], x[2:], b),
        ):
            assert torch.equal(verb("auto"), verb(beta))
        assert measured.levels(["auto", 0.2]) == (0.5, 0.2)

    def test_edits_start_there_by_default(self, measured):
        x, direction = images(4), torch.ones(4, 8, 8)
        for verb in (
            lambda *b: measured.manipulate(x, direction, 1.0, *b, steps=3),
            lambda *b: measured.interpolate(x[:2], x[2:], 0.5, *b, steps=3),
            lambda *b: measured.principal_directions(x, *b).directions,
            lambda *b: measured.attribute_direction(x[:2], x[2:], *b),
        ):
            assert torch.equal(verb(), verb(0.5))
        with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\], or one for each sample, got None"):
            measured.encode(x)

    def test_latents_need_none(self, fresh):
        latents = fresh.encode(images(4), 0.5)
        assert torch.equal(fresh.attribute_direction(latents[:2], latents[2:]), latents[:2].mean(0) - latents[2:].mean(0))

    def test_a_model_that_was_not_measured_says_how(self, fresh):
        for verb in (lambda: fresh.encode(images(1), "auto"), lambda: fresh.manipulate(images(1), torch.ones(4, 8, 8), 1.0)):
            with pytest.raises(ValueError, match=r"model\.measure_spectrum\(images\) .*`multibeta spectrum MODEL --save`"):
                verb()

    def test_a_model_of_one_representation_has_none(self, refiner, baseline):
        for single in (refiner, baseline):
            for verb in (lambda m: m.encode(images(1), "auto"), lambda m: m.levels(["auto"]), lambda m: m.auto_beta):
                with pytest.raises(ValueError, match="has one representation and takes no beta"):
                    verb(single)

    def test_other_words_are_refused(self, measured):
        for verb in (lambda: measured.encode(images(1), "high"), lambda: measured.levels(["high"])):
            with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\] or \"auto\", got 'high'"):
                verb()

    @pytest.mark.parametrize(
        "recorded",
        [
            *([], {}, "high", {"levels": [LEVEL]}, {"num_images": "8", "levels": [LEVEL]}, {"num_images": 0, "levels": [LEVEL]}),
            *({"num_images": 8, "levels": levels} for levels in ([], [{"beta": 0.5}])),
            *(
                {"num_images": 8, "levels": [{**LEVEL, **change}]}
                for change in (
                    *({"identity": wrong} for wrong in ("1", float("nan"), True, 7, -3)),
                    *({"mse": None}, {"nats": 10**400}, {"nats": float("inf")}),
                )
            ),
            *(
                {"num_images": 8, "levels": [{**LEVEL, "beta": beta} for beta in betas]}
                for betas in ([0.0, 2.0], [0.5, 0.0], [0.5, 0.5], [-1.0])
            ),
        ],
    )
    def test_damaged_records_are_named(self, fresh, recorded):
        fresh.info["spectrum"] = {"num_images": 8, "levels": [LEVEL]}
        fresh.encode(images(1), "auto")
        fresh.info["spectrum"] = recorded
        with pytest.raises(ValueError, match=r"info\[\"spectrum\"\] of the model is damaged: .*identity"):
            fresh.encode(images(1), "auto")


def test_auto_is_never_above_what_was_measured(fresh):
    for measured in ([0.1], [0.0], [0.05, 0.2]):
        fresh.measure_spectrum(images(2), measured)
        assert fresh.auto_beta <= max(measured)


class TestShippedModel:
    def test_knows_its_levels(self, scenes32):
        nats, kept = ([row[name] for row in scenes32.spectrum] for name in ("nats", "identity"))
        assert nats == sorted(nats, reverse=True) and kept == sorted(kept, reverse=True)
        assert 0.85 <= scenes32.auto_beta <= 0.93
        assert json.loads((resolve_pretrained("scenes32") / "config.json").read_text())["info"]["spectrum"]["num_images"] == 200

    def test_images_stay_what_they_are_at_its_auto_beta(self, scenes32):
        chosen = torch.randint(480_000, (16,), generator=torch.Generator().manual_seed(0))
        x = data.to_float(SCENES.images(chosen))
        kept = scenes32.manipulate(x, torch.zeros(4, 8, 8), 0.0)
        assert torch.cdist(kept.flatten(1), x.flatten(1)).argmin(1).tolist() == list(range(16))
        assert identity(kept, scenes32.decode(scenes32.encode(x, 0.0))) > 0.9

    def test_an_edit_there_leaves_the_other_factors(self, scenes32):
        """Floors are dyed; of all shapes on all floors, the image is nearest to the shape it had."""
        factors = SCENES.factors(torch.randint(480_000, (224,), generator=torch.Generator().manual_seed(1)))
        factors[:, 5] = 7  # one orientation, whose few scenes are quickly drawn
        x, factors = data.to_float(SCENES.images(SCENES.indices(factors))), factors[:24]
        pca = scenes32.principal_directions(x, num_directions=2)
        edited = scenes32.manipulate(x[:24], pca.directions[1], 2 * pca.deviations[1])
        floors, shapes = [], []
        for image, own in zip(edited, factors, strict=True):
            candidates = own.repeat(40, 1)
            candidates[:, 0], candidates[:, 4] = torch.arange(40) % 10, torch.arange(40) // 10
            others = data.to_float(SCENES.images(SCENES.indices(candidates)))
            nearest = candidates[(others - image).square().flatten(1).sum(1).argmin()]
            floors.append(bool(nearest[0] == own[0]))
            shapes.append(bool(nearest[4] == own[4]))
        assert sum(floors) <= 8 and sum(shapes) >= 21  # by chance 2 and 6
