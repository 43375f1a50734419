"""The command that makes a model sharp: its decoder, against a discriminator."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from multibeta import files, recipes
from multibeta.cli.arguments import Source, Switch, TrainsModel, saying_what_is_kept
from multibeta.evaluation.records import images_of_training

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
        model = self.load()
        images = images_of_training(model, self.data, "--data", upscale=self.upscale)
        with saying_what_is_kept(self.out), files.occupy(self.out, "tuning in"):
            recipes.tune_decoder(model, *images, self.out / recipes.DECODER, self.training, resume=self.resume)
            model.save_pretrained(self.out / "model")
        self.say_next("tuned decoder")
