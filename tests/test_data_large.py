"""Folders and tar shards of any number of images: indexes, order, what stands in for a damaged image, memory, resuming."""

import concurrent.futures
import dataclasses
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from test_training import Denoise, run, same

from dataset_files import age, cut, encoded, noise, open_folder, planes, quiet, save
from multibeta import files, recipes, training
from multibeta.caches import cache_contents
from multibeta.data import (
    ImageFolder,
    LargeFolder,
    Mirrored,
    Subset,
    TarShards,
    absolute_source,
    index,
    knows_classes,
    knows_order,
    large,
    open_dataset,
    split,
)
from multibeta.data import (
    shards as shard_files,
)
from multibeta.recipes.own_images import default_folder
from multibeta.training.batches import order_of
from tiny_recipes import tiny

pytestmark = pytest.mark.usefixtures("cache_home")

COUNT, SHARD = 60, 3


def put(archive, name, content, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def write_shards(folder, count=COUNT, each=SHARD, form=tarfile.PAX_FORMAT):
    """Image `i` is `noise(20, 16, i)`, in the order of the archives."""
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, each):
        with tarfile.open(folder / f"photos-{start // each:06}.tar", "w", format=form) as archive:
            for number in range(start, min(start + each, count)):
                put(archive, f"{number:05}.json", b"{}")
                put(archive, f"{number:05}.png", encoded(noise(20, 16, number)))
                put(archive, f"{number:05}.seg.png", encoded(noise(20, 16, 1000 + number)))
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "photos")


@pytest.fixture
def classes(tmp_path):
    for path in ("b/1.png", "b/deep/2.png", "a-b/1.png", "a/1.png", "a/2.png", "a.b/unread.txt"):
        (tmp_path / "classes" / path).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / "classes" / path) if path.endswith("png") else (tmp_path / "classes" / path).touch()
    return tmp_path / "classes"


def test_shards_hold_one_image_of_each_sample(shards):
    dataset = quiet(TarShards, shards, 16)
    assert len(dataset) == COUNT and dataset.paths[:2] == ["photos-000000.tar/00000.png", "photos-000000.tar/00001.png"]
    for number in (0, 7, 59):
        expected = noise(20, 16, number).crop((2, 0, 18, 16))
        assert torch.equal(dataset.images([number])[0], planes(expected))
    assert quiet(TarShards, shards, 16, channels=1).images([3, 1]).shape == (2, 1, 16, 16)
    assert dataset.images([]).shape == (0, 3, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).images([4, 2]), dataset.images([4, 2]))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_is_read(tmp_path, form):
    """Names longer than a header holds, folders and links between the images."""
    name = "long" * 20 + "/" + "ü" * 20 + ".png"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        put(archive, "folder", b"", type=tarfile.DIRTYPE)
        put(archive, name, encoded(noise(16, 16, 1)))
        put(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname="elsewhere.png")
        put(archive, "._hidden.png", b"resource fork")
        put(archive, "last.PNG", encoded(noise(16, 16, 2)))
    dataset = quiet(TarShards, tmp_path / "a.tar", 16)
    assert list(dataset.paths) == [f"a.tar/{name}", "a.tar/last.PNG"]
    assert torch.equal(dataset.images([1, 0]), torch.stack([planes(noise(16, 16, 2)), planes(noise(16, 16, 1))]))


