"""Commands that make pictures with a model: new images, edited ones, and those between two."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from tyro.conf import Positional, arg

from multibeta import data, diffusion_vae, files, latents
from multibeta.cli.arguments import (
    SHIPPED,
    AnySampler,
    AnySteps,
    Image,
    Model,
    OnModel,
    Source,
    Switch,
    command,
    given,
    require_at_least,
    require_suffix,
)
from multibeta.cli.images import choose, labels_of, load_images, open_source
from multibeta.evaluation import advance
from multibeta.nonlinear_diffusion import SAMPLERS
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline, convert_output

DIRECTION_IMAGES = 1000


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
        denoises, named = model.denoises, given(sampler=self.sampler, steps=self.steps)
        if named and not denoises:
            flags = " or ".join(f"--{name}" for name in named)
            raise ValueError(f"a {type(model).__name__} decodes noise at once and takes no {flags}")
        sampling = model.sampling_options(self.sampler, self.steps)
        with tqdm(desc="sampling", unit="step", disable=not denoises) as bar:

            def advance(done, total, _):
                bar.total = total
                bar.update(done - bar.n)

            options = sampling | {"callback": advance} if denoises else {}
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
        (beta,) = model.levels(None if self.beta is None else [self.beta], default=[0.7])
        model.sampling_options(self.sampler, self.steps)
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
        (beta,) = model.levels(None if self.beta is None else [self.beta], default=[0.7])
        others = {"dims": self.dims} if beta is None else {"noise": self.noise or None, **self.of_refiner()}
        refuse(model, **others)
        model.sampling_options(self.sampler, self.steps)
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


def refuse(model: Pipeline, **flags) -> None:
    """`ValueError` if any of the flags, which belong to another class of model, was given."""
    if named := [f"--{name.replace('_', '-')}" for name in given(**flags)]:
        raise ValueError(f"a {type(model).__name__} takes no {' or '.join(named)}")


def at_level(beta: float | None) -> str:
    """Where an edit happens, of models that have several levels."""
    return "" if beta is None else f" at beta {beta:g}"
