"""What DisCo learns in a saved model, as directions with names."""

import pytest
import torch

from multibeta import data, latents
from multibeta.recipes.directions import learn_directions, visible_change


@pytest.mark.parametrize("name", ["model", "refiner", "baseline", "latent"])
def test_every_class_of_model_has_some(name, request, tmp_path):
    model, scenes = request.getfixturevalue(name), data.Subset(data.Scenes(16), torch.arange(0, 480_000, 8_000))
    beta = 0.3 if model.usual_levels else None
    found = learn_directions(model, scenes, tmp_path / "disco", beta, 4, steps=2, progress=False)
    assert found.names == ("disco 0", "disco 1", "disco 2", "disco 3") and (found.kind, found.beta) == ("disco", beta)
    assert found.model == model.latent_digest()
    encodings = model.encode(data.to_float(scenes.images(range(60))), beta)
    for step in found.steps:  # one standard deviation along each
        torch.testing.assert_close(latents.in_deviations(step, encodings), step, rtol=1e-3, atol=1e-5)
    changes = [visible_change(model, encodings[:16], step, beta) for step in found.steps]
    assert changes == sorted(changes, reverse=True)


def test_a_stopped_training_goes_on(baseline, tmp_path):
    scenes = data.Subset(data.Scenes(16), torch.arange(0, 480_000, 8_000))
    options = {"num_directions": 3, "progress": False}
    whole = learn_directions(baseline, scenes, tmp_path / "whole", steps=2, **options)
    with pytest.raises(FileExistsError):
        learn_directions(baseline, scenes, tmp_path / "whole", steps=2, **options)
    again = learn_directions(baseline, scenes, tmp_path / "whole", steps=2, resume=True, **options)
    assert torch.equal(again.steps, whole.steps)
    other = learn_directions(baseline, scenes, tmp_path / "other", steps=2, seed=1, **options)
    assert not torch.allclose(other.steps, whole.steps)
