"""Where an image of the studio comes from: the data, a file that was dropped, or noise; for the page and in Python."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multibeta import checkpoints, data
from multibeta.checks import check_integer
from multibeta.data import decoding
from multibeta.pipelines import Pipeline
from multibeta.pipelines.inputs import image_options
from multibeta.sampling import Callback

MOST_PIXELS, MOST_BYTES = 50_000_000, 20_000_000  # of a file that is dropped
MOST_NEW, MOST_SEED = 64, 2**31 - 1
BATCH = 8  # images at once: oneDNN keeps its kernels for every batch size that it has met, some 10 MB each
NAME_LETTERS = 255
LONGEST = 2**24  # letters of what a page says of an image


@dataclass(frozen=True)
class Sampling:
    """How a picture is denoised.

    Attributes:
        sampler, steps: Of the model's `denoise`.
        seed: Of its noise.
    """

    sampler: str
    steps: int
    seed: int = 0

    def check(self, model: Pipeline) -> None:
        """`ValueError` unless the model has this sampler and its grid these steps."""
        check_integer("steps", self.steps, 1)
        check_integer("seed", self.seed, 0, MOST_SEED)
        model.sampling_options(self.sampler, self.steps)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the model's verbs."""
        return {"sampler": self.sampler, "steps": self.steps}

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.sampler} in {self.steps} step{'s' * (self.steps > 1)}"

    def __str__(self) -> str:
        return f"sampler={self.sampler!r}, steps={self.steps}"


@dataclass(frozen=True)
class OfData:
    """An image of the data that the studio was opened with."""

    index: int

    def load(self, model: Pipeline, dataset: data.Dataset, callback: Callback | None = None) -> Tensor:
        if not 0 <= self.index < len(dataset):
            raise ValueError(f"the data has images 0 to {len(dataset) - 1}, got {self.index}")
        return data.to_float(data.read_images(dataset, [self.index]))

    def lines(self, model: Pipeline) -> list[str]:
        return [f"data.to_float(dataset.images([{self.index}]))"]

    @property
    def label(self) -> str:
        return f"image {self.index} of the data"


@dataclass(frozen=True)
class OfFile:
    """A file that was dropped, as the model sees it.

    Attributes:
        name: Of the file, without its folder.
        png: The square that the model sees, as a PNG file in base64.
    """

    name: str
    png: str

    @classmethod
    def read(cls, path: str | Path, name: str, model: Pipeline) -> OfFile:
        """What a file shows.

        Raises:
            ValueError: It is no image that is read here, it is broken, or too large; says which.
        """
        name = Path(name).name[-NAME_LETTERS:] or "image"
        if (size := Path(path).stat().st_size) > MOST_BYTES:
            raise ValueError(f"{name} has {size / 1e6:.0f} MB, a file may have {MOST_BYTES / 1e6:.0f}")
        with open(path, "rb") as file:
            try:
                width, height = decoding.open_image(file, Path(name).suffix.lower()).size
            except Exception as error:  # decoders raise whatever a broken file provokes
                raise ValueError(f"{name} cannot be read: {decoding.reason_of(error)}") from error
        if width * height > MOST_PIXELS:
            raise ValueError(f"{name} has {width} x {height} pixels, an image may have {MOST_PIXELS:,}")
        try:
            square = data.to_uint8(data.load_images(path, **image_options(model)))[0]
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from error
        return cls(name, base64.b64encode(as_png(square)).decode())

    def load(self, model: Pipeline, dataset: data.Dataset, callback: Callback | None = None) -> Tensor:
        config = model.vae.config
        shape = (config.image_channels, config.resolution, config.resolution)
        try:
            with io.BytesIO(base64.b64decode(self.png, validate=True)) as file:
                picture = decoding.open_image(file, ".png")
                square = np.atleast_3d(np.asarray(picture)) if max(picture.size) <= config.resolution else np.empty(0)
        except (binascii.Error, OSError, ValueError, SyntaxError) as error:
            raise ValueError("the image of the page is damaged: drop the file again") from error
        pixels = torch.from_numpy(np.array(square))
        if pixels.dtype != torch.uint8 or pixels.dim() != 3 or tuple(pixels.movedim(2, 0).shape) != shape:
            raise ValueError("the image of the page is of another model: drop the file again")
        return data.to_float(pixels.movedim(2, 0)[None].contiguous())

    def lines(self, model: Pipeline) -> list[str]:
        return [f"data.load_images({self.name!r}, {arguments(image_options(model))})"]

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class OfNoise:
    """One of the images that the studio made from noise.

    Attributes:
        index: Among `count` images.
        sampling: Of all of them.
        shared_noise: As of `DiffusionVAE.generate`.
    """

    index: int
    count: int
    sampling: Sampling
    shared_noise: bool = False

    def load(self, model: Pipeline, dataset: data.Dataset, callback: Callback | None = None) -> Tensor:
        check_integer("count", self.count, 1)
        if self.count > MOST_NEW or not 0 <= self.index < self.count:
            raise ValueError(f"of {self.count} new images, at most {MOST_NEW}, there is none of number {self.index}")
        self.sampling.check(model)
        return model.generate(self.count, **self.options, callback=callback)[self.index :][:1]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        shared = {"shared_noise": True} if self.shared_noise else {}
        return {**self.sampling.options, "seed": self.sampling.seed, "batch_size": BATCH, **shared}

    def lines(self, model: Pipeline) -> list[str]:
        return [f"model.generate({self.count}, {arguments(self.options)})[{self.index}:{self.index + 1}]"]

    @property
    def label(self) -> str:
        return f"new image {self.index} of seed {self.sampling.seed}"


Origin = OfData | OfFile | OfNoise
KINDS = {"data": OfData, "file": OfFile, "noise": OfNoise}


def to_page(origin: Origin) -> str:
    """An origin as a page keeps it, JSON."""
    kind = next(name for name, each in KINDS.items() if isinstance(origin, each))
    return json.dumps({kind: dataclasses.asdict(origin)})


def from_page(said: str) -> Origin:
    """The inverse of `to_page`.

    Raises:
        ValueError: What no page of ours says.
    """
    try:
        if len(said) > LONGEST:
            raise ValueError("too long")
        ((kind, values),) = json.loads(said).items()
        if kind == "noise":
            values = values | {"sampling": Sampling(**checkpoints.typed(Sampling, values["sampling"]))}
            return OfNoise(**checkpoints.typed(OfNoise, values))
        return KINDS[kind](**checkpoints.typed(KINDS[kind], values))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("the page does not say which image it is about: choose one again") from error


def as_png(pixels: Tensor) -> bytes:
    """Pixels (C, H, W) uint8 as a PNG file."""
    array, buffer = pixels.cpu().movedim(0, -1).numpy(), io.BytesIO()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()


def arguments(options: dict[str, Any]) -> str:
    """Keyword arguments as Python writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
