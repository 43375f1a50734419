"""The command that finds directions of a model's latents, and keeps them in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multibeta import checkpoints, data
from multibeta.cli.arguments import (
    EditBeta,
    OnModel,
    Source,
    Switch,
    given,
    require_at_least,
    require_suffix,
    saying_what_is_kept,
)
from multibeta.cli.images import open_source
from multibeta.cli.pictures import at_level, edit_level
from multibeta.latents import SHOWN_STRENGTHS, NamedDirections
from multibeta.pipelines import Pipeline, named_directions
from multibeta.pipelines.display import traversals
from multibeta.recipes.directions import learn_directions

USUAL_NUMBER = 16  # of directions of which there are hundreds


@dataclass(frozen=True, kw_only=True)
class Directions(OnModel):
    """Directions of a model's latents with their names, in steps of one standard deviation: for `edit --directions FILE`.

    Principal ones have the largest variance; those of attributes lead from images without an attribute to those with it; those of
    channels move a whole channel. DisCo learns directions that change images in ways that a small network can tell apart, for
    which it is trained, in the folder of the name of FILE without its suffix.
    """

    out: Path  # A .safetensors file.
    kind: Literal["principal", "channel", "attribute", "disco"] = "principal"  # How they are found.
    beta: EditBeta = None
    num: int | None = None  # How many; by default 16 of principal ones and of disco, all of the others.
    directions_from: Source = None  # Images whose encodings give the directions; by default the model's own data.
    picture: Path | None = None  # A .png file: the first of these images, moved along each direction by -3 to 3, a row for each.
    steps: int | None = None  # Of disco: updates of its training, by default 400.
    seed: int | None = None  # Of disco, by default 0.
    resume: Switch = False  # Of disco: continue an interrupted training, with the same flags.

    def run(self) -> None:
        require_suffix(self.out, ".safetensors")
        if self.picture is not None:
            require_suffix(self.picture, ".png")
        require_at_least(1, num=self.num, steps=self.steps)
        training = given(steps=self.steps, seed=self.seed, resume=self.resume or None)
        if training and self.kind != "disco":
            named = " or ".join(f"--{name}" for name in training)
            raise ValueError(f"directions of kind {self.kind} are not trained and take no {named}")
        model = self.load(denoising=False)
        beta = edit_level(model, self.beta, 0.7)
        images, _ = open_source(model, self.directions_from, "--directions-from", upscale=True)
        if self.kind == "disco":
            found = self.learn(model, images, beta, training)
        else:
            usual = USUAL_NUMBER if self.kind == "principal" else None
            found = named_directions(model, self.kind, images, beta, self.num or usual)
        found.save(self.out)
        print(f"{self.out}: {len(found)} {self.kind} directions{at_level(model, beta)}, {', '.join(found.names)}")
        if self.picture is not None:
            first = data.to_float(images.images([0]))
            moved = traversals(model, first, found.steps, SHOWN_STRENGTHS, beta, denoise=model.denoises)
            data.save_grid(moved.flatten(0, 1).cpu(), self.picture, columns=len(SHOWN_STRENGTHS), labels=found.names)
            print(f"{self.picture}: one image, moved along each by {', '.join(f'{strength:+g}' for strength in SHOWN_STRENGTHS)}")

    def learn(self, model: Pipeline, images: data.Dataset, beta: float | None, training: dict[str, Any]) -> NamedDirections:
        """What DisCo learns, in the folder beside the file."""
        folder = self.out.with_suffix("")
        if checkpoints.exists(folder / "checkpoint") and not self.resume:
            raise FileExistsError(f"{folder} holds a training of DisCo: pass --resume to go on with it, or choose another --out")
        with saying_what_is_kept(folder):
            return learn_directions(model, images, folder, beta, self.num, **training)
