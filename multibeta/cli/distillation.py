"""The command that makes a model fast: a flow map, for images in one to four evaluations."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from multibeta import checkpoints, evaluation, recipes
from multibeta.cli.arguments import OnModel, Switch

USUAL_STEPS = 6500


@dataclass(frozen=True, kw_only=True)
class Distill(OnModel):
    """Train a flow map for a model: new images, edits and paths between images in one to four evaluations of its network.

    It learns from walks of the model itself, so no images are needed. Afterwards --sampler map and map_noise take few --steps.
    """

    out: Path  # Folder of the training; the model with its map is saved in the subfolder model.
    resume: Switch = False  # Continue an interrupted training, with the same flags, or with more steps a finished one.
    training: Annotated[recipes.DistillationOptions, arg(name="")] = field(
        default_factory=lambda: recipes.DistillationOptions(steps=USUAL_STEPS)
    )

    def run(self) -> None:
        if checkpoints.exists(self.out / "model") and not self.resume:
            raise FileExistsError(
                f"{self.out / 'model'} exists: pass --resume to go on with its training, or choose another --out"
            )
        model = self.load()
        recipes.distill(model, self.out / recipes.FLOW_MAP, self.training, resume=self.resume)
        model.save_pretrained(self.out / "model")  # what comes now may be interrupted
        if evaluation.choose_recorded_paths(model):
            model.save_pretrained(self.out / "model")
        folder = shlex.quote(str(self.out / "model"))
        print(f"The model with its map is in {folder}. Next:")
        print(f"  multibeta sample {folder} --sampler map --steps 1 --out samples.png")
