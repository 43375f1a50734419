"""The likelihood of images, and the Gaussian of their pixels that it stands beside."""

import math

import numpy as np
import pytest
import torch
from processes import in_processes
from torch.distributions import MultivariateNormal

from multibeta import data, ops
from multibeta.evaluation import evaluate, likelihood_measure, pixel_gaussian_bits, results_table
from multibeta.evaluation.likelihood import WALK
from multibeta.pipelines import load_pretrained

QUIET = {"seed": 0, "batch_size": 8, "progress": False}


@pytest.fixture(autouse=True)
def short_walks(monkeypatch):
    monkeypatch.setitem(WALK, "steps", 4)


class Known:
    """Images of a correlated Gaussian of 48 pixels, in 8 bits."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(48, 48, generator=generator, dtype=torch.float64) * torch.logspace(-2, -1.2, 48, dtype=torch.float64)
        self.density = MultivariateNormal(torch.linspace(-0.3, 0.3, 48).double(), mixing @ mixing.T / 2 + 1e-3 * torch.eye(48))

    def images(self, count, seed):
        torch.manual_seed(seed)
        return data.to_float(data.to_uint8(self.density.sample((count,)).view(count, 3, 4, 4)))


def test_a_gaussian_that_is_learned_costs_the_entropy_of_the_one_it_learned():
    known = Known()
    learning, images = known.images(4000, 0), known.images(1000, 1)
    entropy = float(known.density.entropy()) / 48 / math.log(2) - math.log2(2 / 255)
    found = pixel_gaussian_bits(learning, images)
    assert found.shape == (1000,)
    assert float(found.mean()) == pytest.approx(entropy, abs=0.03)  # 3200 images of 48 pixels: 0.01 of it for the estimate


def test_a_gaussian_of_fewer_images_than_pixels_knows_less_but_is_no_nonsense():
    known = Known()
    images = known.images(200, 1)
    few, many = (float(pixel_gaussian_bits(known.images(count, 0), images).mean()) for count in (30, 4000))
    alone = float(pixel_gaussian_bits(torch.zeros(30, 3, 4, 4) + known.images(1, 5), images).mean())
    assert many < few < alone and few < many + 1.5


def test_it_is_the_mean_over_images_that_it_was_not_learned_of(model, monkeypatch):
    monkeypatch.setattr("multibeta.evaluation.likelihood.GAUSSIAN_IMAGES", 100)
    scenes = data.Scenes(16)
    found = likelihood_measure(model, scenes, 20, **QUIET)()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(scenes)))
    bits = model.log_likelihood(scenes.images(order[:20]), steps=4, seeds=ops.sample_seeds(0, order[:20])).bits_per_dimension
    assert found["bits_per_dimension"] == pytest.approx(float(bits.mean()), abs=1e-5)
    assert found["error"]["bits_per_dimension"] == pytest.approx(float(bits.std()) / 20**0.5, abs=1e-5)
    images = [data.to_float(scenes.images(part)) for part in (order[20:120], order[:20])]
    assert found["gaussian"] == pytest.approx(float(pixel_gaussian_bits(*images).mean()), abs=1e-6)
    assert (found["num_images"], found["num_train"], found["held_out"]) == (20, 100, False)


def test_it_stands_in_the_results_where_asked(model):
    few = data.Subset(data.Scenes(16), range(0, 480_000, 20_000))
    result = evaluate(model, few, betas=[0.5], num_images=24, fidelity=False, likelihood=True, steps=2, progress=False)
    assert result["likelihood"]["num_images"] == result["likelihood"]["num_train"] == 12  # of 24 images half
    assert "likelihood: at most" in results_table(result)


def test_images_that_the_model_held_out_are_measured(model, monkeypatch):
    few = data.Subset(data.Scenes(16), range(0, 480_000, 10_000))
    split = torch.arange(30), torch.arange(30, 48)
    monkeypatch.setattr("multibeta.evaluation.likelihood.recorded_split", lambda model, dataset: split)
    found = likelihood_measure(model, few, 100, **QUIET)()
    assert (found["num_images"], found["num_train"], found["held_out"]) == (18, 30, True)


def test_what_cannot_be_measured(model, baseline, refiner):
    for pipeline in (baseline, refiner):
        with pytest.raises(ValueError, match=f"not of a {type(pipeline).__name__}: leave it out"):
            likelihood_measure(pipeline, data.Scenes(16), 20, **QUIET)
    few = data.Subset(data.Scenes(16), range(18))
    for dataset, count, message in ((few, 100, "got 9 and 9"), (data.Scenes(16), 5, "got 5 and 4000")):
        with pytest.raises(ValueError, match=f"a likelihood takes 10 images and 10 others, {message}"):
            likelihood_measure(model, dataset, count, **QUIET)


def measured_together(folder):
    """What a process measures that may be one of several."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WALK, "steps", 2)
        patch.setattr("multibeta.evaluation.likelihood.GAUSSIAN_IMAGES", 20)
        return likelihood_measure(load_pretrained(folder), data.Scenes(16), 13, **QUIET | {"batch_size": 4})()


def test_two_processes_measure_what_one_measures(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    together = in_processes(2, measured_together, str(tmp_path / "model"), folder=tmp_path)
    threads = torch.get_num_threads()
    try:
        assert together == [measured_together(str(tmp_path / "model"))] * 2
    finally:
        torch.set_num_threads(threads)
