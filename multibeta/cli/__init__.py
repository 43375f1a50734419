"""The command `multibeta`: choose a recipe or a model, override fields, call."""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm
from tyro.conf import FlagCreatePairsOff, Positional, arg

from multibeta import (
    acceleration,
    caches,
    checkpoints,
    data,
    diffusion_vae,
    environment,
    files,
    interop,
    latents,
    metrics,
    processors,
    recipes,
)
from multibeta import reproduce as experiments
from multibeta.data.decoding import load_square
from multibeta.evaluation import advance, checked_walk
from multibeta.evaluation.scores import checked_levels, of_recorded_data, scores, source_of, table
from multibeta.nonlinear_diffusion import SAMPLERS
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline, convert_output, load_pretrained, resolve_pretrained
from multibeta.recipes import preflight
from multibeta.seeds import as_seed
from multibeta.training import TrainingInterrupted, TrainingStopped

logger = logging.getLogger(__name__)

DESCRIPTION = """Generative models whose latent space a person can read and steer.

Start with `multibeta demo`; `multibeta COMMAND --help` explains a command. MODEL is a folder that `train` wrote, or the
name of a shipped model, such as scenes32. Anywhere, --debug shows the traceback of an error, and --cache FOLDER says where
caches lie, as the variable MULTIBETA_CACHE does."""
SHIPPED = "scenes32"
DEFAULT_RECIPE, DEMO_RECIPE = "scenes32", "scenes32-small"
DEMO_SCENES = ("scenes:61234", "scenes:178503", "scenes:290117", "scenes:433021")
DIRECTION_IMAGES = 1000
DENOISERS = (DenoisingMultiBetaVAE, DiffusionVAE)

Model = Annotated[Positional[str], arg(metavar="MODEL", help="Folder of a trained model, or name of a shipped one.")]
Image = Annotated[Positional[str], arg(metavar="IMAGE", help="Image file, or scenes:INDEX for a built-in scene.")]
Source = Annotated[str | None, arg(metavar="FOLDER|scenes|NAME:PATH")]
Device = Literal["cpu", "cuda"]
AnySampler = Annotated[
    Literal[(*SAMPLERS, *diffusion_vae.SAMPLERS)] | None, arg(help="By default ode; of a DiffusionVAE ddim, or ddpm.")
]
AnySteps = Annotated[
    int | None, arg(help="Steps of the sampler, at most those of the model's grid; by default 50, of a DiffusionVAE 100.")
]
Switch = Annotated[bool, FlagCreatePairsOff]
command = dataclass(frozen=True, kw_only=True)  # fields become flags, the comments beside them their help


