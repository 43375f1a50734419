"""The command that chooses another average of the weights after a training."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from multibeta import checkpoints, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE


@dataclass(frozen=True, kw_only=True)
class Average:
    """The model of a run with a longer or shorter average of the weights of its diffusion network (post-hoc EMA).

    Needs a run that was trained with --diffusion-training.posthoc-ema 0.05 0.1. The average reaches back over about a share
    --sigma-rel of the training; which is best depends on network and data, so try some and compare by `multibeta evaluate`.
    """

    folder: Annotated[Positional[Path], arg(metavar="RUN")]  # Folder of a finished run.
    sigma_rel: float  # Relative width of the average, up to 0.28; it is best met between those that were tracked.
    out: Path  # Folder of the model.

    def run(self) -> None:
        if checkpoints.exists(self.out):
            raise FileExistsError(f"{self.out} holds a model: choose another --out")
        model = recipes.average(self.folder, self.sigma_rel)
        model.save_pretrained(self.out)
        print(f"The model with an average of width {self.sigma_rel:g} is in {self.out}. Next:")
        folder = shlex.quote(str(self.out))
        if isinstance(model, DenoisingMultiBetaVAE):
            print(f"  multibeta spectrum {folder} --save")
        print(f"  multibeta evaluate {folder} --out scores.json")
