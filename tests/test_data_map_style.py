"""Datasets of torch, in the conventions of torchvision and of Hugging Face, as datasets of the library."""

import itertools
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_files import noise, open_folder, save
from multibeta import files
from multibeta.data import (
    ImageFolder,
    MapDataset,
    Scenes,
    StreamDataset,
    Subset,
    absolute_source,
    as_dataset,
    images,
    load_images,
    open_dataset,
    source_name,
    to_float,
)

pytestmark = pytest.mark.usefixtures("cache_home")

PICTURES = [noise(50, 40, seed) for seed in range(5)]


class Pictures(torch.utils.data.Dataset):
    """Five pictures, each in the form that `form` makes of it."""

    def __init__(self, form=lambda picture: picture, pictures=PICTURES):
        self.form, self.pictures, self.read = form, pictures, 0

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.read += 1
        return self.form(self.pictures[index])


def opened(dataset, resolution=32, channels=3, **options):
    return MapDataset(dataset, resolution, channels, progress=False, **options)


def tensor_of(picture):
    return torch.tensor(np.asarray(picture)).movedim(2, 0)


FORMS = {
    "picture": lambda picture: picture,
    "torchvision": lambda picture: (picture, 7),
    "list": lambda picture: [picture, 7],
    "image": lambda picture: {"label": 7, "image": picture},
    "img": lambda picture: {"img": picture, "fine_label": 7},
    "array": np.asarray,
    "array of floats": lambda picture: np.asarray(picture) / 255,
    "bytes": lambda picture: (tensor_of(picture), 7),
    "tensor": lambda picture: to_float(tensor_of(picture)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_convention_gives_the_same_images(form):
    dataset = opened(Pictures(FORMS[form]))
    assert (len(dataset), dataset.resolution, dataset.channels, dataset.in_memory) == (5, 32, 3, True)
    assert torch.equal(to_float(dataset.images(range(5))), load_images(PICTURES, 32))
    assert dataset.fingerprint == opened(Pictures()).fingerprint
    assert torch.equal(dataset[3], load_images(PICTURES[3], 32)[0])
    grey = opened(Pictures(FORMS[form]), channels=1)
    assert torch.equal(to_float(grey.images([4, 0])), load_images([PICTURES[4], PICTURES[0]], 32, channels=1))


def test_items_are_read_once_and_kept():
    dataset = Pictures()
    kept = opened(dataset)
    subset = Subset(kept, [1, 4])
    assert torch.equal(subset.images([1]), kept.images([4])) and subset._images is None
    assert dataset.read == 5


def test_files_lists_and_parts_of_our_datasets_are_map_style_too(tmp_path):
    for index, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{index}.png")
    expected = load_images(tmp_path, 32)
    for dataset in (PICTURES, sorted(tmp_path.glob("*.png")), expected, [*ImageFolder(tmp_path, 32, progress=False)]):
        assert torch.equal(to_float(opened(dataset).images(range(5))), expected)
    part, _ = torch.utils.data.random_split(open_folder(tmp_path, 32), [3, 2], torch.Generator().manual_seed(0))
    assert torch.equal(to_float(opened(part).images(range(3))), expected[part.indices])


def test_beyond_the_memory_items_are_read_when_they_are_asked_for(monkeypatch, caplog):
    kept = opened(Pictures())
    monkeypatch.setattr(images, "MEMORY_LIMIT_BYTES", 1000)
    monkeypatch.setattr("multibeta.data.map_style.CHUNK", 3)
    dataset = Pictures()
    with caplog.at_level(logging.WARNING):
        large = opened(dataset)
    assert not large.in_memory and dataset.read == 3 and "more than 4 GiB" in caplog.text
    assert torch.equal(large.images([4, 1]), kept.images([4, 1])) and large.images([]).shape == (0, 3, 32, 32)
    assert large.fingerprint == opened(Pictures()).fingerprint
    assert large.fingerprint != opened(Pictures(pictures=PICTURES[::-1])).fingerprint


def test_a_fingerprint_is_that_of_the_pixels_in_their_order():
    first = opened(Pictures()).fingerprint
    assert opened(Pictures(pictures=PICTURES[::-1])).fingerprint != first
    assert opened(Pictures(pictures=[*PICTURES[:4], noise(50, 40, 9)])).fingerprint != first
    assert Subset(opened(Pictures()), [1]).fingerprint == first


def test_tensors_of_floats_say_what_is_black():
    def scaled(picture):
        return tensor_of(picture) / 255  # as torchvision's ToTensor does

    with pytest.raises(ValueError, match=r"of the first 5 of Pictures none is negative, from 0 to 1: .*value_range=\(0, 1\)"):
        opened(Pictures(scaled))
    expected = load_images(PICTURES, 32)
    assert torch.equal(to_float(opened(Pictures(scaled), value_range=(0, 1)).images(range(5))), expected)
    wide = opened(Pictures(lambda picture: tensor_of(picture).double()), value_range=(0, 255))
    assert torch.equal(to_float(wide.images(range(5))), expected)
    bright = Pictures(lambda picture: to_float(tensor_of(picture)).abs())
    assert opened(bright, value_range=(-1, 1))[0].mean() > 0.3  # where it was said
    for wrong in [(1, 0), (0, float("inf")), (0, 1, 2), 1]:
        with pytest.raises(ValueError, match=r"values of black and of white, got " + re.escape(str(wrong))):
            opened(Pictures(), value_range=wrong)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(PICTURES)


class Failing(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(PICTURES[1 // 0])


class Broken(Pictures):
    def __getitem__(self, index):
        return [][0] if index == 3 else super().__getitem__(index)


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "list has no items"),
        ("photos", TypeError, "got the str 'photos': open_dataset opens folders"),
        (Stream(), TypeError, "needs __len__ and __getitem__, got a Stream, which only streams: data.StreamDataset"),
        (np.array(3.0), TypeError, "that of ndarray is missing: TypeError: len"),
        ({"train": [], "test": []}, TypeError, "got a dict of train, test: give one of these"),
        (Broken(), ValueError, "item 3 of Broken cannot be read: IndexError"),
        (
            Pictures(lambda picture: {"pixels": picture, "y": 1}),
            TypeError,
            'it has pixels, y: .*rename_column\\(NAME, "image"\\)',
        ),
        (Pictures(lambda picture: ("cat", picture)), ValueError, "item 0 of Pictures is no picture: .*'cat'"),
        (Pictures(lambda picture: (7, picture)), TypeError, "item 0 of Pictures must be a file, an image of Pillow.*got int"),
        (Pictures(lambda picture: None), TypeError, "item 0 of Pictures must be .* got NoneType"),
        (
            Pictures(lambda picture: 2 * to_float(tensor_of(picture))),
            ValueError,
            r"item 0 of Pictures must be floats in \[-1, 1\]",
        ),
        ([Image.new("RGB", (20, 50))], ValueError, "item 0 of list cannot be read: TooSmall: 20 x 50 pixels are too few for"),
    ],
)
def test_what_is_no_dataset_of_pictures_is_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        opened(dataset)


def pictures_of_a_file():
    yield from PICTURES


class Unread(dict):
    def __getitem__(self, key):
        raise RuntimeError("lost")


@pytest.mark.parametrize("kind", [MapDataset, StreamDataset, as_dataset])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (3, "needs __len__ and __getitem__, or else __iter__, got a int"),
        (None, "or else __iter__, got a NoneType"),
        (PICTURES[0], "or else __iter__, got a Image"),
        ("photos", "got the str 'photos': open_dataset opens folders"),
        ({"train": PICTURES}, "got a dict of train: give one of these"),
        (torch.utils.data.DataLoader(PICTURES, 2, collate_fn=list), "got a DataLoader, which gives batches: give its dataset"),
        (pictures_of_a_file, r"got pictures_of_a_file, which is to be called: give what it returns, pictures_of_a_file\(...\)"),
        (Stream, "got the class Stream itself: give an object of it"),
    ],
)
def test_what_gives_no_pictures_says_what_to_give(kind, dataset, message):
    with pytest.raises(TypeError, match=message):
        kind(dataset, 32, progress=False)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Unread(image=1), "item 0 of .* cannot be read: RuntimeError: lost"),
        (torch.zeros(3, 40, 40).to_sparse(), "item 0 of .* must be a dense tensor"),
        (torch.zeros(3, 40, 40, device="meta"), "item 0 of .* must have values"),
        (torch.zeros(2, 3, 40, 40), r"item 0 of .* must have shape \(C, H, W\), .* got \(2, 3, 40, 40\)"),
        (None, "item 0 of .* must be a file, .*, got NoneType"),
        ((None, 7), "item 0 of .* must be a file, .*, got NoneType"),
        ({"image": None}, "item 0 of .* must be a file, .*, got NoneType"),
    ],
)
def test_what_is_no_picture_is_named(item, message):
    """Of one item a stream says that none of its items was taken."""
    error = TypeError if message.endswith("NoneType") else ValueError
    for kind in (MapDataset, StreamDataset):
        with pytest.raises(error, match=message):
            kind([item], 32, progress=False)


