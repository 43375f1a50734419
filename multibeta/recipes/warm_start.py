"""A diffusion network that starts from that of a trained model."""

from __future__ import annotations

from typing import Any

from multibeta import checkpoints
from multibeta.pipelines import config_from_dict, resolve_pretrained
from multibeta.recipes.recipe import Recipe

# Of a config, what no weight depends on: how the network is trained, and the process, which is the new model's own.
_FREE = ("dropout", "sigma_per_channel", "num_steps", "schedule", "first_variance", "last_variance")


def check_warm_start(recipe: Recipe) -> None:
    """That the network of stage 2 can start from the model that a recipe names, if it names one.

    Raises:
        FileNotFoundError: There is no such model.
        ValueError: It is of another class, or its network of another shape; says which fields differ.
    """
    if recipe.warm_start is None:
        return
    folder = resolve_pretrained(recipe.warm_start)
    config, model = checkpoints.load_config(folder), recipe.model
    if config.get("class") != model.__name__:
        raise ValueError(f"--warm-start takes a {model.__name__} for this recipe, {folder} holds a {config.get('class')}")
    with checkpoints.naming(folder, f"a {model.__name__}"):
        theirs = config_from_dict(model.parts["diffusion"][1], config["diffusion"])
    differing = [
        f"diffusion.{name} is {_shown(given)} there, {_shown(getattr(recipe.diffusion, name))} here"
        for name, given in vars(theirs).items()
        if name not in _FREE and given != getattr(recipe.diffusion, name)
    ]
    if differing:
        raise ValueError(f"--warm-start {recipe.warm_start} is a network of another shape: {'; '.join(differing)}")


def start_warm(diffusion: Any, recipe: Recipe) -> None:
    """Give the network of `diffusion` the weights of the one in the model that a recipe names; its process stays its own."""
    assert recipe.warm_start is not None
    check_warm_start(recipe)
    folder = resolve_pretrained(recipe.warm_start)
    model: Any = recipe.model.from_pretrained(folder)
    checkpoints.load_state(diffusion.unet, model.diffusion.unet.state_dict(), folder / "diffusion.safetensors")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