def train_command(preset: recipes.Recipe, typed: str) -> Callable:
    """`multibeta train` with the fields of `preset` as flags; `typed` is the command line, recorded with the model."""
    kinds = typing.get_type_hints(type(preset))
    names = [field.name for field in dataclasses.fields(preset) if field.name != "source"]  # where it is published
    parts = {name: kinds[name] for name in names if dataclasses.is_dataclass(kinds[name])}
    free = {name: without_checks(kind) for name, kind in parts.items()}
    presets = {name: getattr(preset, name) for name in names}
    presets |= {name: kind(**vars(presets[name])) for name, kind in free.items()}
    fields = dataclasses.make_dataclass("Fields", [(name, free.get(name, kinds[name]), presets[name]) for name in names])

    def train(
        overrides: Annotated[fields, arg(name="")],
        recipe: Literal[tuple(recipes.RECIPES)] = preset.name,
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
        for name, kind in parts.items():
            with preflight.naming_flags(name, kind):
                values[name] = kind(**vars(values[name]))
        resolved = resolve(preset, values, seed, typed)
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
        print(f"  multibeta report {model} --out report.html")

    return train


def without_checks(kind: type) -> type:
    """The dataclass `kind` without its checks: typed numbers are checked where the flag can be named that they came by."""

    @dataclass(frozen=True)
    class Unchecked(kind):  # tyro reads the help of the fields beside them, in the source of `kind`
        __doc__ = kind.__doc__

        def __post_init__(self):
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

    def reproduce(
        experiment: Positional[Literal[tuple(experiments.EXPERIMENTS)]],
        study: Annotated[experiments.Study, arg(name="")],
        out: Path = Path("runs") / "reproduce",
    ) -> None:
        """An experiment of the paper: all methods trained and measured over seeds, next to the printed numbers.

        A second call goes on where the first stopped. Tables are Markdown, numbers JSON, curves over beta a picture.

        Args:
            experiment: Table or figure of the paper; headline sets disentanglement beside sharpness over beta.
            study: The budget, the same for every method.
            out: Folder of tables and trainings; experiments with one study share their trainings there.
        """
        print(experiments.reproduce(experiment, study, out, command=typed))
        print(f"\n{out / experiment}.json: all numbers")

    return reproduce


def resolve(preset: recipes.Recipe, values: dict, seed: int | None, typed: str = "") -> recipes.Recipe:
    """The preset with other `values` and seeds, checked before the work begins, alone and against its images.

    A folder named in place of the preset's images is used whole where it holds fewer than the preset asks for, in batches that it
    fills; numbers that were typed stay, and are refused where they cannot be.

    Args:
        typed: The command line, which tells a number that was typed from the preset's.
    """
    if seed is not None:
        stages = ("vae_training", "diffusion_training")
        values = values | {stage: dataclasses.replace(values[stage], seed=seed) for stage in stages}
    recipe = dataclasses.replace(preset, **values)
    for name, given in dataclasses.asdict(values["diffusion"]).items():
        fitted = getattr(recipe.diffusion, name)
        if given not in (fitted, getattr(preset.diffusion, name)):
            raise ValueError(f"diffusion.{name} follows from the VAE and is {fitted}, got {given}; change the vae field instead")
    networks = recipes.check(recipe)
    words = [*preflight.check_attention(recipe, preset), *preflight.check_norms(*networks)]
    flags = {word.partition("=")[0].replace("_", "-") for word in shlex.split(typed)}
    recipe, more = fit_to_images(recipe, preset, flags)
    for word in words + more:
        logger.warning("%s", word)
    return recipe


def fit_to_images(recipe: recipes.Recipe, preset: recipes.Recipe, flags: set[str]) -> tuple[recipes.Recipe, list[str]]:
    """A recipe made to fit the number of its images where no `flags` say otherwise, and words on what was changed."""
    images, words = recipe.data, []
    own = images.source == preset.data.source
    if own and images.source != "scenes" and not Path(images.source).exists():
        return recipe, [f"there is no folder {images.source} here, the images of the recipe: name yours with --data.source"]
    try:
        held = len(recipes.open_images(recipe))
    except ValueError as error:
        raise preflight.with_fitting_resolution(recipe, error) from error
    if not own:
        recipe = recipes.located(recipe)
    asked = preset.data.num_train
    fewer = not own and asked is not None and held < asked + images.num_test
    if fewer and images.num_train == asked and "--data.num-train" not in flags:
        words.append(f"{images.source} holds {held} images, fewer than the recipe asks for: using all of them")
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_train=None))
        words[-1] += ", {} to train on and {} held out".format(*preflight.counts(recipe, held))
    num_train = preflight.counts(recipe, held)[0] * (2 if images.mirror else 1)
    given = {stage for stage in preflight.STAGES if preflight.flag(stage, "batch_size") in flags}
    changed = {s for s in preflight.STAGES if getattr(recipe, s).batch_size != getattr(preset, s).batch_size}
    recipe, fitted = preflight.fit_batches(recipe, num_train, given | changed)
    preflight.check_counts(recipe, num_train)
    return recipe, words + fitted


@command
class OnModel:
    """A command on a trained model."""

    model: Model
    device: Device = "cpu"  # Where to compute.

    def load(self, *kinds: type[Pipeline]) -> Pipeline:
        """The model, ready on its device; `ValueError` unless it is of one of the `kinds`, by default those that denoise."""
        model, kinds = load_pretrained(self.model, device=available(self.device)), kinds or DENOISERS
        if not isinstance(model, kinds):
            command, needed = type(self).__name__.lower(), " or a ".join(kind.__name__ for kind in kinds)
            found = f"{self.model} holds a {type(model).__name__}, which sample, encode and evaluate take"
            raise ValueError(f"{command} needs a {needed}, {found}")
        return model


