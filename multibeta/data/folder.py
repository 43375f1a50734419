"""Any folder of images as a dataset: cropped to squares once, then read from a memory map."""

import json
import logging
import os
import shutil
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from multibeta.data.cache import cache_name, remove_older, size_and_time
from multibeta.data.images import CHUNK, as_indices
from multibeta.files import build_once, cached, write_atomically, write_text

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
CACHE_VERSION = 1

logger = logging.getLogger(__name__)


class ImageFolder:
    """The images below a folder, in the order of their relative paths, as squares of one resolution.

    Each image is turned upright by its EXIF orientation, laid on white where it is transparent, converted to RGB
    (16-bit greys keep their upper byte), scaled with Lanczos so that the shorter side becomes `resolution`, and cropped
    at the centre. Animations give their first frame. Hidden files and folders are ignored.

    The result is written once to a memory map and reused until a file or the resolution changes. Files that cannot be
    read are left out and kept in `skipped`, a list of (relative path, reason); `paths` names the file of each image.

    Args:
        root: Folder, searched with all folders below it.
        resolution: Pixels per side.
        cache: Folder of the memory map; `multibeta` in $XDG_CACHE_HOME or ~/.cache by default.
        minimum: Fewest readable images to accept.
        upscale: Accept images whose shorter side is below `resolution`.
        progress: Show progress bars while reading.

    Raises:
        FileNotFoundError, NotADirectoryError: `root` is missing or a file.
        ValueError: no images, fewer than `minimum`, or some below `resolution` without `upscale`.
        OSError: the cache cannot be written.
    """

    channels = 3

    def __init__(self, root, resolution, *, cache=None, minimum=2, upscale=False, progress=True):
        if not isinstance(resolution, int) or resolution < 1:
            raise ValueError(f"resolution must be a positive integer, got {resolution!r}")
        if minimum < 1:
            raise ValueError(f"minimum must be at least 1, got {minimum}")
        self.root = Path(root).expanduser().resolve()
        self.resolution = resolution
        files = _find_images(self.root)
        paths = list(files)
        options = {"minimum": minimum, "upscale": upscale, "progress": progress}
        name = cache_name(self.root, resolution, [CACHE_VERSION, upscale, list(files.items())]) + ".json"
        try:
            entry = cached(name, cache)
        except OSError as error:
            raise OSError(f"cannot write the image cache of {self.root}: {error}") from None
        self._images, self.skipped = build_once(
            entry,
            lambda: _read_cache(entry, len(paths), resolution),
            lambda: build_cache(entry, self.root, paths, resolution, **options),
            doing="decoding images into",
        )
        left_out = {path for path, _ in self.skipped}
        self.paths = [path for path in files if path not in left_out]
        _require_minimum(self.root, len(self), minimum, self.skipped)
        if self.skipped:
            path, reason = self.skipped[0]
            logger.warning("skipped %d of %d files in %s, e.g. %s: %s", len(self.skipped), len(files), self.root, path, reason)

    def __len__(self):
        return len(self._images)

    def images(self, indices):
        """Images at `indices`, uint8, (N, 3, resolution, resolution)."""
        return torch.from_numpy(np.array(self._images[as_indices(indices, len(self))]))


def load_square(path, resolution):
    """One image file as an upright RGB square: shorter side scaled to `resolution`, cropped at the centre.

    Returns:
        uint8, (3, resolution, resolution).

    Raises:
        ValueError: the pixel values have no known range (floating point, or integers beyond 16 bits).
        OSError: the file is broken.
    """
    with Image.open(path, formats=FORMATS) as image:
        image = _to_rgb(ImageOps.exif_transpose(image))
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square).transpose(2, 0, 1)


def build_cache(entry, root, paths, resolution, *, minimum, upscale, progress):
    """Decode all images into a .npy file, uint8, (N, 3, resolution, resolution), then note the others in `entry`, JSON beside it.

    The headers are read first, so that images too small for the resolution are reported before any is decoded.
    Older caches of the same folder and resolution are removed.
    """
    sides, skipped = _read_headers(root, paths, progress)
    _require_minimum(root, len(sides), minimum, skipped)
    if not upscale:
        _require_resolution(root, sides, resolution)
    needed = len(sides) * 3 * resolution**2
    try:
        free = shutil.disk_usage(entry.parent).free
        if free < needed:
            raise OSError(f"{free / 2**20:.0f} MiB are free")
        skipped += _write_images(entry.with_suffix(".npy"), root, list(sides), resolution, minimum, progress)
        write_text(entry, json.dumps(sorted(skipped)))
    except OSError as error:
        raise OSError(
            f"cannot write the image cache of {needed / 2**20:.1f} MiB to {entry.parent} ({error}); "
            "make room there or choose another cache folder"
        ) from error
    remove_older(entry.with_suffix(""))


