import contextlib
import errno
import json
import logging
import multiprocessing
import operator
import os
import pickle
import shutil
import socket
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta.files
from multibeta.data import (
    ImageFolder,
    Mirrored,
    Scenes,
    Subset,
    decoding,
    folder,
    knows_attributes,
    knows_factors,
    open_dataset,
    split,
    to_float,
    to_uint8,
)
from multibeta.data.decoding import load_square
from multibeta.files import read_arrays, read_json


@pytest.fixture(scope="module")
def scenes():
    return Scenes(32)


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nothing_in(folder):
    return not folder.exists() or not list(folder.iterdir())


def age(folder):
    """Two hours pass for all files of a folder: what is younger may be in use by others."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    (root / "b" / "deep").mkdir(parents=True)
    save(root / "b" / "deep" / "1.png", (0, 0, 255))
    save(root / "b" / "2.JPG", (0, 255, 0))
    save(root / "a.png", (255, 0, 0))
    return root


def save(path, colour=(10, 20, 30), size=(48, 40), mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)


def open_folder(root, resolution=16, **options):
    return ImageFolder(root, resolution, progress=False, **options)


def centre(dataset, index=0):
    side = dataset.resolution // 2
    return dataset.images([index])[0, :, side, side].tolist()


# --- ranges, subsets, splits ---


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


def test_subset_without_factors_has_none(photos):
    subset = Subset(open_folder(photos), [0])
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

    class Named(Bare):
        def factors(self, indices):
            return scenes.factors(indices)

    class Empty(Named):
        factor_names = ()

    assert knows_factors(scenes) and knows_attributes(scenes)
    assert knows_factors(Named()) and not knows_attributes(Named())
    assert not knows_factors(Bare()) and not knows_factors(Empty())
    assert Subset(Bare(), [1, 2]).factor_names == Subset(Bare(), [1, 2]).attribute_names == ()


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


def test_split_says_what_is_missing(photos):
    with pytest.raises(ValueError, match="need 5 images, the dataset has 3"):
        split(open_folder(photos), 4, 1)
    with pytest.raises(ValueError, match="negative"):
        split(open_folder(photos), -1, 1)


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


# --- scenes ---


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


# --- folders ---


def test_a_folder_is_read_in_path_order(photos):
    dataset = open_folder(photos)
    assert dataset.paths == ["a.png", "b/2.JPG", "b/deep/1.png"]
    assert dataset.images([0, 1, 2]).shape == (3, 3, 16, 16)
    assert [int(image.float().mean((1, 2)).argmax()) for image in dataset.images([0, 1, 2])] == [0, 1, 2]
    assert dataset.skipped == []


def test_hidden_files_are_ignored(photos):
    (photos / "._a.png").write_bytes(b"resource fork")
    (photos / ".thumbnails").mkdir()
    save(photos / ".thumbnails" / "a.png")
    assert len(open_folder(photos)) == 3


def test_linked_folders_are_followed_but_not_in_circles(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "far.png")
    (photos / "c").symlink_to(tmp_path / "elsewhere")
    (photos / "b" / "up").symlink_to(photos)
    assert open_folder(photos).paths == ["a.png", "b/2.JPG", "b/deep/1.png", "c/far.png"]


def test_the_centre_square_is_kept(tmp_path):
    image = Image.new("RGB", (120, 40), (255, 255, 255))
    image.paste((0, 0, 0), (40, 0, 80, 40))
    image.save(tmp_path / "wide.png")
    dataset = open_folder(tmp_path, resolution=40, minimum=1)
    assert (dataset.images([0]) == 0).all()


def test_downscaling_averages_fine_detail(tmp_path):
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    image = open_folder(tmp_path, resolution=16, minimum=1).images([0]).float()
    assert (image - 127.5).abs().max() < 3


# Each mode with a colour and the RGB value it must become.
MODES = {
    "1": (1, (255, 255, 255)),
    "L": (100, (100, 100, 100)),
    "LA": ((0, 0), (255, 255, 255)),  # transparent black shows the white ground
    "RGBA": ((255, 0, 0, 51), (255, 204, 204)),  # a fifth of red on white
    "CMYK": ((0, 255, 255, 0), (255, 0, 0)),
    "I;16": (25_700, (100, 100, 100)),
    "YCbCr": ((100, 128, 128), (100, 100, 100)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour, expected = MODES[mode]
    save(tmp_path / "a.tiff", colour, mode=mode)
    dataset = open_folder(tmp_path, minimum=1)
    assert dataset.skipped == []
    assert centre(dataset) == pytest.approx(expected, abs=1)


COMMON = ["png", "apng", "jpg", "JPG", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "bmp", "dib", "tif", "tiff", "gif"]
SUFFIXES = [*COMMON, "ppm", "pnm", "pcx", "qoi", "sgi", "tga", "dds"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read(tmp_path, suffix):
    if f".{suffix.lower()}" not in decoding.extensions():
        pytest.skip(f"this Pillow cannot read .{suffix}")
    save(tmp_path / f"a.{suffix}", (200, 100, 50))
    dataset = open_folder(tmp_path, minimum=1)
    assert centre(dataset) == pytest.approx((200, 100, 50), abs=6)
    assert dataset.skipped == []
    assert np.array_equal(load_square(tmp_path / f"a.{suffix}", 16), dataset.images([0])[0])


def test_nothing_that_runs_another_program_is_read(tmp_path):
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".fits", ".h5"} & set(decoding.extensions())
    save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image: .*of no format that is read"):
        load_square(tmp_path / "a.png", 16)


def test_the_content_says_which_format_it_is(tmp_path):
    save(tmp_path / "photo.jpg", (200, 100, 50))
    for name in ("photo.png", "photo", "photo.0001", "photo.jpg_large", "IMG 1.2.2024 12h"):
        (tmp_path / name).write_bytes((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "photo.txt").write_bytes((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "empty").touch()
    dataset = open_folder(tmp_path)
    assert dataset.paths == sorted(["photo.jpg", "photo.png", "photo", "photo.0001", "photo.jpg_large", "IMG 1.2.2024 12h"])
    assert [centre(dataset, index) for index in range(6)] == [pytest.approx([200, 100, 50], abs=6)] * 6
    assert [path for path, _ in dataset.skipped] == ["*.txt", "no extension"]


def test_what_is_not_read_is_listed_with_what_would_read_it(photos, caplog):
    for name in ("a.heic", "b/b.HEIC", "c.NEF", "d.svg", "e.txt", "f.txt"):
        (photos / name).write_text("x")
    dataset = open_folder(photos)
    assert [path for path, _ in dataset.skipped] == ["*.txt", "a.heic", "b/b.HEIC", "c.NEF", "d.svg"]
    skipped = dict(dataset.skipped)
    assert "2 files" in skipped["*.txt"] and "JPEG" in skipped["a.heic"] and "raw" in skipped["c.NEF"]
    assert "2 *.heic (HEIC" in caplog.text and "d.svg" in caplog.text and "*.txt (2 files" in caplog.text
    for path in (photos / "a.png", photos / "b"):
        path.rename(photos / f".{path.name}")
    with pytest.raises(ValueError, match=r"only other files \(.*1 .heic.*\); known are .*; passed over: a.heic \(HEIC"):
        open_folder(photos)
    with pytest.raises(ValueError, match=r"a.heic cannot be read .*HEIC: convert it to JPEG"):
        load_square(photos / "a.heic", 16)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "jp2", "bmp", "tif", "gif", "ppm", "tga"])
def test_errors_about_a_file_name_it(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    if f".{suffix}" not in decoding.extensions():
        pytest.skip(f"this Pillow cannot read .{suffix}")
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half.{suffix} cannot be read as an image"):
        load_square(path, 16)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"half.{suffix} cannot be read .*the file is empty"):
        load_square(path, 16)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_square(tmp_path / f"nowhere.{suffix}", 16)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        load_square(tmp_path, 16)


# --- grey, and 16 bits of it ---


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_grey(tmp_path, mode):
    colour, (red, green, blue) = MODES[mode]
    save(tmp_path / "a.tiff", colour, mode=mode)
    dataset = open_folder(tmp_path, minimum=1, channels=1)
    assert (dataset.channels, dataset.images([0]).shape) == (1, (1, 1, 16, 16))
    assert centre(dataset) == pytest.approx([0.299 * red + 0.587 * green + 0.114 * blue], abs=1)


def test_grey_and_colour_have_caches_of_their_own(photos, cache_home):
    grey, colour = open_folder(photos, channels=1), open_folder(photos)
    assert len(list(cache_home.iterdir())) == 4
    age(cache_home)
    save(photos / "0.png")
    open_folder(photos, channels=1)
    assert open_folder(photos).images([0]).shape[1] == 3
    assert [centre(grey, index) for index in range(3)] == [[76], [pytest.approx(150, abs=2)], [29]]
    assert centre(colour) == [255, 0, 0]


@pytest.mark.parametrize("channels", [0, 2, 4, "grey"])
def test_other_channels_are_refused(photos, channels):
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got .*--vae.image-channels"):
        open_dataset(photos, 16, channels=channels)


def test_sources_give_the_channels_that_are_asked_for_or_say_why_not(photos):
    assert open_dataset(photos, 16, channels=1, progress=False).channels == 1
    assert open_dataset(photos, 16, progress=False).channels == 3
    assert open_dataset("scenes", 16, channels=3).channels == 3
    with pytest.raises(ValueError, match=r"scenes has RGB images of 3 channels, 1 are asked for.*--vae.image-channels 3"):
        open_dataset("scenes", 16, channels=1)
    with pytest.raises(ValueError, match=r"dsprites has grey images of 1 channel, 3 are asked for.*--vae.image-channels 1"):
        open_dataset("dsprites:nowhere", 64, channels=3)  # before a large file is unpacked


def deep(path, values, **options):
    Image.fromarray(np.asarray(values, dtype=np.uint16)).resize((40, 40), Image.Resampling.NEAREST).save(path, **options)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, suffix):
    for number, (value, expected) in enumerate([(0, 0), (128, 0), (129, 1), (0x80FF, 0x80), (65_406, 254), (65_407, 255)]):
        deep(tmp_path / f"{number}.{suffix}", [[value]])
        dataset = ImageFolder(tmp_path, 16, minimum=1, progress=False)
        assert centre(dataset, number) == [expected] * 3


def png_of_16_bits(kind, value, transparent=b""):
    """A PNG of one colour as its standard says, which Pillow itself writes in grey only."""
    row = b"\0" + np.tile(np.array(value, dtype=">u2"), 20).tobytes()
    header = (20).to_bytes(4, "big") * 2 + bytes([16, kind, 0, 0, 0])
    chunks = (
        {b"IHDR": header} | ({b"tRNS": transparent} if transparent else {}) | {b"IDAT": zlib.compress(row * 20), b"IEND": b""}
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks.items())


@pytest.mark.parametrize(
    ("kind", "value", "transparent", "expected"),
    [
        (0, [25_700], b"", [100, 100, 100]),
        (0, [25_700], b"\x64\x64", [255, 255, 255]),  # the value that is transparent
        (2, [25_700, 65_535, 0], b"", [100, 255, 0]),
        (4, [0, 13_107], b"", [204, 204, 204]),  # a fifth of black on white
        (6, [65_535, 0, 0, 13_107], b"", [255, 204, 204]),
    ],
)
def test_pngs_of_16_bits_and_their_alpha(tmp_path, kind, value, transparent, expected):
    (tmp_path / "a.png").write_bytes(png_of_16_bits(kind, value, transparent))
    assert load_square(tmp_path / "a.png", 8)[:, 4, 4].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage" + b"\xff" * 50, b"Exif\0\0MM\0*\0\0\0\x08\0\x20"])
def test_damaged_exif_loses_no_photo(tmp_path, exif):
    save(tmp_path / "a.jpg", (200, 100, 50), exif=exif)
    assert centre(open_folder(tmp_path, minimum=1)) == pytest.approx([200, 100, 50], abs=3)


def test_big_endian_tiffs_are_read(tmp_path):
    Image.frombytes("I;16B", (40, 40), np.full((40, 40), 25_700, ">u2").tobytes()).save(tmp_path / "a.tif")
    assert centre(open_folder(tmp_path, minimum=1)) == [100] * 3


def test_images_of_a_12_bit_camera_are_dark_and_said_to_be(tmp_path, caplog):
    camera = tmp_path / "camera"
    camera.mkdir()
    deep(camera / "dark.png", [[819]])
    deep(camera / "light.png", [[4095]])
    dataset = open_folder(camera, channels=1)
    assert [centre(dataset, index) for index in (0, 1)] == [[3], [16]]
    assert "reach 4095 and come out dark: white_level=4095 (--data.white-level 4095)" in caplog.text
    caplog.clear()
    for level, expected in ((4095, [51, 255]), (1023, [204, 255])):
        dataset = open_folder(camera, channels=1, white_level=level)
        assert [centre(dataset, index) for index in (0, 1)] == [[value] for value in expected]
        assert load_square(camera / "dark.png", 16, white_level=level)[0, 0, 0] == expected[0]
    assert "come out dark" not in caplog.text
    with pytest.raises(ValueError, match="white_level must lie between 1 and 65535, got 0"):
        open_folder(camera, white_level=0)


def test_the_background_can_be_chosen(tmp_path):
    save(tmp_path / "a.png", (0, 0), mode="LA")
    save(tmp_path / "b.png", (0, 0, 0, 0), mode="RGBA")
    Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / "c.png", transparency=(200, 100, 50))
    Image.new("L", (40, 40), 7).save(tmp_path / "d.png", transparency=7)
    for background, expected in {"white": (255,) * 3, "black": (0,) * 3, "#ff0000": (255, 0, 0)}.items():
        for dataset in (open_folder(tmp_path, background=background), open_folder(tmp_path, background=background, channels=1)):
            luma = [round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2])]
            wanted = list(expected) if dataset.channels == 3 else luma
            assert [centre(dataset, index) for index in range(4)] == [wanted] * 4
    with pytest.raises(ValueError, match="unknown color specifier: 'paper'"):
        open_folder(tmp_path, background="paper")


# --- files that are no images, and names that are no words ---


def test_only_regular_files_are_read(photos):
    os.mkfifo(photos / "fifo.png")
    os.mkfifo(photos / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(photos / "s.png"))
        dataset = open_folder(photos)
        assert len(dataset) == 3
        assert dict(dataset.skipped)["fifo.png"].endswith(f"a FIFO, not a file: '{photos / 'fifo.png'}'")
        assert "a socket, not a file" in dict(dataset.skipped)["s.png"]
    with pytest.raises(OSError, match=r"a FIFO, not a file: .*fifo.png"):
        load_square(photos / "fifo.png", 16)
    with pytest.raises(OSError, match="a FIFO, not a file"):
        read_json(photos / "fifo.png")


def test_every_name_is_read(tmp_path):
    names = ["a.png", "A.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png"), "ü.png", "%s {0}.png", "x" * 240 + ".png"]
    for name in names:
        save(tmp_path / name)
    dataset = open_folder(tmp_path)
    assert sorted(dataset.paths) == sorted(names) == sorted(open_folder(tmp_path).paths)
    assert dataset.skipped == []


def test_deep_folders_are_searched(tmp_path):
    folder = tmp_path
    for _ in range(1200):  # deeper than Python's stack
        folder = folder / "d"
    os.makedirs(tmp_path / "d")
    descriptor = os.open(tmp_path / "d", os.O_RDONLY)
    for _ in range(1199):
        os.mkdir("d", dir_fd=descriptor)
        inner = os.open("d", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(descriptor)
    for name in ("1.png", "2.png"):
        save(folder / name)
    assert len(open_folder(tmp_path)) == 2
    for _ in range(1200):
        for path in folder.iterdir():
            path.unlink() if path.is_file() else path.rmdir()
        folder = folder.parent


def test_folders_that_cannot_be_searched_are_listed(photos, monkeypatch, caplog):
    found = os.listdir

    def listdir(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return found(folder)

    monkeypatch.setattr(folder.os, "listdir", listdir)
    dataset = open_folder(photos)
    assert dataset.paths == ["a.png", "b/2.JPG"]
    assert dataset.skipped[0][0] == "b/deep" and "Permission denied" in dataset.skipped[0][1]
    assert "b/deep (PermissionError" in caplog.text


def test_files_that_vanish_while_they_are_read_are_listed(photos, monkeypatch):
    check = folder._check

    def check_and_remove(source):
        found = check(source)
        (photos / "a.png").unlink()
        return found

    monkeypatch.setattr(folder, "_check", check_and_remove)
    dataset = open_folder(photos)
    assert dataset.paths == ["b/2.JPG", "b/deep/1.png"]
    assert [path for path, _ in dataset.skipped] == ["a.png"]
    assert "No such file" in dataset.skipped[0][1]


# --- JSON and arrays ---


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_broken_json_and_arrays_are_named(tmp_path, content):
    for name, read in (("a.json", read_json), ("a.npz", read_arrays)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no readable"):
            read(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read(tmp_path / "nowhere")
    np.savez(tmp_path / "a.npz", codes=np.arange(3))
    assert read_arrays(tmp_path / "a.npz")["codes"].tolist() == [0, 1, 2]
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a.npz is no readable .npz file, or truncated"):
        read_arrays(tmp_path / "a.npz")


def test_palette_images_become_rgb(tmp_path):
    Image.new("RGB", (32, 32), (200, 100, 50)).quantize(4).save(tmp_path / "a.png")
    assert centre(open_folder(tmp_path, minimum=1)) == [200, 100, 50]


def test_a_transparent_palette_entry_shows_white(tmp_path):
    Image.new("RGB", (32, 32), (200, 100, 50)).quantize(4).save(tmp_path / "a.png", transparency=0)
    assert centre(open_folder(tmp_path, minimum=1)) == [255, 255, 255]


@pytest.mark.parametrize(("name", "kind"), [("a.gif", "GIF"), ("a.tif", "TIFF"), ("a.jpg", "MPO")])
def test_images_with_several_frames_give_the_first(tmp_path, name, kind):
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, kind, save_all=True, append_images=[blue])
    assert centre(open_folder(tmp_path, minimum=1)) == pytest.approx((255, 0, 0), abs=3)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 32), "white")
    image.paste((0, 0, 0), (0, 0, 16, 32))  # black left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: left becomes top
    image.save(tmp_path / "a.png", exif=exif)
    shown = open_folder(tmp_path, minimum=1).images([0])[0, 0]
    assert shown[:7].max() < 40
    assert shown[9:].min() > 215


def test_broken_files_are_listed_and_left_out(photos, caplog):
    (photos / "b" / "text.png").write_text("not an image")
    whole = (photos / "b" / "2.JPG").read_bytes()
    (photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    Image.fromarray(np.zeros((32, 32), dtype=np.float32)).save(photos / "float.tiff")
    with caplog.at_level(logging.WARNING):
        dataset = open_folder(photos)
    assert dataset.paths == ["a.png", "b/2.JPG", "b/deep/1.png"]
    assert len(dataset) == 3
    assert [path for path, _ in dataset.skipped] == ["b/text.png", "float.tiff", "gone.png", "half.jpg"]
    assert "UnidentifiedImageError" in dataset.skipped[0][1]
    assert "no known range" in dataset.skipped[1][1]
    assert "skipped 4 of 7 files" in caplog.text
    assert open_folder(photos).skipped == dataset.skipped  # also when the cache is reused


def chunk(kind, body):
    """A part of a PNG."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png_header(path, width, height):
    """A PNG of any size that holds no pixels."""
    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_skipped(photos):
    png_header(photos / "bomb.png", 30_000, 20_000)
    dataset = open_folder(photos)
    assert [path for path, _ in dataset.skipped] == ["bomb.png"]
    assert "30000 x 20000 pixels are more than the limit of 400 million" in dataset.skipped[0][1]
    with pytest.raises(ValueError, match=r"bomb.png .*30000 x 20000 pixels are more than the limit of 400 million"):
        load_square(photos / "bomb.png", 16)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_large_photos_are_read_whatever_the_limits_of_pillow(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # what it would warn of, or refuse
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 10_000)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 1_000)
    ramp = np.broadcast_to(np.arange(300, dtype=np.float32)[:, None] * 255 / 300, (300, 400))
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / f"a.{suffix}")
    found = load_square(tmp_path / f"a.{suffix}", 16)
    assert np.array_equal(open_folder(tmp_path, minimum=1).images([0])[0], found)
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.abs(found.astype(int) - expected).max() <= 3  # shrinking in two steps is a little softer
    assert Image.MAX_IMAGE_PIXELS == 9_000


