"""Small files like those of published datasets, and folders of photos; fixtures and helpers of the tests of `multibeta.data`."""

import io
import os
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta.data import (
    MPI3D,
    Cars3D,
    DSprites,
    ImageFolder,
    Scenes,
    Shapes3D,
    decoding,
)


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_heif(monkeypatch):
    """What Pillow knows of formats, without readers of HEIC, to change for one test."""
    decoding.extensions()
    monkeypatch.setattr(Image, "EXTENSION", {name: kind for name, kind in Image.EXTENSION.items() if kind != "HEIF"})
    monkeypatch.setattr(Image, "OPEN", {kind: opener for kind, opener in Image.OPEN.items() if kind != "HEIF"})
    monkeypatch.setattr(Image, "ID", [*Image.ID])


def nothing_in(folder):
    return not folder.exists() or not list(folder.iterdir())


def age(folder):
    """Two hours pass for all files of a folder: what is younger may be in use by others."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)


@pytest.fixture(scope="module")
def scenes():
    return Scenes(32)


@pytest.fixture
def nested_photos(tmp_path):
    root = tmp_path / "photos"
    (root / "b" / "deep").mkdir(parents=True)
    save(root / "b" / "deep" / "1.png", (0, 0, 255))
    save(root / "b" / "2.JPG", (0, 255, 0))
    save(root / "a.png", (255, 0, 0))
    return root


def save(path, colour=(10, 20, 30), size=(48, 40), mode="RGB", **options):
    Image.new(mode, size, colour).save(path, **options)


def open_folder(root, resolution=16, **options):
    return ImageFolder(root, resolution, progress=False, **options)


def centre(dataset, index=0):
    side = dataset.resolution // 2
    return dataset.images([index])[0, :, side, side].tolist()


SHAPES3D_SIZES = (2, 3, 2, 2, 2, 3)


DSPRITES_SIZES = (1, 3, 2, 4, 2, 3)


MPI3D_SIZES = (2, 3, 2, 1, 2, 3, 4), (3, 3, 2, 1, 2, 3, 4)


def numbered(count, side=64):
    """Images that carry their index: its low byte in red, its high byte in green, a ramp in blue."""
    index = np.arange(count)[:, None, None]
    ramp = np.broadcast_to(np.arange(side, dtype=np.uint8), (count, side, side))
    low, high = (np.broadcast_to(part.astype(np.uint8), ramp.shape) for part in (index % 256, index // 256))
    return np.stack([low, high, ramp], axis=-1)


def numbers(images):
    return (images[:, 0, 0, 0].int() + 256 * images[:, 1, 0, 0].int()).tolist()


def combinations(sizes):
    return np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def planes(image):
    return torch.from_numpy(np.array(image).transpose(2, 0, 1))


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def quiet(kind, path, resolution=64, **options):
    return kind(path, resolution, progress=False, **options)


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def shapes3d(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(Shapes3D, "factor_sizes", SHAPES3D_SIZES)
    stored = numbered(np.prod(SHAPES3D_SIZES))
    path = tmp_path / "3dshapes.h5"
    with h5py.File(path, "w") as file:
        # Chunks as odd as the published ones: no image lies in one piece.
        file.create_dataset("images", data=stored, chunks=(50, 16, 16, 1), compression="gzip", compression_opts=1)
        file["labels"] = combinations(SHAPES3D_SIZES) * [0.1, 0.1, 0.1, 0.07, 1, 4.2857] + [0, 0, 0, 0.75, 0, -30]
    return path


@pytest.fixture
def dsprites(tmp_path, monkeypatch):
    monkeypatch.setattr(DSprites, "factor_sizes", DSPRITES_SIZES)
    count = np.prod(DSPRITES_SIZES)
    images = (np.arange(count)[:, None, None] >> np.arange(64) & 1).astype(np.uint8).repeat(64, 1)  # the index in binary
    path = tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    metadata = np.array(Payload(tmp_path / "unpickled"), dtype=object)
    np.savez_compressed(path, imgs=images, latents_classes=combinations(DSPRITES_SIZES), metadata=metadata)
    return path


@pytest.fixture
def mpi3d(tmp_path, monkeypatch):
    monkeypatch.setattr(MPI3D, "known_sizes", MPI3D_SIZES)
    path = tmp_path / "mpi3d_toy.npz"
    np.savez(path, images=numbered(np.prod(MPI3D_SIZES[0])))
    return path


@pytest.fixture
def cars3d(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    monkeypatch.setattr(Cars3D, "factor_sizes", (4, 24, 3))
    folder = tmp_path / "data" / "cars"
    folder.mkdir(parents=True)
    for car in (2, 0, 1):  # written out of order
        views = np.zeros((128, 128, 3, 24, 4), dtype=np.uint8)
        views[:, :, 0] = car
        views[:, :, 1] = 10 + np.arange(24)[:, None]
        views[:, :, 2] = 100 + np.arange(4)
        savemat(folder / f"car_{car:03}_mesh.mat", {"im": views}, do_compression=True)
    (folder / "list.txt").write_text("")
    return tmp_path / "data"


NAMES = ("5_o_Clock_Shadow", "Bald", "Young")


ATTRIBUTES = [[0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]]


def write_attributes(path, names, attributes=ATTRIBUTES):
    rows = [" ".join([name, *(" 1" if value else "-1" for value in row)]) for name, row in zip(names, attributes, strict=True)]
    path.write_text(f"{len(names)}\n{' '.join(NAMES)} \n" + "\n".join(rows) + "\n")


@pytest.fixture
def celeba_folder(tmp_path):
    root = tmp_path / "celeba"
    (root / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06}.jpg" for number in range(1, 6)]
    for number, name in enumerate(names):
        noise(178, 218, number).save(root / "img_align_celeba" / name, quality=95)
    write_attributes(root / "list_attr_celeba.txt", names)
    (root / "list_eval_partition.txt").write_text("".join(f"{name} {part}\n" for name, part in zip(names, "00120", strict=True)))
    return root


def zipped(folder, method=zipfile.ZIP_STORED):
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w", method) as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"{folder.name}/{path.name}")
            path.unlink()
    folder.rmdir()
    return target


@pytest.fixture
def celebamask(tmp_path):
    root = tmp_path / "CelebAMask-HQ"
    (root / "CelebA-HQ-img").mkdir(parents=True)
    names = [f"{number}.jpg" for number in (0, 1, 2, 10, 11)]
    for number, name in enumerate(names):
        noise(96, 96, number).save(root / "CelebA-HQ-img" / name, quality=95)
    write_attributes(root / "CelebAMask-HQ-attribute-anno.txt", names)
    return root


@pytest.fixture
def celebahq(tmp_path):
    root = tmp_path / "celebahq"
    root.mkdir()
    for number in range(3):
        np.save(root / f"imgHQ{number:05}.npy", np.array(noise(96, 96, number)).transpose(2, 0, 1)[None])
    return root


@pytest.fixture
def ffhq(tmp_path):
    for number in (1000, 0, 1):
        folder = tmp_path / "ffhq" / "images1024x1024" / f"{number // 1000 * 1000:05}"
        folder.mkdir(parents=True, exist_ok=True)
        noise(96, 96, number).save(folder / f"{number:05}.png")
    return tmp_path / "ffhq"


@pytest.fixture
def lsun(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    root = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(root), map_size=2**24) as database, database.begin(write=True) as transaction:
        for number in (2, 0, 1, 3):
            kind = "JPEG" if number == 3 else "WEBP"
            options = {"quality": 95} if number == 3 else {"lossless": True}
            transaction.put(b"%040x" % number, encoded(noise(90 + number, 64, number), kind, **options))
    return root


ALL = {
    "cars3d": "cars3d",
    "shapes3d": "shapes3d",
    "mpi3d": "mpi3d",
    "dsprites": "dsprites",
    "celeba": "celeba_folder",
    "celebahq": "celebahq",
    "celebamaskhq": "celebamask",
    "ffhq": "ffhq",
    "lsun": "lsun",
}