def test_beyond_the_memory_the_next_item_stands_in_for_a_damaged_one(monkeypatch, caplog):
    monkeypatch.setattr(images, "MEMORY_LIMIT_BYTES", 1000)
    monkeypatch.setattr(files, "_said", set())
    with caplog.at_level(logging.WARNING):
        dataset = opened(Broken())
        for _ in range(2):
            assert torch.equal(to_float(dataset.images([3, 4, 2])), load_images([PICTURES[number] for number in (4, 4, 2)], 32))
    lines = [line for line in caplog.messages if "stands in for it" in line]
    assert len(lines) == 1 and lines[0].startswith("item 3 of Broken cannot be read: IndexError") and "item 4 stands" in lines[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_is_read_once_to_a_file_that_goes_with_the_process(form, cache_home, caplog):
    with caplog.at_level(logging.INFO):
        dataset = as_dataset((FORMS[form](picture) for picture in PICTURES), 32, progress=False)
    assert isinstance(dataset, StreamDataset) and (len(dataset), dataset.in_memory) == (5, False)
    assert torch.equal(to_float(dataset.images([4, 0, 0])), load_images([PICTURES[number] for number in (4, 0, 0)], 32))
    assert dataset.images([]).shape == (0, 3, 32, 32) and source_name(dataset) == "dataset: generator"
    assert list(cache_home.iterdir()) == [] and "5 images of generator take 0.0 MiB on disk" in caplog.text
    assert as_dataset(Stream(), 32, progress=False).fingerprint == dataset.fingerprint
    assert streamed(reversed(PICTURES)).fingerprint != dataset.fingerprint


def streamed(stream, **options):
    return StreamDataset(stream, 32, progress=False, **options)


def test_a_stream_without_an_end_needs_a_limit(monkeypatch, cache_home):
    assert len(streamed(itertools.cycle(PICTURES), limit=12)) == 12
    assert len(streamed(PICTURES, limit=12)) == 5
    monkeypatch.setattr("multibeta.data.map_style.MOST_STREAMED", 10)
    assert len(streamed(PICTURES * 2)) == 10
    with pytest.raises(ValueError, match=r"cycle gives more than 10 pictures, and may have no end: .*, 32, limit="):
        streamed(itertools.cycle(PICTURES))
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        streamed(PICTURES, limit=0)
    assert list(cache_home.iterdir()) == []


def test_what_a_stream_gives_in_place_of_pictures_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(streamed([Image.new("RGB", (20, 50)), *PICTURES])) == 5
    assert "item 0 of list cannot be read: TooSmall: 20 x 50 pixels are too few" in caplog.text
    with pytest.raises(ValueError, match=r"none of the first 64 items is taken; the last: item 63 of repeat .*20 x 50 pixels"):
        streamed(itertools.repeat(Image.new("RGB", (20, 50))))
    with pytest.raises(ValueError, match=r"none of the 2 items of generator is taken; the last: item 1 of .*20 x 50 pixels"):
        streamed(Image.new("RGB", (20, 50)) for _ in range(2))
    with pytest.raises(ValueError, match="Failing fails at item 0: ZeroDivisionError"):
        streamed(Failing())
    with pytest.raises(ValueError, match="generator has no items"):
        streamed(picture for picture in ())
    with pytest.raises(ValueError, match="generator fails at item 1: ZeroDivisionError"):
        streamed(PICTURES[1 // (1 - number)] for number in range(3))
    with pytest.raises(TypeError, match=r"item 0 of count must be a file, .*got int"):
        streamed(itertools.count())
    with pytest.raises(
        ValueError, match=r"of the first 5 of map none is negative.*StreamDataset\(\.\.\., value_range=\(0, 1\)\)"
    ):
        streamed(map(lambda picture: tensor_of(picture) / 255, PICTURES))


def test_datasets_of_hugging_face():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"image": PICTURES, "label": list(range(5))}, features=features)
    for each in (dataset, dataset.with_format("torch"), dataset.with_format("numpy"), dataset.to_iterable_dataset()):
        prepared = as_dataset(each, 32, progress=False)
        assert isinstance(prepared, MapDataset if hasattr(each, "__len__") else StreamDataset)
        assert torch.equal(to_float(prepared.images(range(5))), load_images(PICTURES, 32))
    with pytest.raises(TypeError, match="got a DatasetDict of train: give one of these"):
        as_dataset(datasets.DatasetDict({"train": dataset}), 32)


def test_small_pictures_are_enlarged_where_it_is_allowed():
    assert opened([Image.new("RGB", (20, 50))], upscale=True).images([0]).shape == (1, 3, 32, 32)


def test_a_dataset_of_ours_stays_what_it_is():
    scenes = Scenes(16)
    assert as_dataset(scenes, 16) is scenes
    with pytest.raises(ValueError, match=r"Scenes has images of 16 pixels per side, 32 are asked for"):
        as_dataset(scenes, 32)
    with pytest.raises(ValueError, match=r"Scenes has RGB images of 3 channels, 1 are asked for"):
        as_dataset(scenes, 16, channels=1)
    assert isinstance(as_dataset(PICTURES, 16, progress=False), MapDataset)


def test_a_name_says_that_images_were_handed_over():
    for dataset in (Pictures(), opened(Pictures())):
        assert source_name(dataset) == absolute_source(source_name(dataset)) == "dataset: Pictures"
    with pytest.raises(ValueError, match="dataset: Pictures was handed over in Python, no name opens it again"):
        open_dataset("dataset: Pictures", 16)


def test_a_dataset_that_hides_paths_behind_the_name_of_images_is_read_by_its_items(tmp_path):
    """As torchvision's VOCDetection does."""
    dataset = Pictures()
    dataset.images = ["a.jpg"]
    save(tmp_path / "a.jpg")
    assert len(as_dataset(dataset, 32, progress=False)) == 5