def _find_images(root):
    """Relative paths of the image files below `root`, sorted, with size and modification time as evidence of change."""
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file, not a folder of images")
    files, others, visited = {}, Counter(), set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_warn_unsearchable):
        real = os.path.realpath(folder)
        if real in visited:  # linked folders are followed, but never in a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in EXTENSIONS:
                files[path.relative_to(root).as_posix()] = size_and_time(path)
            else:
                others[path.suffix.lower() or "no extension"] += 1
    if not files:
        found = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        found = f"only other files ({found})" if found else "no files at all"
        raise ValueError(f"found no images in {root}, {found}; known are {' '.join(EXTENSIONS)}")
    return dict(sorted(files.items()))


def _warn_unsearchable(error):
    logger.warning("cannot search a folder: %s", error)


def _read_headers(root, paths, progress):
    """Shorter side of each readable image by path, and the (path, reason) of the others."""
    sides, skipped = {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for path in tqdm(paths, desc="checking images", unit="image", disable=not progress):
            try:
                with Image.open(root / path, formats=FORMATS) as image:
                    sides[path] = min(image.size)
            except Exception as error:  # decoders raise whatever a broken file provokes
                skipped.append((path, _reason(error)))
    return sides, skipped


def _reason(error):
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _require_minimum(root, count, minimum, skipped):
    if count >= minimum:
        return
    message = f"{count} readable images in {root}, at least {minimum} are needed"
    if skipped:
        path, reason = skipped[0]
        message += f"; {len(skipped)} files could not be read, e.g. {path}: {reason}"
    raise ValueError(message)


def _require_resolution(root, sides, resolution):
    small = [path for path, side in sides.items() if side < resolution]
    if small:
        example = min(small, key=sides.get)
        raise ValueError(
            f"{len(small)} of {len(sides)} images in {root} are smaller than resolution {resolution}, the smallest is "
            f"{example} with a shorter side of {sides[example]}; choose a resolution up to {sides[example]}, "
            "remove them, or allow upscale"
        )


def _to_rgb(image):
    """RGB version of an image of any mode, on white where it is transparent."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer pixels from {values.min()} to {values.max()} have no known range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _write_images(target, root, paths, resolution, minimum, progress):
    """Decode `paths` in order into a .npy file; returns the (path, reason) of those that failed."""
    skipped = []

    def decode(path):
        try:
            return load_square(root / path, resolution)
        except Exception as error:  # decoders raise whatever a broken file provokes
            return _reason(error)

    def write(file):
        # Plain sequential writes: on a full disk they raise, where a memory map would kill the process.
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, resolution, resolution)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        bar = tqdm(total=len(paths), desc="decoding images", unit="image", disable=not progress)
        with bar, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for first in range(0, len(paths), CHUNK):
                chunk = paths[first : first + CHUNK]
                for path, result in zip(chunk, pool.map(decode, chunk), strict=True):
                    if isinstance(result, str):
                        skipped.append((path, result))
                    else:
                        file.write(result.tobytes())
                    bar.update()
        _require_minimum(root, len(paths) - len(skipped), minimum, skipped)
        header["shape"] = (len(paths) - len(skipped), *header["shape"][1:])
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == start, "headers of both lengths must take the same room"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_atomically(target, write)
    return skipped


def _read_cache(entry, count, resolution):
    """Memory map, (N, 3, resolution, resolution), and skipped files of a complete cache of `count` files, or None."""
    try:
        skipped = [tuple(found) for found in json.loads(entry.read_bytes())]
        images = np.load(entry.with_suffix(".npy"), mmap_mode="r")
    except (OSError, ValueError):
        return None
    return (images, skipped) if images.shape == (count - len(skipped), 3, resolution, resolution) else None