@command
class Sample(OnModel):
    """New images from noise: denoised, or by a baseline decoded at once, which takes no --sampler or --steps."""

    model: Model = SHIPPED
    out: Path  # A .png file for one grid, or a folder for one PNG per image, named by index.
    num_images: int = 64  # How many.
    sampler: Literal[(*SAMPLERS, *diffusion_vae.SAMPLERS)] | None = None  # By default ode2; of a DiffusionVAE ddim, or ddpm.
    steps: int | None = None  # Steps of the sampler, at most those of the model's grid; by default 20, of a DiffusionVAE 100.
    seed: int = 0  # Image i depends on the seed and i alone.
    batch_size: int = 64  # Images computed at once.

    def run(self) -> None:
        as_grid = bool(self.out.suffix) and not self.out.is_dir()
        if as_grid:
            require_suffix(self.out, ".png")
        model = self.load(Pipeline)
        denoises, named = hasattr(model, "denoise"), given(sampler=self.sampler, steps=self.steps)
        if named and not denoises:
            flags = " or ".join(f"--{name}" for name in named)
            raise ValueError(f"a {type(model).__name__} decodes noise at once and takes no {flags}")
        walk = checked_walk(model, self.sampler, self.steps)
        with tqdm(desc="sampling", unit="step", disable=not denoises) as bar:

            def advance(done, total, _):
                bar.total = total
                bar.update(done - bar.n)

            options = walk | {"callback": advance} if denoises else {}
            images = model.generate(self.num_images, seed=self.seed, batch_size=self.batch_size, **options)
        if as_grid:
            data.save_grid(images, self.out)
        else:
            for index, picture in enumerate(convert_output(images, "pil")):
                files.write_atomically(
                    self.out / f"{index:06}.png", lambda file, picture=picture: picture.save(file, format="PNG")
                )
        print(f"{self.out}: {self.num_images} images from noise")


@command
class Edit(OnModel):
    """Images moved along a direction of their latents: one row per image, the input first."""

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGES")]  # Files, folders, or scenes:INDEX.
    out: Path  # A .png file.
    beta: float | None = None  # Information level of the edit, 0 to 1, by default 0.7; a DiffusionVAE has none.
    direction: int | None = None  # Principal direction; 0, the default, has the largest variance.
    attribute: str | None = None  # In its place, the way from images without this attribute to those with it.
    strengths: tuple[float, ...] = (-3, -1.5, 0, 1.5, 3)  # Columns, in standard deviations or in ways to an attribute.
    directions_from: Source = None  # Images whose encodings give the direction; by default the model's own data.
    sampler: AnySampler = None
    steps: AnySteps = None

    def run(self) -> None:
        require_suffix(self.out, ".png")
        if None not in (self.direction, self.attribute):
            raise ValueError("--direction and --attribute are two ways to name a direction: give one")
        model = self.load()
        (beta,) = checked_levels(model, None if self.beta is None else [self.beta], default=[0.7])
        checked_walk(model, self.sampler, self.steps)
        inputs = load_images(self.images, model)
        step, name = self.find_direction(model, beta)
        options = given(beta=beta, sampler=self.sampler, steps=self.steps)
        with tqdm(self.strengths, desc="editing", unit="strength") as strengths:
            edited = [model.manipulate(inputs, step, strength, **options).cpu() for strength in strengths]
        columns = [inputs, *edited]
        data.save_grid(torch.stack(columns, dim=1).flatten(0, 1), self.out, columns=len(columns))
        shown = ", ".join(f"{strength:+g}" for strength in self.strengths)
        print(f"{self.out}: each input, then {name}{at_level(beta)} by {shown}")

    def find_direction(self, model: Pipeline, beta: float | None) -> tuple[Tensor, str]:
        """What strength 1 adds to a latent, (c, h, w), and its name."""
        dataset, _ = open_source(model, self.directions_from, "--directions-from", upscale=True)
        indices = choose(len(dataset), DIRECTION_IMAGES)
        has = None if self.attribute is None else labels_of(dataset, indices, self.attribute)
        encodings = torch.cat([model.encode(data.to_float(dataset.images(chunk)), beta) for chunk in indices.split(256)])
        if has is not None:
            return encodings[has].mean(0) - encodings[~has].mean(0), f"the way to {self.attribute}"
        found, direction = latents.principal_directions(encodings), self.direction or 0
        if not 0 <= direction < len(found.directions):
            raise ValueError(f"direction must lie between 0 and {len(found.directions) - 1}, got {direction}")
        return found.directions[direction] * found.deviations[direction], f"deviations along direction {direction}"


