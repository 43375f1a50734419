"""The command that makes a model sharp: its decoder, against a discriminator."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from multibeta import files, recipes
from multibeta.cli.arguments import Source, Switch, TrainsModel, require_at_least, saying_what_is_kept
from multibeta.evaluation.records import images_of_training
from multibeta.training import read_metrics

USUAL_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class TuneDecoder(TrainsModel):
    """Train the decoder of a model against a discriminator, so that what it makes is sharp; latents keep their meaning.

    It learns on the images that the model was trained on, or on others of a folder. Weights of LPIPS, which you bring, are named
    with --vgg and --heads. Pictures along the way show held-out images, decoded before and after.
    """

    data: Source = None  # Images to tune on; by default those of the training of the model.
    upscale: Switch = False  # Accept images smaller than the model's.
    training: Annotated[recipes.DecoderTuningOptions, arg(name="")] = field(
        default_factory=lambda: recipes.DecoderTuningOptions(steps=USUAL_STEPS)
    )

    def run(self) -> None:
        self.check_out()
        self.check_options()
        model = self.load()
        images = images_of_training(model, self.data, "--data", upscale=self.upscale)
        with saying_what_is_kept(self.out), files.occupy(self.out, "tuning in"):
            recipes.tune_decoder(model, *images, self.out / recipes.DECODER, self.training, resume=self.resume)
            model.save_pretrained(self.out / "model")
        self.say_sharpness()
        self.say_next("tuned decoder")

    def check_options(self) -> None:
        """`ValueError` or `FileNotFoundError` for what was typed and does nothing, or is not there."""
        require_at_least(1, steps=self.training.steps)
        usual = recipes.DecoderTuningOptions()
        typed = [name for name, value in vars(self.training).items() if value != getattr(usual, name)]
        for name, needed in self.training.without_effect(typed).items():
            raise ValueError(f"--{name.replace('_', '-')} does nothing without --{needed}")
        self.training.check_files()

    def say_sharpness(self) -> None:
        """Print how sharp held-out images are decoded, before the tuning and after it."""
        measured = [each for each in read_metrics(self.out / recipes.DECODER) if "validation/sharpness" in each]
        before, after = (measured[-1][f"validation/{name}"] for name in ("sharpness_before", "sharpness"))
        if None in (before, after):
            return  # the images are of one colour each
        print(
            f"Sharpness, the energy of fine detail beside that of the images: {before:.3f} before, {after:.3f} now (theirs: 1)."
        )
