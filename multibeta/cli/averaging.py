"""The command that chooses another average of the weights after a training."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from multibeta import checkpoints, evaluation, files, recipes
from multibeta.cli.arguments import AnySampler, AnySteps, Device, Source, available, given, require_at_least
from multibeta.evaluation.records import images_of_training
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline, load_pretrained


@dataclass(frozen=True, kw_only=True)
class Average:
    """The model of a run with a longer or shorter average of the weights of its diffusion network (post-hoc EMA).

    Needs a run that was trained with --diffusion-training.posthoc-ema 0.05 0.1. The average reaches back over about a share
    --sigma-rel of the training; which is best depends on network and data. Of several, such as --sigma-rel 0.05 0.1 0.15 0.2, it
    is the one whose new images have the least Frechet distance to images that the run held out; the table shows all of them, and
    the model as it was trained. The flags that follow it matter only with several widths.
    """

    folder: Annotated[Positional[Path], arg(metavar="RUN")]  # Folder of a finished run.
    # Relative widths of the average, each up to 0.28; they are best met between those that were tracked.
    sigma_rel: tuple[float, ...]
    out: Path  # Folder of the model.
    data: Source = None  # Images to compare with: a tenth of these, by default those that the run held out.
    num_images: int | None = None  # New images of each average, as many as are compared with; by default 2000.
    sampler: AnySampler = None
    steps: AnySteps = None
    device: Device = "auto"  # Where new images are made: auto is the GPU, where torch sees one.

    def run(self) -> None:
        files.require_no_file(self.out)
        if checkpoints.exists(self.out):
            raise FileExistsError(f"{self.out} holds a model: choose another --out")
        if self.out.resolve() == self.folder.resolve():
            raise FileExistsError(f"{self.out} is the run itself: choose another --out")
        require_at_least(2, num_images=self.num_images)
        recipes.check_averages(self.folder, self.sigma_rel)
        if len(self.sigma_rel) == 1:
            self.refuse_comparing()
            model = recipes.average(self.folder, *self.sigma_rel)
        else:
            model = self.best()
        model.save_pretrained(self.out)
        print(f"The model with an average of width {model.info['sigma_rel']:g} is in {self.out}. Next:")
        folder = shlex.quote(str(self.out))
        if isinstance(model, DenoisingMultiBetaVAE):
            print(f"  multibeta spectrum {folder} --save")
        print(f"  multibeta evaluate {folder} --out scores.json")

    def refuse_comparing(self) -> None:
        """`ValueError` for what was typed and does nothing where one width is made."""
        named = given(data=self.data, num_images=self.num_images, sampler=self.sampler, steps=self.steps)
        if named:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
            raise ValueError(f"{flags} compare averages: name several widths with --sigma-rel")

    def best(self) -> Pipeline:
        """The model of the width whose new images are nearest, once the table of all is printed."""
        run, sampling = load_pretrained(self.folder / "model"), {"sampler": self.sampler, "steps": self.steps}
        how, device = run.sampling_options(**sampling), available(self.device)
        train_images, test_images = images_of_training(run, self.data, "--data", upscale=False, mirrored=False)
        _, real, _ = evaluation.equally_many(train_images, test_images, self.num_images or evaluation.CHOICE_IMAGES)
        features = evaluation.usual_features(train_images, test_images, device=device)
        model, rows = evaluation.compare_averages(self.folder, self.sigma_rel, features, real, device=device, **sampling)
        print("   width  Frechet distance")
        for row in rows:
            width = "trained" if row["sigma_rel"] is None else f"{row['sigma_rel']:g}"
            print(f"{width:>8}  {row['frechet']:16.3f}")
        print(f"of {len(real)} new images by {how['sampler']}, {how['steps']} steps, to as many held out, in {features.name}")
        return model
