import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from multibeta import checkpoints

DIE_BETWEEN_RENAMES = """
import os, signal, sys, torch
from multibeta import checkpoints
rename, calls = os.rename, []
def dying(*paths):
    if calls:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(paths)
    rename(*paths)
os.rename = dying
checkpoints.save_folder(sys.argv[1], {"module": {"a": torch.ones(1)}}, {"step": 2})
"""


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of step 1 with weights of zero."""
    checkpoints.save_folder(tmp_path / "model", {"module": {"a": torch.zeros(1)}}, {"step": 1})
    return tmp_path / "model"


def step_of(folder):
    return checkpoints.load_folder(folder)[1]["step"]


def test_a_folder_returns_what_was_saved(tmp_path):
    weights = {
        "module": {
            "permuted": torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 3),
            "part": torch.arange(10)[2:5],
        },
        "ema": {"a": torch.zeros(2)},
    }
    config = {"name": "β", "sizes": [1, 2], "rate": 1e-3, "none": None}
    checkpoints.save_folder(tmp_path / "runs" / "model", weights, config)
    loaded, loaded_config = checkpoints.load_folder(tmp_path / "runs" / "model")
    assert loaded_config == config
    assert {name: set(state) for name, state in loaded.items()} == {name: set(state) for name, state in weights.items()}
    for name, value in weights["module"].items():
        assert loaded["module"][name].dtype == value.dtype
        assert torch.equal(loaded["module"][name], value)


def test_saving_leaves_one_folder_that_others_may_read(folder):
    checkpoints.save_folder(folder, {"other": {"a": torch.ones(1)}}, {"step": 2})
    assert os.listdir(folder.parent) == ["model"]
    assert sorted(os.listdir(folder)) == ["config.json", "other.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_files_of_the_user_survive_a_save(folder):
    (folder / "README.md").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.txt").write_text("mine too")
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "figures" / "a.txt").read_text() == "mine too"
    assert step_of(folder) == 2


@pytest.mark.parametrize("message", ["No space left on device", None])
def test_a_full_disk_keeps_the_old_checkpoint(folder, monkeypatch, message):
    def full(state, path):
        Path(path).write_bytes(b"half")
        if message is None:  # as the safetensors library reports it
            raise checkpoints.SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, message)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"disk is full; the checkpoint that was there is unchanged") as caught:
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(folder.parent) == ["model"]
    assert step_of(folder) == 1


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_keeps_the_old_checkpoint(folder, monkeypatch, failing):
    rename, calls = os.rename, []

    def broken(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="busy"):
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert os.listdir(folder.parent) == ["model"]
    assert step_of(folder) == 1


def test_a_kill_between_the_renames_loses_nothing(folder):
    (folder / "README.md").write_text("mine")
    script = [sys.executable, "-c", DIE_BETWEEN_RENAMES, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run(script, cwd=Path(__file__).parent, env=environment).returncode == -9
    assert not folder.exists()
    assert checkpoints.exists(folder)
    assert step_of(folder) == 1
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 3})
    assert step_of(folder) == 3
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(folder.parent) == ["model"]


def test_a_kill_after_the_swap_keeps_the_files_of_the_user(folder, monkeypatch):
    (folder / "README.md").write_text("mine")
    monkeypatch.setattr(checkpoints, "_settle", lambda folder: None)  # never reached by the killed process
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    monkeypatch.undo()
    assert step_of(folder) == 2
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 3})
    assert (folder / "README.md").read_text() == "mine"
    assert os.listdir(folder.parent) == ["model"]


def test_a_folder_replaced_while_it_is_read_is_read_again(folder, monkeypatch):
    load_file, loads = checkpoints.load_file, []

    def replaced_once(path):
        loads.append(path)
        if len(loads) == 1:
            checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
        return load_file(path)

    monkeypatch.setattr(checkpoints, "load_file", replaced_once)
    weights, config = checkpoints.load_folder(folder)
    assert config["step"] == 2 and weights["module"]["a"] == 1


def test_a_missing_checkpoint_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"nothing holds no checkpoint: config\.json is missing"):
        checkpoints.load_folder(tmp_path / "nothing")
    (folder / "module.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"module\.safetensors is missing"):
        checkpoints.load_folder(folder)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])  # nothing, half the header length, within the header, the last byte
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "module.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"module\.safetensors is truncated or damaged .* copy it again"):
        checkpoints.load_folder(folder)


@pytest.mark.parametrize("text", ["", '{"format": 1, "st', "[1]"])
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoints.load_folder(folder)


def test_another_format_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version of multibeta reads format 1"):
        checkpoints.load_folder(folder)


def test_tied_weights_are_refused_by_name(tmp_path):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"'0\.weight' and '1\.weight' share memory"):
        checkpoints.save_folder(tmp_path / "model", {"module": nn.Sequential(first, second).state_dict()}, {})


@pytest.mark.parametrize(
    "weights, config, reason",
    [
        ({"module": {"a": 3}}, {}, "'a' is int, only tensors can be saved"),
        ({}, {"format": 3}, "config must not hold format"),
        ({}, {"a": {1, 2}}, "config cannot be written as JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_writing(tmp_path, weights, config, reason):
    with pytest.raises(ValueError, match=reason):
        checkpoints.save_folder(tmp_path / "model", weights, config)
    assert not list(tmp_path.iterdir())


def test_the_current_folder_and_a_file_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the current folder"):
        checkpoints.save_folder(".", {}, {})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        checkpoints.save_folder("file", {}, {})


def test_a_state_of_another_recipe_is_explained():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = {
        "0.weight": torch.zeros(3, 5),
        "0.bias": torch.zeros(3),
        **{f"extra.{i}": torch.zeros(1) for i in range(5)},
    }
    with pytest.raises(ValueError) as caught:
        checkpoints.load_state(module, state, "runs/a")
    assert str(caught.value) == (
        "runs/a is a checkpoint of another recipe; 2 missing: 1.weight, 1.bias; "
        "5 unexpected: extra.0, extra.1, extra.2 and 2 more; 1 of another shape: 0.weight (3, 5) instead of (3, 2)"
    )


def test_a_refused_state_changes_nothing():
    module = nn.Linear(2, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError):
        checkpoints.load_state(module, {"weight": torch.zeros(2, 2)}, "a")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_flatten_is_undone_by_unflatten():
    states = {"conv.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}, "a/b": {"step": torch.tensor(1.0)}}
    assert checkpoints.unflatten(checkpoints.flatten(states)) == states
