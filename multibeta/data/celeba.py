"""CelebA: faces with forty attributes."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta.data.arrays import open_zip
from multibeta.data.dataset import Indices
from multibeta.data.files import EncodedImages, FolderFiles, ZipFiles, find_file, find_folder, open_images, read_text
from multibeta.data.images import as_indices

logger = logging.getLogger(__name__)

IMAGE_SIZE = (178, 218)
CROPS = ("d2c", "nashae", "squash")
PARTS = ("train", "valid", "test")


class CelebA(EncodedImages):
    """CelebA, aligned and cropped (Liu et al. 2015): 202,599 faces of 178 x 218 pixels with 40 attributes.

    Put into one folder, from "Large-scale CelebFaces Attributes (CelebA) Dataset" of MMLAB: `img_align_celeba.zip` or the
    folder `img_align_celeba` from it (or `img_align_celeba_png`), `list_attr_celeba.txt`, and for a part
    `list_eval_partition.txt`. They are found up to two folders below, as in the published `Img`, `Anno` and `Eval` or in a
    folder `celeba`; the lists may be those of Kaggle, `list_attr_celeba.csv` and `list_eval_partition.csv`, and the images lie in
    a second folder of the same name. The order is that of the attribute file.

    Args:
        path: That folder.
        resolution: Pixels per side.
        part: "all", "train", "valid" or "test".
        crop: "d2c", the 128 pixels from column 25 and row 57 (D2C, DiffAE, DisDiff); "nashae", the centre two thirds of the
            width after scaling (NashAE); "squash", the whole image. All are scaled bilinearly with antialiasing.
        upscale: Accept a resolution above the crop's own.
    """

    def __init__(self, path: str | Path, resolution: int, *, part: str = "all", crop: str = "d2c", upscale: bool = False):
        if part not in ("all", *PARTS):
            raise ValueError(f"part must be one of {', '.join(('all', *PARTS))}, got {part!r}")
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")
        self.crop = crop
        root = find_folder(path)
        listing = find_file(root, "list_attr_celeba.txt", "list_attr_celeba.csv")
        names, self.attribute_names, self._attributes = read_attributes(listing)
        if part != "all":
            partition = find_file(root, "list_eval_partition.txt", "list_eval_partition.csv")
            chosen = read_partition(partition, names) == PARTS.index(part)
            names, self._attributes = [name for name, kept in zip(names, chosen, strict=True) if kept], self._attributes[chosen]
        images = ("img_align_celeba", "img_align_celeba.zip", "img_align_celeba_png", "img_align_celeba_png.zip")
        super().__init__(open_files(find_file(root, *images), names), resolution, upscale)

    def attributes(self, indices: Indices) -> Tensor:
        """Attributes at `indices`, bool, (N, 40)."""
        return torch.from_numpy(self._attributes[as_indices(indices, len(self))])

    def _square(self, image: Image.Image) -> np.ndarray:
        if image.size != IMAGE_SIZE:
            raise ValueError(f"{image.width} x {image.height} pixels, {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} are expected")
        return np.asarray(crop_face(image, self.resolution, self.crop))


def crop_face(image: Image.Image, resolution: int, crop: str) -> Image.Image:
    """An aligned face of 178 x 218 pixels as a square of `resolution` pixels; for `crop` see `CelebA`."""
    if crop == "d2c":
        return image.crop((25, 57, 153, 185)).resize((resolution, resolution), Image.Resampling.BILINEAR)
    if crop == "squash":
        return image.resize((resolution, resolution), Image.Resampling.BILINEAR)
    width = resolution * 3 // 2
    height = int(width * image.height / image.width)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + resolution, top + resolution))


def open_files(path: Path, names: list[str]) -> FolderFiles | ZipFiles:
    """The images of `names` in the folder or zip archive `path`, or in a folder in it; all must be there, perhaps as .png."""
    if path.is_file():
        with open_zip(path) as archive:
            there = archive.namelist()
        folder = min((name.rpartition("/")[0] for name in there if Path(name).stem == Path(names[0]).stem), key=len, default="")
        prefix = f"{folder}/" if folder else ""
        there = {name.removeprefix(prefix) for name in there}
    else:
        if not _holds(path, names[0]):
            path = next((folder for folder in sorted(path.iterdir()) if folder.is_dir() and _holds(folder, names[0])), path)
        there, prefix = {entry.name for entry in path.iterdir()}, ""
    if names[0] not in there and (png := f"{Path(names[0]).stem}.png") in there:
        logger.info("%s holds %s in place of %s", path, png, names[0])
        names = [f"{Path(name).stem}.png" for name in names]
    missing = [name for name in names if name not in there]
    if missing and path.is_dir():  # `ZipFiles` says what an archive lacks
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of {len(names)} images, e.g. {', '.join(missing[:3])}; "
            f"found {', '.join(sorted(there)[:3]) or 'nothing'}"
        )
    return open_images(path, [prefix + name for name in names])


def _holds(folder: Path, name: str) -> bool:
    """Whether a folder holds an image of that name, perhaps as .png."""
    return (folder / name).exists() or (folder / name).with_suffix(".png").exists()


def read_attributes(path: Path) -> tuple[list[str], tuple[str, ...], np.ndarray]:
    """A list of attributes in CelebA's format: the number of images, the names, then per image its file and -1 or 1 for each.

    A list that ends in .csv has a heading with the names in place of that, and 0 or 1 may stand for -1 and 1.

    Returns:
        names: File names, list of N.
        attribute_names: Tuple of A.
        attributes: bool, (N, A).
    """
    lines = read_text(path).splitlines()
    if is_csv(path):
        rows = [row for row in csv.reader(lines) if row]
        count, attribute_names, rows = len(rows) - 1, tuple(name.strip() for name in rows[0][1:]) if rows else (), rows[1:]
    else:
        count, attribute_names = (lines[0].strip() if lines else ""), tuple(lines[1].split()) if len(lines) > 1 else ()
        count = int(count) if count.isdecimal() else 0
        rows = [line.split() for line in lines[2:] if line.strip()]
    if count < 1 or not attribute_names:
        raise ValueError(f"{path} does not begin with the number of images and the names of the attributes")
    kept = [(name, [value.strip() for value in values]) for name, *values in rows if len(values) == len(attribute_names)]
    known = [{"1", "-1"}] + [{"1", "0"}] * is_csv(path)
    values_used = set().union(*(values for _, values in kept))
    if not any(values_used <= pair for pair in known):
        name = next(name for name, values in kept if not set(values) <= known[0])
        raise ValueError(f"{path} holds attributes other than -1 and 1 for {name}")
    if len(kept) != count:
        raise ValueError(f"{path} is truncated or damaged: {len(kept)} images, {count} are announced")
    return [name for name, _ in kept], attribute_names, np.array([[value == "1" for value in values] for _, values in kept])


def read_partition(path: Path, names: list[str]) -> np.ndarray:
    """The part of each of `names`, 0 to 2, from a file with a name and a part per line, int64, (N,); a .csv has a heading."""
    lines = read_text(path).splitlines()
    rows = [row for row in csv.reader(lines[1:])] if is_csv(path) else [line.split() for line in lines]
    rows = [[value.strip() for value in row] for row in rows if row]
    if [row[0] for row in rows] != names or not all(row[1:] in (["0"], ["1"], ["2"]) for row in rows):
        raise ValueError(f"{path} does not give a part of 0, 1 or 2 for each of the {len(names)} images, in the same order")
    return np.array([row[1] for row in rows], dtype=np.int64)


def is_csv(path: Path) -> bool:
    """Whether a list has commas and a heading, as its name says."""
    return Path(path).suffix.lower() == ".csv"
