"""The section of a report that sets another model beside: what has no representation to compare shows new images."""

import pytest

from multibeta import data, evaluation
from multibeta.evaluation.images import new_images
from multibeta.report.comparison import new_images_section
from multibeta.report.page import number
from multibeta.report.write import check_models


def test_latent_diffusion_makes_new_images_beside_those_of_a_model(model, latent, baseline):
    real = data.to_float(data.Scenes(16).images(range(0, 160_000, 10_000)))
    features = evaluation.Features("some pixels", lambda x: x.flatten(1)[:, ::97])
    numbers = {"generation": {"features": features.name, "num_images": len(real)}}
    page = new_images_section(numbers, (model, latent), real, features, progress=False)
    ours, theirs = numbers["beside"]
    assert ours["walk"] == {"sampler": "ode2", "steps": 20} and theirs["walk"] == {"sampler": "ddim", "steps": 40}
    made = new_images(latent, len(real), progress=False, **theirs["walk"])
    assert theirs["frechet"] == pytest.approx(features.distance(made, real), rel=1e-3)
    assert all(f"<td>{number(row[key])}</td>" in page for row in (ours, theirs) for key in ("frechet", "sharpness"))
    assert "this model: DenoisingMultiBetaVAE, none" in page and "beside it: LatentDiffusion, none" in page

    check_models(model, latent)
    for refused in ((latent, None), (model, baseline)):
        with pytest.raises(ValueError, match="a report is of a DenoisingMultiBetaVAE or a DiffusionVAE, got a "):
            check_models(*refused)
