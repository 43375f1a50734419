"""What the commands share: their flags, the model that they work on, and checks of what was typed."""

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from tyro.conf import FlagCreatePairsOff, Positional, arg

from multibeta import checkpoints, distribution
from multibeta.pipelines import PIPELINES, Pipeline, load_pretrained
from multibeta.training import TrainingInterrupted

SHIPPED = "scenes32"

if TYPE_CHECKING:  # what there is to choose from is known when it runs
    Sampler = str
else:
    Sampler = Literal[tuple(dict.fromkeys(name for each in PIPELINES.values() for name in each.samplers))]
Model = Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a run or of its model, or name of a shipped model.")]
Image = Annotated[Positional[str], arg(metavar="IMAGE", help="Image file, or scenes:INDEX for a built-in scene.")]
Source = Annotated[str | None, arg(metavar="FOLDER|scenes|NAME:PATH")]
Device = Literal["auto", "cpu", "cuda"]
Images = Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES", help="Files, folders, or scenes:INDEX.")]
AnySampler = Annotated[
    Sampler | None,
    arg(
        help="By default that of the model: dpm2m or ode2, of a DiffusionVAE and a LatentDiffusion ddim. A model with a flow map "
        "also has map and map_noise, for 1 to 4 --steps."
    ),
]
AnySteps = Annotated[
    int | None,
    arg(
        help="Steps of the sampler, at most those of the model's grid; by default 20, of a LatentDiffusion 50, DiffusionVAE 100; "
        "by map 2, by map_noise 4; to invert 50."
    ),
]
Direction = Annotated[str | None, arg(metavar="NUMBER|NAME")]
Beta = float | Literal["auto"] | None
EditBeta = Annotated[
    Beta,
    arg(
        help="Compression, 0 to 1: higher keeps less. By default auto, the highest that keeps what an image is; of a model "
        "that does not know it 0.7, to show 0.9. A DiffusionVAE has none."
    ),
]
Switch = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class OnModel:
    """A command on a trained model. Fields become flags, the comments after them their help."""

    model: Model
    device: Device = "auto"  # Where to compute: auto is the GPU, where torch sees one.

    def load(self, *, denoising: bool = True) -> Pipeline:
        """The model, ready on its device; with `denoising`, `ValueError` unless it denoises."""
        model = load_pretrained(self.model, device=available(self.device))
        if denoising and not model.denoises:
            name, classes = type(self).__name__.lower(), [name for name, each in PIPELINES.items() if each.denoises]
            held = f"{self.model} holds a {type(model).__name__}, which sample, encode and evaluate take"
            raise ValueError(f"{name} needs a {' or a '.join(classes)}, {held}")
        return model


@dataclass(frozen=True, kw_only=True)
class TrainsModel(OnModel):
    """A command that trains a part of a model."""

    out: Path  # Folder of the training; the model with what was trained is saved in the subfolder model.
    resume: Switch = False  # Continue an interrupted training, with the same flags, or with more steps a finished one.

    def check_out(self) -> None:
        """`FileExistsError` where a model is there that is not to be gone on with."""
        if checkpoints.exists(self.out / "model") and not self.resume:
            raise FileExistsError(
                f"{self.out / 'model'} exists: pass --resume to go on with its training, or choose another --out"
            )

    def say_next(self, what: str, sampling: str = "") -> None:
        """Print where the model is, and how to see what it makes."""
        folder = shlex.quote(str(self.out / "model"))
        print(f"The model with its {what} is in {folder}. Next:")
        print(f"  multibeta sample {folder} {sampling}--out samples.png")


def available(device: Device) -> torch.device:
    """The device to compute on, which the log says: see `distribution.local_device`; `ValueError` where this machine has none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda needs a CUDA build of torch and a GPU, there is none here")
    chosen = distribution.local_device(None if device == "auto" else device)
    distribution.say_device(chosen)
    return chosen


def ended_numbers(command: object, words: Sequence[str]) -> list[str]:
    """The words after a command, with those put before a flag of several numbers that followed these: a folder is no number."""
    several = set()
    if dataclasses.is_dataclass(command):
        numbers = [field.name for field in dataclasses.fields(command) if re.search(r"tuple\[(int|float)", str(field.type))]
        several = {f"--{name.replace('_', '-')}" for name in numbers}
    ordered: list[str] = []
    since = None  # where the words of the last such flag begin
    for word in words:
        if word.startswith("--"):
            since = len(ordered) if word.replace("_", "-") in several else None
        if since is None or word.startswith("--") or is_number(word):
            ordered.append(word)
        else:
            ordered.insert(since, word)
            since += 1
    return ordered


def is_number(word: str) -> bool:
    """Whether a word is what Python reads as a float."""
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return False


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def require_suffix(path: Path, *suffixes: str) -> None:
    """`ValueError` unless `path` names a file of one of these types."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"out must be a {' or '.join(suffixes)} file, got {path}")


def require_at_least(minimum: int, **values: int | None) -> None:
    """`ValueError` for the first value below `minimum`; None passes."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


@contextlib.contextmanager
def saying_what_is_kept(out: Path) -> Iterator[None]:
    """A Ctrl-C that comes between the steps of a training says that nothing is lost, as one within them does."""
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was saved in {out} is kept: the same command with --resume goes on") from None
