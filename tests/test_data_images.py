"""What every dataset answers: bytes and floats, indices, subsets, mirrors and splits."""

import re

import numpy as np
import pytest
import torch

from dataset_files import noise, open_folder
from multibeta.data import (
    Mirrored,
    Scenes,
    Subset,
    knows_attributes,
    knows_classes,
    knows_factors,
    split,
    split_indices,
    to_float,
    to_uint8,
)

pytestmark = pytest.mark.usefixtures("cache_home")


def test_bytes_survive_the_float_range():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), values)


def test_floats_beyond_the_range_are_clamped():
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


def test_subset_keeps_order_and_factors(scenes):
    chosen = [7, 3, 479_999, 3]
    subset = Subset(scenes, chosen)
    assert len(subset) == 4
    assert subset.indices.tolist() == chosen
    assert torch.equal(subset.images(range(4)), scenes.images(chosen))
    assert torch.equal(subset.factors([2, 0]), scenes.factors([479_999, 7]))
    assert subset.factor_sizes == scenes.factor_sizes


def test_subset_without_factors_has_none(nested_photos):
    subset = Subset(open_folder(nested_photos), [0])
    assert not knows_factors(subset) and subset.factor_names == ()
    with pytest.raises(AttributeError, match="no known factors"):
        subset.factors([0])


def test_what_a_dataset_knows_is_told_of_foreign_ones_too(scenes):
    class Bare:
        resolution, channels = 32, 3

        def __len__(self):
            return 4

        def images(self, indices):
            return scenes.images(indices)

    class Unnamed(Bare):
        def factors(self, indices):
            return scenes.factors(indices)

    class Named(Unnamed):
        factor_names, factor_sizes = scenes.factor_names, scenes.factor_sizes

    class Empty(Named):
        factor_names = ()

    assert knows_factors(scenes) and knows_attributes(scenes)
    with pytest.raises(ValueError, match=r"has factors\(indices\) and no factor_names: name each column"):
        Subset(Unnamed(), [1, 2])
    assert knows_factors(Named()) and not knows_attributes(Named())
    assert Subset(Named(), [1, 2]).factor_names == scenes.factor_names
    assert not knows_factors(Bare()) and not knows_factors(Empty())
    assert Subset(Bare(), [1, 2]).factor_names == Subset(Bare(), [1, 2]).attribute_names == ()

    class Labelled(Bare):
        def labels(self, indices):
            return torch.as_tensor(indices) % 2

    assert not knows_classes(Labelled()) and not knows_classes(Bare()) and not knows_classes(scenes)
    Labelled.class_names = ("even", "odd")
    assert knows_classes(Labelled()) and Subset(Labelled(), [3, 2]).labels([0, 1]).tolist() == [1, 0]
    Labelled.labels = [0, 1, 0, 1]  # of other libraries: no function of indices
    assert not knows_classes(Labelled())


@pytest.mark.parametrize(
    ("change", "error", "given"),
    [
        (lambda images: images[:-1], ValueError, "a Tensor of uint8 and shape (4, 3, 16, 16)"),
        (lambda images: torch.cat([images, images]), ValueError, "a Tensor of uint8 and shape (10, 3, 16, 16)"),
        (lambda images: images[:, :, ::2, ::2], ValueError, "a Tensor of uint8 and shape (5, 3, 8, 8)"),
        (lambda images: images.permute(0, 2, 3, 1), ValueError, "a Tensor of uint8 and shape (5, 16, 16, 3)"),
        (lambda images: images[:, :1], ValueError, "a Tensor of uint8 and shape (5, 1, 16, 16)"),
        (lambda images: images / 255, TypeError, "a Tensor of float32 and shape (5, 3, 16, 16)"),
        (lambda images: images.long(), TypeError, "a Tensor of int64 and shape (5, 3, 16, 16)"),
        (lambda images: images.numpy(), TypeError, "a ndarray of uint8 and shape (5, 3, 16, 16)"),
        (list, TypeError, "a list"),
        (lambda images: None, TypeError, "a NoneType"),
    ],
)
def test_images_that_a_dataset_does_not_promise_are_refused(change, error, given):
    class Odd(Scenes):
        def images(self, indices):
            return change(super().images(indices))

    words = "images(indices) of Odd must give a Tensor of uint8 and shape (5, 3, 16, 16) for 5 indices, got "
    for read in (lambda: Subset(Odd(16), range(5)), lambda: Mirrored(Odd(16)).images(range(5))):
        with pytest.raises(error, match=re.escape(words + given) + "$"):
            read()


