"""Pictures in every form that Python knows become what a folder of them gives."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_files import noise, open_folder, save
from multibeta.data import as_float, decoding, load_images, to_float, to_uint8

pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def odd_photos(tmp_path):
    """Four files, each with something that a folder takes care of."""
    root = tmp_path / "photos"
    root.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    noise(50, 70).save(root / "a turned.jpg", exif=turned)
    noise(80, 40, 1).convert("RGBA").save(root / "b.png")
    Image.merge("RGBA", (*noise(40, 60, 2).split(), noise(40, 60, 3).getchannel(0))).save(root / "c transparent.png")
    Image.fromarray(np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40).save(root / "d deep.png")
    return root


@pytest.mark.parametrize("options", [{}, {"channels": 1}, {"background": "#204060", "white_level": 4095}])
def test_files_folders_and_images_of_pillow_are_prepared_alike(odd_photos, options):
    expected = to_float(open_folder(odd_photos, 32, **options).images(range(4)))
    paths = sorted(odd_photos.iterdir())
    for images in (odd_photos, str(odd_photos), [odd_photos], paths, [str(path) for path in paths], iter(paths)):
        assert torch.equal(load_images(images, 32, **options), expected)
    opened = [Image.open(path) for path in paths]
    for _ in range(2):  # nothing is changed in them
        assert torch.equal(load_images(opened, 32, **options), expected)
    assert torch.equal(load_images([paths[0], opened[1], odd_photos], 32, **options), expected[[0, 1, 0, 1, 2, 3]])
    assert torch.equal(load_images(paths[2], 32, **options), expected[2:3])
    assert torch.equal(load_images(opened[2], 32, **options), expected[2:3])


def test_arrays_and_tensors_are_the_pictures_that_they_show():
    picture = noise(50, 40)
    array = np.asarray(picture)
    expected = load_images(picture, 32)
    assert expected.shape == (1, 3, 32, 32) and expected.abs().max() <= 1
    tensor = torch.tensor(array).movedim(2, 0)
    for same in (array, array / 255, (array / 255).astype(np.float32), np.asfortranarray(array), tensor, to_float(tensor)):
        assert torch.equal(load_images(same, 32), expected)
        assert torch.equal(load_images([same, picture], 32), expected.repeat(2, 1, 1, 1))
        assert torch.equal(load_images(same[None], 32), expected)  # a batch of one
    grey = array[:, :, 0]
    shown = load_images(Image.fromarray(grey), 32)
    for same in (grey, grey[:, :, None], torch.tensor(grey)[None]):
        assert torch.equal(load_images(same, 32), shown)
        assert torch.equal(load_images(same, 32, channels=1), shown[:, :1])
    transparent = np.dstack([array, np.full_like(grey, 51)])
    assert torch.equal(load_images(transparent, 32), load_images(Image.fromarray(transparent), 32))
    assert torch.equal(to_uint8(load_images(array[:40, :40], 40))[0].movedim(0, 2), torch.tensor(array[:40, :40]))


def test_a_matrix_is_an_array():
    pixels = np.random.default_rng(0).random((20, 20), dtype=np.float32)
    assert torch.equal(load_images(np.asmatrix(pixels), 16), load_images(pixels, 16))


def test_small_pictures_are_enlarged_or_refused(tmp_path, caplog):
    save(tmp_path / "small.png", size=(20, 90))
    save(tmp_path / "large.png", size=(40, 90))
    assert load_images(tmp_path, 32).shape == load_images([tmp_path / "small.png"] * 2, 32).shape == (2, 3, 32, 32)
    assert len(load_images(tmp_path, 32, upscale=False)) == 1
    assert "small.png" in caplog.text
    with pytest.raises(ValueError, match=r"small.png cannot be read .*20 x 90 pixels are too few for resolution 32"):
        load_images(tmp_path / "small.png", 32, upscale=False)
    for images in ([noise(40, 40), noise(20, 30)], [np.zeros((40, 40)), np.zeros((30, 20))]):
        with pytest.raises(ValueError, match=r"image 1 cannot be read: TooSmall: 20 x 30 pixels are too few"):
            load_images(images, 32, upscale=False)


def test_a_large_picture_is_not_changed(monkeypatch, tmp_path):
    noise(400, 300).save(tmp_path / "large.jpg")
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1000)
    with Image.open(tmp_path / "large.jpg") as picture:
        load_images(picture, 16)
        assert picture.size == (400, 300)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "give at least one image"),
        (np.zeros((0, 4, 4, 3)), ValueError, "give at least one image"),
        (3, TypeError, "images must be files, folders, images of Pillow, arrays or tensors, got int"),
        ([3], TypeError, r"image 0 must be a file, an image of Pillow, an array \(H, W, C\) or a tensor \(C, H, W\), got int"),
        ("nowhere.png", FileNotFoundError, "nowhere.png"),
        (
            np.zeros((3, 40, 40)),
            ValueError,
            r"the image must have shape \(H, W, C\) or \(H, W\), as an array.* \(3, 40, 40\)",
        ),
        (torch.zeros(40, 40, 3), ValueError, r"the image must have shape \(C, H, W\), as a tensor.* got \(40, 40, 3\)"),
        (torch.zeros(2, 40, 40, 3), ValueError, r"image 0 must have shape \(C, H, W\), as a tensor"),
        (
            [np.zeros((4, 4)), np.full((4, 4), 2.0)],
            ValueError,
            r"image 1 .* got float64 from 2 ",
        ),
        (
            np.full((4, 4), -0.5),
            ValueError,
            r"\[0, 1\], got float64 from -0.5 .*uint8, and a tensor holds floats in \[-1, 1\]",
        ),
        (torch.full((3, 4, 4), 200.0), ValueError, r"floats in \[-1, 1\], got torch.float32 from 200 .*bytes .* taken as uint8"),
        (np.full((4, 4), np.nan), ValueError, r"in \[0, 1\], got float64 from nan"),
        (np.zeros((4, 4), dtype=np.int64), ValueError, r"got int64 \(possible are uint8, from 0 to 255, and float64"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), ValueError, r"got torch.int64 \(possible are uint8"),
        (Image.new("RGB", (0, 5)), ValueError, "the image cannot be read: ValueError: an image of 0 x 5 pixels shows nothing"),
        (np.zeros((4, 4), dtype=complex), ValueError, r"got complex128 \(possible are uint8"),
        (torch.zeros(3, 4, 4).to_sparse(), ValueError, "the image must be a dense tensor"),
        (Image.new("F", (40, 40)), ValueError, "the image cannot be read: ValueError: floating-point pixels have no known range"),
    ],
)
def test_what_is_no_picture_is_refused(images, error, message):
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("error")
        load_images(images, 16)


def test_wrong_options_are_refused():
    for options, message in (
        ({"channels": 2}, "channels must be"),
        ({"white_level": 0}, "white_level"),
        ({"background": "x"}, "x"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(noise(20, 20), 16, **options)
    with pytest.raises(ValueError, match="resolution must be a positive integer, got 0"):
        load_images(noise(20, 20), 0)


def test_floats_of_a_tensor_stay_as_they_are():
    half = torch.tensor([-1.0005, 0.25, 1], dtype=torch.float64)
    assert as_float(half) is half
    assert torch.equal(as_float(np.array([0, 0.5, 1])), torch.tensor([-1.0, 0, 1]))
    assert torch.equal(as_float(np.array([0, 255], dtype=np.uint8)), torch.tensor([-1.0, 1]))


def test_the_home_of_a_user_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.png")
    assert torch.equal(load_images("~/a.png", 16), load_images(Path(tmp_path, "a.png"), 16))
    assert torch.equal(load_images("~", 16), load_images(tmp_path, 16))
