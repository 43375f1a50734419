"""The built-in scenes."""

import pytest
import torch

from multibeta.data import (
    Scenes,
    to_float,
)

pytestmark = pytest.mark.usefixtures("cache_home")


def test_scenes_have_the_sizes_of_3d_shapes(scenes):
    assert scenes.factor_sizes == (10, 10, 10, 8, 4, 15)
    assert len(scenes) == 480_000
    assert len(scenes.factor_names) == 6


def test_last_factor_varies_fastest(scenes):
    assert scenes.factors([0, 1, 15]).tolist() == [[0] * 6, [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]


def test_attributes_are_statements_about_the_factors(scenes):
    factors = torch.tensor([[0, 5, 9, 7, 2, 14], [3, 2, 7, 0, 0, 7]])
    values = scenes.attributes(scenes.indices(factors))
    assert values.dtype == torch.bool and values.shape == (2, len(scenes.attribute_names))
    names = [{name for name, value in zip(scenes.attribute_names, row, strict=True) if value} for row in values.tolist()]
    assert names == [{"warm_floor", "warm_object", "large", "sphere", "turned_right"}, {"warm_wall", "cube"}]
    assert scenes.attributes([]).shape == (0, len(scenes.attribute_names))


def test_factors_and_indices_are_inverse(scenes):
    indices = torch.arange(0, len(scenes), 997)
    assert torch.equal(scenes.indices(scenes.factors(indices)), indices)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([[0, 0, 0, 8, 0, 0]], r"scale must lie in \[0, 7\], got 8"),
        ([[0, 0, -1, 0, 0, 0]], "object_hue"),
        ([[0, 0, 0]], "shape"),
        ([[0.0] * 6], "integers"),
    ],
)
def test_wrong_factors_are_refused(scenes, factors, message):
    with pytest.raises(ValueError, match=message):
        scenes.indices(factors)


@pytest.mark.parametrize("resolution", [0, 4, 2048, 32.0])
def test_wrong_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match="resolution"):
        Scenes(resolution)


def test_a_scene_depends_on_its_index_alone(scenes):
    indices = torch.tensor([123_456, 7, 400_000, 123_456])
    images = scenes.images(indices)
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images[0], images[3])
    fresh = Scenes(32)
    for index, image in zip(indices.tolist(), images, strict=True):
        assert torch.equal(fresh.images([index])[0], image)


def test_dropping_old_light_maps_changes_nothing(scenes):
    frugal = Scenes(32)
    frugal._maps_limit = 2
    indices = torch.arange(0, 60, 7)
    assert torch.equal(frugal.images(indices), scenes.images(indices))
    assert len(frugal._maps) == 2


@pytest.mark.parametrize("factor", range(6))
def test_every_step_of_every_factor_changes_the_image(scenes, factor):
    for base in ([2, 5, 8, 0, 1, 7], [7, 7, 7, 4, 2, 3]):
        factors = torch.tensor(base).repeat(scenes.factor_sizes[factor], 1)
        factors[:, factor] = torch.arange(scenes.factor_sizes[factor])
        images = to_float(scenes.images(scenes.indices(factors))).flatten(1)
        distances = torch.cdist(images, images) / images.shape[1] ** 0.5
        distances.fill_diagonal_(1)
        assert distances.min() > 0.01


def test_hue_factors_colour_their_own_surface(scenes):
    base = scenes.images(scenes.indices([[0, 0, 0, 4, 0, 7]]))[0].int()
    top, bottom, middle = (slice(0, 4), slice(0, 4)), (slice(28, 32), slice(0, 4)), (slice(15, 18), slice(12, 20))
    for factor, own in ((0, bottom), (1, top), (2, middle)):
        factors = torch.tensor([[0, 0, 0, 4, 0, 7]])
        factors[0, factor] = 5
        difference = (scenes.images(scenes.indices(factors))[0].int() - base).abs()
        for place in (top, bottom, middle):
            assert (difference[:, place[0], place[1]].amax() > 20) == (place == own)


def test_every_orientation_looks_different(scenes):
    # No symmetry of the room, even for round objects and equal hues.
    for shape in range(4):
        factors = torch.tensor([[3, 3, 3, 0, shape, 0]]).repeat(15, 1)
        factors[:, 5] = torch.arange(15)
        images = to_float(scenes.images(scenes.indices(factors)))
        for reference in (images, images.flip(-1)):
            distances = torch.cdist(images.flatten(1), reference.flatten(1))
            assert (distances + torch.eye(15) * 100 > 1).all()


def test_larger_scales_cover_more_pixels(scenes):
    for shape in range(4):
        factors = torch.tensor([[0, 5, 0, 0, shape, 7], [0, 5, 5, 0, shape, 7]]).repeat_interleave(8, 0)
        factors[:, 3] = torch.arange(8).repeat(2)
        red, cyan = scenes.images(scenes.indices(factors)).int().split(8)
        covered = ((red - cyan).abs().amax(1) > 10).sum((1, 2))
        assert (covered.diff() >= 6).all()


@pytest.mark.parametrize("shape", range(4))
def test_resolutions_show_the_same_scene(scenes, shape):
    index = scenes.indices([[1, 6, 8, 5, shape, 4], [4, 2, 0, 7, shape, 12]])
    small, large = ((data.images(index) / 255).square() for data in (scenes, Scenes(64)))  # linear light
    difference = (small - torch.nn.functional.avg_pool2d(large, 2)).abs()
    assert difference.mean() < 0.002
    assert difference.max() < 0.15  # one row of rays at the edge of an object


def test_scenes_use_the_range_of_bytes(scenes):
    images = to_float(scenes.images(torch.arange(0, len(scenes), 30_011)))
    assert 0.35 < images.std() < 0.6
    assert images.mean().abs() < 0.25