def put_sparse(archive, name, content, form):
    """As `tar -S` stores a file whose second KiB is a hole, by the old header of GNU or by that of POSIX."""
    stored = content[:1024] + content[2048:]
    if form == tarfile.PAX_FORMAT:
        places = f"2\n0\n1024\n2048\n{len(content) - 2048}\n".encode().ljust(512, b"\0")
        words = {"major": "1", "minor": "0", "name": name, "realsize": str(len(content))}
        put(archive, name, places + stored, pax_headers={f"GNU.sparse.{key}": value for key, value in words.items()})
        return
    member = tarfile.TarInfo(name)
    member.size, member.type = len(stored), tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    numbers = [0, 1024, 2048, len(content) - 2048]
    header[386:434] = b"".join(b"%011o\0" % number for number in numbers)
    header[483:495] = b"%011o\0" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive.fileobj.write(bytes(header) + stored.ljust(-(-len(stored) // 512) * 512, b"\0"))
    archive.offset = archive.fileobj.tell()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_without_bytes_of_their_own_are_passed_over(tmp_path, form, caplog, monkeypatch):
    """Sparse files and links: neither wrong pixels nor another file of the sample stand for them."""
    content = bytearray(encoded(noise(32, 32, 0), "BMP"))
    content[1024:2048] = bytes(1024)
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        put_sparse(archive, "0.bmp", bytes(content), form)
        put(archive, "0.seg.png", encoded(noise(16, 16, 1)))
        put(archive, "1.png", encoded(noise(16, 16, 2)))
        put(archive, "2.png", b"", type=tarfile.LNKTYPE, linkname="1.png")
        put(archive, "2.seg.png", encoded(noise(16, 16, 3)))
        put(archive, "3.json", b"", type=tarfile.SYMTYPE, linkname="1.json")
        put(archive, "3.png", encoded(noise(16, 16, 4)))
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.extractfile("0.bmp").read() == content  # the archive is what it is meant to be
    monkeypatch.setattr(files, "_said", set())
    for _ in range(2):  # listed, then known by the index
        with caplog.at_level(logging.WARNING):
            dataset = quiet(TarShards, tmp_path / "a.tar", 16)
        assert list(dataset.paths) == ["a.tar/1.png", "a.tar/3.png"]
        assert torch.equal(dataset.images([0, 1]), torch.stack([planes(noise(16, 16, 2)), planes(noise(16, 16, 4))]))
        assert caplog.text.count("only plain files of an archive are read: 1 links, 1 sparse files") == 1
    with tarfile.open(tmp_path / "b.tar", "w", format=form) as archive:
        put_sparse(archive, "0.bmp", bytes(content), form)
    with pytest.raises(ValueError, match="holds no images: 1 files of other kinds in 1 archives, 1 sparse files among them"):
        quiet(TarShards, tmp_path / "b.tar", 16)


def test_shards_are_named_by_folder_pattern_or_range(shards, monkeypatch):
    first = shards / "photos-000000.tar"
    whole = quiet(open_dataset, shards, 16)
    assert isinstance(whole, TarShards) and isinstance(quiet(open_dataset, f"shards:{first}", 16), TarShards)
    assert [
        len(quiet(open_dataset, f"{shards}/photos-{{{rest}", 16)) for rest in ("000000..000019}.tar", "000007..000008}.tar")
    ] == [60, 6]
    assert len(quiet(open_dataset, f"{shards}/photos-00000?.tar", 16)) == 30 and len(quiet(open_dataset, first, 16)) == 3
    monkeypatch.chdir(shards.parent)
    assert absolute_source("shards:photos") == f"shards:{shards}"
    assert quiet(open_dataset, "shards:photos", 16).fingerprint == whole.fingerprint
    with pytest.raises(FileNotFoundError, match=r"there is no file .*photos-000020.tar, 2 of 4 are missing"):
        quiet(open_dataset, f"{shards}/photos-{{000018..000021}}.tar", 16)
    for pattern in ("pictures-*.tar", "photos-{00000..00002}[xy].tar"):
        with pytest.raises(FileNotFoundError, match="no file matches"):
            quiet(open_dataset, f"{shards}/{pattern}", 16)
    assert len(quiet(open_dataset, f"{shards}/photos-{{00000..00001}}*.tar", 16)) == COUNT
    assert len(quiet(open_dataset, f"{shards}/*{{0..1}}*.tar", 16)) == COUNT  # no archive twice
    with pytest.raises(ValueError, match=r"the range \{000005..000002\} of .* is empty: it goes from the smaller number"):
        quiet(open_dataset, f"{shards}/photos-{{000005..000002}}.tar", 16)
    save(shards / "a.png")  # a folder of images, with archives beside them
    save(shards / "b.png")
    assert isinstance(quiet(open_dataset, shards, 16), ImageFolder)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{0..11}", [str(number) for number in range(12)]),
        ("{00..11}", [f"{number:02}" for number in range(12)]),
        ("{8..010}", ["008", "009", "010"]),
        ("{9..10}-{0..1}", ["9-0", "9-1", "10-0", "10-1"]),
    ],
)
def test_ranges_are_those_of_a_shell(pattern, expected, tmp_path):
    for name in expected:
        (tmp_path / f"q-{name}.tar").touch()
    assert shard_files.shard_paths(tmp_path / f"q-{pattern}.tar") == [tmp_path / f"q-{name}.tar" for name in expected]
    if shutil.which("bash"):
        shell = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True, check=True)
        assert shell.stdout.split() == expected


