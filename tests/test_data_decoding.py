"""From image files of every format to bytes."""

import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset_files import centre, open_folder, save
from multibeta.data import (
    ImageFolder,
    decoding,
)
from multibeta.data.decoding import load_square

pytestmark = pytest.mark.usefixtures("cache_home")


def test_the_centre_square_is_kept(tmp_path):
    image = Image.new("RGB", (120, 40), (255, 255, 255))
    image.paste((0, 0, 0), (40, 0, 80, 40))
    image.save(tmp_path / "wide.png")
    dataset = open_folder(tmp_path, resolution=40, minimum=1)
    assert (dataset.images([0]) == 0).all()


def test_downscaling_averages_fine_detail(tmp_path):
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "checks.png")
    image = open_folder(tmp_path, resolution=16, minimum=1).images([0]).float()
    assert (image - 127.5).abs().max() < 3


# Each mode with a colour and the RGB value it must become.
MODES = {
    "1": (1, (255, 255, 255)),
    "L": (100, (100, 100, 100)),
    "LA": ((0, 0), (255, 255, 255)),  # transparent black shows the white ground
    "RGBA": ((255, 0, 0, 51), (255, 204, 204)),  # a fifth of red on white
    "CMYK": ((0, 255, 255, 0), (255, 0, 0)),
    "I;16": (25_700, (100, 100, 100)),
    "YCbCr": ((100, 128, 128), (100, 100, 100)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour, expected = MODES[mode]
    save(tmp_path / "a.tiff", colour, mode=mode, compression="tiff_lzw")  # as it is, Pillow 12 cannot read its own YCbCr
    dataset = open_folder(tmp_path, minimum=1)
    assert dataset.skipped == []
    assert centre(dataset) == pytest.approx(expected, abs=1)


COMMON = ["png", "apng", "jpg", "JPG", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "j2k", "bmp", "dib", "tif", "tiff", "gif"]


SUFFIXES = [*COMMON, "ppm", "pnm", "pcx", "qoi", "sgi", "tga", "dds"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_is_read(tmp_path, suffix):
    if f".{suffix.lower()}" not in decoding.extensions():
        pytest.skip(f"this Pillow cannot read .{suffix}")
    save(tmp_path / f"a.{suffix}", (200, 100, 50))
    dataset = open_folder(tmp_path, minimum=1)
    assert centre(dataset) == pytest.approx((200, 100, 50), abs=6)
    assert dataset.skipped == []
    assert np.array_equal(load_square(tmp_path / f"a.{suffix}", 16), dataset.images([0])[0])


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.usefixtures("without_heif")
def test_heic_is_told_by_its_content_and_what_reads_it_is_named(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(HEIC)  # as phones send them
    save(tmp_path / "a.png")
    dataset = open_folder(tmp_path, minimum=1)
    assert [path for path, _ in dataset.skipped] == ["photo.jpg"]
    assert "HEIC: convert it to JPEG, or pip install pillow-heif" in dataset.skipped[0][1]


PILLOW_HEIF = """
from PIL import Image, ImageFile


class Reader(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._mode, self._size = "RGB", (40, 50)

    def load(self):
        self.im = Image.core.fill("RGB", self.size, (200, 100, 50))


def register_heif_opener():
    Image.register_open("HEIF", Reader, lambda header: header[4:12] == b"ftypheic")
    Image.register_extensions("HEIF", [".heic", ".heif", ".hif"])
"""


@pytest.mark.usefixtures("without_heif")
@pytest.mark.parametrize("suffix", ["heic", "HEIC", "Heif", "hif", "jpg"])
def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch, suffix):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "pillow_heif.py").write_text(PILLOW_HEIF)  # a stand-in, which registers as the other does
    monkeypatch.delitem(sys.modules, "pillow_heif", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(decoding, "_register_heif", decoding._register_heif.__wrapped__)
    (tmp_path / f"a.{suffix}").write_bytes(HEIC)
    dataset = open_folder(tmp_path, minimum=1)
    assert dataset.paths == [f"a.{suffix}"] and centre(dataset) == [200, 100, 50]
    sys.modules.pop("pillow_heif")


@pytest.mark.usefixtures("without_heif")
def test_avif_that_this_pillow_cannot_read_is_named(tmp_path, monkeypatch):
    def accept(header):
        return header[4:12] == b"ftypavif" and "AVIF support not installed"

    for suffix in (".avif", ".avifs"):
        Image.EXTENSION.pop(suffix, None)
    monkeypatch.setitem(Image.OPEN, "AVIF", (None, accept))
    for name in ("b.AVIF", "c.avif", "d.png"):
        (tmp_path / name).write_bytes(HEIC.replace(b"heic", b"avif"))
    save(tmp_path / "a.png")
    dataset = open_folder(tmp_path, minimum=1)
    assert dataset.paths == ["a.png"] and [path for path, _ in dataset.skipped] == ["b.AVIF", "c.avif", "d.png"]
    assert all("a newer one can; or convert it to PNG" in reason for _, reason in dataset.skipped)


def test_nothing_that_runs_another_program_is_read(tmp_path):
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".fits", ".h5"} & set(decoding.extensions())
    save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image: .*of no format that is read"):
        load_square(tmp_path / "a.png", 16)


def test_the_content_says_which_format_it_is(tmp_path):
    save(tmp_path / "photo.jpg", (200, 100, 50))
    for name in ("photo.png", "photo", "photo.0001", "photo.jpg_large", "IMG 1.2.2024 12h"):
        (tmp_path / name).write_bytes((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "photo.txt").write_bytes((tmp_path / "photo.jpg").read_bytes())
    (tmp_path / "LICENSE").write_text("text")
    (tmp_path / "empty").touch()
    dataset = open_folder(tmp_path)
    assert dataset.paths == sorted(["photo.jpg", "photo.png", "photo", "photo.0001", "photo.jpg_large", "IMG 1.2.2024 12h"])
    assert [centre(dataset, index) for index in range(6)] == [pytest.approx([200, 100, 50], abs=6)] * 6
    assert [path for path, _ in dataset.skipped] == ["*.txt", "no extension"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "jp2", "bmp", "tif", "gif", "ppm", "tga"])
def test_errors_about_a_file_name_it(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    if f".{suffix}" not in decoding.extensions():
        pytest.skip(f"this Pillow cannot read .{suffix}")
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"half.{suffix} cannot be read as an image"):
        load_square(path, 16)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"half.{suffix} cannot be read .*the file is empty"):
        load_square(path, 16)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_square(tmp_path / f"nowhere.{suffix}", 16)
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        load_square(tmp_path, 16)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_grey(tmp_path, mode):
    colour, (red, green, blue) = MODES[mode]
    save(tmp_path / "a.tiff", colour, mode=mode, compression="tiff_lzw")  # as it is, Pillow 12 cannot read its own YCbCr
    dataset = open_folder(tmp_path, minimum=1, channels=1)
    assert (dataset.channels, dataset.images([0]).shape) == (1, (1, 1, 16, 16))
    assert centre(dataset) == pytest.approx([0.299 * red + 0.587 * green + 0.114 * blue], abs=1)


def deep(path, values, **options):
    Image.fromarray(np.asarray(values, dtype=np.uint16)).resize((40, 40), Image.Resampling.NEAREST).save(path, **options)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, suffix):
    for number, (value, expected) in enumerate([(0, 0), (128, 0), (129, 1), (0x80FF, 0x80), (65_406, 254), (65_407, 255)]):
        deep(tmp_path / f"{number}.{suffix}", [[value]])
        dataset = ImageFolder(tmp_path, 16, minimum=1, progress=False)
        assert centre(dataset, number) == [expected] * 3


