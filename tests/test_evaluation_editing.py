"""Two ways to edit side by side: what is to stay is read off the scenes, not off the edits."""

import dataclasses

import pytest
import torch

from multibeta import data
from multibeta.evaluation import Features, compare_editing
from multibeta.evaluation.editing import meant_factor, unchanged_pixels
from multibeta.metrics import FactorClassifier

SCENES = data.Scenes(16)
CHOSEN = torch.arange(0, 480_000, 48_001)


@pytest.fixture(scope="module")
def features():
    classifier = FactorClassifier(SCENES.factor_sizes, 16, width=8).eval()
    return Features("features of a factor classifier", lambda x: classifier.features(x).detach()[:, :2], classifier)


def test_a_pixel_stays_where_no_value_of_the_factor_changes_it():
    factors = SCENES.factors(CHOSEN)
    for factor, name in enumerate(SCENES.factor_names):
        stays = unchanged_pixels(SCENES, CHOSEN, factor)
        other = factors.clone()
        other[:, factor] = (other[:, factor] + 1) % SCENES.factor_sizes[factor]
        change = (SCENES.images(SCENES.indices(other)).int() - SCENES.images(CHOSEN).int()).abs().amax(1)
        assert (change[stays] <= 8).all() and change.amax() > 8, name
    floor, wall, thing = (unchanged_pixels(SCENES, CHOSEN, factor) for factor in range(3))
    assert (floor | wall | thing).float().mean() > 0.98  # but where all three meet in a pixel
    assert floor[:, 0].all() and wall[:, -1].all()  # no floor in the first row, no wall in the last


def test_the_meant_factor_is_the_one_that_latents_lie_by():
    factors = SCENES.factors(torch.arange(0, 480_000, 1777))
    noise = torch.randn(len(factors), generator=torch.Generator().manual_seed(0))
    for factor, size in enumerate(SCENES.factor_sizes):
        by_value = torch.randn(size, generator=torch.Generator().manual_seed(factor))
        assert meant_factor(by_value[factors[:, factor]] + 0.3 * noise, factors) == factor


def test_no_edit_of_an_inverted_latent_is_nearer_to_the_image(model, features):
    rows = compare_editing(model, features, SCENES, CHOSEN, CHOSEN, [0.5], num_directions=1, strengths=(1.0,), steps=25)
    assert [(row["way"], row["strength"]) for row in rows] == [
        (way, strength) for way in ("encoded", "inverted") for strength in (0.0, 1.0)
    ]
    encoded, inverted = rows[0], rows[2]
    assert inverted["lossless"] < 0.1 * encoded["lossless"]
    assert rows[1]["meant"] == rows[3]["meant"] and rows[1]["meant"][0] in SCENES.factor_names
    assert all(row["sampler"] == "ode2" and row["steps"] == 25 for row in rows)


def test_numbers_are_those_of_the_edits(model, features):
    walk = {"sampler": "heun", "steps": 2}
    *_, row = compare_editing(model, features, SCENES, CHOSEN, CHOSEN, [0.4], num_directions=1, strengths=(2.0,), **walk)
    images, factors = data.to_float(SCENES.images(CHOSEN)), SCENES.factors(CHOSEN)
    principal = model.principal_directions(model.encode(images, 0.4), 0.4, 1)
    direction = principal.directions[0] * principal.deviations[0]
    meant = SCENES.factor_names.index(row["meant"][0])
    stays, others = unchanged_pixels(SCENES, CHOSEN, meant), [factor for factor in range(6) if factor != meant]
    changed, kept, outside = [], [], []
    for strength in (-2.0, 2.0):
        edited = model.manipulate(images, direction, strength, 0.4, invert=True, **walk)
        same = features.classifier.predict(edited) == factors
        changed.append((~same[:, meant]).float().mean())
        kept.append(same[:, others].float().mean())
        error = (edited - images).square().mean(1) * stays
        outside.append((error.sum((1, 2)) / stays.sum((1, 2)).clamp(min=1)).mean())
    for name, values in (("changed", changed), ("kept", kept), ("outside", outside)):
        assert row[name] == pytest.approx(float(sum(values) / 2), abs=1e-4)


def test_edits_are_judged_by_a_classifier(model, features):
    with pytest.raises(ValueError, match="by a classifier of the factors, and there is none behind pixels"):
        compare_editing(model, dataclasses.replace(features, name="pixels", classifier=None), SCENES, CHOSEN, CHOSEN)
    with pytest.raises(ValueError, match="must be one of ode, ode2, heun"):
        compare_editing(model, features, SCENES, CHOSEN, CHOSEN, sampler="ancestral")
