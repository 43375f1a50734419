"""CelebA: faces with forty attributes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from multibeta.data.files import EncodedImages, FolderFiles, ZipFiles, find_file, find_folder
from multibeta.data.images import as_indices

IMAGE_SIZE = (178, 218)
CROPS = ("d2c", "nashae", "squash")
PARTS = ("train", "valid", "test")


class CelebA(EncodedImages):
    """CelebA, aligned and cropped (Liu et al. 2015): 202,599 faces of 178 x 218 pixels with 40 attributes.

    Put into one folder, from "Large-scale CelebFaces Attributes (CelebA) Dataset" of MMLAB: `img_align_celeba.zip` or the
    folder `img_align_celeba` from it, `list_attr_celeba.txt`, and for a part `list_eval_partition.txt`; the published
    folders `Img`, `Anno` and `Eval`, or all in a folder `celeba`, are found too. The order is that of the attribute file.

    Args:
        path: That folder.
        resolution: Pixels per side.
        part: "all", "train", "valid" or "test".
        crop: "d2c", the 128 pixels from column 25 and row 57 (D2C, DiffAE, DisDiff); "nashae", the centre two thirds of the
            width after scaling (NashAE); "squash", the whole image. All are scaled bilinearly with antialiasing.
        upscale: Accept a resolution above the crop's own.
    """

    def __init__(self, path, resolution, *, part="all", crop="d2c", upscale=False):
        if part not in ("all", *PARTS):
            raise ValueError(f"part must be one of {', '.join(('all', *PARTS))}, got {part!r}")
        if crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")
        self.crop = crop
        root = find_folder(path)
        root = root / "celeba" if (root / "celeba").is_dir() else root
        names, self.attribute_names, self._attributes = read_attributes(
            find_file(root, "list_attr_celeba.txt", "Anno/list_attr_celeba.txt")
        )
        if part != "all":
            partition = find_file(root, "list_eval_partition.txt", "Eval/list_eval_partition.txt")
            chosen = read_partition(partition, names) == PARTS.index(part)
            names, self._attributes = [name for name, kept in zip(names, chosen, strict=True) if kept], self._attributes[chosen]
        images = ("img_align_celeba", "Img/img_align_celeba", "img_align_celeba.zip", "Img/img_align_celeba.zip")
        super().__init__(open_files(find_file(root, *images), names), resolution, upscale)

    def attributes(self, indices):
        """Attributes at `indices`, bool, (N, 40)."""
        return torch.from_numpy(self._attributes[as_indices(indices, len(self))])

    def _square(self, image):
        if image.size != IMAGE_SIZE:
            raise ValueError(f"{image.width} x {image.height} pixels, {IMAGE_SIZE[0]} x {IMAGE_SIZE[1]} are expected")
        return np.asarray(crop_face(image, self.resolution, self.crop))


def crop_face(image, resolution, crop):
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


def open_files(path, names):
    """The images of `names` in the folder or zip archive `path`, all of which must be there."""
    if path.is_file():
        return ZipFiles(path, [f"{path.stem}/{name}" for name in names])
    there = {entry.name for entry in path.iterdir()}
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(f"{path} lacks {len(missing)} of {len(names)} images, e.g. {', '.join(missing[:3])}")
    return FolderFiles(path, names)


def read_attributes(path):
    """A list of attributes in CelebA's format: the number of images, the names, then per image its file and -1 or 1 for each.

    Returns:
        names: File names, list of N.
        attribute_names: Tuple of A.
        attributes: bool, (N, A).
    """
    with open(path) as file:
        count, attribute_names = file.readline().strip(), tuple(file.readline().split())
        if not count.isdigit() or int(count) < 1 or not attribute_names:
            raise ValueError(f"{path} does not begin with the number of images and the names of the attributes")
        names, attributes = [], []
        for line in file:
            name, *values = line.split() or [""]
            if not set(values) <= {"1", "-1"}:
                raise ValueError(f"{path} holds attributes other than -1 and 1 for {name}")
            if len(values) == len(attribute_names):
                names.append(name)
                attributes.append(np.array([value == "1" for value in values]))
    if len(names) != int(count):
        raise ValueError(f"{path} is truncated or damaged: {len(names)} images, {int(count)} are announced")
    return names, attribute_names, np.stack(attributes)


def read_partition(path, names):
    """The part of each of `names`, 0 to 2, from a file with a name and a part per line, int64, (N,)."""
    rows = Path(path).read_text().split()
    if rows[::2] != names or not set(rows[1::2]) <= {"0", "1", "2"}:
        raise ValueError(f"{path} does not give a part of 0, 1 or 2 for each of the {len(names)} images, in the same order")
    return np.array(rows[1::2], dtype=np.int64)