@command
class Interpolate(OnModel):
    """A path from one image to another through the latents; the inputs stand at its ends.

    Of a DiffusionVAE also from one noise to another at the latent of one image, which stands before it with its reconstruction.
    """

    first: Image
    second: Annotated[Positional[str | None], arg(metavar="IMAGE")] = None  # Where the path leads to; none with --noise.
    out: Path  # A .png file.
    beta: float | None = None  # Information level of the path, 0 to 1, by default 0.7: higher keeps less of the inputs.
    num: int = 8  # Images on the path.
    dims: tuple[int, ...] | None = None  # Latent channels that change; all by default.
    how: Literal["lerp", "slerp"] | None = None  # Of a DiffusionVAE: a straight path, the default, or an arc.
    noise: Switch = False  # Of a DiffusionVAE: from noise to noise at one image.
    shared_noise: Switch = False  # Of a DiffusionVAE, by ddpm: all images take the same noise at every step.
    sampler: AnySampler = None
    steps: AnySteps = None

    def run(self) -> None:
        require_suffix(self.out, ".png")
        require_at_least(2, num=self.num)
        model = self.load()
        (beta,) = checked_levels(model, None if self.beta is None else [self.beta], default=[0.7])
        others = {"dims": self.dims} if beta is None else {"noise": self.noise or None, **self.of_refiner()}
        refuse(model, **others)
        checked_walk(model, self.sampler, self.steps)
        if self.noise != (self.second is None):
            raise ValueError("--noise stays at one image: name no second" if self.noise else "name a second image, or --noise")
        ends = [load_images([name], model) for name in (self.first, self.second) if name]
        path = self.refined(model, ends) if beta is None else self.denoised(model, ends, beta)
        if self.noise:
            grid, shown = (*ends, model.decode(model.encode(*ends)).cpu(), path), "the image, its reconstruction, {}"
        else:
            grid, shown = (ends[0], path, ends[1]), "the first image, {}, the second image"
        data.save_grid(torch.cat(grid), self.out, columns=self.num + 2)
        print(f"{self.out}: {shown.format(f'{self.num} images of the path{at_level(beta)}')}")

    def of_refiner(self) -> dict:
        """What was given of the options that a DiffusionVAE alone has."""
        return given(how=self.how, shared_noise=self.shared_noise or None)

    def denoised(self, model: DenoisingMultiBetaVAE, ends: list[Tensor], beta: float) -> Tensor:
        """The images of the path, (num, C, H, W)."""
        options = given(sampler=self.sampler, steps=self.steps)
        with tqdm(torch.linspace(0, 1, self.num).tolist(), desc="interpolating", unit="image") as weights:
            return torch.cat([model.interpolate(*ends, weight, beta, self.dims, **options).cpu() for weight in weights])

    def refined(self, model: DiffusionVAE, ends: list[Tensor]) -> Tensor:
        """The same by a DiffusionVAE, in one batch: each image of a path takes noise of its own, or all the same."""
        between = model.interpolate_noise if self.noise else model.interpolate
        points = (*ends, [0], [1]) if self.noise else ends  # these are seeds
        with tqdm(desc="interpolating", unit="step") as bar:
            options = given(sampler=self.sampler, steps=self.steps, **self.of_refiner())
            options["callback"] = lambda done, total, _: advance(bar, done, total)
            return between(*points, torch.linspace(0, 1, self.num).tolist(), **options)[0].cpu()


@command
class Encode(OnModel):
    """Codes of many images as .npz: `codes` (num_samples, num_codes), their `beta`, and `names`, or `factors` of scenes."""

    images: Annotated[Positional[str], arg(metavar="FOLDER|scenes|NAME:PATH")]  # Images to encode.
    out: Path  # An .npz file.
    beta: float | None = None  # Information level, 0 to 1, by default 0.5; a baseline has none.
    limit: int | None = None  # Encode this many, chosen at random.
    seed: int = 0  # Seed of that choice.
    batch_size: int = 256  # Images computed at once.
    upscale: Switch = False  # Accept images smaller than the model's.

    def run(self) -> None:
        require_at_least(1, limit=self.limit, batch_size=self.batch_size)
        model = self.load(Pipeline)
        (beta,) = checked_levels(model, None if self.beta is None else [self.beta], default=[0.5])
        dataset = open_images(model, self.images, upscale=self.upscale)
        indices = choose(len(dataset), self.limit, self.seed)
        with tqdm(indices.split(self.batch_size), desc="encoding", unit="batch") as batches:
            codes = [model.encode(data.to_float(dataset.images(batch)), beta).flatten(1).cpu() for batch in batches]
        arrays = {"codes": torch.cat(codes).numpy()} | ({} if beta is None else {"beta": np.float32(beta)})
        if data.knows_factors(dataset):
            arrays |= {"factors": dataset.factors(indices).numpy(), "factor_names": np.array(dataset.factor_names)}
        else:
            arrays["names"] = np.array(dataset.paths)[indices]
        files.write_atomically(self.out, lambda file: np.savez(file, **arrays))
        print(f"{self.out}: codes {arrays['codes'].shape}" + ("" if beta is None else f" at beta {beta:g}"))


