"""Commands that train: a recipe, or the methods of an experiment."""

import dataclasses
import json
import logging
import shlex
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.extras import literal_type_from_choices

from multibeta import distribution, recipes
from multibeta.cli.arguments import Device, Switch, available, saying_what_is_kept
from multibeta.cli.distillation import saved_map, settle_paths
from multibeta.recipes import costs, preflight
from multibeta.recipes.own_images import default_folder, say_choice
from multibeta.recipes.planning import check_minutes
from multibeta.reproduce import EXPERIMENTS, Study, reproduce
from multibeta.training import Parallel

if TYPE_CHECKING:  # what there is to choose from is known when it runs
    ExperimentName = str
else:
    ExperimentName = Literal[tuple(EXPERIMENTS)]

logger = logging.getLogger(__name__)


def train_command(preset: recipes.Recipe, typed: str, source: str | None = None) -> Callable:
    """`multibeta train` with the fields of `preset` as flags.

    Args:
        preset: See `recipes.choose`; or what a run records that is gone on with.
        typed: The command line, recorded with the model.
        source: Of the images that the preset was chosen by, where no recipe was named.
    """
    types: dict[str, Any] = typing.get_type_hints(type(preset))
    types["name"] = Annotated[str, arg(help="Of the recipe, recorded with the model.")]
    own = ("source", "warm_start")  # where it is published; a flag without a preset
    names = [field.name for field in dataclasses.fields(preset) if field.name not in own]
    parts = {name: types[name] for name in names if dataclasses.is_dataclass(types[name])}
    free = {name: without_checks(part) for name, part in parts.items()}
    presets = {name: getattr(preset, name) for name in names}
    presets |= {name: part(**vars(presets[name])) for name, part in free.items()}
    place = Path("runs") / preset.name if source is None else default_folder(source)
    fields = dataclasses.make_dataclass("Fields", [(name, free.get(name, types[name]), presets[name]) for name in names])

    def train(
        overrides: Any,
        folder: Annotated[Positional[str | None], arg(metavar="[FOLDER]")] = None,
        recipe: str = preset.name,
        resolution: int | None = None,
        minutes: float | None = None,
        out: Path = place,
        resume: Switch = False,
        warm_start: str | None = preset.warm_start,
        dry_run: Switch = False,
        device: Device = "auto",
        seed: int | None = None,
        parallel: Parallel = "ddp",
        gpus: int | None = None,
        mfu: float = costs.MFU,
        peak_tflops: float = costs.PEAK_TFLOPS,
    ) -> None:
        """Train both stages of a recipe, and what has --flow-map.steps or --decoder-tuning.steps; every field of it is a flag.

        Example: multibeta train ./photos --resolution 64 --minutes 90

        Args:
            folder: Images to train on, in place of --data.source; before the flags of parts. The recipes for photos mirror them
                as well, but for those of known factors; images of text or digits should not be: --data.no-mirror.
            recipe: Preset to start from; the defaults below are its own. Without it, images that are named take photos32,
                photos64 or photos128.
            resolution: Pixels per side. Where no recipe is named, it chooses among those for photos; otherwise it is
                --vae.resolution.
            minutes: For the whole training: a few steps are measured, and as many planned as fit. By default photos32 takes 40,
                photos64 120, photos128 360; other recipes, and steps that are typed, stay as they are.
            out: Folder of the run, named after the recipe, or without one after the images; the model is saved in its subfolder
                model.
            resume: Continue an interrupted run, with the steps that it began with, or with more steps a finished one. With --out
                alone, without a recipe and images, all flags are those that the run records.
            warm_start: Model, a folder or a shipped name, whose diffusion network stage 2 starts from; of the same shape.
            dry_run: Check everything, plan the steps, print the resolved recipe as JSON and train nothing; the images are decoded
                into the cache.
            device: Where to train: auto is the GPU, where torch sees one.
            seed: Seed of the weights, the order and the noise in both stages; the choice of images stays.
            parallel: Of several processes, which torchrun --nproc-per-node=N -m multibeta train starts: ddp, each holds all
                weights, fsdp, each a part, or hsdp, those of a machine do.
            gpus: With --dry-run, say what the training would cost on so many: parameters, operations, memory of each, time.
            mfu: Of --gpus: the share of their peak that they reach.
            peak_tflops: Of --gpus: the peak of each; an H100 or H200 has 989 in bfloat16.
        """
        here = available(device)
        values: dict[str, Any] = {name: getattr(overrides, name) for name in names} | {"warm_start": warm_start}
        for name, part in parts.items():
            with preflight.naming_flags(name, part):
                values[name] = part(**vars(values[name]))
        flags = recipes.flags_of(typed)
        check_minutes(minutes, flags)
        if (asked := sorted({"--gpus", "--mfu", "--peak-tflops"} & set(flags))) and not (dry_run and gpus is not None):
            raise ValueError(f"{' and '.join(asked)} ask what a training would cost: give --dry-run and --gpus")
        costs.check_assumptions(1 if gpus is None else gpus, mfu, peak_tflops)
        if resolution not in (None, values["vae"].resolution):
            raise ValueError(f"--resolution {resolution} and --vae.resolution {values['vae'].resolution} say two: give one")
        if folder is not None:
            late, twice = source is None and "--recipe" not in flags, "--data.source" in flags
            if late or (twice and folder != values["data"].source):
                raise ValueError(f"name the images once, before other flags: multibeta train {shlex.quote(folder)} ...")
            values["data"] = dataclasses.replace(values["data"], source=folder)
        if source is not None:
            say_choice(preset)
        resolved = recipes.resolve(preset, values, seed, flags)
        try:
            recipes.check_place(resolved, out, resume=resume)
        except (NotADirectoryError, FileNotFoundError):
            raise
        except OSError as error:
            if not dry_run:
                raise
            logger.warning("%s", error)  # a run that is there, a small disk: no reasons not to look at a recipe
        plan = None
        if not (dry_run and recipes.lacks_images(resolved, preset)):
            resolved, plan = recipes.fit_to_time(resolved, minutes, out, flags=flags, resume=resume, device=here)
        if dry_run:
            print(json.dumps(recipes.to_dict(resolved), indent=2))
            if gpus is not None:
                words = costs.table(costs.costs(resolved), gpus, mfu, peak_tflops)
                logger.info("what %s costs, statistics and validation aside:\n%s", resolved.name, words)
            return
        before = saved_map(out / "model") if resolved.flow_map.steps else None
        with saying_what_is_kept(out):
            trained = recipes.run(resolved, out, resume=resume, device=here, command=typed, plan=plan, parallel=parallel)
        if resolved.flow_map.steps:
            distribution.by_first(lambda: settle_paths(trained, out / "model", before))
        model = shlex.quote(str(out / "model"))
        print(f"The model is in {model}. Next:\n  multibeta sample {model} --out samples.png")
        measure, page = ("report", "report.html") if resolved.model.denoises else ("evaluate", "scores.json")
        print(f"  multibeta {measure} {model} --out {page}")
        print(f"  multibeta doctor {shlex.quote(str(out))}")

    # the fields of this preset, which no checker of types can know
    train.__annotations__["overrides"] = Annotated[fields, arg(name="")]
    train.__annotations__["recipe"] = literal_type_from_choices(dict.fromkeys([*recipes.RECIPES, preset.name]))
    return train


def without_checks(part: type) -> type:
    """The dataclass `part` without its checks: typed numbers are checked where the flag can be named that they came by."""

    @dataclass(frozen=True)
    class Unchecked(part):  # tyro reads the help of the fields in the source of `part`
        __doc__ = part.__doc__

        def __post_init__(self) -> None:
            pass

    return Unchecked


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
