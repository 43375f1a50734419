"""What to train and how: one frozen dataclass per training, its JSON, the networks and the images that it asks for."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from multibeta import checkpoints, data
from multibeta.adversarial import AdversarialObjective, AdversarialOptions, against_discriminator
from multibeta.checks import check_integer
from multibeta.diffusion_vae import (
    CapacityObjective,
    CapacityObjectiveOptions,
    CapacityVAE,
    ConditionalDiffusion,
    ConditionalDiffusionConfig,
    ConditionalDiffusionObjective,
    ConditionalDiffusionObjectiveOptions,
)
from multibeta.files import expanded, read_json, write_text
from multibeta.gaussian_diffusion import (
    GaussianDiffusion,
    GaussianDiffusionConfig,
    GaussianDiffusionObjective,
    GaussianDiffusionObjectiveOptions,
)
from multibeta.multibeta_vae import MultiBetaObjective, MultiBetaObjectiveOptions, MultiBetaVAE, VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig, UNetShape
from multibeta.nonlinear_diffusion import (
    DiffusionConfig,
    NonlinearDiffusion,
    NonlinearDiffusionObjective,
    NonlinearDiffusionObjectiveOptions,
)
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, Pipeline, config_from_dict
from multibeta.recipes.decoder_tuning import DecoderTuningOptions
from multibeta.recipes.distillation import DistillationOptions
from multibeta.seeds import as_seed
from multibeta.training import TrainingOptions

LARGEST_TABLE = 2**30  # bytes

Plan = dict[str, tuple[TrainingOptions, dict[str, Any]]]

AFTER_STAGES = ("flow_map", "decoder_tuning")  # trainings that change nothing of both stages, and know what they need themselves
RECORD = "recipe.json"  # in the folder of a run
LEAST_HELD_OUT, MOST_HELD_OUT = 2, 1000  # of a tenth of the images


@dataclass(frozen=True)
class DataOptions:
    """The images, as `data.open_dataset` takes their `source`.

    Attributes:
        num_train: Images to train on; None takes all that are not held out.
        num_test: Images to hold out, at most a fifth of those that are there; None holds out a tenth, from 2 to 1000 of them.
        seed: Of the choice of images that are held out.
        upscale: Take images that are smaller than the resolution, enlarged.
        mirror: Train on the mirror images as well, left to right; not where they show text or digits, or where a known factor,
            such as an orientation, is no longer true.
    """

    # scenes (built in), a folder of images, shards:PATH for tar archives of them, or NAME:PATH for a published dataset: cars3d,
    # shapes3d, mpi3d, dsprites, celeba, celebahq, celebamaskhq, ffhq, lsun.
    source: str = "scenes"

    num_train: int | None = None
    num_test: int | None = 1000
    seed: int = 0
    upscale: bool = False
    mirror: bool = False
    white_level: int | None = None  # Of 16-bit grey in a folder or in shards: the value that becomes white, by default 65535.

    def __post_init__(self) -> None:
        as_seed(self.seed)
        for name, switch in (("upscale", self.upscale), ("mirror", self.mirror)):
            if not isinstance(switch, bool):
                raise ValueError(f"{name} must be True or False, got {switch!r}")
        for name, count, least in (("num_train", self.num_train, 1), ("num_test", self.num_test, 0)):
            if count is not None:  # whether there are as many, `split_counts` says
                check_integer(name, count, least, 2**63)
        if self.white_level is not None:
            check_integer("white_level", self.white_level, 1, data.WHITE_LEVEL)


@dataclass(frozen=True)
class VAEObjectiveOptions(MultiBetaObjectiveOptions):
    """See `MultiBetaObjective`; and what happens around its training.

    Attributes:
        fold: Rotate the latent to its principal axes (at beta = 0.5) after stage 1.
        untie_steps: As many more steps then train one curve sigma_j(beta) per latent channel: best where the steps before are
            just enough to anneal `balance`.
    """

    fold: bool = True
    untie_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("untie_steps", self.untie_steps, 0, 2**63)


@dataclass(frozen=True)
class DiffusionObjectiveOptions(NonlinearDiffusionObjectiveOptions):
    """See `NonlinearDiffusionObjective`; and what happens before its training.

    Attributes:
        statistics_images: Training images that the process is measured on, see `process_statistics` and `table_statistics`.
    """

    statistics_images: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("statistics_images", self.statistics_images, 1, 2**63)


@dataclass(frozen=True)
class LatentDiffusionObjectiveOptions(GaussianDiffusionObjectiveOptions):
    """See `GaussianDiffusionObjective`; and what happens before its training.

    Attributes:
        statistics_images: Training images that the fold of stage 1 and the normalisation of latents are measured on.
    """

    statistics_images: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("statistics_images", self.statistics_images, 1, 2**63)


@dataclass(frozen=True)
class RefinerObjectiveOptions(ConditionalDiffusionObjectiveOptions):
    """See `diffusion_vae.ConditionalDiffusionObjective`; and what happens before its training.

    Attributes:
        mixture_components: As many Gaussians are fitted to the latents of the training images, to draw new ones from; 0 keeps
            the prior.
    """

    mixture_components: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("mixture_components", self.mixture_components, 0)


@dataclass(frozen=True)
class Recipe:
    """Everything a training depends on; saved with the model. Stage 1 trains the `vae`, stage 2 the `diffusion` of a `model`.

    Attributes:
        warm_start: A model, a folder or the name of a shipped one, from whose diffusion network that of stage 2 starts.
        flow_map: Of a third training, that of a flow map, which follows where it has steps.
    """

    model: ClassVar[type[Pipeline]]

    name: str
    source: str
    data: DataOptions
    vae: AutoencoderConfig | BlockAutoencoderConfig
    vae_objective: Any
    vae_training: TrainingOptions
    diffusion: UNetShape
    diffusion_objective: Any
    diffusion_training: TrainingOptions
    warm_start: str | None = field(default=None, kw_only=True)
    flow_map: DistillationOptions = field(default=DistillationOptions(), kw_only=True)

    def first_objective(self, vae: nn.Module, **fields: Any) -> Any:
        """The objective of stage 1, with other `fields` in its options than the recipe's where they are given."""
        raise NotImplementedError

    def second_objective(self, vae: nn.Module, diffusion: nn.Module) -> Any:
        """The objective of stage 2, which sees images as a frozen `vae` does."""
        raise NotImplementedError

    def plan(self) -> Plan:
        """Folder of each training on images, in the order in which they follow, to its options and the context of its checkpoint.

        That of stage 1 says nothing of stage 2: copied into the folder of another run it is continued there, so that recipes that
        differ in stage 2 share it.
        """
        first = {name: dataclasses.asdict(getattr(self, name)) for name in ("data", "vae", "vae_objective")}
        whole = {name: value for name, value in dataclasses.asdict(self).items() if name not in AFTER_STAGES}
        return {"vae": (self.vae_training, first), "diffusion": (self.diffusion_training, whole)}


