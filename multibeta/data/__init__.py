"""Image data: bytes and floats, subsets and splits, folders of images, built-in scenes, and datasets as they are published."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from multibeta.data.cars3d import Cars3D
from multibeta.data.celeba import CelebA
from multibeta.data.celebahq import CelebAHQ, CelebAMaskHQ
from multibeta.data.dataset import (
    KNOWS,
    AttributeDataset,
    Dataset,
    FactorDataset,
    Indices,
    LabelledDataset,
    OrderedDataset,
    fingerprint_of,
    knows_attributes,
    knows_classes,
    knows_factors,
    knows_order,
    read_images,
    require_dataset,
)
from multibeta.data.decoding import WHITE_LEVEL, require_channels
from multibeta.data.dsprites import DSprites
from multibeta.data.factors import StoredFactorGrid
from multibeta.data.ffhq import FFHQ
from multibeta.data.files import EncodedImages
from multibeta.data.folder import ImageFolder
from multibeta.data.grid import save_grid
from multibeta.data.images import ImageDataset, Mirrored, Subset, choose, chosen_digest, split, split_indices, to_float, to_uint8
from multibeta.data.large import LargeFolder, LargeImages, is_large
from multibeta.data.loading import Picture, as_float, load_images
from multibeta.data.lsun import LSUN
from multibeta.data.map_style import HANDED_OVER, Foreign, MapDataset, MapStyle, StreamDataset, as_dataset, source_name
from multibeta.data.mpi3d import MPI3D
from multibeta.data.scenes import Scenes
from multibeta.data.shapes3d import Shapes3D
from multibeta.data.shards import COMPRESSED_SUFFIXES, SUFFIX, TarShards, holds_shards
from multibeta.files import expanded

PUBLISHED = {
    "cars3d": Cars3D,
    "shapes3d": Shapes3D,
    "mpi3d": MPI3D,
    "dsprites": DSprites,
    "celeba": CelebA,
    "celebahq": CelebAHQ,
    "celebamaskhq": CelebAMaskHQ,
    "ffhq": FFHQ,
    "lsun": LSUN,
}
SHARDS = "shards"
NAMES = (*PUBLISHED, SHARDS)  # before the colon of a source

__all__ = [
    "AttributeDataset",
    "Dataset",
    "FactorDataset",
    "Foreign",
    "Indices",
    "ImageDataset",
    "ImageFolder",
    "LabelledDataset",
    "LargeFolder",
    "LargeImages",
    "MapDataset",
    "MapStyle",
    "Mirrored",
    "OrderedDataset",
    "Picture",
    "Scenes",
    "StreamDataset",
    "Subset",
    "TarShards",
    "WHITE_LEVEL",
    "absolute_source",
    "as_dataset",
    "as_float",
    "KNOWS",
    "choose",
    "chosen_digest",
    "fingerprint_of",
    "knows_attributes",
    "knows_classes",
    "knows_factors",
    "knows_order",
    "load_images",
    "open_dataset",
    "read_images",
    "require_dataset",
    "save_grid",
    "source_name",
    "split",
    "split_indices",
    "to_float",
    "to_uint8",
    "PUBLISHED",
    "Cars3D",
    "CelebA",
    "CelebAHQ",
    "CelebAMaskHQ",
    "DSprites",
    "FFHQ",
    "LSUN",
    "MPI3D",
    "Shapes3D",
]


def absolute_source(source: str | Path) -> str:
    """A source as `open_dataset` takes it, with its path made absolute: so it names the same images from any folder."""
    if source == "scenes" or str(source).startswith(HANDED_OVER):
        return str(source)
    name, colon, path = str(source).partition(":")
    prefix, path = (name + colon, path) if colon and name in NAMES else ("", str(source))
    return prefix + os.path.abspath(os.path.expanduser(path))


def open_dataset(
    source: str | Path, resolution: int, *, channels: int | None = None, white_level: int | None = None, **options: Any
) -> Scenes | ImageFolder | StoredFactorGrid | EncodedImages:
    """The dataset a user named.

    Args:
        source: "scenes" for the built-in scenes; "NAME:PATH" with a name of `PUBLISHED`, such as "shapes3d:data/3dshapes.h5", for
            a published dataset; "shards:PATH" for `TarShards`, as is a path that ends in .tar or a folder of such files alone;
            anything else is a folder of images, an `ImageFolder` of up to 100,000, a `LargeFolder` of more. A folder of such a
            name is reached as "./scenes".
        resolution: Pixels per side.
        channels: 1 for grey or 3 for RGB; a folder and shards give either, RGB by default, of the others each has its own.
        white_level: Of 16-bit grey in a folder or in shards: see `ImageFolder`. The others have none.
        options: Passed to the dataset; the scenes need none.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such folder; says what data is.
        ValueError: The dataset has other channels, it is none that a name opens or a URL, or what it raises itself.
    """
    if source == "scenes":
        require_channels("the source scenes", Scenes.channels, channels)
        return Scenes(resolution)
    name, colon, path = str(source).partition(":")
    if str(source).startswith(HANDED_OVER):
        raise ValueError(f"{source} was handed over in Python, no name opens it again")
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*://", path if colon and name in NAMES else str(source)):
        raise ValueError(f"{source} is no path: sources are paths on this machine, so mount it or copy it here first")
    if colon and name in PUBLISHED:
        require_channels(f"the source {name}", PUBLISHED[name].channels, channels)
        return PUBLISHED[name](path, resolution, **options)
    options |= {"channels": 3 if channels is None else channels}
    options |= {"white_level": WHITE_LEVEL if white_level is None else white_level}
    path = path if colon and name == SHARDS else str(source)
    folder = expanded(path)
    try:
        if path != str(source) or path.endswith((SUFFIX, *COMPRESSED_SUFFIXES)) or (folder.is_dir() and holds_shards(folder)):
            return TarShards(path, resolution, **options)
        large = is_large(folder, options.get("cache"))
        return (LargeFolder if large else ImageFolder)(folder, resolution, **options)
    except (FileNotFoundError, NotADirectoryError) as error:
        known = f'data is "scenes" or a folder of images, or NAME:PATH with a name of {", ".join(NAMES)}'
        raise type(error)(f"{error}; {known}") from None