@pytest.mark.parametrize("pattern", ["{0..3000000}", "{0..999}{0..999}", "{0..99999999999999999999}"])
def test_a_range_without_an_end_is_refused_at_once(pattern):
    with pytest.raises(ValueError, match=r"stands for \d+ names, possible are 100000"):
        shard_files.shard_paths(f"photos-{pattern}.tar")


def test_shards_that_cannot_be_read_are_named(tmp_path):
    folder = write_shards(tmp_path / "photos", 6)
    with tarfile.open(tmp_path / "photos-1.tar.gz", "w:gz") as archive:
        put(archive, "a.png", b"")
    with pytest.raises(ValueError, match=r"photos-1.tar.gz is compressed by gzip, .*decompress it"):
        quiet(open_dataset, f"shards:{tmp_path}/photos-1.tar.gz", 16)
    packed = tmp_path / "packed"
    packed.mkdir()
    (tmp_path / "photos-1.tar.gz").rename(packed / "photos-1.tar.gz")
    for source in (packed, f"shards:{packed}", packed / "photos-1.tar.gz"):
        with pytest.raises(ValueError, match=r"photos-1.tar.gz is compressed by gzip, .*decompress it"):
            quiet(open_dataset, source, 16)
    (folder / "photos-1.tar.gz").touch()
    assert len(quiet(open_dataset, folder, 16)) == 6  # left of `gunzip --keep`
    path = folder / "photos-000001.tar"
    whole = path.read_bytes()
    for content in (
        whole[:200],
        whole[:700],
        whole[:1024],
        whole[:1300],
        whole[:2000],
        whole[:1024] + b"x" * 2048,
        b"no archive" * 99,
    ):
        path.write_bytes(content)  # in a header, in a member, at the end of one, in the next
        with pytest.raises(ValueError, match=r"photos-000001.tar is no readable tar archive, or truncated"):
            quiet(TarShards, folder, 16)
    with tarfile.open(tmp_path / "text.tar", "w") as archive:
        put(archive, "a.txt", b"text")
    with pytest.raises(ValueError, match=r"holds no images: 1 files of other kinds in 1 archives"):
        quiet(TarShards, tmp_path / "text.tar", 16)
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none holds no .tar files, found nothing"):
        quiet(TarShards, tmp_path / "none", 16)


def test_joined_archives_are_read_to_the_last(tmp_path):
    """As `cat` joins them, each with its end and padding, and what tells archives from a damaged one is not lost."""
    parts = sorted(write_shards(tmp_path / "photos", 9).iterdir())
    whole, joined = quiet(TarShards, tmp_path / "photos", 16), tmp_path / "joined.tar"
    contents = [path.read_bytes() for path in parts]
    joined.write_bytes(b"".join(contents) + bytes(2**20 + 512))
    dataset = quiet(TarShards, joined, 16)
    assert [name.partition("/")[2] for name in dataset.paths] == [name.partition("/")[2] for name in whole.paths]
    assert torch.equal(dataset.images(range(9)), whole.images(range(9)))
    joined.write_bytes(contents[0] * 2)  # samples of one name are two where they are of two archives
    assert len(quiet(TarShards, joined, 16)) == 6
    joined.write_bytes(bytes(1024) + contents[0])  # an empty one comes first
    assert len(quiet(TarShards, joined, 16)) == 3
    for damaged in (contents[0] + contents[1][:1300], contents[0] + contents[1][:200], contents[0] + b"no archive" * 99):
        joined.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"joined.tar is no readable tar archive, or truncated"):
            quiet(TarShards, joined, 16)