def test_large_images_keep_their_orientation_mode_and_range(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (90, 80), "white")
    image.paste((0, 0, 0), (0, 0, 45, 80))
    image.save(tmp_path / "turned.jpg", exif=exif, progressive=True)
    assert load_square(tmp_path / "turned.jpg", 8, 1)[0, :3].max() < 40
    save(tmp_path / "half.png", (255, 0, 0, 51), (90, 80), "RGBA")
    assert load_square(tmp_path / "half.png", 8)[:, 4, 4].tolist() == pytest.approx([255, 204, 204], abs=1)
    Image.fromarray(np.full((80, 90), 25_700, dtype=np.uint16)).save(tmp_path / "deep.tif")
    assert (load_square(tmp_path / "deep.tif", 8, 1) == 100).all()


def test_the_cache_is_reused_without_decoding(photos, cache_home, monkeypatch):
    first = open_folder(photos)
    assert sorted(path.suffix for path in cache_home.iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(folder, "build_cache", None)
    assert torch.equal(open_folder(photos).images([0, 1, 2]), first.images([0, 1, 2]))


def test_the_cache_can_live_elsewhere(photos, tmp_path, cache_home):
    open_folder(photos, cache=tmp_path / "here" / "deep")
    assert len(list((tmp_path / "here" / "deep").iterdir())) == 2
    assert nothing_in(cache_home)


def test_a_changed_folder_is_read_again(photos, cache_home):
    open_folder(photos)
    open_folder(photos, resolution=8)
    save(photos / "a.png", (1, 2, 3), size=(30, 30))
    assert centre(open_folder(photos)) == [1, 2, 3]
    save(photos / "a.png", (3, 2, 1), size=(30, 30))
    os.utime(photos / "a.png", ns=(0, 0))
    assert centre(open_folder(photos)) == [3, 2, 1]
    save(photos / "0.png")
    assert len(open_folder(photos)) == 4
    (photos / "0.png").unlink()
    age(cache_home)
    assert len(open_folder(photos)) == 3
    save(photos / "0.png")
    assert len(open_folder(photos)) == 4
    # The current one and the untouched one of resolution 8 are kept, each with its list of skipped files.
    assert len(list(cache_home.iterdir())) == 4


def test_a_fingerprint_is_that_of_the_pixels_in_their_order(photos, tmp_path):
    first = open_folder(photos).fingerprint
    shutil.copytree(photos, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert open_folder(copy).fingerprint == Subset(open_folder(copy), [1, 0]).fingerprint == first
    save(copy / "a.png", (1, 2, 3), size=(30, 30))
    assert open_folder(copy).fingerprint != first
    shutil.copy(photos / "a.png", copy / "a.png")
    assert open_folder(copy).fingerprint == first
    (copy / "a.png").rename(copy / "z.png")
    assert open_folder(copy).fingerprint != first


@pytest.mark.parametrize("damage", ["short", "list lost", "no json"])
def test_a_damaged_cache_is_rebuilt(photos, cache_home, damage):
    expected = open_folder(photos).images([0, 1, 2])
    images, notes = next(cache_home.glob("*.npy")), next(cache_home.glob("*.json"))
    if damage == "short":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "list lost":
        notes.unlink()
    else:
        notes.write_text("{")
    assert torch.equal(open_folder(photos).images([0, 1, 2]), expected)
    assert json.loads(next(cache_home.glob("*.json")).read_text())["skipped"] == []


def test_small_images_are_reported_before_any_work(photos, cache_home):
    save(photos / "small.png", size=(20, 90))
    save(photos / "tiny.png", size=(90, 12))
    with pytest.raises(ValueError, match=r"2 of 5 images .* resolution 32, the smallest is tiny.png .* up to 12"):
        open_folder(photos, resolution=32)
    assert nothing_in(cache_home)
    assert len(open_folder(photos, resolution=32, upscale=True)) == 5
    assert len(open_folder(photos, resolution=12)) == 5


def test_the_cache_serves_with_and_without_upscale(photos, cache_home, monkeypatch):
    save(photos / "small.png", size=(20, 90))
    open_folder(photos, resolution=32, upscale=True)
    monkeypatch.setattr(folder, "build_cache", None)
    assert len(open_folder(photos, resolution=32, upscale=True)) == 4
    with pytest.raises(ValueError, match=r"1 of 4 images .* resolution 32, the smallest is small.png .* up to 20"):
        open_folder(photos, resolution=32)


def test_the_log_says_where_a_cache_is_and_how_large(photos, cache_home, caplog):
    caplog.set_level(logging.INFO)
    open_folder(photos, resolution=40)
    assert f"writing 3 images of {photos} to a cache of 0.0 MiB in {cache_home}" in caplog.text
    caplog.clear()
    open_folder(photos, resolution=40)
    assert "cache" not in caplog.text


def test_without_a_folder_for_caches_images_are_kept_in_memory(photos, cache_home, monkeypatch, caplog):
    expected = open_folder(photos).images(range(3))
    monkeypatch.delenv("MULTIBETA_CACHE")
    monkeypatch.setattr(multibeta.caches, "cache_folders", lambda cache=None: [photos / "a.png" / "cache"])
    save(photos / "small.png", size=(12, 12))
    dataset = open_folder(photos, upscale=True)
    assert torch.equal(dataset.images(range(3)), expected)
    assert "4 images" in caplog.text and "of memory: no folder for caches" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 4 images .* smaller than resolution 16"):
        open_folder(photos)
    monkeypatch.setattr(folder.images, "MEMORY_LIMIT_BYTES", 1000)
    with pytest.raises(OSError, match=r"4 images .* GiB without a cache: no folder for caches"):
        open_folder(photos, upscale=True)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_folder_of_the_parent(photos, method):
    scenes = Scenes(16)
    dataset = open_folder(photos)
    scenes.images([7])  # renders light maps
    assert len(pickle.dumps([dataset, scenes])) < 10_000  # places in files, not images
    datasets = [dataset, Subset(dataset, [2, 0, 1]), scenes]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        found = list(pool.map(operator.methodcaller("images", [2, 0]), datasets))
    assert all(torch.equal(images, dataset.images([2, 0])) for images, dataset in zip(found, datasets, strict=True))


def test_threads_share_a_dataset(photos, scenes):
    frugal = Scenes(32)
    frugal._maps_limit = 2
    chosen = torch.arange(0, 60, 7)
    for dataset, indices in ((frugal, chosen), (open_folder(photos), [2, 0, 1])):
        expected = (scenes if dataset is frugal else dataset).images(indices)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(dataset.images, [indices] * 24))
        assert all(torch.equal(images, expected) for images in found)


def test_datasets_are_shown_in_a_line(photos):
    dataset = open_folder(photos, channels=1)
    assert repr(dataset) == f"ImageFolder('{photos}': 3 grey images of 16 pixels)"
    assert repr(Mirrored(Subset(dataset, [0, 1]))) == f"Mirrored(Subset(2 images of {dataset!r}))"
    assert repr(Scenes(16)) == "Scenes(480000 images of 16 pixels, factors (10, 10, 10, 8, 4, 15))"


def test_missing_and_empty_folders_say_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_folder(tmp_path / "missing")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        open_folder(tmp_path / "file.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no files at all"):
        open_folder(tmp_path / "empty")
    for name in ("a.txt", "b.txt", "README"):
        (tmp_path / "empty" / name).write_text("")
    with pytest.raises(ValueError, match=r"only other files \(2 .txt, 1 no extension\)"):
        open_folder(tmp_path / "empty")


def test_too_few_images_say_why(tmp_path, cache_home):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"1 readable images .* at least 2 .* 1 files could not be read, e.g. b.png"):
        open_folder(tmp_path)
    dataset = open_folder(tmp_path, minimum=1)
    assert len(dataset) == 1
    with pytest.raises(ValueError, match="at least 5"):
        open_folder(tmp_path, minimum=5)
    with pytest.raises(ValueError, match="minimum"):
        open_folder(tmp_path, minimum=0)


