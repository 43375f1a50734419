"""A work that was stopped goes on where it was, and never mixes with another."""

import json

import numpy as np
import pytest

from multibeta import files
from multibeta.numbered_files import NumberedFiles, write_npz


def begin(folder, facts, **options):
    with NumberedFiles(folder, ".txt").written(facts, doing="writing into", **options):
        pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_chunks_with_a_missing_file_are_to_be_made_whole(tmp_path, caplog):
    numbered = NumberedFiles(tmp_path, ".txt")
    caplog.set_level("INFO", "multibeta")
    assert numbered.share(2) == [range(1), range(1, 2)] and not caplog.records
    for number in (0, 1, 2, 5):
        numbered.path(number).write_text("")
    assert numbered.share(7, 2) == [range(2, 4), range(4, 6), range(6, 7)]
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}: 4 of 7 files are there already"]
    assert numbered.share(3, 2) == []


def test_files_of_another_work_are_refused_and_say_what_differs(tmp_path):
    begin(tmp_path / "a", {"seed": 1, "steps": 2, "shape": (3, 4)})
    begin(tmp_path / "a", {"seed": 1, "steps": 2, "shape": (3, 4)})
    with pytest.raises(ValueError, match="a is of another work: seed is 1 there and 2 here, end is None there and 5 here"):
        begin(tmp_path / "a", {"seed": 2, "steps": 2, "shape": (3, 4), "end": 5})
    begin(tmp_path / "b", {"digest": "0a", "fingerprint": 1})
    with pytest.raises(ValueError, match="b is of another work: another model, other images; choose another folder"):
        begin(tmp_path / "b", {"digest": "0b", "fingerprint": 2})
    (tmp_path / "000003.txt").touch()
    with pytest.raises(ValueError, match=r"holds numbered files and no index\.json"):
        begin(tmp_path, {})


def test_a_fact_that_grows_does_not_shrink(tmp_path):
    for count in (3, 5):
        begin(tmp_path, {"count": count}, grows="count")
    assert json.loads((tmp_path / "index.json").read_text()) == {"count": 5}
    with pytest.raises(ValueError, match="count is 5 there and 4 here"):
        begin(tmp_path, {"count": 4}, grows="count")


def test_halves_that_a_killed_call_left_are_removed(tmp_path):
    begin(tmp_path, {})
    for name in (".000001.txt.0123456789ab.part", ".mine.part"):
        (tmp_path / name).touch()
    begin(tmp_path, {})
    assert names(tmp_path) == [".mine.part", "index.json"]


def test_two_works_do_not_write_into_one_folder(tmp_path):
    held = NumberedFiles(tmp_path, ".txt").written({}, doing="writing into")
    with held, pytest.raises(FileExistsError, match="is writing into it"):
        begin(tmp_path, {})


def squares(made, fails_at=None):
    """What gives the squares of the items of each chunk, and notes which."""

    def make(chunks):
        for chunk in chunks:
            if chunk.start == fails_at:
                raise KeyboardInterrupt
            made.append(chunk)
            yield {"squares": np.arange(chunk.start, chunk.stop) ** 2}

    return make


def test_an_npz_file_that_was_stopped_is_finished_from_its_parts(tmp_path):
    target, made = tmp_path / "squares.npz", []
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        write_npz(target, {"seed": 0}, 8, 3, squares(made, fails_at=6))
    assert names(tmp_path) == ["squares.npz.parts"]
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        write_npz(target, {"seed": 1}, 8, 3, squares(made))
    with pytest.raises(ValueError, match=r"num_images is 8 there and 9 here, batch_size is 3 there and 2 here; choose"):
        write_npz(target, {"seed": 0}, 9, 2, squares(made))
    assert write_npz(target, {"seed": 0}, 8, 3, squares(made), beside={"beta": 0.5}) == {"squares": (8,)}
    assert made == [range(3), range(3, 6), range(6, 8)] and names(tmp_path) == ["squares.npz"]
    assert {name: value.tolist() for name, value in files.read_arrays(target).items()} == {
        "squares": [0, 1, 4, 9, 16, 25, 36, 49],
        "beta": 0.5,
    }
