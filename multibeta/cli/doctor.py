"""The command that says what is wrong with a training, and what to do."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from multibeta.cli.arguments import Device, Source, Switch, available, require_at_least
from multibeta.doctor import examine
from multibeta.doctor.measured import MEASURED_IMAGES


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What is wrong with a run, finished or not, or with a model, in words, and which flag to change; or that all is well.

    It reads what the trainings wrote down and measures the model on held-out images. The exit status is 0 where nothing is wrong
    and 1 where something is (2 after an error, as of every command).
    """

    folder: Annotated[Positional[str], arg(metavar="RUN", help="Folder of a run or a model, or the name of a shipped model.")]
    data: Source = None  # Images to measure on; by default those that the run held out.
    num_images: int = MEASURED_IMAGES  # How many of them.
    upscale: Switch = False  # Accept images smaller than the model's.
    device: Device = "auto"  # Where to compute: auto is the GPU, where torch sees one.

    def run(self) -> int:
        require_at_least(2, num_images=self.num_images)
        options = {"num_images": self.num_images, "upscale": self.upscale, "device": available(self.device)}
        examination = examine(self.folder, self.data, **options)
        print(examination)
        return 0 if examination.healthy else 1
