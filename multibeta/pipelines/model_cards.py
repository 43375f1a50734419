"""The README.md of a saved model: what it is, how to load it, how it was trained."""

from __future__ import annotations

import shlex
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from multibeta.checks import is_integer

MARK = "<!-- Written by save_pretrained, which replaces this file as long as this line is in it. -->"

_TEMPLATE = """---
library_name: multibeta
pipeline_tag: unconditional-image-generation
tags:
{tags}
---

{mark}

# {title}

{summary}

It makes {channels} images of {resolution} x {resolution} pixels.

| part | class | million parameters | dtype |
| --- | --- | --- | --- |
{parts}

## Use

```python
import multibeta

model = multibeta.load_pretrained("path/to/this/folder")
pictures = model.generate(4, seed=0, output_type="pil")
```

## Training

{training}

## Files

| file | holds |
| --- | --- |
{files}

Weights are safetensors, configuration is JSON: loading executes no code.

## Intended use and limits

For research on generation and on readable representations. The model knows its training data and nothing else: images of another
kind are encoded and decoded poorly, generated images repeat what the data shows, its gaps and its biases included. Directions
and axes of the latent space are found by statistics; what they mean must be looked at. Writing this file measured nothing:
`multibeta evaluate` measures quality on your data. The licence of the weights is for whoever shares them to state.
"""


_COUNTS = {"images": ("training", "held_out"), "flow_map": ("steps", "batch_size"), "decoder_tuning": ("steps", "batch_size")}
_COUNTS_OF_RECIPE = {
    "data": (),
    "vae_objective": ("untie_steps",),
    "vae_training": ("steps", "batch_size"),
    "diffusion_objective": (),
    "diffusion_training": ("steps", "batch_size"),
}


def model_card(
    class_name: str,
    summary: str,
    tags: tuple[str, ...],
    parts: dict[str, tuple[str, int, str]],
    files: dict[str, str],
    image: tuple[int, int],
    info: dict[str, Any],
) -> str:
    """The card as Markdown with YAML front matter, as model hubs read it.

    Args:
        class_name: Class of the model.
        summary: What it is, a paragraph.
        tags: Of the front matter.
        parts: Name to (class, number of parameters, dtype of its networks).
        files: Name to what it holds.
        image: (channels, resolution).
        info: Where the model comes from; of its paths only the last component is shown.
    """
    recipe = info.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {"name": recipe}
    images, tuned = info.get("images") or {}, info.get("decoder_tuning")
    told = {
        "data": _source(recipe),
        "images": _images(images, recipe) if images else None,
        "recipe": recipe.get("name"),
        "from": recipe.get("source") if info.get("changes") == {} else None,  # a changed recipe is not the published one
        "method": info.get("method"),
        **{stage: _budget(recipe, stage) for stage in ("vae", "diffusion")},
        "flow map": "{steps} steps of {batch_size} spans".format(**info["flow_map"]) if info.get("flow_map") else None,
        "decoder": "tuned in {steps} steps of {batch_size} images".format(**tuned) if tuned else None,
        "command": hide_folders(info["command"]) if isinstance(info.get("command"), str) else None,
    }
    lines = [f"- {name}: `{value}`" for name, value in told.items() if value]
    if changes := info.get("changes"):
        lines.append("- changed from the recipe, which has the second:")
        lines += [f"  - {name}: `{_shown(own)}`, `{_shown(before)}`" for name, (before, own) in changes.items()]
    return _TEMPLATE.format(
        tags="\n".join(f"- {tag}" for tag in tags),
        mark=MARK,
        title=_title(class_name, recipe, info.get("changes")),
        summary=summary,
        channels={1: "grey", 3: "RGB"}.get(image[0], f"{image[0]}-channel"),
        resolution=image[1],
        parts="\n".join(f"| `{name}` | `{of}` | {count / 1e6:.2f} | {dtype} |" for name, (of, count, dtype) in parts.items()),
        training="\n".join(lines) or "Not recorded.",
        files="\n".join(f"| `{name}` | {holds} |" for name, holds in files.items()),
    )


