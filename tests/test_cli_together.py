"""Commands that several processes do together, as torchrun starts them: what one process does, bit for bit."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes, torchrun

from multibeta import files
from multibeta.kernels import cpp

pytest.importorskip("tyro")
from multibeta.cli import main
from multibeta.cli.commands import run

SAMPLE = ["--num-images", "5", "--batch-size", "2", "--steps", "3"]
PICTURES = [f"{index:06}.png" for index in range(5)]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The folder of a model that records its data."""
    folder = tmp_path_factory.mktemp("saved")
    model.info["recipe"] = {"data": {"source": "scenes"}}
    model.save_pretrained(folder)
    return str(folder)


def every_command(model, photos, out):
    """What each command returns that several processes can do, and what another says to them."""
    torch.set_num_threads(1)
    cpp.load()  # before all caches move
    os.environ["MULTIBETA_CACHE"] = str(out.parent / "cache")
    measure = ["--data", photos, "--num-images", "11", "--batch-size", "4", "--betas", "0.5", "--steps", "2"]
    commands = {
        "samples": ["sample", model, *SAMPLE],
        "samples.npz": ["sample", model, *SAMPLE],
        "samples.png": ["sample", model, *SAMPLE],
        "codes.npz": ["encode", model, "scenes", "--limit", "7", "--batch-size", "3"],
        "scores.json": ["evaluate", model, *measure],
    }
    return [main([*words, "--out", str(out / name)]) for name, words in commands.items()], refusal(["cache"])


def refusal(words):
    """What is said of a command that was refused; None where it ran."""
    try:
        run(words)
    except ValueError as error:
        return str(error)
    return None


def pixels(folder):
    """The pictures of a folder by number, (N, H, W, C)."""
    return np.stack([np.asarray(Image.open(folder / name)) for name in PICTURES])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_processes_make_what_one_makes(saved, photos, tmp_path, monkeypatch):
    threads, one, two = torch.get_num_threads(), tmp_path / "one", tmp_path / "two"
    with monkeypatch.context() as before:
        before.setenv("MULTIBETA_CACHE", os.environ["MULTIBETA_CACHE"])
        try:
            assert every_command(saved, str(photos), one) == ([0] * 5, None)
        finally:
            torch.set_num_threads(threads)
    refused = "cache is for one process, torchrun started 2; several can train, sample, encode, evaluate"
    assert in_processes(2, every_command, saved, str(photos), two, folder=tmp_path) == [([0] * 5, refused)] * 2
    assert names(one) == names(two) and names(one / "samples") == names(two / "samples") == [*PICTURES, "index.json"]
    for name in ("samples.png", "scores.json", *(f"samples/{name}" for name in (*PICTURES, "index.json"))):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("samples.npz", "codes.npz"):
        first, second = (files.read_arrays(side / name) for side in (one, two))
        assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
    assert np.array_equal(files.read_arrays(two / "samples.npz")["arr_0"], pixels(two / "samples"))


def test_torchrun_goes_on_with_a_folder_that_was_begun(saved, tmp_path, error_of):
    out, words = tmp_path / "samples", ["sample", saved, *SAMPLE, "--out"]
    assert main([*words, str(out)]) == 0
    before, kept = pixels(out), (out / "000003.png").stat().st_mtime_ns
    for name in ("000002.png", "000004.png"):
        (out / name).unlink()
    assert "seed is 0 there and 1 here" in error_of(*words, out, "--seed", "1")
    ended = torchrun(2, "-m", "multibeta", *words, out)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{out}: 5 images from noise\n"  # the first process speaks for both
    assert (out / "000003.png").stat().st_mtime_ns == kept
    assert np.abs(pixels(out).astype(int) - before).max() <= 1  # rounding: each process of torchrun has one thread
