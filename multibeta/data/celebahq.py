"""CelebA-HQ and CelebAMask-HQ: 30,000 faces of 1024 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta.data.arrays import map_npy
from multibeta.data.celeba import open_files, read_attributes
from multibeta.data.dataset import Indices
from multibeta.data.files import (
    EncodedImages,
    choose_listed,
    find_file,
    find_folder,
    find_images,
    open_images,
    resize_without_antialiasing,
)
from multibeta.data.images import as_indices


class CelebAHQ(EncodedImages):
    """CelebA-HQ (Karras et al. 2018): 30,000 square faces in one of its two common layouts.

    Put anywhere either the folder of `imgHQ*.npy` files, uint8 (1, 3, 1024, 1024), that taming-transformers and latent-diffusion
    read; or a folder or zip archive of square images, such as `celeba_hq_256`, or `celeba_hq` of StarGAN v2 with `train` and
    `val` over `female` and `male`, which then are the attribute "Male". The order is that of the paths, or of `listing`.

    Args:
        path: That folder, or the archive.
        resolution: Pixels per side.
        listing: Text file that chooses files by name, one a line, such as `celebahqtrain.txt` of taming-transformers.
        antialias: Bilinear over all pixels covered, or between the four nearest; as published, images do the former and .npy
            files the latter.
        upscale: Accept a resolution above the images'.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        *,
        listing: str | Path | None = None,
        antialias: bool | None = None,
        upscale: bool = False,
    ):
        root, names = find_images(path, others=(".npy",))
        arrays = [name for name in names if name.endswith(".npy")]
        self._arrays = bool(arrays)
        names = arrays or names
        names = names if listing is None else choose_listed(names, listing)
        self.antialias = not self._arrays if antialias is None else antialias
        self._male = None
        folders = [Path(root, name).parent.name.lower() for name in names]
        if set(folders) <= {"male", "female"}:
            self.attribute_names = ("Male",)
            self._male = np.array([[folder == "male"] for folder in folders])
        super().__init__(open_images(root, names), resolution, upscale)

    def _decode(self, index: int) -> Image.Image:
        if not self._arrays:
            return super()._decode(index)
        if self._files.root.is_file():
            raise ValueError("arrays are read from a folder: unpack the archive")
        stored = map_npy(self._files.root / self._files.names[index])
        if stored.dtype != np.uint8 or len(stored.shape) != 4 or stored.shape[:2] != (1, 3) or max(stored.shape[2:]) > 4096:
            raise ValueError(f"{stored.dtype} {stored.shape}, uint8 (1, 3, 1024, 1024) is expected")
        return Image.fromarray(np.ascontiguousarray(stored[0].transpose(1, 2, 0)))

    def _square(self, image: Image.Image) -> np.ndarray:
        return square_face(image, self.resolution, self.antialias)

    @property
    def attributes(self) -> Callable[[Indices], Tensor]:
        """Whether faces at indices are filed as male, bool, (N, 1); `AttributeError` where the folders do not say."""
        male = self._male
        if male is None:
            raise AttributeError(f"the images of {self!r} have no known attributes: they are not filed as male and female")
        return lambda indices: torch.from_numpy(male[as_indices(indices, len(self))])


class CelebAMaskHQ(EncodedImages):
    """The images and attributes of CelebAMask-HQ (Lee et al. 2020): 30,000 faces of 1024 pixels, 40 attributes.

    Put the unpacked `CelebAMask-HQ.zip` anywhere: the folder `CelebA-HQ-img` and `CelebAMask-HQ-attribute-anno.txt` are read, the
    masks are not. The order is that of the attribute file: 0.jpg, 1.jpg, 2.jpg.

    Args:
        path: That folder.
        resolution: Pixels per side; bilinear with antialiasing.
        upscale: Accept a resolution above 1024.
    """

    def __init__(self, path: str | Path, resolution: int, *, upscale: bool = False):
        root = find_folder(path)
        annotations = find_file(root, "CelebAMask-HQ-attribute-anno.txt")
        names, self.attribute_names, self._attributes = read_attributes(annotations)
        super().__init__(open_files(find_file(root, "CelebA-HQ-img"), names), resolution, upscale)

    def attributes(self, indices: Indices) -> Tensor:
        """Attributes at `indices`, bool, (N, 40)."""
        return torch.from_numpy(self._attributes[as_indices(indices, len(self))])

    def _square(self, image: Image.Image) -> np.ndarray:
        return square_face(image, self.resolution, antialias=True)


def square_face(image: Image.Image, resolution: int, antialias: bool) -> np.ndarray:
    """A square image at `resolution`, uint8 (resolution, resolution, 3), scaled bilinearly with or without antialiasing."""
    if image.width != image.height:
        raise ValueError(f"{image.width} x {image.height} pixels, a square is expected")
    if antialias:
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))
    return resize_without_antialiasing(image, resolution)
