"""The folder of all caches, as several processes and threads meet it."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from multibeta import caches, files


def text(target):
    return Path(target).read_text(encoding="utf-8")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A home and a folder of temporary files of this test."""
    for name in ("MULTIBETA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    files._said.clear()


def test_one_variable_moves_them_all_and_an_argument_goes_before_it(tmp_path, monkeypatch):
    assert caches.cache_folder() == tmp_path / "home" / ".cache" / "multibeta"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert caches.cache_folder() == tmp_path / "xdg" / "multibeta"
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "mine"))
    assert caches.cache_folder() == tmp_path / "mine"
    assert caches.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert names(tmp_path) == ["temporary"]  # asking makes nothing


def test_a_user_without_a_home_has_a_folder_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda user: {}[user])
    folder = caches.cache_folder()
    assert folder.parent == tmp_path / "temporary"
    caches.make_cache_folder(folder)
    assert folder.stat().st_mode & 0o077 == 0
    assert caches.cache_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(OSError, match=r"there is no home folder; .*others may write to it.*--cache or MULTIBETA_CACHE"):
        caches.cache_folder()


def test_a_home_that_cannot_be_written_is_passed_over_with_a_word(tmp_path, monkeypatch, caplog):
    (tmp_path / "home").write_text("a file")
    assert caches.cache_folder().parent == tmp_path / "temporary"
    assert caches.cache_folder().parent == tmp_path / "temporary"
    (record,) = caplog.records
    assert "Not a directory" in record.message and "MULTIBETA_CACHE names another folder" in record.message
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "home" / "cache"))
    with pytest.raises(OSError, match="no folder for caches"):  # which was asked for by name
        caches.cache_folder()


def test_what_lies_in_a_folder_that_cannot_be_written_is_found(tmp_path, monkeypatch):
    files.write_text(tmp_path / "home" / ".cache" / "multibeta" / "a", "")
    monkeypatch.setattr(caches, "why_not_writable", lambda folder: "closed" if "home" in str(folder) else None)
    assert caches.cached("a") == tmp_path / "home" / ".cache" / "multibeta" / "a"
    assert caches.cached("b").parent.parent == tmp_path / "temporary"


def test_one_builds_and_the_others_wait(tmp_path):
    entry, built = tmp_path / "cache" / "entry", []

    def build():
        built.append(1)
        time.sleep(0.05)
        files.write_text(entry, "whole")

    def read():
        return text(entry) if entry.exists() else None

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: caches.build_once(entry, read, build, "building"), range(8)))
    assert found == ["whole"] * 8 and built == [1] and names(entry.parent) == ["entry"]


def test_what_a_killed_builder_left_goes_with_the_next_build(tmp_path):
    entry = tmp_path / "cache" / "photos[1].json"
    entry.parent.mkdir()
    (entry.parent / ".photos[1].npy.0123456789ab.part").write_text("half")
    caches.build_once(entry, lambda: entry.exists() or None, lambda: files.write_text(entry, ""), "building")
    assert names(entry.parent) == ["photos[1].json"]


def test_what_is_cleared_while_it_is_built_is_built_again(tmp_path):
    entry, built = tmp_path / "cache" / "entry", []

    def build():
        built.append(1)
        if len(built) > 1:  # otherwise cleared at once
            files.write_text(entry, "whole")

    assert caches.build_once(entry, lambda: text(entry) if entry.exists() else None, build, "building") == "whole"


def test_an_entry_of_two_files_is_not_cleared_between_them(tmp_path):
    entry = tmp_path / "photos-0123456789abcdef-64-0123456789abcdef.json"

    def build():
        files.write_text(entry.with_suffix(".npy"), "pixels")
        assert caches.clear_caches(tmp_path) == (0, 0)
        files.write_text(entry, "the rest")

    def read():
        return True if entry.exists() and entry.with_suffix(".npy").exists() else None

    assert caches.build_once(entry, read, build, "building")
    assert caches.clear_caches(tmp_path) == (2, 14)


def test_a_home_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(FileNotFoundError, match="~nobody-of-that-name/cache"):
        caches.cache_folder()


def test_a_build_that_leaves_nothing_is_an_error(tmp_path):
    with pytest.raises(OSError, match="cannot be read back"):
        caches.build_once(tmp_path / "entry", lambda: None, lambda: None, "building")


def test_clearing_removes_ours_and_nothing_else(tmp_path):
    cache, digest = tmp_path / "cache", "0123456789abcdef"
    ours = [f"photos-{digest}-64-{digest}.npy", f"photos-{digest}-64-{digest}.json", f"cpp-{digest}0123.so"]
    ours += [f"dci/dci-{digest}01234567.npz", f".a.json.{digest[:12]}.part"]
    for name in (*ours, "notes.txt", "array.npy"):
        files.write_text(cache / name, "12345")
    os.utime(cache / ours[-1], (time.time() - 7200,) * 2)  # left by a process that was killed
    assert {str(path.relative_to(cache)) for _, path in caches.cache_contents(cache)} == set(ours)
    assert caches.clear_caches(cache) == (5, 25)
    assert names(cache) == ["array.npy", "dci", "notes.txt"]


def test_what_is_being_written_stays(tmp_path):
    part = tmp_path / ".a.0123456789ab.part"
    with open(part, "w") as held:
        files.fcntl.flock(held, files.fcntl.LOCK_EX)
        assert caches.clear_caches(tmp_path) == (0, 0)
    os.utime(part, (time.time() - 7200,) * 2)
    assert caches.clear_caches(tmp_path) == (1, 0)