def test_images_that_break_while_decoding_leave_no_cache(tmp_path, cache_home):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.bmp")
    whole = (tmp_path / "whole.bmp").read_bytes()
    for name in ("half.bmp", "whole.bmp"):
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"0 readable images .* truncated"):
        open_folder(tmp_path)
    assert nothing_in(cache_home)


def test_a_full_disk_is_reported_before_decoding(photos, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"cannot write the image cache .* choose another cache folder"):
        open_folder(photos)


def test_a_disk_that_fills_up_leaves_nothing_behind(photos, cache_home, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .* choose another cache folder"):
        open_folder(photos)
    assert nothing_in(cache_home)


def test_a_cache_folder_that_cannot_exist_is_reported(photos):
    with pytest.raises(OSError, match="cannot write the image cache"):
        open_folder(photos, cache=photos / "a.png" / "cache")


def test_sources_are_opened_by_name(photos, monkeypatch):
    assert isinstance(open_dataset("scenes", 16), Scenes)
    dataset = open_dataset(str(photos), 16, progress=False)
    assert isinstance(dataset, ImageFolder)
    assert (len(dataset), dataset.resolution, dataset.channels) == (3, 16, 3)
    with pytest.raises(FileNotFoundError, match='"scenes" or a folder'):
        open_dataset("scene", 16)


def test_threads_that_open_a_new_folder_read_its_images(photos):
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda resolution: open_folder(photos, resolution), [16] * 6 + [8] * 6))
    for dataset in datasets:
        alone = open_folder(photos, dataset.resolution, cache=photos.parent / "alone")
        assert torch.equal(dataset.images(range(3)), alone.images(range(3)))
