import errno
import json
import logging
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta.data import ImageFolder, Mirrored, Scenes, Subset, decoding, folder, open_dataset, split, to_float, to_uint8
from multibeta.data.decoding import load_square


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
    assert not hasattr(Subset(open_folder(photos), [0]), "factors")


def test_mirrored_images_follow_the_others():
    scenes = Scenes(16)
    mirrored = Mirrored(Subset(scenes, [7, 11, 13]))
    assert len(mirrored) == 6 and not hasattr(mirrored, "factors")
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


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif"])
def test_every_format_is_read(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", (200, 100, 50))
    assert centre(open_folder(tmp_path, minimum=1)) == pytest.approx((200, 100, 50), abs=6)


def test_sixteen_bit_png_keeps_the_upper_byte(tmp_path):
    Image.fromarray(np.full((32, 32), 0x80FF, dtype=np.uint16)).save(tmp_path / "a.png")
    assert centre(open_folder(tmp_path, minimum=1)) == [0x80] * 3


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


def png_header(path, width, height):
    """A PNG of any size that holds no pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

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

    monkeypatch.setattr(folder.os, "fsync", full)
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


def test_threads_that_open_a_new_folder_read_its_images(photos, caplog):
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda resolution: open_folder(photos, resolution), [16] * 6 + [8] * 6))
    for dataset in datasets:
        alone = open_folder(photos, dataset.resolution, cache=photos.parent / "alone")
        assert torch.equal(dataset.images(range(3)), alone.images(range(3)))
