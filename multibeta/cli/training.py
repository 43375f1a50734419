"""Commands that train: a recipe, or the methods of an experiment."""

import contextlib
import dataclasses
import json
import logging
import shlex
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from multibeta import recipes
from multibeta.cli.arguments import Device, Switch, available
from multibeta.recipes import preflight
from multibeta.reproduce import EXPERIMENTS, Study, reproduce
from multibeta.training import TrainingInterrupted

if TYPE_CHECKING:  # what there is to choose from is known when it runs
    RecipeName = ExperimentName = str
else:
    RecipeName, ExperimentName = Literal[tuple(recipes.RECIPES)], Literal[tuple(EXPERIMENTS)]

logger = logging.getLogger(__name__)


def train_command(preset: recipes.Recipe, typed: str) -> Callable:
    """`multibeta train` with the fields of `preset` as flags; `typed` is the command line, recorded with the model."""
    types = typing.get_type_hints(type(preset))
    names = [field.name for field in dataclasses.fields(preset) if field.name != "source"]  # where it is published
    parts = {name: types[name] for name in names if dataclasses.is_dataclass(types[name])}
    free = {name: without_checks(part) for name, part in parts.items()}
    presets = {name: getattr(preset, name) for name in names}
    presets |= {name: part(**vars(presets[name])) for name, part in free.items()}
    fields = dataclasses.make_dataclass("Fields", [(name, free.get(name, types[name]), presets[name]) for name in names])

    def train(
        overrides: Any,
        recipe: RecipeName = preset.name,
        out: Path = Path("runs") / preset.name,
        resume: Switch = False,
        dry_run: Switch = False,
        device: Device = "cpu",
        seed: int | None = None,
    ) -> None:
        """Train both stages of a recipe; every field of it is a flag.

        Example: multibeta train --out runs/photos --data.source ./photos --vae.resolution 64

        Args:
            recipe: Preset to start from; the defaults below are its own.
            out: Folder of the run; the model is saved in its subfolder model.
            resume: Continue an interrupted run.
            dry_run: Check everything, print the resolved recipe as JSON and train nothing; the images are decoded into the cache.
            device: Where to train.
            seed: Seed of the weights, the order and the noise in both stages; the choice of images stays.
        """
        device = available(device)
        values = {name: getattr(overrides, name) for name in names}
        for name, part in parts.items():
            with preflight.naming_flags(name, part):
                values[name] = part(**vars(values[name]))
        resolved = recipes.resolve(preset, values, seed, typed)
        if dry_run:
            try:
                recipes.check_place(resolved, out, resume=resume)
            except NotADirectoryError:
                raise
            except OSError as error:  # a run that is there, a small disk: no reasons not to look at a recipe
                logger.warning("%s", error)
            print(json.dumps(recipes.to_dict(resolved), indent=2))
            return
        with saying_what_is_kept(out):
            recipes.run(resolved, out, resume=resume, device=device, command=typed)
        model = shlex.quote(str(out / "model"))
        print(f"The model is in {model}. Next:\n  multibeta sample {model} --out samples.png")
        measure, page = ("report", "report.html") if resolved.model.denoises else ("evaluate", "scores.json")
        print(f"  multibeta {measure} {model} --out {page}")

    # the fields of this preset, which no checker of types can know
    train.__annotations__["overrides"] = Annotated[fields, arg(name="")]
    return train


def without_checks(part: type) -> type:
    """The dataclass `part` without its checks: typed numbers are checked where the flag can be named that they came by."""

    @dataclass(frozen=True)
    class Unchecked(part):  # tyro reads the help of the fields in the source of `part`
        __doc__ = part.__doc__

        def __post_init__(self) -> None:
            pass

    return Unchecked


@contextlib.contextmanager
def saying_what_is_kept(out: Path) -> Iterator[None]:
    """A Ctrl-C that comes between the steps of a training says that nothing is lost, as one within them does."""
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was saved in {out} is kept: the same command with --resume goes on") from None


def reproduce_command(typed: str) -> Callable:
    """`multibeta reproduce`; `typed` is the command line, recorded with the numbers."""

    def run_experiment(
        experiment: Positional[ExperimentName],
        study: Annotated[Study, arg(name="")],
        out: Path = Path("runs") / "reproduce",
    ) -> None:
        """An experiment of the paper: all methods trained and measured over seeds, next to the printed numbers.

        A second call goes on where the first stopped. Tables are Markdown, numbers JSON, curves over beta a picture.

        Args:
            experiment: Table or figure of the paper; headline sets disentanglement beside sharpness over beta, latent_diffusion
                new images beside those of plain latent diffusion on the same VAE, at equal images and at equal CPU time.
            study: The budget, the same for every method.
            out: Folder of tables and trainings; experiments with one study share their trainings there.
        """
        print(reproduce(experiment, study, out, command=typed))
        print(f"\n{out / experiment}.json: all numbers")

    return run_experiment