def png_of_16_bits(kind, value, transparent=b""):
    """A PNG of one colour as its standard says, which Pillow itself writes in grey only."""
    row = b"\0" + np.tile(np.array(value, dtype=">u2"), 20).tobytes()
    header = (20).to_bytes(4, "big") * 2 + bytes([16, kind, 0, 0, 0])
    chunks = (
        {b"IHDR": header} | ({b"tRNS": transparent} if transparent else {}) | {b"IDAT": zlib.compress(row * 20), b"IEND": b""}
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in chunks.items())


@pytest.mark.parametrize(
    ("kind", "value", "transparent", "expected"),
    [
        (0, [25_700], b"", [100, 100, 100]),
        (0, [25_700], b"\x64\x64", [255, 255, 255]),  # the value that is transparent
        (2, [25_700, 65_535, 0], b"", [100, 255, 0]),
        (4, [0, 13_107], b"", [204, 204, 204]),  # a fifth of black on white
        (6, [65_535, 0, 0, 13_107], b"", [255, 204, 204]),
    ],
)
def test_pngs_of_16_bits_and_their_alpha(tmp_path, kind, value, transparent, expected):
    (tmp_path / "a.png").write_bytes(png_of_16_bits(kind, value, transparent))
    assert load_square(tmp_path / "a.png", 8)[:, 4, 4].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage" + b"\xff" * 50, b"Exif\0\0MM\0*\0\0\0\x08\0\x20"])
def test_damaged_exif_loses_no_photo(tmp_path, exif):
    save(tmp_path / "a.jpg", (200, 100, 50), exif=exif)
    assert centre(open_folder(tmp_path, minimum=1)) == pytest.approx([200, 100, 50], abs=3)


def test_big_endian_tiffs_are_read(tmp_path):
    Image.frombytes("I;16B", (40, 40), np.full((40, 40), 25_700, ">u2").tobytes()).save(tmp_path / "a.tif")
    assert centre(open_folder(tmp_path, minimum=1)) == [100] * 3


