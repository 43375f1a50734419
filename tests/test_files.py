"""Whole files and locks, as several processes and threads meet them."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from multibeta import caches, files


def text(target):
    return Path(target).read_text(encoding="utf-8")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


class TestWriting:
    def test_a_file_is_replaced_whole_and_its_folders_are_made(self, tmp_path):
        target = tmp_path / "a" / "b" / "β.txt"
        files.write_text(target, "first")
        files.write_text(target, "zweite β")
        assert text(target) == "zweite β" and names(target.parent) == ["β.txt"]

    def test_a_writer_that_fails_leaves_what_was_there(self, tmp_path):
        files.write_text(tmp_path / "a", "first")

        def write(file):
            file.write(b"half")
            raise ValueError("no more")

        with pytest.raises(ValueError, match="no more"):
            files.write_atomically(tmp_path / "a", write)
        assert text(tmp_path / "a") == "first" and names(tmp_path) == ["a"]

    def test_no_file_of_several_changes_before_all_are_written(self, tmp_path):
        files.write_text(tmp_path / "a", "first")
        with pytest.raises(AttributeError):
            files.write_together({tmp_path / "a": "second", tmp_path / "b": None})
        assert text(tmp_path / "a") == "first" and names(tmp_path) == ["a"]

    def test_a_full_disk_leaves_all_of_several_files(self, tmp_path, monkeypatch):
        path = tmp_path / "page.html"
        path.write_text("old page")
        path.with_suffix(".json").write_text("old numbers")

        def fail(*args):
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space left"):
            files.write_together({path: "new page", path.with_suffix(".json"): "new numbers"})
        assert path.read_text() == "old page" and path.with_suffix(".json").read_text() == "old numbers"
        assert len(list(tmp_path.iterdir())) == 2

    def test_writers_of_one_file_do_not_meet(self, tmp_path):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda index: files.write_text(tmp_path / "a", str(index) * 100_000), range(10)))
        found = text(tmp_path / "a")
        assert found == found[0] * 100_000 and names(tmp_path) == ["a"]

    @pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
    def test_a_file_that_is_a_mount_point_is_written_in_place(self, tmp_path, monkeypatch, number):
        files.write_text(tmp_path / "a", "first")
        monkeypatch.setattr(os, "replace", failing(number))
        files.write_text(tmp_path / "a", "second")
        assert text(tmp_path / "a") == "second" and names(tmp_path) == ["a"]
        with pytest.raises(OSError):
            files.write_text(tmp_path / "new", "there is no file to write into")
        assert names(tmp_path) == ["a"]

    def test_a_file_in_a_folder_that_takes_no_others_is_written_in_place(self, tmp_path, monkeypatch):
        files.write_text(tmp_path / "here" / "a", "first")
        with_name = Path.with_name
        monkeypatch.setattr(files.Path, "with_name", lambda path, name: with_name(Path("/proc/nowhere"), name))
        monkeypatch.setattr(files, "NOT_HERE", (*files.NOT_HERE, errno.ENOENT))
        files.write_text(tmp_path / "here" / "a", "second")
        monkeypatch.undo()
        assert text(tmp_path / "here" / "a") == "second" and names(tmp_path / "here") == ["a"]

    def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(self, tmp_path):
        left, old, fresh = (tmp_path / f".a[1].{digit * 12}.part" for digit in "123")
        for path in (left, old, fresh):
            path.write_text("")
        for path in (left, old):
            os.utime(path, (time.time() - 7200,) * 2)
        with open(old) as held:
            files.fcntl.flock(held, files.fcntl.LOCK_EX)
            files.write_text(tmp_path / "a[1]", "whole")
        assert names(tmp_path) == [".a[1].222222222222.part", ".a[1].333333333333.part", "a[1]"]

    def test_a_link_stays_a_link(self, tmp_path):
        files.write_text(tmp_path / "real", "first")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        files.write_text(tmp_path / "link", "second")
        assert (tmp_path / "link").is_symlink() and text(tmp_path / "real") == "second"

    def test_devices_and_pipes_are_written_to_and_not_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(text, tmp_path / "pipe")
            files.write_text(tmp_path / "pipe", "through")
            assert read.result() == "through"
        assert not (tmp_path / "pipe").is_file() and names(tmp_path) == ["pipe"]
        with pytest.raises(IsADirectoryError, match="a folder, name a file in it"):
            files.write_text(tmp_path, "")

    def test_a_file_that_is_being_flushed_is_not_taken_for_abandoned(self, tmp_path, monkeypatch):
        flush = files.flush

        def slowly(path):
            os.utime(path, (time.time() - 7200,) * 2)
            assert caches.clear_caches(tmp_path) == (0, 0)
            flush(path)

        monkeypatch.setattr(files, "flush", slowly)
        files.write_text(tmp_path / "a", "whole")
        assert text(tmp_path / "a") == "whole"


class TestLock:
    def test_one_thread_at_a_time_holds_it(self, tmp_path):
        inside = []

        def use(_):
            with files.lock(tmp_path / ".lock") as held:
                assert held and not inside
                inside.append(1)
                time.sleep(0.001)
                inside.pop()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(200)))
        assert names(tmp_path) == []

    def test_it_names_its_holder(self, tmp_path):
        with (
            files.lock(tmp_path / ".lock"),
            pytest.raises(FileExistsError, match=rf"process {os.getpid()} on .* is training in it; wait for it, stop it"),
            files.lock(tmp_path / ".lock", wait=False, doing="training in"),
        ):
            pass
        with files.lock(tmp_path / ".lock", wait=False):
            pass

    def test_it_ends_with_its_process_however_that_ends(self, tmp_path):
        code = (
            "import sys, time; from pathlib import Path; from multibeta import files\n"
            "with files.lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
        with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(FileExistsError, match=f"process {process.pid}"), files.lock(tmp_path / ".lock", wait=False):
                pass
            waits = threading.Timer(0.2, process.send_signal, [signal.SIGKILL])
            waits.start()
            with files.lock(tmp_path / ".lock") as held:
                assert held and process.wait() == -signal.SIGKILL

    def test_an_occupied_folder_is_made_and_goes_again_where_nothing_came_into_it(self, tmp_path):
        with pytest.raises(ValueError, match="early"), files.occupy(tmp_path / "a" / "b", "training in"):
            raise ValueError("early")
        assert names(tmp_path) == []
        with files.occupy(tmp_path / "a" / "b", "training in"):
            files.write_text(tmp_path / "a" / "b" / "c", "")
        assert names(tmp_path / "a" / "b") == ["c"]
        with pytest.raises(NotADirectoryError, match="c is a file"), files.occupy(tmp_path / "a" / "b" / "c", "training in"):
            pass

    def test_who_waits_for_a_folder_that_goes_makes_it_again(self, tmp_path):
        def occupy(_):
            with files.occupy(tmp_path / "a" / "b", "using", wait=True):
                pass

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(occupy, range(1000)))
        assert not [path for path in tmp_path.rglob("*") if not path.is_dir()]

    def test_the_lock_of_another_user_is_waited_for(self, tmp_path, monkeypatch):
        (tmp_path / ".lock").write_text("left by a process that was killed")
        opened = os.open

        def theirs(path, flags, *mode):
            if flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return opened(path, flags, *mode)

        monkeypatch.setattr(os, "open", theirs)
        monkeypatch.setattr(Path, "unlink", failing(errno.EPERM))
        with files.lock(tmp_path / ".lock") as held:
            assert held
            with pytest.raises(FileExistsError), files.lock(tmp_path / ".lock", wait=False):
                pass

    def test_a_full_disk_locks_as_well(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with files.lock(tmp_path / ".lock") as held:
            assert held
        assert names(tmp_path) == []

    def test_without_locks_the_log_says_so_and_work_goes_on(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(files.fcntl, "flock", failing(errno.ENOLCK))
        for _ in range(2):
            with files.lock(tmp_path / ".lock", doing="saving into") as held:
                assert not held
        assert [record.message for record in caplog.records] == [
            f"{tmp_path} cannot be locked here: see that one process at a time is saving into it"
        ]
        assert names(tmp_path) == []


class TestReading:
    @pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
    def test_broken_json_and_arrays_are_named(self, tmp_path, content):
        for name, read in (("a.json", files.read_json), ("a.npz", files.read_arrays)):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is no readable"):
                read(tmp_path / name)
            with pytest.raises(FileNotFoundError, match="nowhere"):
                read(tmp_path / "nowhere")
        np.savez(tmp_path / "a.npz", codes=np.arange(3))
        assert files.read_arrays(tmp_path / "a.npz")["codes"].tolist() == [0, 1, 2]
        (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
        with pytest.raises(ValueError, match=r"a.npz is no readable .npz file, or truncated"):
            files.read_arrays(tmp_path / "a.npz")
