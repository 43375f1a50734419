"""FFHQ: faces of 1024 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from multibeta.data.celebahq import square_face
from multibeta.data.files import EncodedImages, choose_listed, find_images, open_images
from multibeta.files import expanded


class FFHQ(EncodedImages):
    """Flickr-Faces-HQ (Karras et al. 2019): 70,000 square faces of 1024 pixels, or its thumbnails of 128.

    Put `images1024x1024` (or `thumbnails128x128`) of "ffhq-dataset" of NVlabs anywhere, with or without its subfolders of a
    thousand: `00000/00000.png` to `69000/69999.png`, or smaller copies as .jpg or .webp, as a folder or a zip archive. The order
    is that of the numbers, or of `listing`.

    Args:
        path: That folder or archive, or the one that holds it.
        resolution: Pixels per side.
        listing: Text file that chooses files by name, one a line, such as `ffhqtrain.txt` of taming-transformers.
        antialias: Bilinear over all pixels covered; by default between the four nearest, as in latent-diffusion.
        upscale: Accept a resolution above the images'.
    """

    def __init__(
        self,
        path: str | Path,
        resolution: int,
        *,
        listing: str | Path | None = None,
        antialias: bool = False,
        upscale: bool = False,
    ):
        root = expanded(path)
        root = next((root / name for name in ("images1024x1024", "thumbnails128x128") if (root / name).is_dir()), root)
        root, names = find_images(root)
        numbers = [Path(name).stem for name in names]
        if not all(number.isdigit() for number in numbers) or len(set(numbers)) != len(numbers):
            raise ValueError(
                f"{root} holds images such as {names[0]}; each of the numbers 00000.png to 69999.png once is expected"
            )
        self.antialias = antialias
        names = names if listing is None else choose_listed(names, listing)
        super().__init__(open_images(root, names), resolution, upscale)

    def _square(self, image: Image.Image) -> np.ndarray:
        return square_face(image, self.resolution, self.antialias)