@dataclass(frozen=True)
class MultiBetaStageRecipe(Recipe):
    """What the systems share that are built on a multi-beta VAE: stage 1.

    Attributes:
        adversarial: A discriminator and LPIPS in stage 1, where it has a weight, or weights of LPIPS.
        decoder_tuning: Of a last training, that of the decoder alone, which follows where it has steps.
    """

    vae: VAEConfig
    vae_objective: VAEObjectiveOptions
    adversarial: AdversarialOptions = field(default=AdversarialOptions(weight=0.0), kw_only=True)
    decoder_tuning: DecoderTuningOptions = field(default=DecoderTuningOptions(), kw_only=True)

    def first_objective(self, vae: MultiBetaVAE, **fields: Any) -> MultiBetaObjective | AdversarialObjective:
        objective = MultiBetaObjective(vae, self.vae_objective, **fields)
        if not self.adversarial.active:
            return objective
        return against_discriminator(objective, vae, self.adversarial, self.vae_training.seed)

    def plan(self) -> Plan:
        plan = super().plan()
        first, whole = plan["vae"][1], plan["diffusion"][1]
        if self.adversarial.active:
            first["adversarial"] = whole["adversarial"]
        else:  # as checkpoints say that were there before it
            del whole["adversarial"]
        of_objective = [field.name for field in dataclasses.fields(MultiBetaObjectiveOptions)]  # the fold changes nothing learned
        first["vae_objective"] = {name: getattr(self.vae_objective, name) for name in of_objective}
        if self.vae_objective.untie_steps:
            untied = (dataclasses.replace(self.vae_training, steps=self.vae_objective.untie_steps), first)
            plan = {"vae": plan["vae"], "vae-untied": untied, "diffusion": plan["diffusion"]}
        return plan


