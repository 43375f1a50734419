"""What all published datasets have in common."""

import multiprocessing
import operator
import os
import pickle
import zipfile
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch

from dataset_files import ALL, cut, noise, nothing_in, quiet, zipped
from multibeta.data import (
    FFHQ,
    KNOWS,
    LSUN,
    MPI3D,
    PUBLISHED,
    CelebA,
    CelebAHQ,
    DSprites,
    Subset,
    images,
    open_dataset,
    split,
)

pytestmark = pytest.mark.usefixtures("cache_home")


def test_every_published_dataset_is_covered():
    assert ALL.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", ALL)
def test_sources_are_opened_by_name_and_path(name, request):
    dataset = open_dataset(f"{name}:{request.getfixturevalue(ALL[name])}", 32, upscale=False)
    assert type(dataset) is PUBLISHED[name]
    assert dataset.images([1]).shape == (1, dataset.channels, 32, 32)
    with pytest.raises(ValueError, match="lie in"):
        dataset.images([len(dataset)])


@pytest.mark.parametrize("name", ALL)
def test_datasets_are_shown_in_a_line_and_keep_their_channels(name, request):
    path = request.getfixturevalue(ALL[name])
    dataset = open_dataset(f"{name}:{path}", 32)
    assert len(repr(dataset)) < 300 and f"{len(dataset)} images of 32 pixels" in repr(dataset)
    assert repr(dataset).startswith(f"{type(dataset).__name__}('{path.parent}")
    assert open_dataset(f"{name}:{path}", 32, channels=dataset.channels).channels == dataset.channels
    with pytest.raises(ValueError, match=rf"the source {name} has .*--vae.image-channels {dataset.channels}"):
        open_dataset(f"{name}:{path}", 32, channels=4 - dataset.channels)


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d", "dsprites", "cars3d", "celeba"])
def test_a_fifo_in_place_of_a_file_is_named(name, request):
    path = request.getfixturevalue(ALL[name])
    if name == "cars3d":
        path = path / "cars" / "car_001_mesh.mat"
    elif name == "celeba":
        path = path / "img_align_celeba" / "000001.jpg"
    path.unlink()
    os.mkfifo(path)
    root = request.getfixturevalue(ALL[name])
    with pytest.raises((OSError, ValueError), match=f"a FIFO, not a file: .*{path.name}"):
        open_dataset(f"{name}:{root}", 32)


@pytest.mark.parametrize("name", ALL)
def test_subsets_and_splits_take_every_dataset(name, request):
    dataset = open_dataset(f"{name}:{request.getfixturevalue(ALL[name])}", 32)
    train, test = split(dataset, 2, 1)
    assert torch.equal(test.images([0]), dataset.images(test.indices))
    for known, knows in KNOWS.items():
        assert knows(train) == knows(dataset)
        if knows(dataset):
            assert torch.equal(getattr(Subset(dataset, [2, 0]), known)([1, 0]), getattr(dataset, known)([0, 2]))


def test_subsets_beyond_the_memory_limit_read_when_asked(celeba_folder, monkeypatch):
    dataset = CelebA(celeba_folder, 32)
    expected = Subset(dataset, [4, 1, 2]).images([2, 0])
    monkeypatch.setattr(images, "MEMORY_LIMIT_BYTES", 3 * 3 * 32 * 32 - 1)
    streamed = Subset(dataset, [4, 1, 2])
    assert streamed._images is None
    assert torch.equal(streamed.images([2, 0]), expected)


@pytest.mark.parametrize("name", ALL)
def test_missing_paths_say_so(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no (file|folder) .*nowhere"):
        open_dataset(f"{name}:{tmp_path / 'nowhere'}", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=r"holds (no|0) .*|lacks"):
        open_dataset(f"{name}:{tmp_path / 'empty'}", 32)


def test_a_folder_with_a_colon_stays_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "celeba:mine").mkdir()
    for number in range(2):
        noise(20, 20).save(tmp_path / "celeba:mine" / f"{number}.png")
    assert len(open_dataset("./celeba:mine", 16, progress=False)) == 2


def test_a_file_in_place_of_a_folder_names_the_way(tmp_path):
    (tmp_path / "3dshapes.h5").touch()
    with pytest.raises(NotADirectoryError, match=r"NAME:PATH with a name of cars3d, shapes3d"):
        open_dataset(tmp_path / "3dshapes.h5", 64)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_parent_opened(method, mpi3d, dsprites, celeba_folder, celebahq, ffhq, lsun):
    zipped(celeba_folder / "img_align_celeba")
    datasets = [quiet(MPI3D, mpi3d), CelebA(celeba_folder, 32), CelebAHQ(celebahq, 32), FFHQ(ffhq, 32), quiet(LSUN, lsun, 32)]
    if method == "fork":
        datasets.append(quiet(DSprites, dsprites))
    expected = [dataset.images([1, 0]) for dataset in datasets]
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        found = list(pool.map(operator.methodcaller("images", [1, 0]), datasets))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(pickle.dumps(datasets)) < 20_000  # places in files, not images


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d", "dsprites", "celeba", "ffhq", "cars3d"])
def test_whatever_is_damaged_is_named(name, request):
    root = request.getfixturevalue(ALL[name])
    if name == "celeba":
        zipped(root / "img_align_celeba", zipfile.ZIP_DEFLATED)
    found = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file() and path.name != "list.txt"]
    random = np.random.default_rng(0)
    for number in range(40):
        path = found[number % len(found)]
        whole = path.read_bytes()
        content = bytearray(whole)
        if number % 3:
            start = random.integers(len(content) if number % 3 == 1 else min(len(content), 300))
            content[start : start + 20] = random.bytes(len(content[start : start + 20]))
        else:
            del content[random.integers(len(content)) :]
        path.write_bytes(content)
        try:
            dataset = open_dataset(f"{name}:{root}", 32)
            dataset.images(range(len(dataset)))
        except (ValueError, OSError) as error:
            assert path.name in str(error) or str(root) in str(error)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d", "dsprites"])
def test_truncated_archives_are_reported(name, request, cache_home):
    path = request.getfixturevalue(name)
    cut(path, 0.6)
    with pytest.raises(ValueError, match=r"(3dshapes|mpi3d_toy|dsprites).* is no readable .*truncated"):
        quiet(PUBLISHED[name], path)
    assert nothing_in(cache_home)
