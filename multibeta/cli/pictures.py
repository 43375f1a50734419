"""Commands that make pictures with a model: new images, edited ones, those between two, and what denoising makes of some."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional, arg

from multibeta import data, distribution
from multibeta.cli.arguments import (
    SHIPPED,
    AnySampler,
    AnySteps,
    Beta,
    Direction,
    EditBeta,
    Image,
    Images,
    Model,
    OnModel,
    Source,
    Switch,
    given,
    require_at_least,
    require_suffix,
)
from multibeta.cli.images import labels_of, load_images, open_source
from multibeta.latents import NamedDirections
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline, generate_folder, generate_npz, generate_shared
from multibeta.pipelines.directions import DIRECTION_IMAGES, encode_dataset
from multibeta.progress import advance, progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample(OnModel):
    """New images from noise: denoised, or by a baseline decoded at once, which takes no --sampler or --steps.

    A folder or an .npz file goes on where a call was stopped, and several processes share it: torchrun --nproc-per-node=8 -m
    multibeta sample MODEL --num-images 50000 --out FOLDER.
    """

    model: Model = SHIPPED
    out: Path  # A .png file for one grid, a folder for one PNG per image, named by index, or an .npz file as ADM evaluates.
    num_images: int = 64  # How many.
    sampler: AnySampler = None
    steps: AnySteps = None
    seed: int = 0  # Image i depends on the seed and i alone.
    batch_size: int = 64  # Images computed at once.

    def run(self) -> None:
        require_at_least(1, num_images=self.num_images, batch_size=self.batch_size)
        as_file = bool(self.out.suffix) and not self.out.is_dir()
        if as_file:
            require_suffix(self.out, ".png", ".npz")
        model = self.load(denoising=False)
        if not model.samplers:
            refuse(model, "decodes noise at once and takes", sampler=self.sampler, steps=self.steps)
        sampling = model.sampling_options(self.sampler, self.steps)
        model.set_progress_bar_config(desc="sampling", unit="step", disable=not model.samplers)
        options = {"seed": self.seed, "batch_size": self.batch_size, **sampling}
        if not as_file:
            generate_folder(model, self.out, self.num_images, **options)
        elif self.out.suffix.lower() == ".npz":
            generate_npz(model, self.out, self.num_images, **options)
        else:
            images = generate_shared(model, self.num_images, **options)
            if distribution.world().first:
                data.save_grid(images, self.out)
        print(f"{self.out}: {self.num_images} images from noise")


@dataclass(frozen=True, kw_only=True)
class Show(OnModel):
    """What denoising makes of images, one a column: the input, its mean latent decoded at once, the same denoised, an edit."""

    images: Images
    out: Path  # A .png file.
    beta: EditBeta = None
    direction: Direction = None  # Adds a row: the images moved along this principal direction, then denoised.
    directions: Path | None = None  # File of `multibeta directions` that has this direction, by name or number.
    strength: float = 2.0  # How far, in standard deviations.
    directions_from: Source = None  # Images whose encodings give the direction; by default the model's own data.
    sampler: AnySampler = None
    steps: AnySteps = None
    labels: Switch = False  # Write beside each row what it is.

    def run(self) -> None:
        require_suffix(self.out, ".png")
        model = self.load()
        file = load_directions(model, self.directions, self.directions_from)
        beta, sampling = edit_level(model, self.beta, 0.9, file), model.sampling_options(self.sampler, self.steps)
        images = load_images(self.images, model)
        latents = model.encode(images, beta)
        rows = {"input": images, f"latents{at_level(model, beta)} decoded at once": model.render(latents, beta, denoise=False)}
        rows["denoised"] = model.render(latents, beta, denoise=True, **sampling)
        if self.direction is not None or file is not None:
            step, name = find_direction(model, beta, file or self.directions_from, self.direction)
            rows[f"moved by {self.strength:+g} {name}"] = model.manipulate(latents, step, self.strength, beta, **sampling)
        grid, labels = torch.cat([row.cpu() for row in rows.values()]), list(rows) if self.labels else None
        data.save_grid(grid, self.out, columns=len(images), labels=labels)
        print(f"{self.out}: from above, {', '.join(rows)}")


@dataclass(frozen=True, kw_only=True)
class Edit(OnModel):
    """Images moved along a direction of their latents: one row per image, the input first."""

    images: Images
    out: Path  # A .png file.
    beta: EditBeta = None
    direction: Direction = None  # Principal direction; 0, the default, has the largest variance.
    directions: Path | None = None  # File of `multibeta directions` that has the direction instead, by name or number.
    attribute: str | None = None  # In its place, the way from images without this attribute to those with it.
    strengths: tuple[float, ...] = (-3, -1.5, 0, 1.5, 3)  # Columns, in standard deviations or in ways to an attribute.
    directions_from: Source = None  # Images whose encodings give the direction; by default the model's own data.
    sampler: AnySampler = None
    steps: AnySteps = None

    # Encode at beta 0 and walk up to beta, in place of encoding there: strength 0 then gives the image back, to its details.
    invert: Switch = False

    def run(self) -> None:
        require_suffix(self.out, ".png")
        if self.attribute is not None and (self.direction is not None or self.directions is not None):
            raise ValueError("--direction and --attribute are two ways to name a direction: give one")
        model = self.load()
        file = load_directions(model, self.directions, self.directions_from)
        sampling = model.sampling_options(self.sampler, self.steps, invert=self.invert)
        beta, inputs = edit_level(model, self.beta, 0.7, file), load_images(self.images, model)
        latents = model.invert(model.encode(inputs, 0.0), beta=beta, **sampling) if self.invert else model.encode(inputs, beta)
        step, name = find_direction(model, beta, file or self.directions_from, self.direction, self.attribute)
        with progress_bar(self.strengths, desc="editing", unit="strength") as strengths:
            edited = [model.manipulate(latents, step, strength, beta, **sampling).cpu() for strength in strengths]
        columns = [inputs, *edited]
        data.save_grid(torch.stack(columns, dim=1).flatten(0, 1), self.out, columns=len(columns))
        shown = ", ".join(f"{strength:+g}" for strength in self.strengths)
        print(f"{self.out}: each input, then {name}{at_level(model, beta)}{', inverted,' * self.invert} by {shown}")


@dataclass(frozen=True, kw_only=True)
class Interpolate(OnModel):
    """A path from one image to another through the latents; the inputs stand at its ends.

    Of a DiffusionVAE also from one noise to another at the latent of one image, which stands before it with its reconstruction.
    """

    first: Image
    second: Annotated[Positional[str | None], arg(metavar="IMAGE")] = None  # Where the path leads to; none with --noise.
    out: Path  # A .png file.
    beta: EditBeta = None
    num: int = 8  # Images on the path.
    dims: tuple[int, ...] | None = None  # Latent channels that change; all by default.
    how: Literal["lerp", "slerp"] | None = None  # Of a DiffusionVAE: a straight path, the default, or an arc.
    noise: Switch = False  # Of a DiffusionVAE: from noise to noise at one image.
    shared_noise: Switch = False  # Of a DiffusionVAE, by ddpm: all images take the same noise at every step.
    sampler: AnySampler = None
    steps: AnySteps = None
    invert: Switch = False  # Encode both at beta 0 and walk up to beta: the path then ends at the images, to their details.

    def run(self) -> None:
        require_suffix(self.out, ".png")
        require_at_least(2, num=self.num)
        model = self.load()
        beta = edit_level(model, self.beta, 0.7)
        of_refiner = {"how": self.how, "shared_noise": self.shared_noise or None}
        others = {"dims": self.dims} if beta is None else {"noise": self.noise or None, **of_refiner}
        refuse(model, "takes", **others)
        options = model.sampling_options(self.sampler, self.steps, invert=self.invert) | given(**of_refiner)
        if self.noise != (self.second is None):
            raise ValueError("--noise stays at one image: name no second" if self.noise else "name a second image, or --noise")
        inputs = [load_images([name], model) for name in (self.first, self.second) if name]
        first, last = inputs[0], inputs[-1]
        weights = torch.linspace(0, 1, self.num).tolist()
        with progress_bar(desc="interpolating", unit="step") as bar:
            options["callback"] = lambda done, total, _: advance(bar, done, total)
            if self.noise:
                assert isinstance(model, DiffusionVAE)  # the others take no --noise
                path = model.interpolate_noise(first, [0], [1], weights, **options)
            else:
                path = model.interpolate(first, last, weights, beta, self.dims, invert=self.invert, seeds=[0], **options)
        images = path[0].cpu()
        if self.noise:
            grid, shown = (first, model.decode(model.encode(first)).cpu(), images), "the image, its reconstruction, {}"
        else:
            grid, shown = (first, images, last), "the first image, {}, the second image"
        data.save_grid(torch.cat(grid), self.out, columns=self.num + 2)
        print(f"{self.out}: {shown.format(f'{self.num} images of the path{at_level(model, beta)}')}")


def find_direction(
    model: Pipeline,
    beta: float | None,
    source: NamedDirections | str | None,
    direction: str | None,
    attribute: str | None = None,
) -> tuple[Tensor, str]:
    """What strength 1 adds to a latent, (c, h, w), and its name: a direction, by default number 0, or the way to an attribute.

    Args:
        source: The directions to choose from; or images whose latents give principal directions, None for those that the model
            records.
        direction: A number, or of named directions a name.
    """
    if isinstance(source, NamedDirections):
        try:
            number = source.index(direction or 0)
        except LookupError as error:
            raise ValueError(error.args[0]) from None
        return source[number], f"deviations along {source.names[number]}"
    dataset, _ = open_source(model, source, "--directions-from", upscale=True)
    indices = data.choose(len(dataset), DIRECTION_IMAGES)
    has = None if attribute is None else labels_of(dataset, indices, attribute)
    latents = encode_dataset(model, dataset, indices, beta)
    if has is not None:
        return model.attribute_direction(latents[has], latents[~has], beta), f"the way to {attribute}"
    principal = model.principal_directions(latents, beta)
    number = as_number(direction or "0")
    if not 0 <= number < len(principal.directions):
        raise ValueError(f"direction must lie between 0 and {len(principal.directions) - 1}, got {number}")
    return principal.directions[number] * principal.deviations[number], f"deviations along direction {number}"


def as_number(direction: str) -> int:
    """The number of a principal direction; `ValueError` for a name, which only a file of directions knows."""
    try:
        return int(direction)
    except ValueError:
        raise ValueError(f"--direction is a number, or a name in the file of --directions, got {direction!r}") from None


def load_directions(model: Pipeline, path: Path | None, source: str | None) -> NamedDirections | None:
    """The directions of a file, if one is named."""
    if path is None:
        return None
    if source is not None:
        raise ValueError("--directions has directions, --directions-from finds some: give one")
    return model.load_directions(path)


def edit_level(model: Pipeline, beta: Beta, unmeasured: float, file: NamedDirections | None = None) -> float | None:
    """Where images are encoded: at `beta`, by default at that of the directions of a file, or else at the model's auto beta.

    Where the model knows none it is `unmeasured`.
    """
    if beta is None and file is not None:
        beta = file.beta
    if beta is None and isinstance(model, DenoisingMultiBetaVAE):
        beta = "auto" if model.spectrum is not None else unmeasured
        if beta != "auto":
            advice = "`multibeta spectrum MODEL --save` measures it"
            logger.warning("the model does not know what each beta keeps of an image, going on at %g: %s", unmeasured, advice)
    (level,) = model.levels(None if beta is None else [beta])
    if file is not None and file.beta != level:
        logger.warning("the directions were found at beta %g, and serve less at %g", file.beta, level)
    return level


def refuse(model: Pipeline, takes: str, **flags: Any) -> None:
    """`ValueError` if any of the flags, which belong to another class of model, was given."""
    if named := [f"--{name.replace('_', '-')}" for name in given(**flags)]:
        raise ValueError(f"a {type(model).__name__} {takes} no {' or '.join(named)}")


def at_level(model: Pipeline, beta: float | None) -> str:
    """Where an edit happens, of models that have several levels."""
    if beta is None:
        return ""
    try:
        auto = model.auto_beta
    except ValueError:  # it knows none, or what it knew is damaged
        auto = None
    return f" at beta {beta:g}" + (" (auto)" if beta == auto else "")
