"""Published faces: CelebA, CelebA-HQ, CelebAMask-HQ and FFHQ."""

import pickle
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dataset_files import ATTRIBUTES, NAMES, Payload, cut, noise, planes, zipped
from multibeta.data import (
    FFHQ,
    CelebA,
    CelebAHQ,
    CelebAMaskHQ,
    celeba,
    files,
    knows_attributes,
)

pytestmark = pytest.mark.usefixtures("cache_home")


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


def test_pickled_celebahq_is_refused(celebahq, tmp_path):
    first = celebahq / "imgHQ00000.npy"
    np.save(first, np.array([Payload(tmp_path / "unpickled")], dtype=object))
    with pytest.raises(ValueError, match="pickled Python objects"):
        CelebAHQ(celebahq, 32)
    first.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(ValueError, match="no readable array"):
        CelebAHQ(celebahq, 32)
    assert not (tmp_path / "unpickled").exists()


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
