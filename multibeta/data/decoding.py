"""One way from an image file to bytes: which formats and how many pixels are read, and what each type of pixel becomes.

Everything that reads images goes through here, and nothing here changes a setting of Pillow or of the process, but that Pillow
gets to know the reader of pillow-heif where that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import numbers
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageColor, UnidentifiedImageError

from multibeta.files import require_file

# Raster formats that Pillow decodes by itself, or with pillow-heif: nothing that runs another program, and no icons.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "JPEG2000", "TIFF", "BMP", "DIB", "GIF", "PPM", "PCX")
FORMATS += ("QOI", "SGI", "SUN", "DDS", "PSD", "TGA")
MAX_PIXELS = 400_000_000  # cameras reach 250 million; decoded in colour, these take 1.6 GB
LARGE_PIXELS = 2**25  # beyond, one image at a time is decoded, and shrunk on the way
STRIP_PIXELS = 2**22
WHITE_LEVEL = 65535  # of 16 bits
DARK = 16  # times below it, all that a camera of 12 bits stores lies
HEADER_BYTES = 32

KNOWN_ELSEWHERE = {
    "HEIC: convert it to JPEG, or pip install pillow-heif, by which it is read": "heic heics heif heifs hif",
    "AVIF: this Pillow cannot read it, a newer one can; or convert it to PNG": "avif avifs",
    "WebP: this Pillow was built without it; convert it to PNG": "webp",
    "JPEG XL: convert it to PNG or JPEG, for example with djxl": "jxl",
    "a camera's raw file: develop it to TIFF or JPEG, for example with darktable": "3fr arw cr2 cr3 crw dng erf iiq kdc mrw nef "
    "nrw orf pef raf raw rw2 sr2 srf srw x3f",
    "a drawing: export it to PNG, for example with Inkscape": "ai eps pdf ps svg svgz",
    "floating-point pixels: map them to 8 or 16 bits as PNG or TIFF": "exr fit fits hdr",
    "a medical or microscope format: export it to PNG or TIFF": "czi dcm dicom lif lsm nd2 nii oib oif svs",
    "an icon: export it to PNG": "cur icns ico",
    "a video: extract its frames, for example with ffmpeg": "avi m4v mkv mov mp4 mpeg mpg webm wmv",
}
BRANDS = dict.fromkeys(b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split(), ".heic")  # bytes 8 to 12 of a file
BRANDS |= dict.fromkeys(b"avif avis".split(), ".avif")
HINTS = {f".{suffix}": hint for hint, suffixes in KNOWN_ELSEWHERE.items() for suffix in suffixes.split()}

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_large = threading.Lock()


def _renew_lock() -> None:
    global _one_large
    _one_large = threading.Lock()  # a thread that a forked process has not got may have held the old one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def extensions() -> tuple[str, ...]:
    """Lower-case extensions of the formats that are read, with the dot, as far as this Pillow knows them; sorted."""
    _register_heif()
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


def extension(name: str) -> str:
    """The lower-case extension of a file's name, with the dot; empty for a number or a long tail, which tell no format."""
    suffix = Path(name).suffix.lower()
    return suffix if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9]{1,5}", suffix) else ""