@dataclass(frozen=True)
class MultiBetaRecipe(MultiBetaStageRecipe):
    """The first system."""

    model: ClassVar = DenoisingMultiBetaVAE

    diffusion: DiffusionConfig
    diffusion_objective: DiffusionObjectiveOptions

    def __post_init__(self) -> None:
        channels, side, _ = self.vae.latent_shape
        fitted = dataclasses.replace(
            self.diffusion,
            latent_channels=channels,
            latent_resolution=side,
            **vars(self.vae.grid),
            sigma_per_channel=self.vae.sigma_per_channel or self.vae_objective.untie_steps > 0,
        )
        object.__setattr__(self, "diffusion", fitted)  # the latent's shape and grid are the VAE's to say

    def second_objective(self, vae: MultiBetaVAE, diffusion: NonlinearDiffusion, **fields: Any) -> NonlinearDiffusionObjective:
        """As of `Recipe`; `fields` are further arguments of `NonlinearDiffusionObjective`."""
        return NonlinearDiffusionObjective(diffusion, vae.encode, self.diffusion_objective, **fields)

    def encodes_before(self, num_images: int) -> bool:
        """Whether all of `num_images` training images are encoded at all nodes before stage 2.

        They are where that is less work than to encode each batch at the ends of its intervals, and where the table is not large.
        """
        training, ends = self.diffusion_training, self.diffusion_objective.nodes + 1
        size = 2 * num_images * ends * math.prod(self.vae.latent_shape)  # of float16
        return ends > 1 and num_images * ends <= 2 * training.steps * training.batch_size and size <= LARGEST_TABLE


@dataclass(frozen=True)
class LatentDiffusionRecipe(MultiBetaStageRecipe):
    """What the first system is compared with: plain latent diffusion of z_0 = f(x, 0), without the noise of the encoder."""

    model: ClassVar = LatentDiffusion

    diffusion: GaussianDiffusionConfig
    diffusion_objective: LatentDiffusionObjectiveOptions

    def __post_init__(self) -> None:
        channels, side, _ = self.vae.latent_shape
        fitted = dataclasses.replace(self.diffusion, latent_channels=channels, latent_resolution=side)
        object.__setattr__(self, "diffusion", fitted)  # the latent's shape is the VAE's to say

    def second_objective(self, vae: MultiBetaVAE, diffusion: GaussianDiffusion, **fields: Any) -> GaussianDiffusionObjective:
        """As of `Recipe`; `fields` are further arguments of `GaussianDiffusionObjective`."""
        return GaussianDiffusionObjective(diffusion, functools.partial(vae.encode, beta=0.0), self.diffusion_objective, **fields)

    @classmethod
    def beside(cls, recipe: MultiBetaRecipe, name: str) -> LatentDiffusionRecipe:
        """Latent diffusion on the VAE of `recipe`: the same stage 1, images and budget, and a U-Net of the same shape."""
        shape = {field.name: getattr(recipe.diffusion, field.name) for field in dataclasses.fields(UNetShape)}
        objective = recipe.diffusion_objective
        return cls(
            name=name,
            source=f"{recipe.source}; plain latent diffusion",
            data=recipe.data,
            vae=recipe.vae,
            vae_objective=recipe.vae_objective,
            vae_training=recipe.vae_training,
            diffusion=GaussianDiffusionConfig(**shape),
            diffusion_objective=LatentDiffusionObjectiveOptions(objective.noise_draws, objective.statistics_images),
            diffusion_training=recipe.diffusion_training,
        )


@dataclass(frozen=True)
class DiffusionVAERecipe(Recipe):
    """The second system; with `diffusion.conditional` False its baseline, a DDPM that does not see what the VAE made."""

    model: ClassVar = DiffusionVAE

    vae: BlockAutoencoderConfig
    vae_objective: CapacityObjectiveOptions
    diffusion: ConditionalDiffusionConfig
    diffusion_objective: RefinerObjectiveOptions

    def __post_init__(self) -> None:
        images = {"resolution": self.vae.resolution, "image_channels": self.vae.image_channels}
        object.__setattr__(self, "diffusion", dataclasses.replace(self.diffusion, **images))  # both stages see one image

    def first_objective(self, vae: CapacityVAE, **fields: Any) -> CapacityObjective:
        return CapacityObjective(vae, self.vae_objective, **fields)

    def second_objective(self, vae: CapacityVAE, diffusion: ConditionalDiffusion) -> ConditionalDiffusionObjective:
        reconstruct = vae.reconstruct if self.diffusion.conditional else no_reconstruction
        return ConditionalDiffusionObjective(diffusion, reconstruct, self.diffusion_objective)


def no_reconstruction(images: Tensor, generator: torch.Generator) -> Tensor:
    """What an unconditional model sees for a reconstruction of images (N, C, H, W): zeros."""
    return torch.zeros_like(images)