@command
class Evaluate(OnModel):
    """The measures of the field on any model: MIG, DCI and TAD of its codes, Frechet distance, precision and recall."""

    model: Model = SHIPPED
    out: Path = Path("scores.json")  # A .json file.
    data: Source = None  # Images to measure on; by default the model's own data. MIG and DCI need known factors, TAD attributes.
    betas: tuple[float, ...] | None = None  # Information levels, 0.1 0.3 0.5 0.7 0.9 by default; a baseline has none.
    num_images: int = 10_000  # Images to measure; 10000 is published for MIG and DCI. TAD takes at most 1000, as published.
    dci: Switch = False  # Measure DCI too: boosted trees, minutes for each beta, kept in ~/.cache/multibeta.
    auroc: Literal["grid", "exact"] = "grid"  # Of TAD: thresholds 0.01 apart as published, which count ties as right, or exact.
    fidelity: bool = True  # Measure generated and decoded images.
    features: Path | None = None  # Weights of the FID Inception: the distance is FID then. By default a classifier's features.
    reference: Path | None = None  # Statistics (.npz with mu and sigma) to measure FID to in place of the data's own.
    sampler: Literal[(*SAMPLERS, *diffusion_vae.SAMPLERS)] | None = None  # By default ode2; of a DiffusionVAE ddim, or ddpm.
    steps: int | None = None  # Steps of the sampler, at most those of the model's grid; by default 20, of a DiffusionVAE 100.
    seed: int = 0  # Of the choice of images and of all noise.
    batch_size: int = 64  # Images computed at once.
    upscale: Switch = False  # Accept images smaller than the model's.

    def run(self) -> None:
        require_suffix(self.out, ".json")
        require_at_least(1, num_images=self.num_images, batch_size=self.batch_size)
        model = self.load(Pipeline)
        checked_levels(model, self.betas)
        checked_walk(model, self.sampler, self.steps)
        names = "betas num_images dci auroc fidelity reference sampler steps seed batch_size"
        options: dict = {name: getattr(self, name) for name in names.split()}
        if self.features:
            options["features"] = metrics.load_features(self.features).to(model.device)
        dataset, source = open_source(model, self.data, "--data", upscale=self.upscale)
        result = scores(model, dataset, cache=dci_cache(), **options)
        result["data"]["source"] = source
        document = json.dumps(result, indent=1, allow_nan=False)
        files.write_atomically(self.out, lambda file: file.write(document.encode()))
        print(f"{table(result)}\n{self.out}: all numbers, and what they depend on")


@command
class Report(OnModel):
    """What a model learned, as one HTML page with figures and numbers."""

    model: Model = SHIPPED
    out: Path = Path("report.html")  # An .html file.
    data: Source = None  # Images to measure on; by default the model's own data.
    quick: Switch = False  # Fewer images, coarser numbers.
    beside: Annotated[str | None, arg(metavar="MODEL")] = None  # Another model that the same held-out images go through.
    beta: float | None = None  # Where a multi-beta VAE encodes images for --beside, 0 to 1; by default 0.9.

    def run(self) -> None:
        from multibeta.report import write_report  # brings matplotlib and scikit-learn

        if self.beta is not None and self.beside is None:
            raise ValueError("--beta says where images are encoded for --beside MODEL: name that too")
        run = Path(self.model).parent  # where `train` left its curves
        curves = run if (run / "vae" / "metrics.jsonl").exists() else None
        options = {"source": self.data, "quick": self.quick, "progress": True, "training_folder": curves}
        if self.beside is not None:
            options |= {"beside": dataclasses.replace(self, model=self.beside).load(), **given(beta=self.beta)}
        model = self.load()
        require_suffix(self.out, ".html")
        write_report(model, self.out, **options)
        print(f"{self.out}: open it in a browser")