def check_info(info: Any) -> None:
    """`ValueError`, which names the entry, where what a model says of its training is of another kind than trainings record.

    What is not there is not missed.
    """
    said = _entries("info", info)
    recipe = said.get("recipe")
    of_recipe = recipe if isinstance(recipe, dict) else {}
    if not isinstance(recipe, str | dict | None):
        raise ValueError(f"info.recipe must be a name or hold entries by name, got a {type(recipe).__name__}")
    for place, holder, counts in (
        *((f"info.{name}", said.get(name), counts) for name, counts in _COUNTS.items()),
        *((f"info.recipe.{name}", of_recipe.get(name), counts) for name, counts in _COUNTS_OF_RECIPE.items()),
    ):
        entries = _entries(place, holder)
        for name in counts:
            if name in entries and not is_integer(entries[name]):
                raise ValueError(f"{place}.{name} must be an integer, got a {type(entries[name]).__name__}")
    for name, pair in _entries("info.changes", said.get("changes")).items():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"info.changes.{name} must be a value before and one now, got a {type(pair).__name__}")


def _entries(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{place} must hold entries by name, got a {type(value).__name__}")
    return value or {}


def _title(class_name: str, recipe: dict[str, Any], changes: dict[str, Any] | None) -> str:
    """The recipe's name, or where the images are not the recipe's what they are called."""
    if changes and "data.source" in changes and (source := _source(recipe)):
        return f"{source.rpartition('/')[2]} ({class_name})"
    return recipe.get("name") or class_name


def _source(recipe: dict[str, Any]) -> str | None:
    """The images, without the folders of the machine."""
    data = recipe.get("data")
    return without_folders(str(data["source"])) if isinstance(data, dict) and data.get("source") else None


def _images(counts: dict[str, Any], recipe: dict[str, Any]) -> str:
    """How many images were trained on and held out."""
    data = recipe.get("data")
    mirrored = isinstance(data, dict) and data.get("mirror")
    trained = f"{counts['training'] // 2} and their mirror images" if mirrored else counts["training"]
    return f"{trained} trained on, {counts['held_out']} held out"


def _budget(recipe: dict[str, Any], stage: str) -> str | None:
    """Steps and batch of a stage."""
    training = recipe.get(f"{stage}_training")
    if not isinstance(training, dict) or not {"steps", "batch_size"} <= training.keys():
        return None
    more = recipe[f"{stage}_objective"].get("untie_steps") if isinstance(recipe.get(f"{stage}_objective"), dict) else None
    return f"{training['steps']}{f' + {more}' if more else ''} steps of {training['batch_size']} images"


def _shown(value: Any) -> str:
    """A value of a recipe as it is typed."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return without_folders(value) if isinstance(value, str) else str(value)


def may_write(folder: str | Path) -> bool:
    """Whether `folder` has no README.md, or one that `model_card` made and nobody took over."""
    path = Path(folder) / "README.md"
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def hide_folders(command: str) -> str:
    """A command line without the folders of the machine it ran on."""
    try:
        words = shlex.split(command)
    except ValueError:  # no command of a shell: nothing is known about its paths
        return "not shown"
    return shlex.join(without_folders(word) for word in words)


def without_folders(word: str) -> str:
    """`word` with a path that is absolute or climbs, alone or after "NAME:" or "NAME=", cut to its last component."""
    prefix, path = "", word
    for separator in ":=":
        name, separated, rest = word.partition(separator)
        if separated and len(name) > 1 and "/" not in name and "\\" not in name:  # a single letter is a drive
            prefix, path = name + separator, rest
            break
    path_class = PureWindowsPath if "\\" in path or path[1:2] == ":" else PurePosixPath
    pure = path_class(path)
    hides = pure.is_absolute() or path.startswith("~") or ".." in pure.parts
    return f"{prefix}.../{pure.name}" if hides else word
