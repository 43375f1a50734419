"""Where the evaluations of a flow map stand: what is tried, which of it is taken, and what is said where nothing can be."""

import itertools
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from multibeta import recipes
from multibeta.evaluation import choose_paths, choose_recorded_paths
from multibeta.flow_map import FlowMap, spread


@pytest.fixture
def mapped(model):
    model.flow_map = FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, span_channels=8)
    yield model
    model.flow_map = None


def test_each_path_is_walked_once_and_every_number_of_evaluations_gets_one(mapped):
    distances = itertools.cycle([5.0, 3.0, 4.0, 4.0, 6.0, 2.0])
    features, seen = SimpleNamespace(distance=lambda images, real: next(distances)), []
    made = mapped.generate

    def generate(count, **sampling):
        seen.append(sampling | {"path": mapped.flow_map.path(sampling["sampler"], sampling["steps"], mapped.num_steps)})
        return made(count, **sampling)

    mapped.generate = generate
    try:
        choose_paths(mapped, features, torch.zeros(2, 3, 16, 16), progress=False)
    finally:
        del mapped.generate
    config = mapped.flow_map.config
    assert [len(path) for path in config.paths] == [1, 2, 3] and [len(path) for path in config.noise_paths] == [2, 4, 6]
    assert len({tuple(each["path"]) for each in seen}) == len(seen)  # each was walked once, along its own path


@pytest.mark.parametrize(("further", "lift"), [(3.5, 0.3), (4.3, 0.2)])
def test_each_number_of_evaluations_has_its_power_and_all_one_lift(mapped, further, lift):
    of_map = [9.5, 9.0, 8.0, 8.5, 7.5, 8.2], [9.0, 1.0, 2.0, 3.0, 2.0, 0.5], [0.5, 3.0, 1.0, 2.0, 0.4, 2.0]
    of_powers = [7.0, 6.0, 4.0, 5.0, 4.5, 3.0], [4.5, 4.0, 5.0, 6.0, 7.0, 7.0], [4.0, 4.0, 3.0, 3.5, 3.5, 3.5]
    of_lifts = [2.0, 4.5, 3.5], [2.5, 3.0, further]  # in all 10 of 0.2 and of 0.1; of 0.3 9 or 9.8
    distances = iter(itertools.chain(*of_map, *of_powers, *of_lifts))
    features = SimpleNamespace(distance=lambda images, real: next(distances))
    tried = choose_paths(mapped, features, torch.zeros(2, 3, 16, 16), progress=False)
    first = {sampler: [(row["power"], row["lift"]) for row in rows if row["steps"] == 2] for sampler, rows in tried.items()}
    walked = 0.5, 1.0, 2.0, 3.0, 1.5, 2.5
    assert first["map"] == [(power, 0.0) for power in walked]
    assert first["map_noise"] == [(power, 0.2) for power in walked] + [(2.5, 0.1), (2.5, 0.3)]
    config, last = mapped.flow_map.config, mapped.num_steps
    powers = {"map": (1.5, 1.5, 0.25), "map_noise": (2.5, 1.0, 2.0)}
    assert config.paths == tuple(tuple(to for _, to in spread(last, k, p)) for k, p in enumerate(powers["map"], 2))
    noisy = (spread(last, k, p, lift) for k, p in enumerate(powers["map_noise"], 2))
    assert config.noise_paths == tuple(tuple(itertools.chain(*path)) for path in noisy)


def test_without_images_the_evaluations_stay_at_equal_steps_and_the_log_says_why(mapped, caplog):
    assert not choose_recorded_paths(mapped, progress=False)
    assert "is not chosen" in caplog.text and mapped.flow_map.config.paths == ()
    assert [here for here, _, _ in mapped.flow_map.path("map", 5, 50)] == [50, 40, 30, 20, 10]


def test_paths_stay_as_they_were_where_too_few_images_are_held_out(mapped, photos, caplog, monkeypatch):
    source = {"recipe": json.loads(json.dumps(recipes.to_dict(recipes.find("photos32"))))}
    source["recipe"]["data"] |= {"source": str(photos), "upscale": True}
    monkeypatch.setattr(mapped, "info", source)
    before = mapped.flow_map.config
    assert not choose_recorded_paths(mapped, progress=False)
    assert "half of 2 images are fewer than 32" in caplog.text and mapped.flow_map.config is before


def test_half_of_the_held_out_images_decide_and_the_log_says_what(mapped, tmp_path, tmp_path_factory, caplog, monkeypatch):
    pixels = torch.randint(256, (400, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path_factory.mktemp("cache")))
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    recipe = json.loads(json.dumps(recipes.to_dict(recipes.find("photos32"))))
    recipe["data"] |= {"source": str(tmp_path), "num_test": 80}
    recipe["vae"]["resolution"] = 16
    monkeypatch.setattr(mapped, "info", {"recipe": recipe})
    with caplog.at_level(logging.INFO, "multibeta"):
        assert choose_recorded_paths(mapped, images=36, progress=False)
    config = mapped.flow_map.config
    assert [len(path) for path in config.paths] == [1, 2, 3] and [len(path) for path in config.noise_paths] == [2, 4, 6]
    assert "on 36 held-out images" in caplog.text and str(config.noise_paths) in caplog.text
