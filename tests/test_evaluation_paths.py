"""Where the evaluations of a flow map stand: the path of the least distance is taken, and what is not there is said."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from multibeta import recipes
from multibeta.evaluation import choose_paths, choose_recorded_paths
from multibeta.flow_map import FlowMap, spread


@pytest.fixture
def mapped(model):
    model.flow_map = FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, span_channels=8)
    yield model
    model.flow_map = None


def test_the_path_of_the_least_distance_is_taken_and_stored(mapped):
    distances = itertools.cycle([5.0, 3.0, 4.0, 6.0, 2.0])
    features, seen = SimpleNamespace(distance=lambda images, real: next(distances)), []
    made = mapped.generate

    def generate(count, **sampling):
        seen.append(sampling | {"path": mapped.flow_map.path(sampling["sampler"], sampling["steps"], mapped.num_steps)})
        return made(count, **sampling)

    mapped.generate = generate
    try:
        tried = choose_paths(mapped, features, torch.zeros(2, 3, 16, 16), progress=False)
    finally:
        del mapped.generate
    config = mapped.flow_map.config
    assert [len(path) for path in config.paths] == [1, 2, 3] and [len(path) for path in config.noise_paths] == [2, 4, 6]
    for sampler, paths in (("map", config.paths), ("map_noise", config.noise_paths)):
        for steps, path in enumerate(paths, start=2):
            rows = [row for row in tried[sampler] if row["steps"] == steps]
            best = min(rows, key=lambda row: row["frechet"])
            pairs = spread(mapped.num_steps, steps, best["power"], best["lift"])
            assert path == tuple(itertools.chain(*pairs) if sampler == "map_noise" else (to for _, to in pairs))
    assert len({tuple(each["path"]) for each in seen}) == len(seen)  # each was walked once, along its own path


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