CLASSES: dict[str, type[Recipe]] = {
    recipe.model.__name__: recipe for recipe in (MultiBetaRecipe, LatentDiffusionRecipe, DiffusionVAERecipe)
}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-ready values, with the class of its model."""
    return {"model": recipe.model.__name__, **dataclasses.asdict(recipe)}


def from_dict(values: dict[str, Any]) -> Recipe:
    """The recipe of `to_dict`, from JSON. Without the class of a model it is a `MultiBetaRecipe`: there were no others.

    Raises:
        ValueError: A field is unknown, missing or of another type; names it.
    """
    if not isinstance(values, dict):
        raise ValueError(f"the fields of a recipe must be given by name, got a {type(values).__name__}")
    values = dict(values)
    model = values.pop("model", DenoisingMultiBetaVAE.__name__)
    if not isinstance(model, str) or model not in CLASSES:
        raise ValueError(f"the model of a recipe must be {', '.join(CLASSES)}, got {model!r}")
    recipe = CLASSES[model]
    types = typing.get_type_hints(recipe)
    for name, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(types.get(name)):
            try:
                values[name] = config_from_dict(types[name], value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    return recipe(**checkpoints.typed(recipe, values))


def record(recipe: Recipe, folder: Path) -> None:
    """Write the recipe of the run in a folder there."""
    write_text(folder / RECORD, json.dumps(to_dict(recipe), indent=2) + "\n")


def recorded_recipe(folder: Path) -> Recipe | None:
    """The recipe that the run in a folder was last called with; None where it says none.

    Raises:
        ValueError: What it says is no recipe.
    """
    try:
        with checkpoints.naming(folder, "a recipe", RECORD):
            return from_dict(cast("dict[str, Any]", read_json(folder / RECORD)))
    except FileNotFoundError:
        return None


def build(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Both parts of a recipe's model, freshly initialised from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.vae_training.seed)
        vae, diffusion = (module(getattr(recipe, name)) for name, (module, _) in recipe.model.parts.items())
        return vae, diffusion


def open_images(recipe: Recipe, dataset: data.Dataset | data.Foreign | None = None) -> data.Dataset:
    """The dataset that a recipe takes its images from, as its networks see them, or a `dataset` handed over in its place."""
    options = recipe.data
    shape = {"resolution": recipe.vae.resolution, "channels": recipe.vae.image_channels}
    if dataset is not None:
        level = data.WHITE_LEVEL if options.white_level is None else options.white_level
        return data.as_dataset(dataset, **shape, upscale=options.upscale, white_level=level)
    return data.open_dataset(options.source, **shape, upscale=options.upscale, white_level=options.white_level)


def open_data(recipe: Recipe, dataset: data.Dataset | data.Foreign | None = None) -> tuple[data.Subset, data.Subset]:
    """(train, test) images of a recipe, in memory: see `open_images`."""
    opened = open_images(recipe, dataset)
    return data.split(opened, *split_counts(recipe, len(opened)), recipe.data.seed)


def split_counts(recipe: Recipe, held: int) -> tuple[int, int]:
    """How many of `held` images a recipe trains and tests on, before any are mirrored.

    Raises:
        ValueError: There are not enough; names the flag of `multibeta train` that mends it.
    """
    options = recipe.data
    if options.num_test is None:
        num_test = min(max(LEAST_HELD_OUT, min(held // 10, MOST_HELD_OUT)), held // 2)
    else:
        num_test = min(options.num_test, held // 5)  # a small folder keeps four fifths for training
    num_train = held - num_test if options.num_train is None else options.num_train
    if num_train + num_test > held:
        raise ValueError(
            f"{num_train} training and {num_test} test images need {num_train + num_test} images, {options.source} has {held}: "
            "lower --data.num-train (None takes all)"
        )
    return num_train, num_test


def located(recipe: Recipe, dataset: data.Dataset | data.Foreign | None = None) -> Recipe:
    """The recipe with its images and what it starts from as they are stored: paths made absolute, of a `dataset` its class."""
    source = data.absolute_source(recipe.data.source) if dataset is None else data.source_name(dataset)
    model = recipe.warm_start
    warm_start = None if model is None else located_model(model)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=source), warm_start=warm_start)


def located_model(model: str) -> str:
    """A model as `resolve_pretrained` takes it, named so that it is the same from any folder."""
    path = expanded(model)
    return os.path.abspath(path) if path.exists() or len(path.parts) > 1 else model
