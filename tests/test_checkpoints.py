import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from multibeta import checkpoints

# A save that dies at each of its changes to the file system in turn, in a process of its own; prints what is loaded afterwards.
DIE_EVERYWHERE = """
import os, shutil, sys, torch
from multibeta import checkpoints
folder, changes = sys.argv[1], "mkdir open rename replace link unlink rmdir".split()
for dies_at in range(1, 200):
    checkpoints.save_folder(folder, {"module": {"a": torch.zeros(1)}, "old": {"a": torch.zeros(1)}}, {"step": 1})
    child = os.fork()
    if child == 0:
        left = dies_at
        def counted(change):
            def dying(*args, **kwargs):
                global left
                left -= 1
                if not left:
                    os._exit(9)
                return change(*args, **kwargs)
            return dying
        for name in changes:
            setattr(os, name, counted(getattr(os, name)))
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}, "new": {"a": torch.ones(1)}}, {"step": 2})
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    weights, config = checkpoints.load_folder(folder)
    print(config["step"], *(f"{name}={state['a'].item():g}" for name, state in sorted(weights.items())))
    if not died:
        break
checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 3})
print(*sorted(os.listdir(folder)))
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


def test_a_config_is_replaced_beside_weights_that_stay(folder, tmp_path):
    before = (folder / "module.safetensors").stat()
    checkpoints.replace_config(folder, {"step": 2, "more": [1.5]})
    weights, config = checkpoints.load_folder(folder)
    assert config == {"step": 2, "more": [1.5]} and weights["module"]["a"].tolist() == [0]
    after = (folder / "module.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(ValueError, match="config must not hold files"):
        checkpoints.replace_config(folder, {"files": []})
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.replace_config(tmp_path / "nothing", {})
    assert sorted(os.listdir(tmp_path)) == ["model"] and step_of(folder) == 2


def test_a_config_is_replaced_in_a_save_that_was_interrupted(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_settle", lambda folder: None)
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    checkpoints.replace_config(folder, {"step": 3})
    weights, config = checkpoints.load_folder(folder)
    assert config == {"step": 3} and weights["module"]["a"].tolist() == [1]


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


def test_a_failing_rename_keeps_the_old_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(os, "rename", failing(errno.EIO))
    with pytest.raises(OSError, match="the checkpoint that was there is unchanged"):
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert sorted(os.listdir(folder)) == ["config.json", "module.safetensors"]
    assert step_of(folder) == 1


def test_a_file_that_cannot_be_replaced_leaves_the_new_checkpoint_to_be_loaded(folder, monkeypatch):
    monkeypatch.setattr(os, "replace", failing(errno.EBUSY))
    with pytest.raises(OSError, match="the new checkpoint is complete"):
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    monkeypatch.undo()
    assert step_of(folder) == 2
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 3})
    assert step_of(folder) == 3 and sorted(os.listdir(folder)) == ["config.json", "module.safetensors"]


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(folder):
    (folder / "README.md").write_text("mine")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-W", "ignore", "-c", DIE_EVERYWHERE, str(folder)]
    run = subprocess.run(script, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True, check=True)
    *loaded, left = run.stdout.splitlines()
    assert set(loaded) == {"1 module=0 old=0", "2 module=1 new=1"} and len(loaded) > 15
    assert left == "README.md config.json module.safetensors"


def test_an_interrupted_save_is_settled_without_another(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "_settle", lambda folder: None)  # never reached by the killed process
    checkpoints.save_folder(folder, {"new": {"a": torch.ones(1)}}, {"step": 2})
    monkeypatch.undo()
    (folder / ".lock").write_text("")
    (folder / ".saving-0123456789ab").mkdir()
    checkpoints.settle(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "new.safetensors"] and step_of(folder) == 2
    checkpoints.settle(folder)
    checkpoints.settle(folder / "nothing")
    assert not (folder / "nothing").exists()


def test_a_folder_that_cannot_be_renamed_is_saved_into(folder, monkeypatch):
    """A mount point, or a folder in a read-only one: its name is not ours to take."""
    rename = os.rename

    def mounted(source, target):
        if folder in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", mounted)
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert step_of(folder) == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions hold for no administrator")
def test_a_folder_in_a_read_only_one_is_saved_into(folder):
    folder.parent.chmod(0o500)
    try:
        checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    finally:
        folder.parent.chmod(0o700)
    assert step_of(folder) == 2


def test_a_file_system_without_links_holds_copies(folder, monkeypatch):
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    checkpoints.save_folder(folder, {"module": {"a": torch.ones(1)}}, {"step": 2})
    assert step_of(folder) == 2 and sorted(os.listdir(folder)) == ["config.json", "module.safetensors"]


def test_threads_that_save_into_one_folder_leave_one_of_theirs(folder):
    def save(step):
        checkpoints.save_folder(folder, {f"part{step}": {"a": torch.full((1000,), float(step))}}, {"step": step})
        weights, config = checkpoints.load_folder(folder)
        ((name, state),) = weights.items()
        assert name == f"part{config['step']}" and (state["a"] == config["step"]).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(2, 40)))
    assert sorted(os.listdir(folder)) == ["config.json", f"part{step_of(folder)}.safetensors"]


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


def test_a_file_that_is_replaced_just_before_it_is_opened_is_read_again(folder, monkeypatch):
    load_file, loads = checkpoints.load_file, []

    def gone_once(path):
        loads.append(path)
        if len(loads) == 1:
            checkpoints.save_folder(folder, {"other": {"a": torch.ones(1)}}, {"step": 2})
            assert not path.exists()
        return load_file(path)

    monkeypatch.setattr(checkpoints, "load_file", gone_once)
    weights, config = checkpoints.load_folder(folder)
    assert config["step"] == 2 and weights["other"]["a"] == 1


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


@pytest.mark.parametrize(
    "text",
    ["", '{"format": 1, "st', "[1]", "3", '"format"', "[" * 100_000]
    + [f'{{"format": 1, "files": {files}}}' for files in ("null", '"module"', "[1]", '["../module"]', '[""]')],
)
def test_a_damaged_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        checkpoints.load_folder(folder)


def test_what_a_damaged_config_names_is_not_removed(folder):
    kept = folder.parent / "mine.safetensors"
    kept.write_text("kept")
    config = json.loads((folder / "config.json").read_text())
    for files in (["../mine"], None, "mine", [["x"]]):
        (folder / "config.json").write_text(json.dumps(config | {"files": files}))
        checkpoints.save_folder(folder, {"module": {"x": torch.ones(1)}}, {})
        assert kept.read_text() == "kept" and checkpoints.load_folder(folder)[1] == {}


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


def test_the_current_folder_is_saved_into_and_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.save_folder(".", {}, {"step": 1})
    assert step_of(".") == 1
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


def test_what_was_computed_is_stored_until_its_key_changes(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(3.0) + len(calls)}

    first = checkpoints.stored(tmp_path / "place", {"count": (1, 2)}, compute)
    again = checkpoints.stored(tmp_path / "place", {"count": [1, 2]}, compute)
    assert len(calls) == 1 and torch.equal(first["a"], again["a"])
    other = checkpoints.stored(tmp_path / "place", {"count": [1, 3]}, compute)
    assert len(calls) == 2 and torch.equal(other["a"], torch.arange(3.0) + 2)


def test_a_digest_tells_names_values_types_and_shapes_apart():
    state = {"a": torch.arange(4.0), "b": torch.ones((), dtype=torch.bfloat16)}
    assert checkpoints.digest(state) == checkpoints.digest(dict(reversed(state.items())))
    others = [
        {**state, "a": state["a"].reshape(2, 2)},
        {**state, "a": torch.arange(4.0).nextafter(torch.ones(4))},
        {**state, "b": torch.ones(())},
        {"c": state["a"], "b": state["b"]},
    ]
    assert len({checkpoints.digest(each) for each in (state, *others)}) == 5


def test_a_file_that_reads_back_otherwise_is_no_checkpoint(tmp_path, monkeypatch):
    state = {"weight": torch.tensor([1.0, float("nan")]), "count": torch.tensor(3)}
    checkpoints.save_folder(tmp_path, {"module": state}, {"step": 1})
    save = checkpoints.save_file

    def failing(tensors, path):
        save({**tensors, "count": torch.tensor(4)}, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(OSError, match=r"module\.safetensors reads back otherwise.*the checkpoint that was there is unchanged"):
        checkpoints.save_folder(tmp_path, {"module": state}, {"step": 2})
    weights, config = checkpoints.load_folder(tmp_path)
    assert config["step"] == 1 and weights["module"]["count"] == 3
