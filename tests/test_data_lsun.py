"""LSUN: an LMDB of encoded images, or exported ones."""

import pytest
import torch
from PIL import Image

from dataset_files import cut, encoded, noise, planes, quiet, zipped
from multibeta import files
from multibeta.data import (
    LSUN,
    open_dataset,
)

lmdb = pytest.importorskip("lmdb")

pytestmark = pytest.mark.usefixtures("cache_home")


def test_exported_scenes_are_read_from_folders_and_archives(tmp_path):
    for number in (2, 10, 1):
        (tmp_path / "out" / "a").mkdir(parents=True, exist_ok=True)
        noise(90, 64, number).save(tmp_path / "out" / "a" / f"{number}.webp", lossless=True)
    dataset = quiet(LSUN, tmp_path / "out", 32)
    assert dataset.paths == ["a/1.webp", "a/2.webp", "a/10.webp"]
    image = noise(90, 64, 10).crop((13, 0, 77, 64)).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(dataset.images([2])[0], planes(image))
    archive = zipped(tmp_path / "out" / "a")
    assert torch.equal(quiet(LSUN, archive, 32).images([2])[0], planes(image))
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"none holds no images .*, found notes.txt"):
        quiet(LSUN, tmp_path / "none", 32)


def test_an_lmdb_is_found_below_a_folder(lsun):
    assert len(quiet(LSUN, lsun.parent, 32)) == 4


def test_lsun_shows_the_centre_square_in_the_order_of_the_keys(lsun):
    dataset = quiet(LSUN, lsun, 32)
    assert len(dataset) == 4
    assert dataset.paths.tolist() == [b"%040x" % number for number in range(4)]
    image = noise(92, 64, 2).crop((14, 0, 78, 64)).resize((32, 32), Image.Resampling.BICUBIC)
    assert torch.equal(dataset.images([2, 0])[0], planes(image))


def test_two_views_of_one_lmdb_live_side_by_side(lsun):
    small, large = quiet(LSUN, lsun, 16), quiet(LSUN, lsun, 32)
    assert small.images([1]).shape[-1] == 16
    assert large.images([1]).shape[-1] == 32


def test_truncated_lmdbs_are_reported(lsun):
    whole = (lsun / "data.mdb").read_bytes()
    for share in (0.9, 0.5):
        cut(lsun / "data.mdb", share)
        with pytest.raises(ValueError, match=r"data.mdb is truncated: \d+ bytes, at least \d+ are expected"):
            quiet(LSUN, lsun)
    for content in (whole[:100], b"no database" * 1000):
        (lsun / "data.mdb").write_bytes(content)
        with pytest.raises(ValueError, match="no readable LMDB"):
            quiet(LSUN, lsun)
    (lsun / "data.mdb").write_bytes(whole)
    assert len(quiet(LSUN, lsun, 32)) == 4


def test_any_lmdb_of_encoded_images_is_read_by_that_name(tmp_path):
    with lmdb.open(str(tmp_path / "faces"), map_size=2**20) as database, database.begin(write=True) as transaction:
        for number, kind in enumerate(("PNG", "BMP")):
            transaction.put(b"64-%05d" % number, encoded(noise(40, 40, number), kind))
        transaction.put(b"length", b"2")
    with pytest.raises(ValueError, match=rf"found no images.*an LMDB of encoded images is opened by lsun:{tmp_path}/faces"):
        quiet(open_dataset, tmp_path / "faces", 40)
    dataset = quiet(open_dataset, f"lsun:{tmp_path}/faces", 40)
    assert torch.equal(dataset.images([0, 1, 2]), torch.stack([planes(noise(40, 40, number)) for number in (0, 1, 0)]))


def test_empty_and_foreign_lmdbs_are_reported(tmp_path):
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database:
        pass
    with pytest.raises(ValueError, match="holds no images"):
        quiet(LSUN, tmp_path / "lmdb")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database, database.begin(write=True) as transaction:
        transaction.put(b"length", b"70000")
    with pytest.raises(ValueError, match=r"length.*cannot identify image"):
        quiet(LSUN, tmp_path / "lmdb")


def test_for_a_damaged_scene_the_next_stands_in(lsun, caplog, monkeypatch):
    whole = quiet(LSUN, lsun, 32).images(range(4))
    with lmdb.open(str(lsun), map_size=2**24) as database, database.begin(write=True) as transaction:
        transaction.put(b"%040x" % 2, transaction.get(b"%040x" % 2)[:100])
    monkeypatch.setattr(files, "_said", set())
    dataset = quiet(LSUN, lsun, 32)
    for _ in range(2):
        assert torch.equal(dataset.images([2, 0, 3]), whole[[3, 0, 3]])
    (said,) = (message for message in caplog.messages if "stands in" in message)
    assert f"{2:040x}: " in said and f"{3:040x} stands in for it" in said
