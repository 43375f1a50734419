"""The command that makes a model fast: a flow map, for images in one to four evaluations."""

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import arg

from multibeta import evaluation, files, recipes
from multibeta.cli.arguments import TrainsModel, saying_what_is_kept
from multibeta.flow_map import FlowMap
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline, load_pretrained
from multibeta.training import TrainingInterrupted

USUAL_STEPS = 6500


@dataclass(frozen=True, kw_only=True)
class Distill(TrainsModel):
    """Train a flow map for a model: new images, edits and paths between images in one to four evaluations of its network.

    It learns from walks of the model itself, so no images are needed. Where its evaluations stand is chosen afterwards on images
    that the model held out, which takes 7 minutes for scenes32 at any --steps. Then --sampler map and map_noise take 1 to 4.
    """

    path_images: int = evaluation.CHOICE_IMAGES  # Held-out images to choose on, at most half of them; 0 for equal steps.
    training: Annotated[recipes.DistillationOptions, arg(name="")] = field(
        default_factory=lambda: recipes.DistillationOptions(steps=USUAL_STEPS)
    )

    def run(self) -> None:
        self.check_out()
        if self.path_images and self.path_images < evaluation.LEAST_IMAGES:
            raise ValueError(f"path_images must be 0 or at least {evaluation.LEAST_IMAGES}, got {self.path_images}")
        model = self.load()
        with saying_what_is_kept(self.out), files.occupy(self.out, "distilling in"):
            before = saved_map(self.out / "model")
            recipes.distill(model, self.out / recipes.FLOW_MAP, self.training, resume=self.resume)
            settle_paths(model, self.out / "model", before, self.path_images)
        self.say_next("map", "--sampler map --steps 1 ")


def saved_map(folder: Path) -> FlowMap | None:
    """The flow map of a model that an earlier run saved, where there is one to be read."""
    try:
        return getattr(load_pretrained(folder), "flow_map", None)
    except (OSError, ValueError):
        return None


def settle_paths(model: Pipeline, folder: Path, before: FlowMap | None, images: int = evaluation.CHOICE_IMAGES) -> None:
    """Save a model with its new flow map, whose paths are those of `before` if that has the same weights, else chosen now.

    Args:
        images: To choose on; 0 leaves the evaluations at equal steps.

    Raises:
        TrainingInterrupted: While they were chosen; the model is saved without them.
    """
    assert isinstance(model, DenoisingMultiBetaVAE | DiffusionVAE) and model.flow_map is not None, "just trained"
    if before is not None and before.config.paths and same_weights(before, model.flow_map):
        model.flow_map.config = before.config
        model.save_pretrained(folder)
        print(
            "nothing was left to train of the flow map, and its paths are chosen; "
            "multibeta.evaluation.choose_recorded_paths(model, images=...) in Python chooses them anew"
        )
        return
    model.save_pretrained(folder)  # what comes now may be interrupted
    if not images:
        return
    try:
        chosen = evaluation.choose_recorded_paths(model, images=images)
    except KeyboardInterrupt as stopped:
        raise TrainingInterrupted(
            f"stopped; {folder} has its map, with its evaluations at equal steps: --resume chooses better",
            getattr(stopped, "signal", signal.SIGINT),
        ) from None
    if chosen:
        model.save_pretrained(folder)


def same_weights(first: FlowMap, second: FlowMap) -> bool:
    """Whether two maps have equal weights."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
