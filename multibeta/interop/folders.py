"""How diffusers lays out what it saves: models in folders, alone or in a pipeline, with weights in variants and shards."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from multibeta.weights import read_weights, shorten

logger = logging.getLogger("multibeta")

WEIGHTS = "diffusion_pytorch_model"
PLAIN = ""  # the variant of weights that have none
_SHARD = re.compile(r"-\d+-of-\d+$")
_FORMS = ({"safetensors", "index", "json"}, {"safetensors"}, {"bin", "index", "json"}, {"bin"})  # the first of them is taken


def model_class(folder: Path) -> str | None:
    """Class of the model of diffusers that `folder` holds; None where it holds none.

    Raises:
        ValueError: Its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again") from error
    return config.get("_class_name") if isinstance(config, dict) else None


def models(folder: Path) -> dict[str, str]:
    """The models of diffusers in `folder`: name of the subfolder, "" for the folder itself, to class."""
    places = {"": folder} | {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: model for name, place in places.items() if (model := model_class(place)) is not None}


def variants(folder: Path) -> dict[str, Path]:
    """The weights in `folder`: variant, `PLAIN` for none, to the file, or to the index of its shards.

    Of one variant safetensors go before what `torch.save` wrote, and shards before a single file, as in diffusers.
    """
    weights: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(folder.iterdir()):
        stem, *ends = path.name.split(".")
        form = set(ends) & {"safetensors", "bin", "index", "json"}
        variant = ".".join(end for end in ends if end not in form)
        if stem == WEIGHTS and form in _FORMS and not _SHARD.search(variant):
            weights.setdefault(variant, []).append((_FORMS.index(form), path))
    return {variant: min(paths)[1] for variant, paths in weights.items()}


def choose(folder: Path, variant: str | None) -> tuple[str, Path]:
    """The weights in `folder` that are meant, as an entry of `variants`.

    Args:
        variant: As diffusers names it, such as "fp16". None takes the weights without one, or else the only variant there is,
            and says so in the log.

    Raises:
        FileNotFoundError: None are there, or not these; what is there.
        ValueError: It must be chosen.
    """
    weights = variants(folder)
    there = ", ".join(f"{name or 'without a variant'} ({path.name})" for name, path in weights.items())
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights, which are called {WEIGHTS}.safetensors; it holds {contents(folder)}")
    if variant is None and PLAIN not in weights and len(weights) > 1:
        raise ValueError(f"{folder} holds weights of several variants, choose one by variant=: {there}")
    if variant is None:
        chosen = PLAIN if PLAIN in weights else next(iter(weights))
        if chosen != PLAIN:
            logger.warning("%s: its only weights are taken, of the variant %s", folder, chosen)
    elif variant in weights:
        chosen = variant
    else:
        raise FileNotFoundError(f"{folder} holds no weights of the variant {variant!r}, but: {there}")
    return chosen, weights[chosen]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file (see `read_weights`), or of all shards that an index names.

    Raises:
        FileNotFoundError, ValueError: What is missing or damaged.
    """
    if path.suffix != ".json":
        return read_weights(path)
    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of shards, or damaged: copy it again") from error
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ValueError(f"{path} names {outside[0]!r}, which is no file beside it")
    if missing := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise FileNotFoundError(f"{path.parent} lacks {len(missing)} of {len(shards)} shards: {shorten(missing)}")
    state = {name: tensor for shard in shards for name, tensor in read_weights(path.parent / shard).items()}
    if differing := sorted(state.keys() ^ names.keys()):
        raise ValueError(f"{path} and its shards name other tensors: {shorten(differing)}; copy them again")
    return state


def contents(folder: Path) -> str:
    """What is in a folder, for messages: models by their class, and files."""
    return ", ".join(_entries(folder)) or "nothing"


def _entries(folder: Path, most: int = 12) -> Iterator[str]:
    paths = sorted(folder.iterdir())
    for path in paths[:most]:
        model = model_class(path) if path.is_dir() else None
        yield f"{path.name}{'/' if path.is_dir() else ''}" + (f" ({model})" if model else "")
    if len(paths) > most:
        yield f"{len(paths) - most} more"