def test_images_of_a_12_bit_camera_are_dark_and_said_to_be(tmp_path, caplog):
    camera = tmp_path / "camera"
    camera.mkdir()
    deep(camera / "dark.png", [[819]])
    deep(camera / "light.png", [[4095]])
    dataset = open_folder(camera, channels=1)
    assert [centre(dataset, index) for index in (0, 1)] == [[3], [16]]
    assert "reach 4095 and come out dark: white_level=4095 (--data.white-level 4095)" in caplog.text
    caplog.clear()
    for level, expected in ((4095, [51, 255]), (1023, [204, 255])):
        dataset = open_folder(camera, channels=1, white_level=level)
        assert [centre(dataset, index) for index in (0, 1)] == [[value] for value in expected]
        assert load_square(camera / "dark.png", 16, white_level=level)[0, 0, 0] == expected[0]
    assert "come out dark" not in caplog.text
    with pytest.raises(ValueError, match="white_level must lie between 1 and 65535, got 0"):
        open_folder(camera, white_level=0)


def test_the_background_can_be_chosen(tmp_path):
    save(tmp_path / "a.png", (0, 0), mode="LA")
    save(tmp_path / "b.png", (0, 0, 0, 0), mode="RGBA")
    Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / "c.png", transparency=(200, 100, 50))
    Image.new("L", (40, 40), 7).save(tmp_path / "d.png", transparency=7)
    for background, expected in {"white": (255,) * 3, "black": (0,) * 3, "#ff0000": (255, 0, 0)}.items():
        for dataset in (open_folder(tmp_path, background=background), open_folder(tmp_path, background=background, channels=1)):
            luma = [round(0.299 * expected[0] + 0.587 * expected[1] + 0.114 * expected[2])]
            wanted = list(expected) if dataset.channels == 3 else luma
            assert [centre(dataset, index) for index in range(4)] == [wanted] * 4
    with pytest.raises(ValueError, match="unknown color specifier: 'paper'"):
        open_folder(tmp_path, background="paper")


def test_palette_images_become_rgb(tmp_path):
    Image.new("RGB", (32, 32), (200, 100, 50)).quantize(4).save(tmp_path / "a.png")
    assert centre(open_folder(tmp_path, minimum=1)) == [200, 100, 50]


def test_a_transparent_palette_entry_shows_white(tmp_path):
    Image.new("RGB", (32, 32), (200, 100, 50)).quantize(4).save(tmp_path / "a.png", transparency=0)
    assert centre(open_folder(tmp_path, minimum=1)) == [255, 255, 255]


@pytest.mark.parametrize(("name", "kind"), [("a.gif", "GIF"), ("a.tif", "TIFF"), ("a.jpg", "MPO")])
def test_images_with_several_frames_give_the_first(tmp_path, name, kind):
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, kind, save_all=True, append_images=[blue])
    assert centre(open_folder(tmp_path, minimum=1)) == pytest.approx((255, 0, 0), abs=3)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (32, 32), "white")
    image.paste((0, 0, 0), (0, 0, 16, 32))  # black left half
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise: left becomes top
    image.save(tmp_path / "a.png", exif=exif)
    shown = open_folder(tmp_path, minimum=1).images([0])[0, 0]
    assert shown[:7].max() < 40
    assert shown[9:].min() > 215


def chunk(kind, body):
    """A part of a PNG."""
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png_header(path, width, height):
    """A PNG of any size that holds no pixels."""
    header = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_skipped(nested_photos):
    png_header(nested_photos / "bomb.png", 30_000, 20_000)
    dataset = open_folder(nested_photos)
    assert [path for path, _ in dataset.skipped] == ["bomb.png"]
    assert "30000 x 20000 pixels are more than the limit of 400 million" in dataset.skipped[0][1]
    with pytest.raises(ValueError, match=r"bomb.png .*30000 x 20000 pixels are more than the limit of 400 million"):
        load_square(nested_photos / "bomb.png", 16)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_large_photos_are_read_whatever_the_limits_of_pillow(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)  # what it would warn of, or refuse
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 10_000)
    monkeypatch.setattr(decoding, "STRIP_PIXELS", 1_000)
    ramp = np.broadcast_to(np.arange(300, dtype=np.float32)[:, None] * 255 / 300, (300, 400))
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(tmp_path / f"a.{suffix}")
    found = load_square(tmp_path / f"a.{suffix}", 16)
    assert np.array_equal(open_folder(tmp_path, minimum=1).images([0])[0], found)
    expected = np.asarray(Image.fromarray(ramp.astype(np.uint8)).resize((16, 16), Image.Resampling.LANCZOS))
    assert np.abs(found.astype(int) - expected).max() <= 3  # shrinking in two steps is a little softer
    assert Image.MAX_IMAGE_PIXELS == 9_000


def test_large_images_keep_their_orientation_mode_and_range(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (90, 80), "white")
    image.paste((0, 0, 0), (0, 0, 45, 80))
    image.save(tmp_path / "turned.jpg", exif=exif, progressive=True)
    assert load_square(tmp_path / "turned.jpg", 8, 1)[0, :3].max() < 40
    save(tmp_path / "half.png", (255, 0, 0, 51), (90, 80), "RGBA")
    assert load_square(tmp_path / "half.png", 8)[:, 4, 4].tolist() == pytest.approx([255, 204, 204], abs=1)
    Image.fromarray(np.full((80, 90), 25_700, dtype=np.uint16)).save(tmp_path / "deep.tif")
    assert (load_square(tmp_path / "deep.tif", 8, 1) == 100).all()