def looks_like_an_image(path: str | Path) -> bool:
    """Whether the first bytes of a file are those of a format that is read; False where it cannot be opened."""
    try:
        with open(require_file(path), "rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError:
        return False
    return any(_accepts(header, name) is True for name in _readable())


def open_image(file: BinaryIO, suffix: str = "") -> Image.Image:
    """The image of Pillow in an open file: its header is read, its pixels are not yet.

    The content says which format it is, not the name; `suffix` only admits TGA, which has no mark of its own.
    This is `Image.open` without the limits that it takes from a global and warns about through global filters.

    Raises:
        UnidentifiedImageError: No format fits, or its header is broken; says which and how.
        ValueError: More than `MAX_PIXELS`.
    """
    header, tried = file.read(HEADER_BYTES), []
    formats = [name for name in _readable() if _accepts(header, name)]
    if header and suffix and Image.registered_extensions().get(suffix) == "TGA":
        formats.append("TGA")
    for name in formats:
        if isinstance(reason := _accepts(header, name), str):  # the format fits, this build of Pillow lacks it
            tried.append(reason)
            continue
        file.seek(0)
        try:
            image = Image.OPEN[name][0](file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            tried.append(f"{name}: {error}")
            continue
        require_pixels(image.size)
        return image
    kind = BRANDS.get(header[8:12], suffix) if header[4:8] == b"ftyp" else suffix
    if header and kind in HINTS and kind not in extensions():
        tried.append(HINTS[kind])
    reason = "; ".join(tried) or ("the content is of no format that is read" if header else "the file is empty")
    raise UnidentifiedImageError(f"cannot identify image: {reason}")


def require_pixels(size: tuple[int, int], limit: int = MAX_PIXELS) -> None:
    """`ValueError` for an image of more pixels than `limit`, or of none."""
    if min(size) < 1:
        raise ValueError(f"an image of {size[0]} x {size[1]} pixels shows nothing")
    if size[0] * size[1] > limit:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than the limit of {limit / 1e6:.0f} million")


class TooSmall(ValueError):
    """An image that can be read has fewer pixels than are asked for."""


def require_side(size: tuple[int, int], resolution: int) -> None:
    """`TooSmall` for an image whose shorter side is below `resolution`."""
    if min(size) < resolution:
        raise TooSmall(f"{size[0]} x {size[1]} pixels are too few for resolution {resolution} without upscale")


def load_square(
    path: str | Path,
    resolution: int,
    channels: int = 3,
    *,
    background: str = "white",
    white_level: int = WHITE_LEVEL,
    upscale: bool = True,
) -> np.ndarray:
    """One image file as an upright square: shorter side scaled to `resolution`, cropped at the centre.

    Args:
        path: A file of one of `FORMATS`, told by its content.
        resolution: Pixels per side.
        channels: 3 for RGB, or 1 for grey: the luma of ITU-R 601 of a colour image.
        background: Colour under transparent pixels, as Pillow names them.
        white_level: Value of 16-bit grey that becomes 255, such as 4095 of a camera with 12 bits.
        upscale: Take an image whose shorter side is below `resolution`, enlarged.

    Returns:
        uint8, (channels, resolution, resolution).

    Raises:
        FileNotFoundError, OSError: There is no such file, or it is no regular file.
        ValueError: It cannot be read as an image; names it and says why.
    """
    with open(require_file(path), "rb") as file:
        try:
            image = open_image(file, extension(str(path)))
            return square(image, resolution, channels, background, white_level, upscale)
        except Exception as error:  # decoders raise whatever a broken file provokes
            raise ValueError(f"{path} cannot be read as an image: {reason_of(error)}") from error


def square(
    image: Image.Image, resolution: int, channels: int, background: str, white_level: int, upscale: bool = True
) -> np.ndarray:
    """An image of Pillow as `load_square` gives it; its pixels are decoded here, those of one large image at a time.

    A large JPEG is decoded at a fraction of its size, and any other large image is averaged strip by strip, to at least twice
    `resolution`, before it is scaled.
    """
    require_pixels(image.size)
    if not upscale:
        require_side(image.size, resolution)
    with decoded(image, resolution) as size:
        orientation = orientation_of(image)
        small = _centre(image, size, resolution, functools.partial(to_bytes, channels, background, white_level))
    pixels = np.asarray(small.transpose(_TURNS[orientation]) if orientation in _TURNS else small)
    return pixels.reshape(resolution, resolution, channels).transpose(2, 0, 1)


def orientation_of(image: Image.Image) -> int | None:
    """How a decoded image is to be turned, by its EXIF; None where that is damaged, and for a TIFF, which its decoder turns."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of photos that are whole, and that every viewer shows
        return None


@contextlib.contextmanager
def decoded(image: Image.Image, resolution: int | None = None) -> Iterator[tuple[float, float]]:
    """A block in which the pixels of an image are decoded; a large one is alone in it, and shrunk where `resolution` allows.

    Yields the width and height that the image fills, which a shrunk one does in fractions of its last pixels.
    """
    large, size = is_large(image), None
    if large and resolution is not None:
        size = shrink_while_decoding(image, resolution)
    with _one_large if large and (is_large(image) or "progressive" in image.info) else contextlib.nullcontext():
        tiles = getattr(image, "_tile_size", None)  # of TIFF: Pillow's limit is checked where memory is taken, so before
        if is_large(image) and tiles:
            image.im = Image.core.new(image.mode, tiles)
        image.load()
        yield size or image.size


def is_large(image: Image.Image) -> bool:
    """Whether an image is one of those that are decoded one at a time."""
    return image.width * image.height > LARGE_PIXELS


def shrink_while_decoding(image: Image.Image, resolution: int) -> tuple[float, float] | None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size, which is returned, where that leaves twice `resolution`."""
    factor = min(image.size) // (2 * resolution)
    if factor < 2 or image.format not in ("JPEG", "MPO"):
        return None
    drafted = image.draft(image.mode, (image.width // factor, image.height // factor))
    return drafted and drafted[1][2:]


def to_bytes(channels: int, background: str, white_level: int, image: Image.Image) -> Image.Image:
    """An image of any mode in mode RGB or L, on `background` where it is transparent.

    Colour profiles are not applied. Pillow itself reads 16-bit colour as the upper byte of each value.
    """
    if is_deep(image):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > WHITE_LEVEL:
            raise ValueError(f"integer pixels from {values.min()} to {values.max()} have no known range")
        grey = Image.fromarray(_bytes_of(white_level)[values])
        transparent = image.info.get("transparency")  # of PNG, the one value that is
        image = grey if transparent is None else Image.merge("LA", (grey, Image.fromarray(values != transparent).convert("L")))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: map them to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert("RGB" if channels == 3 else "L")


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of 16 bits or more."""
    return image.mode.startswith("I")


def brightest(image: Image.Image) -> int:
    """The largest value of a decoded grey image of 16 bits."""
    rows = max(1, STRIP_PIXELS // image.width)
    strips = (image.crop((0, row, image.width, min(row + rows, image.height))) for row in range(0, image.height, rows))
    return max(int(np.asarray(strip).max()) for strip in strips)


def require_channels(what: str, own: int, asked: int | None) -> None:
    """`ValueError` where images of `own` channels are asked for with others."""
    if asked is not None and asked != own:
        colours = {1: "grey", 3: "RGB"}.get(own, str(own))
        raise ValueError(
            f"{what} has {colours} images of {own} channel{'s' * (own != 1)}, {asked} are asked for: train with "
            f"--vae.image-channels {own} for it; a folder of images is read as grey or RGB"
        )


def require_pixel_options(channels: int, background: str, white_level: int) -> None:
    """`ValueError` unless there are 1 or 3 `channels`, `background` is a colour and `white_level` a value of 16 bits."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}: see --vae.image-channels")
    ImageColor.getrgb(background)
    if isinstance(white_level, bool) or not isinstance(white_level, numbers.Integral):
        raise ValueError(f"white_level must be an integer, got {white_level!r}")
    if not 1 <= white_level <= WHITE_LEVEL:
        raise ValueError(f"white_level must lie between 1 and {WHITE_LEVEL}, got {white_level}")


def reason_of(error: Exception) -> str:
    """The class of an error and its message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@functools.cache
def _register_heif() -> None:
    """Have Pillow read HEIC, where pillow-heif is installed and nobody did."""
    Image.init()
    if "HEIF" not in Image.OPEN and importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()


def _readable() -> list[str]:
    """The formats that their first bytes tell and that this Pillow can open."""
    _register_heif()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN and Image.OPEN[name][1]]


def _accepts(header: bytes, name: str) -> bool | str:
    """Whether a file that begins with `header` is of a format; a string says why it is not supported."""
    accept = Image.OPEN[name][1]
    try:
        accepted = accept is None or accept(header)
    except (IndexError, struct.error):  # shorter than any file of the format
        return False
    return accepted if isinstance(accepted, str) else bool(accepted)


@functools.lru_cache(maxsize=4)
def _bytes_of(white_level: int) -> np.ndarray:
    """Table of the byte that each 16-bit value becomes, rounded, uint8 (65536,)."""
    return np.minimum(np.rint(np.arange(WHITE_LEVEL + 1) * (255 / white_level)), 255).astype(np.uint8)


def _centre(
    image: Image.Image, size: tuple[float, float], resolution: int, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """The centre square of a decoded image that fills `size`, converted and scaled to `resolution` with Lanczos."""
    factor = min(image.size) // (2 * resolution)
    if is_large(image) and factor > 1:
        image = _averaged(image, min(image.size), factor, convert)
        size = image.size
    else:
        image = convert(image)
    side = min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _averaged(image: Image.Image, side: int, factor: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Means of `factor` x `factor` pixels over the centre square, converted strip by strip: memory for a few rows."""
    across = side // factor
    left, top = (image.width - across * factor) // 2, (image.height - across * factor) // 2
    rows = max(1, STRIP_PIXELS // (across * factor**2))
    result: Image.Image | None = None
    for row in range(0, across, rows):
        below = min(row + rows, across)
        box = (left, top + row * factor, left + across * factor, top + below * factor)
        strip = convert(image.crop(box)).reduce(factor)
        result = result or Image.new(strip.mode, (across, across))
        result.paste(strip, (0, row))
    assert result is not None, "no image is without rows"
    return result