@command
class Demo:
    """See the shipped model at work, train a small one live, and read its report."""

    out: Path = Path("demo")  # Folder of everything the demo writes; a second call goes on where the first stopped.

    def run(self) -> None:
        run, model = self.out / "run", self.out / "run" / "model"
        typed = shlex.join(["multibeta", "demo", "--out", str(self.out)])
        try:
            resolve_pretrained(SHIPPED)
        except FileNotFoundError as error:
            print(f"The shipped model is missing ({error}): going on with the training.\n")
        else:
            timed(Sample(model=SHIPPED, out=self.out / "samples.png").run)
            timed(lambda: sharpen(SHIPPED, DEMO_SCENES, self.out / "sharpened.png"))
            timed(Edit(model=SHIPPED, images=DEMO_SCENES, out=self.out / "edited.png").run)
            first, second, *_ = DEMO_SCENES
            timed(Interpolate(model=SHIPPED, first=first, second=second, out=self.out / "interpolated.png").run)
        if not checkpoints.exists(model):
            recipe = recipes.find(DEMO_RECIPE)
            try:
                timed(lambda: recipes.run(recipe, run, resume=(run / "vae").exists(), command=typed))
            except KeyboardInterrupt as stopped:  # the message of `train` names a flag that `demo` does without
                number = getattr(stopped, "signal", signal.SIGINT)
                raise TrainingInterrupted(f"stopped; run {typed} again to go on", number) from None
        print(f"{model}: the recipe {DEMO_RECIPE}, trained here")
        timed(Report(model=str(model), out=self.out / "report.html", quick=True).run)


def sharpen(model_name: str, names: Sequence[str], out: Path, beta: float = 0.9) -> None:
    """Grid of images, one a column: the input, its latent at beta decoded directly, and the same latent denoised first."""
    model = DenoisingMultiBetaVAE.from_pretrained(model_name)
    images = load_images(names, model)
    latents = model.encode(images, beta, seeds=range(len(images)))
    rows = [images, model.decode(latents, beta), model.decode(model.denoise(latents, beta, "ode2", steps=20))]
    data.save_grid(torch.cat(rows), out, columns=len(images))
    print(f"{out}: above the images, then their latents at beta {beta:g} decoded directly, below denoised first")


def timed(step: Callable[[], object]) -> None:
    """Call `step` and print how long it took."""
    began = time.perf_counter()
    step()
    print(f"  took {time.perf_counter() - began:.0f} s\n", flush=True)


def available(device: str) -> str:
    """`device`, or `ValueError` where this machine has none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda needs a CUDA build of torch and a GPU, there is none here")
    return device


def open_images(model: Pipeline, source: str, *, upscale: bool):
    """The dataset of a source, as `data.open_dataset` takes it, as a model saw its own."""
    return data.open_dataset(source, **seen_by(model), upscale=upscale)


def seen_by(model: Pipeline) -> dict:
    """The options of `data.open_dataset` that say what a model sees of an image: resolution, channels, white level."""
    config, recipe = model.vae.config, model.info.get("recipe")
    level = recipe.get("data", {}).get("white_level") if isinstance(recipe, dict) else None
    return {"resolution": config.resolution, "channels": config.image_channels, "white_level": level}


def load_images(names: Sequence[str], model: Pipeline) -> Tensor:
    """Images named by file, folder or scenes:INDEX, prepared as `ImageFolder` does for a model, (N, C, H, W) in [-1, 1]."""
    found = []
    for name in names:
        kind, _, index = name.partition(":")
        if kind == "scenes" and index.isdecimal():
            found.append(data.open_dataset(kind, **seen_by(model)).images([int(index)]))
        elif Path(name).is_dir():
            folder = data.open_dataset(f"./{name}" if name == "scenes" else name, **seen_by(model), minimum=1, upscale=True)
            found.append(folder.images(range(len(folder))))
        else:
            found.append(torch.tensor(load_square(name, **given(**seen_by(model))))[None])
    if not found:
        raise ValueError("name at least one image: a file, a folder, or scenes:INDEX")
    return data.to_float(torch.cat(found))


def labels_of(dataset, indices: Tensor, attribute: str) -> Tensor:
    """Which of the images at `indices` have an attribute, bool, (N,); `ValueError` unless some do and some do not."""
    names = dataset.attribute_names
    if attribute not in names:
        raise ValueError(f"the images have no attribute {attribute!r}; they have {', '.join(names) or 'none'}")
    has = dataset.attributes(indices)[:, names.index(attribute)]
    if has.all() or not has.any():
        raise ValueError(f"{int(has.sum())} of {len(has)} images have {attribute}: some must, and some must not")
    return has


def open_source(model: Pipeline, named: str | None, flag: str, *, upscale: bool):
    """The images that were `named` with `flag`, or else those that the model records, and their source."""
    source = source_of(model, named, flag)
    with of_recorded_data(source, named, flag):
        return open_images(model, source, upscale=upscale), source


@command
class Accelerate:
    """What `multibeta.accelerate` makes of a diffusers model: each block's path, error and milliseconds, on its own weights."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]  # Where diffusers saved the model: config.json and weights.
    variant: str | None = None  # Of its weights, such as fp16; by default those without one, or the only ones there are.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of weights and arithmetic.
    batch: int = 1  # Samples of the random input.
    size: int | None = None  # Its height and width; by default that of the model's configuration.
    repetitions: int = 3  # Timed calls of each block.
    device: Device = "cpu"  # Where to compute.

    def run(self) -> None:
        require_at_least(1, batch=self.batch, size=self.size, repetitions=self.repetitions)
        model = acceleration.load(self.folder, getattr(torch, self.dtype), self.variant).to(available(self.device))
        inputs = acceleration.random_inputs(model, batch=self.batch, size=self.size)
        print(acceleration.table(acceleration.check(model, repetitions=self.repetitions, **inputs)))


