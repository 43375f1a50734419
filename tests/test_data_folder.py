"""Folders of images: what is read, listed, cached and reported."""

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
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta.files
from dataset_files import age, centre, nothing_in, open_folder, save
from multibeta.data import (
    ImageFolder,
    Mirrored,
    Scenes,
    Subset,
    folder,
    knows_attributes,
    knows_classes,
    knows_factors,
    open_dataset,
)
from multibeta.data.decoding import load_square
from multibeta.files import read_json

pytestmark = pytest.mark.usefixtures("cache_home")


def test_a_folder_is_read_in_path_order(nested_photos):
    dataset = open_folder(nested_photos)
    assert dataset.paths == ["a.png", "b/2.JPG", "b/deep/1.png"]
    assert dataset.images([0, 1, 2]).shape == (3, 3, 16, 16)
    assert [int(image.float().mean((1, 2)).argmax()) for image in dataset.images([0, 1, 2])] == [0, 1, 2]
    assert dataset.skipped == []


def test_subfolders_are_classes(tmp_path):
    for path in ("b/1.png", "b/deep/2.png", "a-b/1.png", "a/1.png", "a/2.png", "unread/1.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / path) if path.endswith("png") else (tmp_path / path).touch()
    dataset = open_folder(tmp_path)
    assert knows_classes(dataset) and dataset.class_names == ("a", "a-b", "b")
    assert dataset.paths == ["a-b/1.png", "a/1.png", "a/2.png", "b/1.png", "b/deep/2.png"]
    labels = dataset.labels([3, 0, 1, 4])
    assert labels.dtype == torch.int64 and labels.tolist() == [2, 1, 0, 2]
    assert [dataset.class_names[label] for label in dataset.labels(range(5))] == [path.split("/")[0] for path in dataset.paths]
    assert dataset.labels([]).shape == (0,)
    assert not knows_factors(dataset) and not knows_attributes(dataset)
    part = Subset(dataset, [4, 1])
    assert knows_classes(part) and part.class_names == dataset.class_names and part.labels([1, 0, 0]).tolist() == [0, 2, 2]
    assert not knows_classes(Mirrored(dataset))


def test_an_image_in_the_folder_itself_leaves_no_classes(nested_photos):
    dataset = open_folder(nested_photos)
    assert not knows_classes(dataset) and dataset.class_names == Subset(dataset, [0]).class_names == ()
    with pytest.raises(ValueError, match="has no classes: its images do not all lie in subfolders"):
        dataset.labels([0])
    with pytest.raises(AttributeError, match="no known classes"):
        Subset(dataset, [0]).labels([0])


def test_hidden_files_are_ignored(nested_photos):
    (nested_photos / "._a.png").write_bytes(b"resource fork")
    (nested_photos / ".thumbnails").mkdir()
    save(nested_photos / ".thumbnails" / "a.png")
    assert len(open_folder(nested_photos)) == 3


def test_linked_folders_are_followed_but_not_in_circles(nested_photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save(tmp_path / "elsewhere" / "far.png")
    (nested_photos / "c").symlink_to(tmp_path / "elsewhere")
    (nested_photos / "b" / "up").symlink_to(nested_photos)
    assert open_folder(nested_photos).paths == ["a.png", "b/2.JPG", "b/deep/1.png", "c/far.png"]


@pytest.mark.usefixtures("without_heif")
def test_what_is_not_read_is_listed_with_what_would_read_it(nested_photos, caplog):
    for name in ("a.heic", "b/b.HEIC", "c.NEF", "d.svg", "e.txt", "f.txt"):
        (nested_photos / name).write_text("x")
    dataset = open_folder(nested_photos)
    assert [path for path, _ in dataset.skipped] == ["*.txt", "a.heic", "b/b.HEIC", "c.NEF", "d.svg"]
    skipped = dict(dataset.skipped)
    assert "2 files" in skipped["*.txt"] and "JPEG" in skipped["a.heic"] and "raw" in skipped["c.NEF"]
    assert "2 *.heic (HEIC" in caplog.text and "d.svg" in caplog.text and "*.txt (2 files" in caplog.text
    for path in (nested_photos / "a.png", nested_photos / "b"):
        path.rename(nested_photos / f".{path.name}")
    with pytest.raises(ValueError, match=r"only other files \(.*1 .heic.*\); known are .*; passed over: a.heic \(HEIC"):
        open_folder(nested_photos)
    with pytest.raises(ValueError, match=r"a.heic cannot be read .*HEIC: convert it to JPEG"):
        load_square(nested_photos / "a.heic", 16)


def test_grey_and_colour_have_caches_of_their_own(nested_photos, cache_home):
    grey, colour = open_folder(nested_photos, channels=1), open_folder(nested_photos)
    assert len(list(cache_home.iterdir())) == 4
    age(cache_home)
    save(nested_photos / "0.png")
    open_folder(nested_photos, channels=1)
    assert open_folder(nested_photos).images([0]).shape[1] == 3
    assert [centre(grey, index) for index in range(3)] == [[76], [pytest.approx(150, abs=2)], [29]]
    assert centre(colour) == [255, 0, 0]


@pytest.mark.parametrize("channels", [0, 2, 4, "grey"])
def test_other_channels_are_refused(nested_photos, channels):
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got .*--vae.image-channels"):
        open_dataset(nested_photos, 16, channels=channels)


def test_sources_give_the_channels_that_are_asked_for_or_say_why_not(nested_photos):
    assert open_dataset(nested_photos, 16, channels=1, progress=False).channels == 1
    assert open_dataset(nested_photos, 16, progress=False).channels == 3
    assert open_dataset("scenes", 16, channels=3).channels == 3
    with pytest.raises(ValueError, match=r"scenes has RGB images of 3 channels, 1 are asked for.*--vae.image-channels 3"):
        open_dataset("scenes", 16, channels=1)
    with pytest.raises(ValueError, match=r"dsprites has grey images of 1 channel, 3 are asked for.*--vae.image-channels 1"):
        open_dataset("dsprites:nowhere", 64, channels=3)  # before a large file is unpacked


def test_only_regular_files_are_read(nested_photos):
    os.mkfifo(nested_photos / "fifo.png")
    os.mkfifo(nested_photos / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(nested_photos / "s.png"))
        dataset = open_folder(nested_photos)
        assert len(dataset) == 3
        assert dict(dataset.skipped)["fifo.png"].endswith(f"a FIFO, not a file: '{nested_photos / 'fifo.png'}'")
        assert "a socket, not a file" in dict(dataset.skipped)["s.png"]
    with pytest.raises(OSError, match=r"a FIFO, not a file: .*fifo.png"):
        load_square(nested_photos / "fifo.png", 16)
    with pytest.raises(OSError, match="a FIFO, not a file"):
        read_json(nested_photos / "fifo.png")


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


def test_folders_that_cannot_be_searched_are_listed(nested_photos, monkeypatch, caplog):
    found = os.scandir

    def scandir(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return found(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    dataset = open_folder(nested_photos)
    assert dataset.paths == ["a.png", "b/2.JPG"]
    assert dataset.skipped[0][0] == "b/deep" and "Permission denied" in dataset.skipped[0][1]
    assert "b/deep (PermissionError" in caplog.text


def test_files_that_vanish_while_they_are_read_are_listed(nested_photos, monkeypatch):
    check = folder._check

    def check_and_remove(source):
        found = check(source)
        (nested_photos / "a.png").unlink()
        return found

    monkeypatch.setattr(folder, "_check", check_and_remove)
    dataset = open_folder(nested_photos)
    assert dataset.paths == ["b/2.JPG", "b/deep/1.png"]
    assert [path for path, _ in dataset.skipped] == ["a.png"]
    assert "No such file" in dataset.skipped[0][1]


def test_broken_files_are_listed_and_left_out(nested_photos, caplog):
    (nested_photos / "b" / "text.png").write_text("not an image")
    whole = (nested_photos / "b" / "2.JPG").read_bytes()
    (nested_photos / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (nested_photos / "gone.png").symlink_to(nested_photos / "nowhere.png")
    Image.fromarray(np.zeros((32, 32), dtype=np.float32)).save(nested_photos / "float.tiff")
    with caplog.at_level(logging.WARNING):
        dataset = open_folder(nested_photos)
    assert dataset.paths == ["a.png", "b/2.JPG", "b/deep/1.png"]
    assert len(dataset) == 3
    assert [path for path, _ in dataset.skipped] == ["b/text.png", "float.tiff", "gone.png", "half.jpg"]
    assert "UnidentifiedImageError" in dataset.skipped[0][1]
    assert "no known range" in dataset.skipped[1][1]
    assert "skipped 4 of 7 files" in caplog.text
    assert open_folder(nested_photos).skipped == dataset.skipped  # also when the cache is reused


def test_the_cache_is_reused_without_decoding(nested_photos, cache_home, monkeypatch):
    first = open_folder(nested_photos)
    assert sorted(path.suffix for path in cache_home.iterdir()) == [".json", ".npy"]
    monkeypatch.setattr(folder, "build_cache", None)
    assert torch.equal(open_folder(nested_photos).images([0, 1, 2]), first.images([0, 1, 2]))


def test_the_cache_can_live_elsewhere(nested_photos, tmp_path, cache_home):
    open_folder(nested_photos, cache=tmp_path / "here" / "deep")
    assert len(list((tmp_path / "here" / "deep").iterdir())) == 2
    assert nothing_in(cache_home)


def test_a_changed_folder_is_read_again(nested_photos, cache_home):
    open_folder(nested_photos)
    open_folder(nested_photos, resolution=8)
    save(nested_photos / "a.png", (1, 2, 3), size=(30, 30))
    assert centre(open_folder(nested_photos)) == [1, 2, 3]
    save(nested_photos / "a.png", (3, 2, 1), size=(30, 30))
    os.utime(nested_photos / "a.png", ns=(0, 0))
    assert centre(open_folder(nested_photos)) == [3, 2, 1]
    save(nested_photos / "0.png")
    assert len(open_folder(nested_photos)) == 4
    (nested_photos / "0.png").unlink()
    age(cache_home)
    assert len(open_folder(nested_photos)) == 3
    save(nested_photos / "0.png")
    assert len(open_folder(nested_photos)) == 4
    # The current one and the untouched one of resolution 8 are kept, each with its list of skipped files.
    assert len(list(cache_home.iterdir())) == 4


def test_a_fingerprint_is_that_of_the_pixels_in_their_order(nested_photos, tmp_path):
    first = open_folder(nested_photos).fingerprint
    shutil.copytree(nested_photos, tmp_path / "copy")
    copy = tmp_path / "copy"
    assert open_folder(copy).fingerprint == Subset(open_folder(copy), [1, 0]).fingerprint == first
    save(copy / "a.png", (1, 2, 3), size=(30, 30))
    assert open_folder(copy).fingerprint != first
    shutil.copy(nested_photos / "a.png", copy / "a.png")
    assert open_folder(copy).fingerprint == first
    (copy / "a.png").rename(copy / "z.png")
    assert open_folder(copy).fingerprint != first


@pytest.mark.parametrize("damage", ["short", "list lost", "no json"])
def test_a_damaged_cache_is_rebuilt(nested_photos, cache_home, damage):
    expected = open_folder(nested_photos).images([0, 1, 2])
    images, notes = next(cache_home.glob("*.npy")), next(cache_home.glob("*.json"))
    if damage == "short":
        images.write_bytes(images.read_bytes()[:-100])
    elif damage == "list lost":
        notes.unlink()
    else:
        notes.write_text("{")
    assert torch.equal(open_folder(nested_photos).images([0, 1, 2]), expected)
    assert json.loads(next(cache_home.glob("*.json")).read_text())["skipped"] == []


def test_small_images_are_skipped_and_the_log_says_what_takes_them(nested_photos, caplog):
    save(nested_photos / "b" / "a small.png", (9, 9, 9), size=(20, 90))
    save(nested_photos / "tiny.png", size=(90, 12))
    (nested_photos / "broken.png").write_text("not an image")
    dataset = open_folder(nested_photos, resolution=32)
    assert dataset.paths == ["a.png", "b/2.JPG", "b/deep/1.png"] and len(dataset) == 3
    assert [int(image.float().mean((1, 2)).argmax()) for image in dataset.images([0, 1, 2])] == [0, 1, 2]
    assert [path for path, _ in dataset.skipped] == ["b/a small.png", "broken.png", "tiny.png"]
    assert dict(dataset.skipped)["tiny.png"] == "its shorter side of 12 pixels is below resolution 32"
    assert "skipped 2 of 5 images" in caplog.text and "tiny.png with a shorter side of 12" in caplog.text
    assert "--data.upscale takes them, enlarged" in caplog.text and "--vae.resolution 12 takes all" in caplog.text
    assert "skipped 1 of 6 files" in caplog.text
    taken = open_folder(nested_photos, resolution=32, upscale=True)
    assert len(taken) == 5 and [path for path, _ in taken.skipped] == ["broken.png"]
    assert len(open_folder(nested_photos, resolution=12)) == 5


def test_too_few_images_that_are_large_enough_are_an_error_before_any_work(nested_photos, cache_home):
    save(nested_photos / "small.png", size=(20, 90))
    save(nested_photos / "tiny.png", size=(90, 12))
    message = (
        r"2 of 5 images .* resolution 32, and at least 4 must reach it; the smallest is tiny.png .* choose a resolution up to 12"
    )
    with pytest.raises(ValueError, match=message):
        open_folder(nested_photos, resolution=32, minimum=4)
    assert nothing_in(cache_home)
    assert len(open_folder(nested_photos, resolution=32, minimum=3)) == 3
    with pytest.raises(ValueError, match=message):  # also when the cache is reused
        open_folder(nested_photos, resolution=32, minimum=4)


def test_a_fingerprint_is_that_of_the_images_that_are_taken(nested_photos):
    alone = open_folder(nested_photos, resolution=32).fingerprint
    save(nested_photos / "small.png", size=(20, 90))
    with_small = open_folder(nested_photos, resolution=32, upscale=True).fingerprint
    assert len({alone, with_small, open_folder(nested_photos, resolution=32).fingerprint}) == 3


def test_the_cache_serves_with_and_without_upscale(nested_photos, cache_home, monkeypatch):
    save(nested_photos / "small.png", size=(20, 90))
    open_folder(nested_photos, resolution=32, upscale=True)
    monkeypatch.setattr(folder, "build_cache", None)
    assert len(open_folder(nested_photos, resolution=32, upscale=True)) == 4
    assert open_folder(nested_photos, resolution=32).paths == ["a.png", "b/2.JPG", "b/deep/1.png"]


def test_the_log_says_where_a_cache_is_and_how_large(nested_photos, cache_home, caplog):
    caplog.set_level(logging.INFO)
    open_folder(nested_photos, resolution=40)
    assert f"writing 3 images of {nested_photos} to a cache of 0.0 MiB in {cache_home}" in caplog.text
    caplog.clear()
    open_folder(nested_photos, resolution=40)
    assert "cache" not in caplog.text


def test_without_a_folder_for_caches_images_are_kept_in_memory(nested_photos, cache_home, monkeypatch, caplog):
    expected = open_folder(nested_photos).images(range(3))
    monkeypatch.delenv("MULTIBETA_CACHE")
    monkeypatch.setattr(multibeta.caches, "cache_folders", lambda cache=None: [nested_photos / "a.png" / "cache"])
    save(nested_photos / "small.png", size=(12, 12))
    dataset = open_folder(nested_photos, upscale=True)
    assert torch.equal(dataset.images(range(3)), expected)
    assert "4 images" in caplog.text and "of memory: no folder for caches" in caplog.text
    assert torch.equal(open_folder(nested_photos).images(range(3)), expected)  # without the small one
    monkeypatch.setattr(folder.images, "MEMORY_LIMIT_BYTES", 1000)
    with pytest.raises(OSError, match=r"4 images .* GiB without a cache: no folder for caches"):
        open_folder(nested_photos, upscale=True)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_folder_of_the_parent(nested_photos, method):
    scenes = Scenes(16)
    dataset = open_folder(nested_photos)
    scenes.images([7])  # renders light maps
    assert len(pickle.dumps([dataset, scenes])) < 10_000  # places in files, not images
    datasets = [dataset, Subset(dataset, [2, 0, 1]), scenes]
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:
        found = list(pool.map(operator.methodcaller("images", [2, 0]), datasets))
    assert all(torch.equal(images, dataset.images([2, 0])) for images, dataset in zip(found, datasets, strict=True))


def test_threads_share_a_dataset(nested_photos, scenes):
    frugal = Scenes(32)
    frugal._maps_limit = 2
    chosen = torch.arange(0, 60, 7)
    for dataset, indices in ((frugal, chosen), (open_folder(nested_photos), [2, 0, 1])):
        expected = (scenes if dataset is frugal else dataset).images(indices)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(dataset.images, [indices] * 24))
        assert all(torch.equal(images, expected) for images in found)


def test_datasets_are_shown_in_a_line(nested_photos):
    dataset = open_folder(nested_photos, channels=1)
    assert repr(dataset) == f"ImageFolder('{nested_photos}': 3 grey images of 16 pixels)"
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


def test_a_full_disk_is_reported_before_decoding(nested_photos, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"cannot write the image cache .* choose another cache folder"):
        open_folder(nested_photos)


def test_a_disk_that_fills_up_leaves_nothing_behind(nested_photos, cache_home, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left .* choose another cache folder"):
        open_folder(nested_photos)
    assert nothing_in(cache_home)


def test_a_cache_folder_that_cannot_exist_is_reported(nested_photos):
    with pytest.raises(OSError, match="cannot write the image cache"):
        open_folder(nested_photos, cache=nested_photos / "a.png" / "cache")


def test_sources_are_opened_by_name(nested_photos, monkeypatch):
    assert isinstance(open_dataset("scenes", 16), Scenes)
    dataset = open_dataset(str(nested_photos), 16, progress=False)
    assert isinstance(dataset, ImageFolder)
    assert (len(dataset), dataset.resolution, dataset.channels) == (3, 16, 3)
    with pytest.raises(FileNotFoundError, match='"scenes" or a folder'):
        open_dataset("scene", 16)


def test_threads_that_open_a_new_folder_read_its_images(nested_photos):
    with ThreadPoolExecutor(8) as pool:
        datasets = list(pool.map(lambda resolution: open_folder(nested_photos, resolution), [16] * 6 + [8] * 6))
    for dataset in datasets:
        alone = open_folder(nested_photos, dataset.resolution, cache=nested_photos.parent / "alone")
        assert torch.equal(dataset.images(range(3)), alone.images(range(3)))
