"""New images on the disk: any number of them, made by any number of processes, and continued where a call was stopped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multibeta import distribution, files
from multibeta.checks import check_integer
from multibeta.data import to_uint8
from multibeta.numbered_files import NumberedFiles, write_npz
from multibeta.pipelines.generation import convert_output
from multibeta.pipelines.protocol import Pipeline
from multibeta.seeds import as_seed


def generate_shared(model: Pipeline, num_images: int, *, batch_size: int = 64, **options: Any) -> Tensor:
    """`Pipeline.generate` by all processes, each a share of the batches: the images, on the CPU, in all of them."""
    share = generate_share(model, num_images, batch_size=batch_size, **options)
    return torch.cat(list(distribution.in_turn(batch.cpu() for batch in share)))


def generate_share(model: Pipeline, num_images: int, *, batch_size: int = 64, **options: Any) -> Iterator[Tensor]:
    """This process's turns of the batches of `Pipeline.generate_batches`: `distribution.in_turn` gives those of all."""
    _check(num_images, batch_size)
    chunks = distribution.world().turns(distribution.chunks(num_images, batch_size))
    return _batches(model, chunks, num_images, batch_size=batch_size, **options)


def generate_folder(
    model: Pipeline, folder: str | Path, num_images: int, *, seed: int = 0, batch_size: int = 64, **sampling: Any
) -> None:
    """`Pipeline.generate` into a folder, image i as the file {i:06}.png, by all processes; memory holds one batch of each.

    `index.json` says what they are of. A second call makes those that are missing, so that it goes on where one was stopped, or
    with more `num_images`. With one `batch_size` the files are the same, bit for bit, for any number of processes and calls.

    Raises:
        ValueError: The folder holds images of another model, seed or sampling, or more than are asked for.
        FileExistsError: Another call writes into it.
    """
    _check(num_images, batch_size)
    pictures = NumberedFiles(Path(folder), ".png")
    with pictures.written({**_facts(model, seed, sampling), "num_images": num_images}, doing="sampling into", grows="num_images"):
        chunks = pictures.share(num_images, batch_size)
        batches = _batches(model, chunks, num_images, seed=seed, batch_size=batch_size, **sampling)
        for chunk, batch in zip(chunks, batches, strict=True):
            made = zip(map(pictures.path, chunk), convert_output(batch, "pil"), strict=True)
            files.write_all({path: functools.partial(image.save, format="PNG") for path, image in made if not path.exists()})


def generate_npz(
    model: Pipeline, path: str | Path, num_images: int, *, seed: int = 0, batch_size: int = 64, **sampling: Any
) -> None:
    """`Pipeline.generate` into one .npz file by all processes: `arr_0` (N, H, W, C), bytes, as evaluators after ADM take it.

    A second call goes on where one was stopped: see `numbered_files.write_npz`.
    """

    def make(chunks: list[range]) -> Iterator[dict[str, Any]]:
        for batch in _batches(model, chunks, num_images, seed=seed, batch_size=batch_size, **sampling):
            yield {"arr_0": to_uint8(batch.permute(0, 2, 3, 1)).cpu().numpy()}

    _check(num_images, batch_size)
    write_npz(Path(path), _facts(model, seed, sampling), num_images, batch_size, make)


def _batches(model: Pipeline, chunks: list[range], num_images: int, **options: Any) -> Iterator[Tensor]:
    """The images of each of these chunks; all but the last chunk of all images are whole batches."""
    indices = torch.tensor([index for chunk in chunks for index in chunk], dtype=torch.int64)
    return model.generate_batches(num_images, indices=indices, **options)


def _facts(model: Pipeline, seed: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """What tells the images of a call from those of any other."""
    sampling = {**sampling, **model.sampling_options(sampling.get("sampler"), sampling.get("steps"))}
    return {"class": type(model).__name__, "digest": model.digest(), "seed": as_seed(seed), **sampling}


def _check(num_images: int, batch_size: int) -> None:
    check_integer("num_images", num_images, 1)
    check_integer("batch_size", batch_size, 1)