@command
class Convert:
    """Weights of diffusers or latent-diffusion as networks of multibeta, and back, with what became what.

    Example: multibeta convert scenes32 --to diffusers --out converted --beta 0
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]  # Folder of diffusers, weights of latent-diffusion, or a MODEL.
    to: Literal[interop.FORMATS]  # multibeta and diffusers are folders, ldm is one .safetensors file.
    out: Path  # Folder or file.
    parts: tuple[Literal["unet", "vae"], ...] = ("unet", "vae")  # What to take of what there is.
    beta: float | None = None  # Of a MODEL: where to freeze its VAE.
    head_channels: int | None = None  # Of attention in a U-Net of latent-diffusion, whose weights do not show it.
    num_heads: int | None = None  # In place of --head-channels.
    resolution: int | None = None  # Of the input; by default what the config says or the depth suggests. Outputs do not change.
    latent: Literal["published", "decoder"] = "published"  # decoder: post_quant_conv goes into the encoder, where it is exact.
    mean_only: Switch = False  # The encoder returns the mean, as that of a multi-beta VAE, not mean and log variance.
    ema: Switch = False  # Averaged weights of a checkpoint of latent-diffusion.
    variant: str | None = None  # Of weights of diffusers, such as fp16; by default those without one, or the only ones there are.
    verbose: Switch = False  # Show every tensor.

    def run(self) -> None:
        if interop.is_ours(self.source):
            networks = interop.model_networks(load_pretrained(self.source), self.beta, self.parts)
        elif self.beta is not None:
            raise ValueError(f"--beta freezes a model of multibeta, {self.source} is none")
        else:
            names = "parts head_channels num_heads resolution latent mean_only ema variant"
            networks = interop.read_networks(self.source, **{name: getattr(self, name) for name in names.split()})
        for name, report in interop.write_networks(networks, self.to, self.out).items():
            print(f"{name}: {report.summary()}" + (f"\n{report}\n" if self.verbose else ""))
        print(f"{self.out}: {', '.join(networks.modules)}")


@command
class Bench:
    """A benchmark of the checkout that multibeta is installed from: NAME and its flags, as python bench/NAME.py takes them."""

    name: Annotated[Positional[str], arg(metavar="NAME")]  # One of bench/, such as sample_throughput.
    flags: Annotated[Positional[tuple[str, ...]], arg(metavar="FLAGS")] = ()  # What the benchmark takes: see NAME --help.

    def run(self) -> None:
        folder = Path(__file__).resolve().parents[2] / "bench"
        known = sorted(path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
        if not known:
            raise FileNotFoundError(f"there is no {folder}: benchmarks come with a checkout, installed by pip install -e")
        if self.name not in known:
            raise ValueError(f"no benchmark called {self.name!r}; there are {', '.join(known)}")
        subprocess.run([sys.executable, str(folder / f"{self.name}.py"), *self.flags], check=True)


@command
class Cache:
    """What the library derived from your data and keeps for later: decoded images, compiled kernels, fits of DCI."""

    action: Positional[Literal["show", "clear"]] = "show"  # clear removes all of it; what is needed is made again.

    def run(self) -> None:
        if self.action == "clear":
            count, size = caches.clear_caches()
            print(f"removed {count} files, {size / 2**20:.1f} MiB")
        print("\n".join(environment.aligned(environment.caches())))


@command
class Env:
    """Show versions, the machine, the caches, and each fast path: on, or off with the reason, found by calling it."""

    def run(self) -> None:
        print(environment.describe())


def given(**values) -> dict:
    """The values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def refuse(model: Pipeline, **flags) -> None:
    """`ValueError` if any of the flags, which belong to another class of model, was given."""
    if named := [f"--{name.replace('_', '-')}" for name in given(**flags)]:
        raise ValueError(f"a {type(model).__name__} takes no {' or '.join(named)}")