def test_mirrored_images_follow_the_others():
    scenes = Scenes(16)
    mirrored = Mirrored(Subset(scenes, [7, 11, 13]))
    assert len(mirrored) == 6 and not knows_factors(mirrored) and mirrored.factor_names == ()
    images = scenes.images([7, 11, 13])
    assert torch.equal(mirrored.images(range(6)), torch.cat([images, images.flip(3)]))
    assert torch.equal(mirrored.images([4, 1]), torch.stack([images[1].flip(2), images[1]]))


def test_split_is_disjoint_and_seeded(scenes):
    train, test = split(scenes, 40, 24, seed=3)
    assert (len(train), len(test)) == (40, 24)
    assert not set(train.indices.tolist()) & set(test.indices.tolist())
    again, _ = split(scenes, 40, 24, seed=3)
    assert torch.equal(train.indices, again.indices)
    other, _ = split(scenes, 40, 24, seed=4)
    assert not torch.equal(train.indices, other.indices)


def test_parts_have_the_numbers_of_their_images(scenes):
    parts = split(scenes, 5, 3, seed=7)
    assert all(torch.equal(part.indices, indices) for part, indices in zip(parts, split_indices(480_000, 5, 3, 7), strict=True))


def test_split_says_what_is_missing(nested_photos):
    with pytest.raises(ValueError, match="need 5 images, the dataset has 3"):
        split(open_folder(nested_photos), 4, 1)
    with pytest.raises(ValueError, match="negative"):
        split(open_folder(nested_photos), -1, 1)


def test_every_dataset_is_a_map_style_dataset_of_torch(nested_photos, scenes):
    folder = open_folder(nested_photos, 32)
    for dataset in (folder, Subset(folder, [2, 0, 1]), Mirrored(folder), scenes):
        image = dataset[np.int64(2)]
        assert image.shape == (3, 32, 32) and torch.equal(image, to_float(dataset.images([2]))[0])
        for outside in (-1, len(dataset)):
            with pytest.raises(IndexError, match=rf"index must lie in \[0, {len(dataset) - 1}\], got {outside}"):
                dataset[outside]
        with pytest.raises(TypeError):
            dataset[0.5]
    assert torch.equal(torch.stack(list(folder)), to_float(folder.images(range(3))))


def test_the_loaders_of_torch_take_a_folder(nested_photos):
    folder = open_folder(nested_photos)
    batches = list(torch.utils.data.DataLoader(folder, batch_size=2))
    assert torch.equal(torch.cat(batches), to_float(folder.images(range(3))))
    parts = torch.utils.data.random_split(folder, [2, 1], torch.Generator().manual_seed(0))
    loaded = torch.cat([batch for part in parts for batch in torch.utils.data.DataLoader(part)])
    assert torch.equal(loaded, to_float(folder.images([*parts[0].indices, *parts[1].indices])))


def test_a_subset_of_a_subset_takes_images_from_its_memory(scenes):
    inner = Subset(scenes, [7, 3, 11])
    outer = Subset(inner, [2, 0])
    assert inner.in_memory and outer.in_memory and outer._images is None
    assert torch.equal(outer.images([1, 0]), scenes.images([7, 11]))


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_indices_of_every_kind_are_accepted(scenes, kind):
    assert torch.equal(scenes.factors(kind([5, 9])), scenes.factors(torch.tensor([5, 9])))


def test_no_indices_give_no_images(scenes):
    assert scenes.images([]).shape == (0, 3, 32, 32)
    assert scenes.factors([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([480_000], "lie in"), ([-1], "lie in"), ([0.5], "integers"), ([True], "integers"), ([[1]], "one-dimensional")],
)
def test_wrong_indices_are_refused(scenes, indices, message):
    with pytest.raises(ValueError, match=message):
        scenes.images(indices)


@pytest.mark.parametrize("given", [[noise(40, 40)], torch.utils.data.DataLoader([1]), None, (noise(40, 40) for _ in range(3))])
def test_what_is_no_dataset_of_the_library_is_refused(given):
    message = f"numbered images is needed, got a {type(given).__name__}, which has no .*images: multibeta.data.as_dataset makes"
    for use in (lambda: split(given, 1, 1), lambda: Subset(given, [0]), lambda: Mirrored(given)):
        with pytest.raises(TypeError, match=message):
            use()
