"""What to train and how: one frozen dataclass per experiment, one preset per table of the papers, and the run itself."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from multibeta import checkpoints, data
from multibeta.checks import check_integer, is_integer
from multibeta.diffusion_vae import (
    CapacityObjective,
    CapacityVAE,
    ConditionalDiffusionConfig,
    ConditionalDiffusionObjective,
)
from multibeta.files import occupy
from multibeta.multibeta_vae import MultiBetaObjective, MultiBetaVAE, VAEConfig, fold_principal_axes, untie_sigma
from multibeta.networks import BLOCKS_32, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusionObjective, process_statistics
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline, config_from_dict
from multibeta.recipes import preflight
from multibeta.saving import unwrapped
from multibeta.schedules import spatial
from multibeta.seeds import as_seed
from multibeta.training import TrainingOptions, check_folder, train

logger = logging.getLogger(__name__)

GRID_BETAS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class DataOptions:
    """The images, as `data.open_dataset` takes their `source`; `num_train` None takes all but `num_test`."""

    # scenes (built in), a folder of images, or NAME:PATH for a published dataset: cars3d, shapes3d, mpi3d, dsprites, celeba,
    # celebahq, celebamaskhq, ffhq, lsun.
    source: str = "scenes"

    num_train: int | None = None
    num_test: int = 1000
    seed: int = 0
    upscale: bool = False
    mirror: bool = False  # Train on the mirror images as well.
    white_level: int | None = None  # Of 16-bit grey in a folder: the value that becomes white, by default 65535.

    def __post_init__(self):
        as_seed(self.seed)
        for name, count in (("num_train", 0 if self.num_train is None else self.num_train), ("num_test", self.num_test)):
            if not is_integer(count):  # whether there are as many, `preflight.counts` says
                raise ValueError(f"{name} must be an integer, got {count!r}")
        if self.white_level is not None:
            check_integer("white_level", self.white_level, 1, data.WHITE_LEVEL)


@dataclass(frozen=True)
class VAEObjectiveOptions:
    """See `MultiBetaObjective`.

    `fold` rotates the latent to its principal axes (at beta = 0.5) after stage 1. `untie_steps` more steps then train one curve
    sigma_j(beta) per latent channel: best where the steps before are just enough to anneal `balance`.
    """

    balance: float | None = 2.0
    anneal: float = 0.25
    decoder_weight: float = 0.1
    curve_learning_rate: float = 5.0
    collapse_step: int = 500
    fold: bool = True
    untie_steps: int = 0

    def __post_init__(self):
        check_integer("untie_steps", self.untie_steps, 0, 2**63)


@dataclass(frozen=True)
class DiffusionObjectiveOptions:
    """See `NonlinearDiffusionObjective`; `statistics_images` measure the process (`process_statistics`)."""

    weight_exponent: float = 0.0
    noise_draws: int = 1
    statistics_images: int = 1000

    def __post_init__(self):
        check_integer("statistics_images", self.statistics_images, 1, 2**63)


@dataclass(frozen=True)
class CapacityObjectiveOptions:
    """See `diffusion_vae.CapacityObjective`."""

    gamma: float = 100.0
    capacity: float = 25.0
    warmup: float = 0.85
    reduction: Literal["batch_mean", "batch_sum"] = "batch_mean"


@dataclass(frozen=True)
class ConditionalDiffusionObjectiveOptions:
    """See `diffusion_vae.ConditionalDiffusionObjective`.

    `mixture_components` Gaussians are fitted to the latents of the training images, to draw new ones from; 0 keeps the prior.
    """

    condition_dropout: float = 0.0
    mixture_components: int = 0

    def __post_init__(self):
        check_integer("mixture_components", self.mixture_components, 0)


@dataclass(frozen=True)
class Recipe:
    """Everything a training depends on; saved with the model. Each kind trains the two parts of its `model`, `vae` first."""

    model: ClassVar[type[Pipeline]]

    name: str
    source: str
    data: DataOptions


@dataclass(frozen=True)
class MultiBetaRecipe(Recipe):
    """The first system."""

    model: ClassVar = DenoisingMultiBetaVAE

    vae: VAEConfig
    vae_objective: VAEObjectiveOptions
    vae_training: TrainingOptions
    diffusion: DiffusionConfig
    diffusion_objective: DiffusionObjectiveOptions
    diffusion_training: TrainingOptions

    def __post_init__(self):
        channels, side, _ = self.vae.latent_shape
        fitted = dataclasses.replace(
            self.diffusion,
            latent_channels=channels,
            latent_resolution=side,
            num_steps=self.vae.num_steps,
            schedule=self.vae.schedule,
            sigma_per_channel=self.vae.sigma_per_channel or self.vae_objective.untie_steps > 0,
        )
        object.__setattr__(self, "diffusion", fitted)  # the latent's shape and grid are the VAE's to say


@dataclass(frozen=True)
class DiffusionVAERecipe(Recipe):
    """The second system; with `diffusion.conditional` False its baseline, a DDPM that does not see what the VAE made."""

    model: ClassVar = DiffusionVAE

    vae: BlockAutoencoderConfig
    vae_objective: CapacityObjectiveOptions
    vae_training: TrainingOptions
    diffusion: ConditionalDiffusionConfig
    diffusion_objective: ConditionalDiffusionObjectiveOptions
    diffusion_training: TrainingOptions

    def __post_init__(self):
        images = {"resolution": self.vae.resolution, "image_channels": self.vae.image_channels}
        object.__setattr__(self, "diffusion", dataclasses.replace(self.diffusion, **images))  # both stages see one image


KINDS: dict[str, type[Recipe]] = {kind.model.__name__: kind for kind in (MultiBetaRecipe, DiffusionVAERecipe)}


def to_dict(recipe: Recipe) -> dict:
    """The recipe as JSON-ready values, with the class of its model."""
    return {"model": recipe.model.__name__, **dataclasses.asdict(recipe)}


def from_dict(values: dict) -> Recipe:
    """The recipe of `to_dict`, from JSON. Without the class of a model it is a `MultiBetaRecipe`: there were no others."""
    values = dict(values)
    kind = KINDS[values.pop("model", DenoisingMultiBetaVAE.__name__)]
    types = typing.get_type_hints(kind)
    return kind(**{name: config_from_dict(types[name], v) if isinstance(v, dict) else v for name, v in values.items()})


def build(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Both parts of a recipe's model, freshly initialised from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.vae_training.seed)
        vae, diffusion = (module(getattr(recipe, name)) for name, (module, _) in recipe.model.parts.items())
        return vae, diffusion


def open_images(recipe: Recipe):
    """The dataset that a recipe takes its images from, as its networks see them."""
    options = recipe.data
    shape = {"resolution": recipe.vae.resolution, "channels": recipe.vae.image_channels}
    return data.open_dataset(options.source, **shape, upscale=options.upscale, white_level=options.white_level)


def open_data(recipe: Recipe) -> tuple[data.Subset, data.Subset]:
    """(train, test) images of a recipe, in memory."""
    dataset = open_images(recipe)
    return data.split(dataset, *preflight.counts(recipe, len(dataset)), recipe.data.seed)


def located(recipe: Recipe) -> Recipe:
    """The recipe with the path of its images made absolute, as it is stored: see `data.absolute_source`."""
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source=data.absolute_source(recipe.data.source)))


def changes(recipe: Recipe) -> dict[str, tuple] | None:
    """What a recipe changes of the preset of its name, field to (preset's, its own); None where there is no such preset.

    What follows from the VAE counts with the VAE.
    """
    preset = RECIPES.get(recipe.name)
    if type(preset) is not type(recipe):
        return None
    fitted = dataclasses.replace(preset, vae=recipe.vae, vae_objective=recipe.vae_objective)
    found = {}
    for part in (field.name for field in dataclasses.fields(recipe) if field.name not in ("name", "source")):
        before = dataclasses.asdict(getattr(fitted if part == "diffusion" else located(preset), part))
        for name, value in dataclasses.asdict(getattr(located(recipe), part)).items():
            implied = name == "num_train" and value is None and "data.source" in found  # other images, of which all are taken
            if value != before[name] and not implied:
                found[f"{part}.{name}"] = (before[name], value)
    return found


def recorded_changes(info: dict) -> dict[str, tuple] | None:
    """`changes` of the recipe that a model records in its `info`, also one that was saved before they were recorded there."""
    if "changes" in info:
        return info["changes"]
    try:
        return changes(from_dict(info["recipe"]))
    except (KeyError, TypeError, ValueError, AttributeError):  # no recipe, or not a whole one
        return None


def origin(recipe: Recipe, command: str | None, train_images, test_images) -> dict:
    """What a model records of its training: `Pipeline.info`."""
    images = {
        "training": len(train_images),
        "held_out": len(test_images),
        "fingerprint": data.fingerprint_of(train_images),
    }
    folder = {"command": command, "working_folder": str(Path.cwd())}
    return {"recipe": to_dict(recipe), "changes": changes(recipe), "images": images, **folder}


def planned(recipe: Recipe) -> dict[str, tuple[TrainingOptions, dict]]:
    """Folder of each training of a recipe to its options and the context that its checkpoint holds."""
    first = {name: dataclasses.asdict(getattr(recipe, name)) for name in ("data", "vae", "vae_objective")}
    stages = {"vae": (recipe.vae_training, first), "diffusion": (recipe.diffusion_training, dataclasses.asdict(recipe))}
    if isinstance(recipe, MultiBetaRecipe):
        first["vae_objective"] = objective_options(recipe.vae_objective)
        if recipe.vae_objective.untie_steps:
            stages["vae-untied"] = (dataclasses.replace(recipe.vae_training, steps=recipe.vae_objective.untie_steps), first)
    return stages


def check(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Build the networks and the objectives of a recipe on the meta device; returns the networks, without values.

    Raises:
        ValueError: A network cannot be, or an objective does not take its options; says which flag of `train` mends it.
    """
    vae, diffusion = networks = preflight.check_networks(recipe)
    make = {
        "vae_objective": lambda: first_objective(recipe, vae),
        "diffusion_objective": lambda: second_objective(recipe, vae, diffusion),
    }
    for part, objective in make.items():
        with preflight.naming_flags(part, type(getattr(recipe, part))):
            objective()
    if getattr(recipe.vae, "sigma_per_channel", False):
        needed = {"no-fold": recipe.vae_objective.fold, "untie-steps 0": recipe.vae_objective.untie_steps}
        if flags := " ".join(f"--vae-objective.{words}" for words, lacking in needed.items() if lacking):
            raise ValueError(f"--vae.sigma-per-channel needs {flags}: the axes of channels with their own sigma are their own")
    return networks


def check_place(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """That `folder` can hold a run of a recipe, whose parts fit together: see `check` and `preflight`."""
    preflight.check_place(folder, list(planned(recipe)), check(recipe), resume=resume)


def first_objective(recipe: Recipe, vae: nn.Module, **options):
    """The objective of stage 1, with other `options` than the recipe's where they are given."""
    kind = MultiBetaObjective if isinstance(recipe, MultiBetaRecipe) else CapacityObjective
    return kind(vae, **objective_options(recipe.vae_objective) | options)


def second_objective(recipe: Recipe, vae: nn.Module, diffusion: nn.Module):
    """The objective of stage 2, which sees images as a frozen `vae` does."""
    options = objective_options(recipe.diffusion_objective)
    if isinstance(recipe, MultiBetaRecipe):
        return NonlinearDiffusionObjective(diffusion, vae.encode, **options)
    conditional = recipe.diffusion.conditional
    reconstruct = vae.reconstruct if conditional else lambda images, generator: torch.zeros_like(images)
    return ConditionalDiffusionObjective(diffusion, reconstruct, **options)


def prepare(recipe: Recipe, folder: Path, *, resume: bool = False, device: str | torch.device = "cpu"):
    """(train, test) images of a run, after everything that can be known of it was checked, of all its stages.

    Raises:
        ValueError: The device, the networks, the images, or a checkpoint to resume from do not fit the recipe.
        OSError: `folder` cannot hold the run; `FileExistsError` where it holds one and `resume` is False.
    """
    preflight.check_device(device)
    check_place(recipe, folder, resume=resume)
    train_images, test_images = open_data(recipe)
    train_images = data.Mirrored(train_images) if recipe.data.mirror else train_images
    preflight.check_counts(recipe, len(train_images))
    for name, (options, context) in planned(recipe).items():
        check_folder(folder / name, options, train_images, resume=resume, context=context)
    if not len(test_images):
        logger.warning(
            "no images are held out: there will be no validation loss, and pictures along the way show training images"
        )
    return train_images, test_images


def shown_images(train_images, test_images) -> Tensor:
    """Images for the pictures along the way, (N, C, H, W) in [-1, 1]: held-out ones where there are any."""
    images = test_images if len(test_images) else train_images
    return data.to_float(images.images(range(min(8, len(images)))))


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> Pipeline:
    """Train both stages of a recipe.

    `folder` receives vae/ and diffusion/ (checkpoint, metrics.jsonl, image grids along the way) and model/, the result as
    `Pipeline.save_pretrained` writes it. `resume` continues whichever stage was interrupted. See `prepare` for what is checked
    before the first begins.
    """
    folder, recipe = Path(folder), located(recipe)
    with occupy(folder, "training in"):
        train_images, test_images = prepare(recipe, folder, resume=resume, device=device)
        common = {"resume": resume, "device": device, "progress": progress}
        first, second = STAGES[type(recipe)]
        vae = first(recipe, train_images, test_images, folder, **common)
        return second(recipe, vae, train_images, test_images, folder, **common, command=command)


def train_stage(objective, train_images, options: TrainingOptions, folder: Path, **training) -> None:
    """Train the module of an objective and leave it averaged and frozen; arguments as of `training.train`."""
    unwrapped(objective.module).load_state_dict(train(objective, train_images, options, folder, **training))
    objective.module.eval().requires_grad_(False)


def train_vae(
    recipe: MultiBetaRecipe, train_images, test_images, folder: Path, *, resume=False, device="cpu", progress=True
) -> MultiBetaVAE:
    """Stage 1: the VAE of a recipe, folded and untied as it says, frozen. Arguments as of `run`."""
    vae = build(recipe)[0].to(device)
    stages, shown = planned(recipe), shown_images(train_images, test_images)

    def stage(vae: MultiBetaVAE, name: str, description: str, **options) -> None:
        training, context = stages[name]
        train_stage(
            first_objective(recipe, vae, **options),
            train_images,
            training,
            folder / name,
            validation=test_images if len(test_images) else None,
            resume=resume and (name == "vae" or checkpoints.exists(folder / name / "checkpoint")),
            on_validate=lambda step, _: save_reconstructions(vae, shown, folder / name / f"reconstructions-{step:06d}.png"),
            progress=progress,
            description=description,
            context=context,
        )

    stage(vae, "vae", "stage 1, VAE")
    if recipe.vae_objective.fold:
        fold_principal_axes(vae, in_batches(vae.encode, device)(statistics_images(recipe, train_images), 0.5))
    if recipe.vae_objective.untie_steps:
        vae = untie_sigma(vae).to(device)
        stage(vae, "vae-untied", "stage 1, sigma per channel", anneal=0.0)
    return vae


def objective_options(options) -> dict:
    """The fields of an objective's options that it takes itself: the others say what happens around its training."""
    around = ("fold", "untie_steps", "statistics_images", "mixture_components")
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in around}


def statistics_images(recipe: MultiBetaRecipe, train_images) -> Tensor:
    """The training images that the fold and the process are measured on, (N, C, H, W) in [-1, 1]."""
    count = min(recipe.diffusion_objective.statistics_images, len(train_images))
    return data.to_float(train_images.images(range(count)))


def train_diffusion(
    recipe: MultiBetaRecipe,
    vae: MultiBetaVAE,
    train_images,
    test_images,
    folder: Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> DenoisingMultiBetaVAE:
    """Stage 2: the diffusion model over the latents of a frozen `vae`, saved together. Arguments as of `run`."""
    diffusion = build(recipe)[1].to(device)
    encode = in_batches(vae.encode, device)
    images = statistics_images(recipe, train_images)
    statistics = process_statistics(encode, images, recipe.vae.num_steps, recipe.vae.schedule)
    diffusion.set_process(vae.sigmas(), *statistics)

    model = DenoisingMultiBetaVAE(vae, diffusion, origin(recipe, command, train_images, test_images))
    diffusion.requires_grad_(True)
    train_stage(
        second_objective(recipe, vae, diffusion),
        train_images,
        recipe.diffusion_training,
        folder / "diffusion",
        validation=test_images if len(test_images) else None,
        resume=resume and checkpoints.exists(folder / "diffusion" / "checkpoint"),  # it may have stopped before
        on_validate=lambda step, _: save_samples(model, folder / "diffusion" / f"samples-{step:06d}.png"),
        progress=progress,
        description="stage 2, diffusion",
        context=dataclasses.asdict(recipe),
    )
    return saved(model, folder)


def saved(model: Pipeline, folder: Path) -> Pipeline:
    """The trained model, written to `folder`/model."""
    model.save_pretrained(folder / "model")
    logger.info("saved the model in %s", folder / "model")
    return model


def train_capacity_vae(
    recipe: DiffusionVAERecipe, train_images, test_images, folder: Path, *, resume=False, device="cpu", progress=True
) -> CapacityVAE:
    """Stage 1 of the second system: the VAE of a recipe, frozen. Arguments as of `run`.

    Its checkpoint says nothing of stage 2: copied into the folder of another run it is continued there, so that recipes that
    differ in stage 2 share it.
    """
    vae = build(recipe)[0].to(device)
    shown = shown_images(train_images, test_images)
    options, context = planned(recipe)["vae"]
    train_stage(
        first_objective(recipe, vae),
        train_images,
        options,
        folder / "vae",
        validation=test_images if len(test_images) else None,
        resume=resume,
        on_validate=lambda step, _: save_sketches(vae, shown, folder / "vae" / f"reconstructions-{step:06d}.png"),
        progress=progress,
        description="stage 1, VAE",
        context=context,
    )
    return vae


def train_refiner(
    recipe: DiffusionVAERecipe,
    vae: CapacityVAE,
    train_images,
    test_images,
    folder: Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
) -> DiffusionVAE:
    """Stage 2 of the second system: the refiner of what a frozen `vae` makes, saved together. Arguments as of `run`."""
    diffusion = build(recipe)[1].to(device)
    model = DiffusionVAE(vae, diffusion, origin(recipe, command, train_images, test_images))
    if recipe.diffusion_objective.mixture_components:
        model.fit_latents(train_images, recipe.diffusion_objective.mixture_components, progress=progress)
    shown = shown_images(train_images, test_images)
    diffusion.requires_grad_(True)
    train_stage(
        second_objective(recipe, vae, diffusion),
        train_images,
        recipe.diffusion_training,
        folder / "diffusion",
        validation=test_images if len(test_images) else None,
        resume=resume and checkpoints.exists(folder / "diffusion" / "checkpoint"),  # it may have stopped before
        on_validate=lambda step, _: save_refinements(model, shown, folder / "diffusion" / f"samples-{step:06d}.png"),
        progress=progress,
        description="stage 2, diffusion",
        context=dataclasses.asdict(recipe),
    )
    return saved(model, folder)


STAGES = {MultiBetaRecipe: (train_vae, train_diffusion), DiffusionVAERecipe: (train_capacity_vae, train_refiner)}


def in_batches(encode: Callable[[Tensor, float], Tensor], device, batch_size: int = 256) -> Callable[[Tensor, float], Tensor]:
    """`encode` over many images, batch by batch, without gradients, in float32, on the CPU side again."""

    @torch.no_grad()
    def encode_all(images: Tensor, beta: float) -> Tensor:
        return torch.cat([encode(batch.to(device), beta).float().cpu() for batch in images.split(batch_size)])

    return encode_all


@torch.no_grad()
def save_reconstructions(vae: MultiBetaVAE, images: Tensor, path: Path) -> None:
    """Image grid: the images, and below them g(f(x, beta) + sigma eps, beta) for rising beta."""
    images = images.to(next(vae.parameters()).device)
    noise = torch.randn(len(images), *vae.config.latent_shape, generator=torch.Generator().manual_seed(0)).to(images.device)
    rows = [images]
    for beta in GRID_BETAS:
        latents = vae.encode(images, beta) + spatial(vae.sigma(torch.tensor([beta], device=images.device))) * noise
        rows.append(vae.decode(latents, beta))
    data.save_grid(torch.cat(rows), path, columns=len(images))


def save_samples(model: DenoisingMultiBetaVAE, path: Path) -> None:
    """Image grid of 32 samples by `ode2` in 20 steps."""
    data.save_grid(model.generate(32, sampler="ode2", steps=min(20, model.num_steps)), path, columns=8)


@torch.no_grad()
def save_sketches(vae: CapacityVAE, images: Tensor, path: Path) -> None:
    """Image grid: the images, and below them what the means of their latents decode to."""
    images = images.to(next(vae.parameters()).device)
    data.save_grid(torch.cat([images, vae.decode(vae.encode(images))]), path, columns=len(images))


def save_refinements(model: DiffusionVAE, images: Tensor, path: Path) -> None:
    """Image grid: images, their reconstructions, these refined, and new images, by `ddim` in 20 steps."""
    steps = min(20, model.num_steps)
    reconstructions = model.decode(model.encode(images))
    rows = [images.to(model.device), reconstructions, model.denoise(reconstructions, steps=steps)]
    data.save_grid(torch.cat([*rows, model.generate(len(images), steps=steps)]), path, columns=len(images))


_PAPER_VAE = VAEConfig(resolution=256, base_channels=128, channel_multipliers=(1, 2, 4, 6), embedding_channels=512)
_PAPER_UNET = DiffusionConfig(base_channels=256, channel_multipliers=(1, 3, 5), attention_resolutions=(32, 16, 8))
_CELEBA_VAE = VAEConfig(
    resolution=64,
    base_channels=32,
    channel_multipliers=(1, 2, 4),
    num_groups=16,  # 32 groups of one channel would normalise the shift by beta away
    embedding_channels=128,
)
_CELEBA_UNET = DiffusionConfig(
    base_channels=64,
    channel_multipliers=(1, 2, 4, 4),
    attention_resolutions=(16, 8, 4),
    head_channels=None,
    num_heads=8,
)
_TOY_VAE = VAEConfig(
    architecture="toy",
    resolution=64,
    latent_channels=32,
    base_channels=64,
    channel_multipliers=(1, 1, 2, 4),
    activation="sigmoid",
    embedding_channels=128,
    num_steps=500,
)
_TOY_UNET = DiffusionConfig(base_channels=256, channel_multipliers=(1,), attention_resolutions=())
_SCENES_VAE = VAEConfig(
    resolution=32,
    base_channels=32,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=1,
    mid_attention=False,
    num_groups=8,
    embedding_channels=128,
)
_SCENES_UNET = DiffusionConfig(
    base_channels=60,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(8, 4),
    head_channels=20,
    num_groups=12,
)
_SCENES_REFINER = ConditionalDiffusionConfig(
    resolution=32,
    base_channels=32,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    num_heads=4,
    dropout=0.0,
    num_groups=8,
    form="eq7",
)
_SCENES32 = (_SCENES_VAE, _SCENES_UNET)
_SCENES64 = (
    dataclasses.replace(_TOY_VAE, activation="silu", num_groups=8),
    dataclasses.replace(_TOY_UNET, base_channels=128, num_groups=8),
)


def _paper(name: str, source: str, vae, unet, batch_size: int, steps: int, learning_rate: float, **objective) -> MultiBetaRecipe:
    """A preset of the first paper: their architecture and budget; the balance and the parameterisation are the mended ones."""
    training = TrainingOptions(steps=steps, batch_size=batch_size, learning_rate=learning_rate, final_learning_rate=1.0)
    return MultiBetaRecipe(
        name=name,
        source=source,
        data=DataOptions(source="images"),
        vae=vae,
        vae_objective=VAEObjectiveOptions(**objective),
        vae_training=training,
        diffusion=unet,
        diffusion_objective=DiffusionObjectiveOptions(),
        diffusion_training=dataclasses.replace(training, ema_decay=0.9999),
    )


def _scenes(
    name: str,
    source: str,
    networks: tuple[VAEConfig, DiffusionConfig],
    balance: float,
    vae_steps: int,
    diffusion_steps: int,
    batch_size: int,
    num_train: int,
    statistics_images: int,
) -> MultiBetaRecipe:
    """A preset on the built-in scenes, sized for two CPU cores; each batch of encodings makes a batch of 128 for the U-Net."""
    vae, unet = networks
    common = {"batch_size": batch_size, "validate_every": 1000, "checkpoint_every": 500}
    return MultiBetaRecipe(
        name=name,
        source=source,
        data=DataOptions(source="scenes", num_train=num_train, num_test=4000),
        vae=vae,
        vae_objective=VAEObjectiveOptions(balance=balance),
        vae_training=TrainingOptions(steps=vae_steps, learning_rate=2e-3, ema_decay=0.998, **common),
        diffusion=unet,
        diffusion_objective=DiffusionObjectiveOptions(noise_draws=128 // batch_size, statistics_images=statistics_images),
        diffusion_training=TrainingOptions(steps=diffusion_steps, learning_rate=1e-3, ema_decay=0.998, **common),
    )


def _diffusion_vae_paper(name: str, source: str) -> DiffusionVAERecipe:
    """The preset of the second paper.

    Paper note: 117,000 steps are the 500 epochs of Table 2; stage 2 is given in days, its steps are the 1000 epochs of the
    published script. The published scripts flip each image with probability 1/2.
    """
    training = TrainingOptions(
        steps=117_000,
        batch_size=128,
        learning_rate=1e-4,
        warmup_steps=0,
        final_learning_rate=1.0,
        adam_betas=(0.9, 0.999),
        ema_decay=0.0,
    )
    second = {"steps": 468_000, "batch_size": 64, "learning_rate": 2e-5, "warmup_steps": 5000, "ema_decay": 0.9999}
    return DiffusionVAERecipe(
        name=name,
        source=source,
        data=DataOptions(source="images", mirror=True),
        vae=BlockAutoencoderConfig(),
        vae_objective=CapacityObjectiveOptions(),
        vae_training=training,
        diffusion=ConditionalDiffusionConfig(),
        diffusion_objective=ConditionalDiffusionObjectiveOptions(),
        diffusion_training=dataclasses.replace(training, **second),
    )


def _diffusion_vae_scenes(
    name: str, source: str, gamma: float, vae_steps: int, diffusion_steps: int, batch_size: int, num_train: int
) -> DiffusionVAERecipe:
    """The second system on the built-in scenes, sized for two CPU cores.

    gamma = 6.25 is the published 100 at a sixteenth of the pixels. Without a capacity a linear VAE would keep 5.5 nats of these
    images at that price, so the capacity of 25 binds.
    """
    common = {"batch_size": batch_size, "learning_rate": 1e-3, "ema_decay": 0.998, "validate_every": 1000}
    return DiffusionVAERecipe(
        name=name,
        source=source,
        data=DataOptions(source="scenes", num_train=num_train, num_test=4000),
        vae=BLOCKS_32,
        vae_objective=CapacityObjectiveOptions(gamma=gamma),
        vae_training=TrainingOptions(steps=vae_steps, **common),
        diffusion=_SCENES_REFINER,
        diffusion_objective=ConditionalDiffusionObjectiveOptions(mixture_components=10),
        diffusion_training=TrainingOptions(steps=diffusion_steps, **common),
    )


def untied(recipe: MultiBetaRecipe, name: str) -> MultiBetaRecipe:
    """The recipe with one curve sigma_j(beta) per latent channel, which part after a quarter of the steps."""
    shared = recipe.vae_training.steps // 4
    return dataclasses.replace(
        recipe,
        name=name,
        vae_objective=dataclasses.replace(
            recipe.vae_objective, anneal=1.0, fold=True, untie_steps=recipe.vae_training.steps - shared
        ),
        vae_training=dataclasses.replace(recipe.vae_training, steps=shared),
    )


def literal(recipe: MultiBetaRecipe) -> MultiBetaRecipe:
    """The recipe as the paper prints it: the sums of Eq. 4, the heads of Eq. 19, no folded rotation."""
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-literal",
        source=f"{recipe.source}; Eq. 4 and Eq. 19 as printed",
        vae=dataclasses.replace(recipe.vae, collapse_exponent=None),
        vae_objective=dataclasses.replace(recipe.vae_objective, balance=None, anneal=0.0, decoder_weight=0.0, fold=False),
        diffusion=dataclasses.replace(recipe.diffusion, parameterization="literal"),
    )


# fmt: off
_PRESETS: tuple[Callable[[], Recipe], ...] = (
    #               name               source                           vae          unet         batch    steps  rate
    lambda: _paper("celebahq256",      "MultiBeta Table 6, C.1.3",      _PAPER_VAE,  _PAPER_UNET,    98, 120_000, 5.6e-5),
    lambda: _paper("ffhq256",          "MultiBeta Table 6, C.1.3",      _PAPER_VAE,  _PAPER_UNET,    98, 180_000, 4.4e-5),
    lambda: _paper("bedrooms256",      "MultiBeta Table 6, C.1.3",      _PAPER_VAE,  _PAPER_UNET,    98, 300_000, 4.4e-5),
    lambda: _paper("celeba64",         "MultiBeta Tables 4 and 5",      _CELEBA_VAE, _CELEBA_UNET,  128, 100_000, 1e-4),
    lambda: _paper("toy64",            "MultiBeta C.1.2",               _TOY_VAE,    _TOY_UNET,     150, 100_000, 5e-4),
    #               name               source                             networks   balance steps     batch images
    lambda: _scenes("scenes32",        "built-in scenes",                 _SCENES32, 1.0, 4000, 3000, 64, 32000, 1000),
    lambda: _scenes("scenes32-small",  "built-in scenes, small budget",   _SCENES32, 1.0,  700,  600, 32,  8000,  250),
    lambda: _scenes("scenes64-isotropic", "built-in scenes, after C.1.2", _SCENES64, 2.0, 3000, 3000, 64, 20000, 1000),
    lambda: _diffusion_vae_paper("diffusion-vae-celebahq128", "DiffusionVAE Tables 2 and 3"),
    #                             name                           source                            gamma steps       batch images
    lambda: _diffusion_vae_scenes("diffusion-vae-scenes32",       "built-in scenes",                6.25, 4000, 4000, 64, 32000),
    lambda: _diffusion_vae_scenes("diffusion-vae-scenes32-small", "built-in scenes, small budget",  6.25,  600,  600, 32,  8000),
)
# fmt: on
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (preset() for preset in _PRESETS)}
RECIPES["scenes64"] = untied(RECIPES["scenes64-isotropic"], "scenes64")
RECIPES["scenes32-small-literal"] = literal(RECIPES["scenes32-small"])


def find(name: str) -> Recipe:
    """The preset of that name; `ValueError` lists those that exist."""
    if name not in RECIPES:
        raise ValueError(f"no recipe called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