def test_of_files_of_one_name_in_a_row_the_last_counts(tmp_path, caplog):
    """As `tar` unpacks them, where `tar -r` wrote a file once more."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        put(archive, "0.png", encoded(noise(16, 16, 0)))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        put(archive, "0.png", encoded(noise(16, 16, 1)))
        put(archive, "0.seg.png", encoded(noise(16, 16, 2)))
        put(archive, "0.cls", b"4")
        put(archive, "0.cls", b"2")
    caplog.set_level(logging.INFO)
    dataset = quiet(TarShards, tmp_path / "a.tar", 16)
    assert torch.equal(dataset.images([0])[0], planes(noise(16, 16, 1))) and dataset.labels([0]).tolist() == [2]
    assert f"listed 1 images in 1 archives of {tmp_path}/a.tar, and 4 files beside them" in caplog.text


def write_labelled(path, labels):
    """Images of the classes `labels`, as WebDataset writes them: the class comes before its image or after it."""
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate(labels):
            parts = {f"{number:05}.cls": label, f"{number:05}.png": encoded(noise(20, 16, number)), f"{number:05}.seg.cls": b"77"}
            for name in sorted(parts, reverse=number % 2 == 1):
                if parts[name] is not None:
                    put(archive, name, parts[name])


def test_classes_are_read_beside_the_images(tmp_path, monkeypatch):
    write_labelled(tmp_path / "0.tar", [b"2", b"0\n", b" 4 ", b"2", b"0"])
    write_labelled(tmp_path / "1.tar", [b"1", b"2"])
    dataset = quiet(open_dataset, tmp_path, 16)
    assert knows_classes(dataset) and dataset.class_names == ("0", "1", "2", "3", "4")
    assert dataset.labels(range(7)).tolist() == [2, 0, 4, 2, 0, 1, 2] and dataset.labels([6, 1, 1]).tolist() == [2, 0, 0]
    assert dataset.labels([]).shape == (0,) and dataset.labels([0]).dtype == torch.int64
    train, test = split(dataset, 5, 2)
    for part in (train, test, pickle.loads(pickle.dumps(test))):
        assert part.class_names == dataset.class_names
        assert torch.equal(part.labels(range(len(part))), dataset.labels(part.indices))


@pytest.mark.parametrize("odd", [None, b"", b"cat", b"-1", b"1.5", b"100000", b"9" * 99, "²".encode()])
def test_there_are_no_classes_where_only_some_images_have_one(tmp_path, monkeypatch, caplog, odd):
    write_labelled(tmp_path / "a.tar", [b"2", odd, b"99999"])
    monkeypatch.setattr(files, "_said", set())
    with caplog.at_level(logging.WARNING):
        dataset = quiet(TarShards, tmp_path / "a.tar", 16)
    assert f"1 of 3 images of {tmp_path}/a.tar have no .cls with an integer from 0 to 99999 beside them" in caplog.text
    assert len(dataset) == 3 and not knows_classes(dataset)
    with pytest.raises(ValueError, match=r"has no classes: not every image has a .cls"):
        dataset.labels([0])


def test_shards_without_any_class_say_nothing_of_them(shards, caplog, monkeypatch):
    monkeypatch.setattr(files, "_said", set())
    assert not knows_classes(quiet(TarShards, shards, 16))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_an_archive_that_changes_while_it_is_open_is_an_error(shards):
    """None of its images is read, nor does another stand in for them; that of other archives goes on."""
    dataset = quiet(TarShards, shards, 16)
    path, before = shards / "photos-000001.tar", dataset.images([0])
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = (shards / "photos-000002.tar").read_bytes()
    assert len(other) == path.stat().st_size
    for content, moment in ((other, times[1] + 1), (other + bytes(512), times[1])):  # as large, of another time, or the reverse
        path.write_bytes(content)
        os.utime(path, ns=(times[0], moment))
        with pytest.raises(OSError, match=r"photos-000001.tar has changed since its images were listed: open .*photos again"):
            dataset.images([3])
    path.unlink()
    with pytest.raises(OSError, match=r"photos-000001.tar is gone since its images were listed"):
        dataset.images([3])
    assert torch.equal(dataset.images([0]), before)


@pytest.mark.parametrize(
    "source", ("s3://bucket/photos", "shards:https://host/photos-{0..9}.tar", "shards:pipe:cat a.tar", "lsun:gs://a")
)
def test_sources_are_paths_on_this_machine(source):
    with pytest.raises(ValueError, match=r"^" + re.escape(source) + " is no path: .* mount it or copy it here first"):
        open_dataset(source, 16)


def test_a_large_folder_is_the_folder_decoded_on_demand(classes, nested_photos):
    for root in (classes, nested_photos):
        small, large_ = open_folder(root), quiet(LargeFolder, root, 16)
        assert list(large_.paths) == small.paths
        assert torch.equal(large_.images(range(len(small))), small.images(range(len(small))))
        assert large_.class_names == small.class_names
        if knows_classes(small):
            assert torch.equal(large_.labels([4, 0, 2, 2]), small.labels([4, 0, 2, 2]))
        else:
            with pytest.raises(ValueError, match="has no classes"):
                large_.labels([0])


def test_names_of_every_kind_are_indexed(tmp_path):
    names = ["A.png", "new\nline.png", os.fsdecode(b"\xff\xfe.png"), "ü.png", "x" * 200 + ".png"]
    for name in names:
        save(tmp_path / name)
    dataset = quiet(LargeFolder, tmp_path, 16)
    assert list(dataset.paths) == sorted(names) and dataset.images(range(5)).shape == (5, 3, 16, 16)
    with pytest.raises(IndexError, match=r"must lie in \[0, 4\], got 5"):
        dataset.paths[5]


def test_a_folder_is_large_beyond_a_number_of_images(classes, monkeypatch):
    assert isinstance(quiet(open_dataset, classes, 16), ImageFolder)
    monkeypatch.setattr(large, "LARGE", 4)
    for _ in range(2):  # counted, then known by its index
        dataset = quiet(open_dataset, classes, 16)
        assert isinstance(dataset, LargeFolder) and dataset.large
    (classes / "a" / "1.png").unlink()
    assert isinstance(quiet(open_dataset, classes, 16), ImageFolder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*; data is"):
        open_dataset(classes / "none", 16)


def test_an_index_is_made_once_and_anew_when_the_folder_changes(classes, monkeypatch, cache_home):
    def never(*_):
        raise AssertionError("the folder is listed again")

    first = quiet(LargeFolder, classes, 16)
    with monkeypatch.context() as patched:
        patched.setattr(large, "ImageSearch", never)
        assert quiet(LargeFolder, classes, 32).paths[:] == first.paths[:]
    assert [maker for maker, _ in cache_contents()] == ["indexes of images"]
    save(classes / "b" / "deep" / "3.png")
    changed = quiet(LargeFolder, classes, 16)
    assert len(changed) == 6 and changed.fingerprint != first.fingerprint
    (entry,) = cache_home.iterdir()
    cut(entry)
    assert quiet(LargeFolder, classes, 16).fingerprint == changed.fingerprint


def test_an_index_of_shards_is_made_anew_when_one_changes(shards, cache_home):
    first = quiet(TarShards, shards, 16)
    age(cache_home)
    (shards / "photos-000019.tar").unlink()
    assert len(quiet(TarShards, shards, 16)) == COUNT - SHARD != len(first) and len(list(cache_home.iterdir())) == 1


def open_with_others(root, barrier):
    """In a process of its own: how many images there are, and how often the folder was listed here."""
    listed, write = [], index._write
    index._write = lambda *arguments: (listed.append(1), write(*arguments))
    barrier.wait()
    return len(quiet(LargeFolder, root, 16)), len(listed)


def test_processes_that_start_together_list_a_folder_once(classes):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, concurrent.futures.ProcessPoolExecutor(3, context) as pool:
        barrier = manager.Barrier(3)
        found = [future.result() for future in [pool.submit(open_with_others, classes, barrier) for _ in range(3)]]
    assert [count for count, _ in found] == [5, 5, 5] and sum(listed for _, listed in found) == 1


def test_for_a_damaged_image_the_next_stands_in(tmp_path, caplog, monkeypatch):
    for number in range(8):
        noise(20, 16, number).save(tmp_path / f"{number}.png")
    whole = quiet(LargeFolder, tmp_path, 16).images(range(8))
    for number in (2, 3, 7):
        cut(tmp_path / f"{number}.png")
    monkeypatch.setattr(files, "_said", set())
    with caplog.at_level(logging.WARNING):
        dataset = quiet(LargeFolder, tmp_path, 16)
        for order in (range(8), [3, 2, 7, 7, 0]):  # whoever asks, and however often
            expected = torch.stack([whole[{2: 4, 3: 4, 7: 0}.get(number, number)] for number in order])
            assert torch.equal(dataset.images(order), expected)
    lines = [record.getMessage() for record in caplog.records if "stands in for it" in record.getMessage()]
    assert len(lines) == 3 and any("3.png: " in line and "4.png stands in for it" in line for line in lines)
    for number in (0, 1):
        cut(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"of 8 images that were looked at 5 cannot be read, e.g. .*0.png: .*truncated"):
        quiet(LargeFolder, tmp_path, 16)


def test_the_class_of_a_stand_in_is_its_own_once_it_was_read(tmp_path):
    """Of 200 images four are damaged, which the look at 64 does not meet with."""
    damaged, folder = (5, 6, 99, 150), tmp_path / "folder"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(200):
            content = encoded(noise(20, 16, number))[: 60 if number in damaged else None]
            put(archive, f"{number:05}.png", content)
            put(archive, f"{number:05}.cls", b"%d" % number)
            (folder / f"{number:05}").mkdir(parents=True)
            (folder / f"{number:05}" / "a.png").write_bytes(content)
    for dataset in (quiet(TarShards, tmp_path / "a.tar", 16), quiet(LargeFolder, folder, 16)):
        part = Subset(dataset, [99, 6, 4])
        assert part.labels([2, 0]).tolist() == [4, 100]  # it keeps its images, so has read them
        dataset.images(range(200))
        assert dataset.labels([4, 5, 6, 7, 99, 150, 5]).tolist() == [4, 7, 7, 7, 100, 151, 7]
        assert Subset(dataset, [5, 8]).labels([1, 0]).tolist() == [8, 7]


def test_small_images_are_enlarged_where_it_is_allowed(tmp_path):
    for number in range(4):
        noise(20, 16, number).save(tmp_path / f"{number}.png")
    assert quiet(LargeFolder, tmp_path, 32, upscale=True).images([0]).shape == (1, 3, 32, 32)
    small = r"4 are too small, e.g. .*0.png: 20 x 16 pixels are too few for resolution 32.*; --data.upscale"
    with pytest.raises(ValueError, match=rf"of 4 images that were looked at {small}"):
        quiet(LargeFolder, tmp_path, 32)
    for name in ("10.png", "11.png"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"of 6 images that were looked at 2 cannot be read, e.g. .*10.png: .*, and {small}"):
        quiet(LargeFolder, tmp_path, 32)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def windows(order):
    """Of each window of 16 shards in an order of all images, which shards it reads."""
    return [set((part // SHARD).tolist()) for part in order.split(16 * SHARD)]


def test_an_epoch_reads_few_shards_at_a_time(shards):
    dataset = quiet(TarShards, shards, 16)
    order = dataset.order(generator(0))
    assert sorted(order.tolist()) == list(range(COUNT))
    assert [len(shards) for shards in windows(order)] == [16, 4]
    assert torch.equal(order, dataset.order(generator(0))) and not torch.equal(order, dataset.order(generator(1)))


def test_parts_and_mirrors_keep_the_order_of_the_shards(shards, monkeypatch):
    dataset = quiet(TarShards, shards, 16)
    train, test = split(dataset, 50, 10)
    assert not knows_order(train) and train.in_memory  # where any image is at hand
    monkeypatch.setattr("multibeta.data.images.MEMORY_LIMIT_BYTES", 16 * 16 * 3 * 20)
    train, test = split(dataset, 50, 10)
    assert knows_order(train) and not train.in_memory and test.in_memory
    whole, chosen = dataset.order(generator(0)), set(train.indices.tolist())
    assert train.indices[train.order(generator(0))].tolist() == [number for number in whole.tolist() if number in chosen]
    twice = Subset(dataset, [5, 9] * 20)
    assert sorted(twice.order(generator(0)).tolist()) == list(range(40))
    order = Mirrored(train).order(generator(0))
    first, second = order.split(50)
    assert sorted(order.tolist()) == list(range(100)) and (first >= 50).any() and (first < 50).any()
    assert torch.equal(first % 50, train.order(generator(0))) and sorted((second % 50).tolist()) == list(range(50))
    assert not knows_order(Mirrored(Subset(open_dataset("scenes", 16), [0])))


def test_batches_follow_the_order_of_the_dataset(shards):
    dataset = quiet(TarShards, shards, 16)
    order = order_of(dataset)
    stream = torch.cat([training.batch_indices(step, COUNT, 7, 3, order) for step in range(2 * COUNT)])
    epochs = stream.reshape(-1, COUNT)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(COUNT).expand(len(epochs), -1))
    assert all([len(part) for part in windows(epoch)] == [16, 4] for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1]) and torch.equal(epochs[1], order_of(dataset)(COUNT, 3, 1))


def test_a_training_on_shards_resumes_in_the_middle_of_an_epoch_bit_for_bit(shards, tmp_path):
    """Twelve batches of 8 are one epoch of 60 images and a part of the next; it stops in the first, at step 6, saved at 5."""

    def stop():
        raise RuntimeError("stopped")

    whole, rest = Denoise(), Denoise()
    expected = run(tmp_path / "whole", whole, quiet(TarShards, shards, 16))
    with pytest.raises(RuntimeError, match="stopped"):
        run(tmp_path / "parts", Denoise({6: stop}), quiet(TarShards, shards, 16))
    assert same(run(tmp_path / "parts", rest, quiet(TarShards, shards, 16), resume=True), expected)
    assert [batch.indices.tolist() for batch in rest.seen] == [batch.indices.tolist() for batch in whole.seen[5:]]
    assert [len(part) for part in windows(torch.cat([batch.indices for batch in whole.seen])[:COUNT])] == [16, 4]


def test_a_recipe_takes_shards(shards):
    source = f"shards:{shards}"
    recipe = dataclasses.replace(tiny(), data=recipes.DataOptions(source, num_test=10))
    train, test = recipes.open_data(recipe)
    assert (len(train), len(test)) == (50, 10) and default_folder(source) == Path("runs/photos")
    chosen = torch.cat([train.indices, test.indices])
    assert torch.equal(test.images(range(10)), quiet(TarShards, shards, 16).images(chosen[50:]))


MEASURE = """
import json, resource, sys
from multibeta import data
from multibeta.training import batch_indices
from multibeta.recipes.own_images import default_folder
from multibeta.training.batches import order_of

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
data.large.LARGE, before, found = 10_000, peak(), []
for source in sys.argv[1:]:
    dataset = data.open_dataset(source, 64, upscale=True, progress=False)
    train, test = data.split(dataset, len(dataset) - 100, 100)
    order = order_of(train)
    seen = sum(len(train.images(batch_indices(step, len(train), 100, 0, order))) for step in range(50))
    found.append([type(dataset).__name__, len(train), seen])
print(json.dumps([found, peak() - before]))
"""


def test_many_images_take_little_memory(tmp_path):
    """20,000 in files and in shards, which are 234 MiB decoded; of each, 5,000 are read."""
    pytest.importorskip("resource")
    content = b"P6 8 8 255\n" + bytes(range(192))
    (tmp_path / "shards").mkdir()
    for part in range(20):
        folder = tmp_path / "files" / f"{part:02}"
        folder.mkdir(parents=True)
        with tarfile.open(tmp_path / "shards" / f"{part:02}.tar", "w") as archive:
            for number in range(1000):
                put(archive, f"{part:02}{number:04}.ppm", content)
                put(archive, f"{part:02}{number:04}.cls", b"%d" % part)
                (folder / f"{number:04}.ppm").write_bytes(content)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "shards"), str(tmp_path / "files")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    found, mebibytes = json.loads(output.stdout)
    assert found == [["TarShards", 19_900, 5000], ["LargeFolder", 19_900, 5000]] and mebibytes < 50
