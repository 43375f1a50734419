"""What distances are measured in."""

import numpy as np
import pytest
import torch

from multibeta import data, evaluation, metrics


def test_default_features_do_not_depend_on_earlier_random_draws():
    train_set, test_set = data.split(data.Scenes(16), 130, 20)
    images = data.to_float(test_set.images(range(20)))
    first, second = [], []
    for found in (first, second):
        torch.rand(7)
        found.append(evaluation.pixel_features(train_set)(images))
        found.append(evaluation.classifier_features(train_set, test_set, steps=1, progress=False)(images))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_few_images_make_a_rough_classifier_and_odd_sizes_none(caplog):
    few = data.split(data.Scenes(16), 40, 8)
    assert evaluation.classifier_features(*few, steps=1, progress=False).accuracy.keys() == set(few[0].factor_names)
    assert "learns from 40 images only" in caplog.text
    odd = data.split(data.Scenes(24), 40, 8)
    assert "pixels" in evaluation.usual_features(*odd, progress=False).name
    assert "no factor classifier takes images of 24 pixels" in caplog.text


def test_grey_images_are_compared_by_their_pixels_although_their_factors_are_known():
    class Grey(data.Scenes):
        channels = 1

        def images(self, indices):
            return super().images(indices)[:, :1]

    train_set, test_set = data.split(Grey(16), 40, 20)
    assert "pixels" in evaluation.usual_features(train_set, test_set, progress=False).name


def test_images_whose_training_images_know_no_factors_are_compared_by_their_pixels():
    train_set, test_set = data.split(data.Scenes(16), 40, 20)
    assert "pixels" in evaluation.usual_features(data.Mirrored(train_set), test_set, progress=False).name


def test_pixels_are_compared_in_as_many_ways_as_they_vary():
    colours = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 8, 8)
    dataset = data.MapDataset([(colour.clone(),) for colour in colours], resolution=8, value_range=(0, 1))
    features, images = evaluation.pixel_features(dataset), data.to_float(dataset.images(range(16)))
    assert features.name == "3 principal components of the pixels"
    assert features.distance(images.flip(0), images) < 1e-3 and features.distance(-images, images) < 100
    with pytest.raises(ValueError, match="the 2 images are all the same"):
        evaluation.pixel_features(data.Subset(dataset, [3, 3]))


@pytest.mark.parametrize("level", [0, 39, 78, 156, 255])
def test_large_images_that_are_all_the_same_do_not_vary_by_rounding(level):
    dataset = data.MapDataset([(torch.full((3, 256, 256), level / 127.5 - 1),)] * 20, resolution=256, value_range=(-1, 1))
    with pytest.raises(ValueError, match="the 20 images are all the same"):
        evaluation.pixel_features(dataset)


@pytest.mark.parametrize(("images", "few"), [(90, True), (92, True), (93, False)])
def test_a_distance_of_few_images_says_so_once(caplog, images, few):
    features = evaluation.Features("the first 46 pixels", lambda x: x.flatten(1)[:, :46])
    made = [torch.rand(count, 3, 4, 4) for count in (images, 200)]
    for pair in (made, made[::-1], made):
        features.distance(*pair)
    assert caplog.text.count(f"distance of {images} images in 46 features says little") == few
    assert ("more than 92" in caplog.text) == few


def test_the_distance_of_few_images_of_one_kind_is_what_the_bias_says():
    """d (d + 5) / 2n of two sets of n from N(0, 1) in d features: the means give 2 d / n, the covariances d (d + 1) / 2n."""
    width, count = 32, 800
    samples = torch.randn(12, 2, count, width, dtype=torch.float64)
    found = np.mean([metrics.frechet_distance(*pair) for pair in samples])
    assert found == pytest.approx(width * (width + 5) / (2 * count), rel=0.05)