def at_level(beta: float | None) -> str:
    """Where an edit happens, of models that have several levels."""
    return "" if beta is None else f" at beta {beta:g}"


def choose(size: int, limit: int | None, seed: int = 0) -> Tensor:
    """Rising indices of all of `size` images, or of `limit` chosen at random, (N,)."""
    if limit is None or limit >= size:
        return torch.arange(size)
    return torch.randperm(size, generator=torch.Generator().manual_seed(as_seed(seed)))[:limit].sort().values


def require_suffix(path: Path, suffix: str) -> None:
    """`ValueError` unless `path` names a file of that kind."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"out must be a {suffix} file, got {path}")


def require_at_least(minimum: int, **values: int | None) -> None:
    """`ValueError` for the first value below `minimum`; None passes."""
    for name, value in values.items():
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def choose_cache(arguments: Sequence[str]) -> list[str]:
    """The arguments without --cache FOLDER, which is put into the environment, for this process and those it starts."""
    kept, left = [], iter(arguments)
    for argument in left:
        name, equals, folder = argument.partition("=")
        if name != "--cache":
            kept.append(argument)
        elif folder := folder if equals else next(left, ""):
            os.environ[caches.CACHE_VARIABLE] = str(files.expanded(folder).absolute())
        else:
            raise ValueError("--cache needs a folder")
    return kept


def dci_cache() -> Path | None:
    """Where fits of DCI are kept, or None, with a word in the log, where there is no place for them."""
    try:
        return caches.cache_folder() / "dci"
    except OSError as error:
        logger.warning("fits of DCI are not kept: %s", error)
        return None


def commands(typed: Sequence[str]) -> dict[str, Callable]:
    """Name to dataclass or function; the preset of --recipe is read first, because it gives the defaults of `train`."""
    parser = argparse.ArgumentParser(prog="multibeta train", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=DEFAULT_RECIPE)
    preset = recipes.find(parser.parse_known_args(typed)[0].recipe)
    train = train_command(preset, shlex.join(["multibeta", *typed]))
    models = (Sample, Edit, Interpolate, Encode, Evaluate, Report, Accelerate, Convert, Bench, Cache, Env)
    reproduce = reproduce_command(shlex.join(["multibeta", *typed]))
    return {"demo": Demo, "train": train, "reproduce": reproduce} | {kind.__name__.lower(): kind for kind in models}


def run(typed: list[str]) -> None:
    """Run the command of a command line."""
    name, *flags = choose_cache([argument for argument in typed if argument != "--debug"]) or ["--help"]
    known = commands(typed)
    if name not in known:
        tyro.extras.subcommand_cli_from_dict(known, prog="multibeta", description=DESCRIPTION, args=[name])
        return
    flags = [flags[0], "--", *flags[1:]] if name == "bench" and len(flags) > 1 else flags  # they are the script's
    with processors.fitting_threads():
        chosen = tyro.cli(known[name], prog=f"multibeta {name}", args=flags)
        if chosen is not None:  # train is a function, which has run
            chosen.run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 after an error of the user or the machine, 128 and its number after a signal."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(format="multibeta: %(message)s")
    logging.getLogger("multibeta").setLevel(logging.INFO)
    try:
        try:
            run(typed)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `multibeta ... | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print(f"multibeta: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except (
        ValueError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        torch.OutOfMemoryError,
        TrainingStopped,
        subprocess.CalledProcessError,
    ) as error:
        if "--debug" in typed:
            raise
        print(f"multibeta: {error}", file=sys.stderr)
        return 2
    return 0
