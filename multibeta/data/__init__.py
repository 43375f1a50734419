"""Image data: bytes and floats, subsets and splits, folders of images, and built-in scenes with known factors."""

from multibeta.data.folder import ImageFolder
from multibeta.data.grid import save_grid
from multibeta.data.images import Subset, split, to_float, to_uint8
from multibeta.data.scenes import Scenes

__all__ = ["ImageFolder", "Scenes", "Subset", "open_dataset", "save_grid", "split", "to_float", "to_uint8"]


def open_dataset(source, resolution, **folder_options):
    """The dataset a user named: "scenes" for the built-in scenes, anything else is a folder of images.

    Args:
        source: "scenes" or the path of a folder; a folder of that name is reached as "./scenes".
        resolution: Pixels per side.
        folder_options: Passed to `ImageFolder`; the scenes need none.
    """
    if source == "scenes":
        return Scenes(resolution)
    try:
        return ImageFolder(source, resolution, **folder_options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{error}; data is "scenes" or a folder of images') from None
