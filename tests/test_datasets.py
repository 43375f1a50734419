import io
import logging
import multiprocessing
import operator
import os
import pickle
import sys
import tarfile
import time
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta.files
from multibeta.data import (
    FFHQ,
    KNOWS,
    LSUN,
    MPI3D,
    PUBLISHED,
    Cars3D,
    CelebA,
    CelebAHQ,
    CelebAMaskHQ,
    DSprites,
    Shapes3D,
    Subset,
    arrays,
    celeba,
    files,
    images,
    knows_attributes,
    open_dataset,
    split,
)

h5py = pytest.importorskip("h5py")
lmdb = pytest.importorskip("lmdb")
savemat = pytest.importorskip("scipy.io").savemat

SHAPES3D_SIZES = (2, 3, 2, 2, 2, 3)
DSPRITES_SIZES = (1, 3, 2, 4, 2, 3)
MPI3D_SIZES = (2, 3, 2, 1, 2, 3, 4), (3, 3, 2, 1, 2, 3, 4)


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nothing_in(folder):
    return not folder.exists() or not list(folder.iterdir())


def age(folder):
    """Two hours pass for all files of a folder: what is younger may be in use by others."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)


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
    root = tmp_path / "bedroom_train_lmdb"
    with lmdb.open(str(root), map_size=2**24) as database, database.begin(write=True) as transaction:
        for number in (2, 0, 1, 3):
            kind = "JPEG" if number == 3 else "WEBP"
            options = {"quality": 95} if number == 3 else {"lossless": True}
            transaction.put(b"%040x" % number, encoded(noise(90 + number, 64, number), kind, **options))
    return root


# --- factors ---


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        (Cars3D, (4, 24, 183)),
        (Shapes3D, (10, 10, 10, 8, 4, 15)),
        (DSprites, (1, 3, 6, 40, 32, 32)),
    ],
)
def test_factor_sizes_are_the_published_ones(kind, sizes):
    assert kind.factor_sizes == sizes
    assert len(kind.factor_names) == len(sizes)


def test_the_number_of_images_says_which_mpi3d(mpi3d, tmp_path):
    assert [np.prod(sizes) for sizes in PUBLISHED["mpi3d"].known_sizes] == [72 * 4, 108 * 4]
    assert quiet(MPI3D, mpi3d).factor_sizes == MPI3D_SIZES[0]
    np.savez(tmp_path / "other.npz", images=numbered(np.prod(MPI3D_SIZES[1])))
    assert quiet(MPI3D, tmp_path / "other.npz").factor_sizes == MPI3D_SIZES[1]


def test_mpi3d_has_the_published_sizes():
    assert [np.prod(sizes) for sizes in MPI3D.known_sizes] == [1_036_800, 460_800]


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d", "dsprites", "cars3d"])
def test_indices_and_factors_are_a_bijection(name, request):
    dataset = quiet(PUBLISHED[name], request.getfixturevalue(name))
    factors = dataset.factors(range(len(dataset)))
    assert factors.dtype == torch.int64
    assert factors.amax(0).add(1).tolist() == list(dataset.factor_sizes)
    assert len(factors.unique(dim=0)) == len(dataset)
    assert dataset.indices(factors).tolist() == list(range(len(dataset)))
    assert dataset.factors([0, 1])[:, -1].tolist() == [0, 1]  # the last varies fastest


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d"])
def test_rows_are_the_stored_images(name, request):
    dataset = quiet(PUBLISHED[name], request.getfixturevalue(name))
    chosen = [7, 3, len(dataset) - 1, 3]
    images = dataset.images(chosen)
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 64, 64)
    assert numbers(images) == chosen
    assert images[0, 2, 5].tolist() == list(range(64))  # blue counts the columns


def test_cars_follow_elevation_azimuth_object(cars3d):
    dataset = quiet(Cars3D, cars3d)
    elevation, azimuth, car = dataset.factors(range(len(dataset))).T
    red, green, blue = dataset.images(range(len(dataset)))[:, :, 32, 32].int().T
    assert torch.equal(red, car.int())
    assert torch.equal(green, 10 + azimuth.int())
    assert torch.equal(blue, 100 + elevation.int())


def test_cars_shrink_as_pillow_thumbnails_do(cars3d):
    picture = noise(128, 128)
    views = np.zeros((128, 128, 3, 24, 4), dtype=np.uint8)
    views[..., 0, 0] = picture
    savemat(cars3d / "cars" / "car_000_mesh.mat", {"im": views})
    picture.thumbnail((64, 64), Image.Resampling.LANCZOS)
    assert torch.equal(quiet(Cars3D, cars3d).images([0])[0], planes(picture))
    assert torch.equal(quiet(Cars3D, cars3d / "cars", 128).images([0])[0], planes(noise(128, 128)))


def test_sprites_are_black_and_white(dsprites):
    dataset = quiet(DSprites, dsprites)
    images = dataset.images([0, 5, 143])
    assert images.shape == (3, 1, 64, 64)
    assert (images[:, 0, 0, :8] // 255 << torch.arange(8)).sum(1).tolist() == [0, 5, 143]
    assert set(images.unique().tolist()) == {0, 255}


@pytest.mark.parametrize("name", ["shapes3d", "mpi3d", "dsprites"])
def test_other_resolutions_are_scaled(name, request):
    path = request.getfixturevalue(name)
    small, whole = quiet(PUBLISHED[name], path, 16), quiet(PUBLISHED[name], path)
    image = Image.fromarray(whole.images([77])[0].permute(1, 2, 0).squeeze(-1).numpy()).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(small.images([77])[0].permute(1, 2, 0).squeeze(-1), image)
    assert small.images([]).shape == (0, small.channels, 16, 16)
    with pytest.raises(ValueError, match="up to 64, got 128, or allow upscale"):
        quiet(PUBLISHED[name], path, 128)
    assert quiet(PUBLISHED[name], path, 128, upscale=True).images([0]).shape[-1] == 128


def test_uncompressed_arrays_are_read_in_place(mpi3d, cache_home, tmp_path):
    quiet(MPI3D, mpi3d).images([0])
    assert nothing_in(cache_home)
    np.savez_compressed(tmp_path / "packed.npz", images=numbered(np.prod(MPI3D_SIZES[0])))
    assert numbers(quiet(MPI3D, tmp_path / "packed.npz").images([200, 13])) == [200, 13]
    assert len(list(cache_home.iterdir())) == 1


def test_contiguous_hdf5_is_read_in_place(shapes3d, cache_home):
    with h5py.File(shapes3d, "r+") as file:
        images = file["images"][...]
        del file["images"]
        file["images"] = images
    assert numbers(quiet(Shapes3D, shapes3d).images([143, 13])) == [143, 13]
    assert nothing_in(cache_home)


def test_arrays_are_unpacked_once(shapes3d, cache_home, monkeypatch):
    quiet(Shapes3D, shapes3d)
    monkeypatch.setattr(arrays, "write_atomically", None)
    quiet(Shapes3D, shapes3d.parent, 32)  # another resolution, named by its folder
    monkeypatch.undo()
    monkeypatch.setenv("MULTIBETA_CACHE", str(cache_home))
    age(cache_home)
    monkeypatch.setattr(Shapes3D, "factor_sizes", SHAPES3D_SIZES)
    os.utime(shapes3d, ns=(0, 0))
    quiet(Shapes3D, shapes3d)
    assert len(list(cache_home.iterdir())) == 1  # the older one is gone


def test_a_cut_cache_is_unpacked_again(shapes3d, cache_home):
    quiet(Shapes3D, shapes3d)
    cut(next(cache_home.iterdir()))
    assert numbers(quiet(Shapes3D, shapes3d).images([143])) == [143]


def test_sprites_are_read_from_hdf5(dsprites, tmp_path):
    expected = quiet(DSprites, dsprites).images(range(144))
    with np.load(dsprites) as stored, h5py.File(dsprites.with_suffix(".hdf5"), "w") as file:
        file.create_dataset("imgs", data=stored["imgs"], chunks=(20, 16, 16), compression="gzip")
        file["latents/classes"] = stored["latents_classes"]
    dsprites.unlink()
    for path in (dsprites.with_suffix(".hdf5"), tmp_path):
        assert torch.equal(quiet(DSprites, path).images(range(144)), expected)
    with h5py.File(tmp_path / "other.h5", "w") as other, h5py.File(dsprites.with_suffix(".hdf5"), "r+") as file:
        other["latents/classes"] = file["latents/classes"][...]
        del file["latents"]
        file["latents"] = h5py.ExternalLink("other.h5", "latents")
    with pytest.raises(ValueError, match='holds no array "latents/classes"'):
        quiet(DSprites, dsprites.with_suffix(".hdf5"))


def test_a_folder_with_several_files_asks_which(mpi3d, tmp_path):
    (tmp_path / "deep").mkdir()
    moved = mpi3d.rename(tmp_path / "deep" / "mpi3d_real.npz")
    assert len(quiet(MPI3D, tmp_path)) == 288
    (tmp_path / "deep" / "mpi3d_toy.npz").write_bytes(moved.read_bytes())
    with pytest.raises(ValueError, match=r"holds deep/mpi3d_real.npz, deep/mpi3d_toy.npz: name one of them"):
        quiet(MPI3D, tmp_path)


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_cars_are_read_from_their_archive(cars3d, tmp_path, mode):
    expected = quiet(Cars3D, cars3d).images(range(288))
    archive = tmp_path / "nips2015-analogy-data.tar.gz"
    with tarfile.open(archive, mode) as members:
        for name in ("car_002_mesh.mat", "car_000_mesh.mat", "car_001_mesh.mat", "list.txt"):
            members.add(cars3d / "cars" / name, f"data/cars/{name}")
        members.add(cars3d / "cars" / "car_000_mesh.mat", "data/sprites/sprites_000.mat")
    for path in (cars3d / "cars").iterdir():
        path.unlink()
    (cars3d / "cars").rmdir()
    for path in (archive, tmp_path):
        assert torch.equal(quiet(Cars3D, path).images(range(288)), expected)
    cut(archive, 0.7)
    with pytest.raises(ValueError, match=r"nips2015-analogy-data.tar.gz.*(truncated|cannot be read)"):
        quiet(Cars3D, archive)


def test_without_a_folder_for_caches_arrays_are_kept_in_memory(cars3d, cache_home, monkeypatch, caplog):
    expected = quiet(Cars3D, cars3d).images([5, 100])
    monkeypatch.delenv("MULTIBETA_CACHE")
    monkeypatch.setattr(multibeta.caches, "cache_folders", lambda cache=None: [cars3d / "cars" / "list.txt" / "cache"])
    assert torch.equal(quiet(Cars3D, cars3d).images([5, 100]), expected)
    assert "of memory: no folder for caches" in caplog.text
    monkeypatch.setattr(arrays, "MEMORY_LIMIT_BYTES", 1000)
    with pytest.raises(OSError, match=r"cannot unpack .*no folder for caches"):
        quiet(Cars3D, cars3d)


def test_the_log_says_where_an_array_is_unpacked(shapes3d, cache_home, caplog):
    caplog.set_level(logging.INFO)
    quiet(Shapes3D, shapes3d)
    assert f"unpacking images of {shapes3d} to a cache of 1.7 MiB in {cache_home}" in caplog.text


def test_images_of_memory_maps_are_copies(mpi3d):
    dataset = quiet(MPI3D, mpi3d)
    dataset.images([5]).fill_(0)
    assert numbers(dataset.images([5])) == [5]


# --- faces ---


def test_d2c_keeps_the_middle_of_the_face(celeba_folder):
    image = Image.new("RGB", (178, 218), "black")
    image.paste("white", (25, 57, 153, 185))
    image.save(celeba_folder / "img_align_celeba" / "000001.jpg", quality=100)
    assert CelebA(celeba_folder, 64).images([0]).min() > 240
    assert CelebA(celeba_folder, 64, crop="squash").images([0]).min() < 10
    image.paste("black", (25, 57, 153, 58))  # one row inside
    assert np.asarray(celeba.crop_face(image, 128, "d2c"))[0].max() == 0
    assert np.asarray(celeba.crop_face(image, 128, "d2c"))[1:].min() == 255


def test_nashae_scales_to_three_halves_and_cuts_the_centre():
    image = noise(178, 218)
    expected = image.resize((96, 117), Image.Resampling.BILINEAR).crop((16, 26, 80, 90))
    assert np.array_equal(celeba.crop_face(image, 64, "nashae"), expected)


def test_squash_shows_the_whole_image():
    image = noise(178, 218)
    assert np.array_equal(celeba.crop_face(image, 64, "squash"), image.resize((64, 64), Image.Resampling.BILINEAR))


def test_celeba_attributes_belong_to_their_images(celeba_folder):
    dataset = CelebA(celeba_folder, 64)
    assert dataset.attribute_names == NAMES
    assert dataset.paths == [f"{number:06}.jpg" for number in range(1, 6)]
    assert dataset.attributes([3, 0]).dtype == torch.bool
    assert dataset.attributes(range(5)).int().tolist() == ATTRIBUTES
    with Image.open(celeba_folder / "img_align_celeba" / "000004.jpg") as image:
        assert torch.equal(dataset.images([3])[0], planes(celeba.crop_face(image, 64, "d2c")))


def test_celeba_parts_follow_the_partition(celeba_folder):
    whole = CelebA(celeba_folder, 64)
    for part, chosen in (("train", [0, 1, 4]), ("valid", [2]), ("test", [3])):
        dataset = CelebA(celeba_folder, 64, part=part)
        assert torch.equal(dataset.images(range(len(dataset))), whole.images(chosen))
        assert torch.equal(dataset.attributes(range(len(dataset))), whole.attributes(chosen))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_celeba_is_read_from_its_archive(celeba_folder, method):
    expected = CelebA(celeba_folder, 64).images(range(5))
    zipped(celeba_folder / "img_align_celeba", method)
    assert torch.equal(CelebA(celeba_folder.parent, 64).images(range(5)), expected)  # also by the folder above


def test_celeba_is_found_in_the_published_folders(celeba_folder):
    for folder, name in (("Anno", "list_attr_celeba.txt"), ("Eval", "list_eval_partition.txt"), ("Img", "img_align_celeba")):
        (celeba_folder / folder).mkdir()
        (celeba_folder / name).rename(celeba_folder / folder / name)
    assert len(CelebA(celeba_folder, 64, part="train")) == 3


def write_csv(path, heading, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [heading, *rows]))


@pytest.mark.parametrize("no", [-1, 0])
def test_celeba_is_read_as_kaggle_has_it(celeba_folder, no):
    expected = CelebA(celeba_folder, 32).images(range(5))
    names = [f"{number:06}.jpg" for number in range(1, 6)]
    rows = [[name, *(1 if value else no for value in row)] for name, row in zip(names, ATTRIBUTES, strict=True)]
    write_csv(celeba_folder / "list_attr_celeba.csv", ["image_id", *NAMES], rows)
    write_csv(celeba_folder / "list_eval_partition.csv", ["image_id", "partition"], zip(names, "00120", strict=True))
    for name in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        (celeba_folder / name).unlink()
    folder = celeba_folder / "img_align_celeba"
    folder.rename(celeba_folder / "inner")
    folder.mkdir()
    (celeba_folder / "inner").rename(folder / "img_align_celeba")
    dataset = CelebA(celeba_folder, 32)
    assert dataset.attribute_names == NAMES
    assert dataset.attributes(range(5)).int().tolist() == ATTRIBUTES
    assert torch.equal(dataset.images(range(5)), expected)
    assert torch.equal(CelebA(celeba_folder, 32, part="test").images([0]), expected[3:4])
    (celeba_folder / "list_attr_celeba.csv").write_text("image_id,Bald\n000001.jpg,2\n")
    with pytest.raises(ValueError, match=r"list_attr_celeba.csv holds attributes other than -1 and 1 for 000001.jpg"):
        CelebA(celeba_folder, 32)
    (celeba_folder / "list_attr_celeba.csv").write_text("image_id,Bald\n000001.jpg,1\n000002.jpg")
    with pytest.raises(ValueError, match=r"list_attr_celeba.csv is truncated or damaged: 1 images, 2 are announced"):
        CelebA(celeba_folder, 32)


def test_celeba_without_loss_and_in_any_archive(celeba_folder):
    folder = celeba_folder / "img_align_celeba"
    expected = CelebA(celeba_folder, 32).images(range(5))
    for path in list(folder.iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(".png"))
        path.unlink()
    folder = folder.rename(celeba_folder / "img_align_celeba_png")
    assert torch.equal(CelebA(celeba_folder, 32).images(range(5)), expected)
    with zipfile.ZipFile(celeba_folder / "img_align_celeba.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"img_align_celeba/img_align_celeba/{path.name}")
            path.unlink()
    folder.rmdir()
    assert torch.equal(CelebA(celeba_folder, 32).images(range(5)), expected)


def test_celeba_without_its_lists_says_what_is_there(celeba_folder):
    (celeba_folder / "list_attr_celeba.txt").rename(celeba_folder / "attributes.txt")
    known = (
        "holds no list_attr_celeba.txt or list_attr_celeba.csv, found attributes.txt, img_align_celeba, list_eval_partition.txt"
    )
    with pytest.raises(FileNotFoundError, match=known):
        CelebA(celeba_folder, 32)
    (celeba_folder / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"list_attr_celeba.txt is no text"):
        CelebA(celeba_folder, 32)


@pytest.mark.parametrize(("option", "value"), [("part", "dev"), ("crop", "centre")])
def test_unknown_parts_and_crops_are_refused(celeba_folder, option, value):
    with pytest.raises(ValueError, match=f"{option} must be one of .* got '{value}'"):
        CelebA(celeba_folder, 64, **{option: value})


def test_celebamask_follows_the_numbers(celebamask):
    dataset = CelebAMaskHQ(celebamask, 32)
    assert dataset.paths == ["0.jpg", "1.jpg", "2.jpg", "10.jpg", "11.jpg"]
    assert dataset.attributes(range(5)).int().tolist() == ATTRIBUTES
    with Image.open(celebamask / "CelebA-HQ-img" / "10.jpg") as image:
        assert torch.equal(dataset.images([3])[0], planes(image.resize((32, 32), Image.Resampling.BILINEAR)))


def test_celebahq_arrays_are_shrunk_without_antialiasing(celebahq):
    dataset = CelebAHQ(celebahq, 24)
    assert dataset.paths == ["imgHQ00000.npy", "imgHQ00001.npy", "imgHQ00002.npy"]
    assert not knows_attributes(dataset)
    pixels = planes(noise(96, 96, 1)).float()
    # A quarter of the size: the samples lie between the second and third of every four pixels.
    expected = sum(pixels[:, row::4, column::4] for row in (1, 2) for column in (1, 2)) / 4
    assert (dataset.images([1])[0] - expected).abs().max() <= 0.5
    smooth = CelebAHQ(celebahq, 24, antialias=True).images([1])[0]
    assert torch.equal(smooth, planes(noise(96, 96, 1).resize((24, 24), Image.Resampling.BILINEAR)))
    assert torch.equal(CelebAHQ(celebahq, 96).images([1])[0], planes(noise(96, 96, 1)))


@pytest.mark.parametrize("shape, resolution", [((96, 96), 24), ((100, 80), 33), ((37, 37), 64), ((1, 5), 5)])
def test_shrinking_without_antialiasing_is_bilinear_interpolation(shape, resolution):
    pixels = np.asarray(noise(*shape[::-1], 1))
    exact = torch.nn.functional.interpolate(
        planes(pixels)[None].double(), (resolution, resolution), mode="bilinear", align_corners=False
    )
    found = planes(files.resize_without_antialiasing(pixels, resolution))
    assert (found - exact[0]).abs().max() <= 0.5 + 1e-4


def test_celebahq_folders_say_who_is_male(tmp_path):
    for number, name in enumerate(("train/female/000001.png", "train/male/000002.png", "val/male/000003.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(48, 48, number).save(tmp_path / name)
    dataset = CelebAHQ(tmp_path, 16)
    assert dataset.attribute_names == ("Male",)
    assert dataset.attributes([0, 1, 2]).tolist() == [[False], [True], [True]]
    assert torch.equal(dataset.images([1])[0], planes(noise(48, 48, 1).resize((16, 16), Image.Resampling.BILINEAR)))
    assert len(CelebAHQ(tmp_path / "val", 16)) == 1


def test_ffhq_follows_the_numbers_below_its_folders(ffhq):
    dataset = FFHQ(ffhq, 24)
    assert dataset.paths == ["00000/00000.png", "00000/00001.png", "01000/01000.png"]
    assert torch.equal(dataset.images([2])[0], planes(files.resize_without_antialiasing(noise(96, 96, 1000), 24)))
    assert torch.equal(FFHQ(ffhq / "images1024x1024", 96).images([1])[0], planes(noise(96, 96, 1)))


def test_listings_choose_and_order(ffhq, celebahq, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text("01000.png\n00000/00000.png\n")
    assert FFHQ(ffhq, 24, listing=listing).paths == ["01000/01000.png", "00000/00000.png"]
    listing.write_text("imgHQ00002.npy\n")
    assert CelebAHQ(celebahq, 24, listing=listing).paths == ["imgHQ00002.npy"]
    listing.write_text("imgHQ00002.npy\nimgHQ00009.npy\n")
    with pytest.raises(ValueError, match=r"lists 2 files, 1 of them are missing, e.g. imgHQ00009.npy"):
        CelebAHQ(celebahq, 24, listing=listing)


def test_faces_are_read_from_one_archive(ffhq, tmp_path):
    expected = FFHQ(ffhq, 24).images(range(3))
    archive = tmp_path / "zipped" / "images1024x1024.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as members:
        for path in sorted(ffhq.rglob("*.png")):
            members.write(path, path.relative_to(ffhq).as_posix())
        members.writestr("__MACOSX/images1024x1024/._00000.png", "resource fork")
    for path in (archive, archive.parent):
        assert torch.equal(FFHQ(path, 24).images(range(3)), expected)
        assert torch.equal(CelebAHQ(path, 24, antialias=False).images(range(3)), expected)


def test_smaller_copies_of_ffhq_may_be_flat_and_of_other_formats(tmp_path):
    for number in (10, 9, 100):
        noise(48, 48, number).save(tmp_path / f"{number:05}.webp", lossless=True)
    dataset = FFHQ(tmp_path, 48)
    assert dataset.paths == ["00009.webp", "00010.webp", "00100.webp"]
    assert torch.equal(dataset.images([1])[0], planes(noise(48, 48, 10)))


# --- scenes of LSUN ---


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


# --- all of them ---

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


# --- files that are not what they seem ---


def test_pickled_metadata_is_never_loaded(dsprites, tmp_path):
    quiet(DSprites, dsprites).images([0])
    assert not (tmp_path / "unpickled").exists()
    with np.load(dsprites, allow_pickle=True) as stored:  # the payload works, when it is let
        stored["metadata"]
    assert (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("name", ["imgs", "latents_classes"])
def test_pickled_arrays_are_refused(dsprites, tmp_path, name):
    with np.load(dsprites, allow_pickle=False) as stored:
        members = {key: stored[key] for key in ("imgs", "latents_classes")}
    members[name] = np.array([Payload(tmp_path / "unpickled")] * len(members[name]), dtype=object)
    np.savez(dsprites, **members)
    with pytest.raises(ValueError, match=f"{name} in .* holds pickled Python objects"):
        quiet(DSprites, dsprites)
    assert not (tmp_path / "unpickled").exists()


def test_pickled_celebahq_is_refused(celebahq, tmp_path):
    first = celebahq / "imgHQ00000.npy"
    np.save(first, np.array([Payload(tmp_path / "unpickled")], dtype=object))
    with pytest.raises(ValueError, match="pickled Python objects"):
        CelebAHQ(celebahq, 32)
    first.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(ValueError, match="no readable array"):
        CelebAHQ(celebahq, 32)
    assert not (tmp_path / "unpickled").exists()


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


def test_damaged_streams_leave_no_cache(dsprites, shapes3d, cache_home):
    for path, kind in ((dsprites, DSprites), (shapes3d, Shapes3D)):
        content = bytearray(path.read_bytes())
        start = len(content) // 3
        content[start : start + 200] = bytes(200)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            quiet(kind, path)
    assert nothing_in(cache_home)


def test_truncated_meshes_are_reported(cars3d, cache_home):
    cut(cars3d / "cars" / "car_001_mesh.mat")
    with pytest.raises(ValueError, match=r"car_001_mesh.mat cannot be read"):
        quiet(Cars3D, cars3d)
    assert nothing_in(cache_home)
    savemat(cars3d / "cars" / "car_001_mesh.mat", {"im": np.zeros((2, 2)), "other": 1})
    with pytest.raises(ValueError, match=r"'im': \(\(2, 2\), 'double'\).* is expected"):
        quiet(Cars3D, cars3d)
    (cars3d / "cars" / "car_001_mesh.mat").unlink()
    with pytest.raises(ValueError, match=r"holds 2 .mat files, 3 are expected"):
        quiet(Cars3D, cars3d)


def test_arrays_of_another_shape_are_refused_before_they_are_read(tmp_path, mpi3d, dsprites, cache_home):
    with zipfile.ZipFile(mpi3d, "w", zipfile.ZIP_DEFLATED) as archive:  # a small file that would expand to 100 MB
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**8,)})
        archive.writestr("images.npy", header.getvalue() + bytes(10**8), compresslevel=1)
    with pytest.raises(ValueError, match=r"is uint8 \(100000000,\), uint8 \(288, 64, 64, 3\) or \(432, 64, 64, 3\) is expected"):
        quiet(MPI3D, mpi3d)
    np.savez(dsprites, imgs=np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(ValueError, match='holds no array "latents_classes", found imgs'):
        quiet(DSprites, dsprites)
    assert nothing_in(cache_home)


def test_members_longer_than_their_header_are_refused(mpi3d):
    images = numbered(np.prod(MPI3D_SIZES[0]))
    buffer = io.BytesIO()
    np.save(buffer, images)
    with zipfile.ZipFile(mpi3d, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue() + b"more")
    with pytest.raises(ValueError, match="is damaged"):
        quiet(MPI3D, mpi3d)


def test_labels_in_another_order_are_refused(shapes3d, dsprites):
    with h5py.File(shapes3d, "r+") as file:
        file["labels"][...] = file["labels"][...][::-1][:, ::-1]
    with pytest.raises(ValueError, match="labels of floor_hue are not in the published order"):
        quiet(Shapes3D, shapes3d)
    with np.load(dsprites) as stored:
        images, classes = stored["imgs"], stored["latents_classes"]
    np.savez(dsprites, imgs=images, latents_classes=np.random.default_rng(0).permutation(classes))
    with pytest.raises(ValueError, match="not in the published order"):
        quiet(DSprites, dsprites)


def test_hdf5_links_to_other_files_are_refused(shapes3d, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other, h5py.File(shapes3d, "r+") as file:
        other["images"] = file["images"][...]
        del file["images"]
        file["images"] = h5py.ExternalLink("other.h5", "images")
    with pytest.raises(ValueError, match='holds no array "images"'):
        quiet(Shapes3D, shapes3d)


def test_sprites_with_other_values_are_refused(dsprites):
    np.savez(dsprites, imgs=np.full((144, 64, 64), 7, np.uint8), latents_classes=combinations(DSPRITES_SIZES))
    with pytest.raises(ValueError, match="values up to 7, 0 and 1 are expected"):
        quiet(DSprites, dsprites).images([0])


def test_celeba_lists_that_do_not_fit_are_reported(celeba_folder):
    listing = celeba_folder / "list_attr_celeba.txt"
    whole = listing.read_text()
    listing.write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"truncated or damaged: .* images, 5 are announced"):
        CelebA(celeba_folder, 64)
    listing.write_text(whole.replace("-1", "-2", 1))
    with pytest.raises(ValueError, match="attributes other than -1 and 1"):
        CelebA(celeba_folder, 64)
    listing.write_text("image_id,5_o_Clock_Shadow\n000001.jpg,-1\n")
    with pytest.raises(ValueError, match="does not begin with the number of images"):
        CelebA(celeba_folder, 64)
    listing.write_text(whole)
    cut(celeba_folder / "list_eval_partition.txt")
    with pytest.raises(ValueError, match="does not give a part"):
        CelebA(celeba_folder, 64, part="train")
    (celeba_folder / "img_align_celeba" / "000003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 5 images, e.g. 000003.jpg"):
        CelebA(celeba_folder, 64)


def test_broken_faces_are_named(celeba_folder, monkeypatch):
    path = celeba_folder / "img_align_celeba" / "000003.jpg"
    cut(path)
    dataset = CelebA(celeba_folder, 64)
    with pytest.raises(ValueError, match=r"img_align_celeba: 000003.jpg: .*truncated"):
        dataset.images([1, 2])
    noise(100, 100).save(path)
    with pytest.raises(ValueError, match=r"000003.jpg: 100 x 100 pixels, 178 x 218 are expected"):
        dataset.images([2])
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than"):
        dataset.images([2])


def test_damaged_archives_of_faces_are_named(celeba_folder):
    archive = zipped(celeba_folder / "img_align_celeba")
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as members:
        place = members.getinfo("img_align_celeba/000002.jpg").header_offset + 3000
    content[place] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"000002.jpg: .*is damaged here"):
        CelebA(celeba_folder, 64).images([1])
    cut(archive, 0.9)
    with pytest.raises(ValueError, match="no readable zip archive, or truncated"):
        CelebA(celeba_folder, 64)
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("img_align_celeba/000001.jpg", "")
    with pytest.raises(ValueError, match=r"holds 1 members, but not img_align_celeba/000002.jpg"):
        CelebA(celeba_folder, 64)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bombs_are_refused_before_they_are_decoded(ffhq):
    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    for side in (9_000, 60_000):  # beyond ours, beyond Pillow's
        header = chunk(b"IHDR", 2 * side.to_bytes(4, "big") + b"\x08\x02\0\0\0")
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
        (ffhq / "images1024x1024" / "00000" / "00000.png").write_bytes(bomb)
        with pytest.raises(ValueError, match=r"00000.png: .*(pixels are more than|exceeds limit)"):
            FFHQ(ffhq, 32)


def test_faces_that_are_no_squares_or_too_small_are_refused(ffhq):
    path = ffhq / "images1024x1024" / "00000" / "00000.png"
    with pytest.raises(ValueError, match=r"96 x 96 pixels are too few for resolution 128 without upscale"):
        FFHQ(ffhq, 128)
    assert FFHQ(ffhq, 128, upscale=True).images([0]).shape[-1] == 128
    noise(96, 90).save(path)
    with pytest.raises(ValueError, match="96 x 90 pixels, a square is expected"):
        FFHQ(ffhq, 32)
    path.rename(path.with_name("me.png"))
    with pytest.raises(ValueError, match=r"holds images such as .*; each of the numbers"):
        FFHQ(ffhq, 32)


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


def test_empty_and_foreign_lmdbs_are_reported(tmp_path):
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database:
        pass
    with pytest.raises(ValueError, match="holds no images"):
        quiet(LSUN, tmp_path / "lmdb")
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**20) as database, database.begin(write=True) as transaction:
        transaction.put(b"length", b"70000")
    with pytest.raises(ValueError, match=r"length.*cannot identify image"):
        quiet(LSUN, tmp_path / "lmdb")


@pytest.mark.parametrize(("name", "package"), [("shapes3d", "h5py"), ("cars3d", "scipy.io"), ("lsun", "lmdb")])
def test_missing_packages_name_the_extra(name, package, request, monkeypatch):
    path = request.getfixturevalue(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'multibeta\[data\]'"):
        quiet(PUBLISHED[name], path)
