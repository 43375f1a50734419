"""Published factor grids in .npz, HDF5 and .mat files."""

import io
import logging
import os
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import multibeta.files
from dataset_files import (
    DSPRITES_SIZES,
    MPI3D_SIZES,
    SHAPES3D_SIZES,
    Payload,
    age,
    combinations,
    cut,
    noise,
    nothing_in,
    numbered,
    numbers,
    planes,
    quiet,
)
from multibeta.data import (
    MPI3D,
    PUBLISHED,
    Cars3D,
    DSprites,
    Shapes3D,
    arrays,
)

h5py = pytest.importorskip("h5py")
lmdb = pytest.importorskip("lmdb")
savemat = pytest.importorskip("scipy.io").savemat

pytestmark = pytest.mark.usefixtures("cache_home")


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


@pytest.mark.parametrize(("name", "package"), [("shapes3d", "h5py"), ("cars3d", "scipy.io"), ("lsun", "lmdb")])
def test_missing_packages_name_the_extra(name, package, request, monkeypatch):
    path = request.getfixturevalue(name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'multibeta\[data\]'"):
        quiet(PUBLISHED[name], path)
