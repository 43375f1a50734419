"""What can be known of a training before it begins: that its networks fit, that its images suffice, that there is room.

Everything here raises `ValueError` or `OSError` with the flag of `multibeta train` that mends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from multibeta import checkpoints, data, distribution
from multibeta.adversarial import AdversarialOptions, DecoderObjective, against_discriminator
from multibeta.blocks import GroupNormAct, ResBlock
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion
from multibeta.gaussian_diffusion import GaussianDiffusion
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig, ConditionedConv
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.recipes.decoder_tuning import DECODER, DecoderTuningOptions
from multibeta.recipes.distillation import FLOW_MAP
from multibeta.recipes.recipe import AFTER_STAGES, MultiBetaStageRecipe, Recipe, open_data, recorded_recipe
from multibeta.recipes.warm_start import check_warm_start
from multibeta.training import TrainingOptions, check_folder

logger = logging.getLogger(__name__)

Built = TypeVar("Built")
STAGES = ("vae_training", "diffusion_training")
MAY_CHANGE = (
    *("source", "steps", "warmup_steps", "validate_every", "checkpoint_every", "log_every", "keep_best"),
    *("accumulate", "compile", "recompute", "num_workers"),
)
SAVED_COPIES = 5  # of a module in a checkpoint: weights, their average, the best average, two moments of Adam


def flag(part: str, name: str) -> str:
    """The flag of `multibeta train` for a field: --vae.image-channels."""
    return f"--{part}.{name}".replace("_", "-")


def typed(part: str, name: str, value: Any) -> str:
    """What is typed to give a field a value: --data.no-mirror, --vae.channel-multipliers 1 2."""
    if isinstance(value, bool):
        return flag(part, name if value else f"no_{name}")
    return " ".join([flag(part, name), *map(str, value if isinstance(value, tuple) else [value])])


@contextlib.contextmanager
def naming_flags(part: str, options: type) -> Iterator[None]:
    """A `ValueError` that begins with a field of `options` names its flag: balance must ... as --vae-objective.balance ..."""
    try:
        yield
    except ValueError as error:
        named = re.match(r"(\w+)[ =]", str(error))
        if named is None or named[1] not in {field.name for field in dataclasses.fields(options)}:
            raise
        raise ValueError(f"{flag(part, named[1])} {str(error)[named.end() :]}") from error


def check(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Build the networks and the objectives of a recipe on the meta device; returns the networks, without values.

    Raises:
        ValueError: A network cannot be, or an objective does not take its options; says which flag of `train` mends it.
    """
    vae, diffusion = check_networks(recipe)
    with naming_flags("adversarial", AdversarialOptions), naming_flags("vae_objective", type(recipe.vae_objective)):
        recipe.first_objective(vae)
    with naming_flags("diffusion_objective", type(recipe.diffusion_objective)):
        recipe.second_objective(vae, diffusion)
    if recipe.flow_map.steps and "flow_map" not in recipe.model.optional_parts:
        raise ValueError(f"--flow-map.steps must be 0 for a {recipe.model.__name__}, which takes no flow map")
    if recipe.flow_map.steps and getattr(recipe.diffusion, "parameterization", None) == "literal":
        raise ValueError(
            "--flow-map.steps must be 0 with --diffusion.parameterization literal: its heads are not in units of one"
        )
    if isinstance(recipe, MultiBetaStageRecipe) and recipe.decoder_tuning.steps:
        assert isinstance(vae, MultiBetaVAE)
        with naming_flags("decoder_tuning", DecoderTuningOptions):
            against_discriminator(DecoderObjective(vae), vae, recipe.decoder_tuning, recipe.decoder_tuning.seed)
    if getattr(recipe.vae, "sigma_per_channel", False):
        needed = {"no-fold": recipe.vae_objective.fold, "untie-steps 0": recipe.vae_objective.untie_steps}
        if flags := " ".join(f"--vae-objective.{words}" for words, lacking in needed.items() if lacking):
            raise ValueError(f"--vae.sigma-per-channel needs {flags}: the axes of channels with their own sigma are their own")
    return vae, diffusion


def say_changes(recipe: Recipe, folder: Path) -> None:
    """Log what a recipe changes of the run in `folder`, but for what may change: a preset may have, since then."""
    try:
        begun = recorded_recipe(folder)
    except ValueError:  # the checkpoints know what they need of it
        return
    if type(begun) is not type(recipe):
        return
    changed = [
        f"{typed(part, name, before)} (now {getattr(options, name)})"
        for part, options in vars(recipe).items()
        if dataclasses.is_dataclass(options) and part not in AFTER_STAGES
        for name, before in vars(getattr(begun, part)).items()
        if name not in MAY_CHANGE and before != getattr(options, name)
    ]
    if changed:
        words = "%s was begun with other values, which these flags give back: %s; --out and --resume alone take all of them"
        logger.warning(words, folder, ", ".join(changed))


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    dataset: data.Dataset | data.Foreign | None = None,
) -> tuple[data.Dataset, data.Dataset]:
    """(train, test) images of a run (see `open_images`), after everything that can be known of it was checked, of all its stages.

    Raises:
        ValueError: The device, the networks, the images, or a checkpoint to resume from do not fit the recipe.
        OSError: `folder` cannot hold the run; `FileExistsError` where it holds one and `resume` is False.
    """
    check_device(device)
    check_place(recipe, folder, resume=resume)
    train_images, test_images = open_data(recipe, dataset)
    train_images = data.Mirrored(train_images) if recipe.data.mirror else train_images
    check_counts(recipe, len(train_images))
    if resume:
        say_changes(recipe, folder)
    for name, (options, context) in recipe.plan().items():
        if warms_up_too_long(options):
            logger.warning(
                "%s: the learning rate rises for %d of its %d steps, more of which, or fewer --%s-training.warmup-steps, make it "
                "arrive",
                *(name, options.warmup_steps, options.steps, name.removesuffix("-untied")),
            )
        check_folder(folder / name, options, train_images, resume=resume, context=context)
    if not len(test_images):
        logger.warning(
            "no images are held out: there will be no validation loss, and pictures along the way show training images"
        )
    return train_images, test_images


def warms_up_too_long(options: TrainingOptions) -> bool:
    """Whether a training is half a warm-up, or more of it."""
    return 2 * options.warmup_steps >= options.steps


def check_networks(recipe: Recipe) -> tuple[nn.Module, nn.Module]:
    """Run both networks of a recipe on the meta device, which computes shapes alone; returns them, without values.

    Raises:
        ValueError: A network cannot be built, or its maps do not fit; says what does.
    """
    with torch.device("meta"), torch.no_grad():
        vae = _attempt(recipe, "vae", lambda: recipe.model.parts["vae"][0](recipe.vae).eval())
        _attempt(recipe, "vae", lambda: _run_autoencoder(recipe, vae))
        side = _side_of_unet(recipe)
        levels = len(recipe.diffusion.channel_multipliers)
        if side % 2 ** (levels - 1):
            raise ValueError(_misfit(recipe, side, levels))
        diffusion = _attempt(recipe, "diffusion", lambda: recipe.model.parts["diffusion"][0](recipe.diffusion).eval())
        _attempt(recipe, "diffusion", lambda: _run_unet(recipe, diffusion))
    return vae, diffusion


def resolution_step(recipe: Recipe) -> int | None:
    """What a resolution must be a multiple of for both networks of a recipe; None where only its own one fits."""
    levels = len(recipe.diffusion.channel_multipliers) - 1
    if not isinstance(recipe.vae, AutoencoderConfig):  # blocks that name their resolutions
        return None
    halvings = len(recipe.vae.channel_multipliers)
    return 2**halvings if recipe.vae.architecture == "toy" else 2 ** (halvings - 1 + levels)


def fitting_resolutions(recipe: Recipe) -> str:
    """Which resolutions both networks take, in words, with the flag; the nearest to the recipe's own."""
    step, resolution = resolution_step(recipe), recipe.vae.resolution
    if step is None:
        assert isinstance(recipe.vae, BlockAutoencoderConfig)
        factor = math.prod(int(number) for number in re.findall(r"\d+d(\d+)", recipe.vae.encoder_blocks))
        return (
            f"the blocks of this recipe make --vae.resolution {factor}; others need --vae.encoder-blocks and --vae.decoder-blocks"
        )
    lower, upper = resolution // step * step, -(-resolution // step) * step
    nearest = " or ".join(str(size) for size in sorted({lower, upper} - {0}))
    return f"both networks take multiples of {step}: --vae.resolution {nearest}"


def with_fitting_resolution(recipe: Recipe, error: ValueError) -> ValueError:
    """An error that recommends a resolution, recommending one that both networks take."""
    advised, step = re.search(r"choose a resolution up to (\d+)", str(error)), resolution_step(recipe)
    if advised is None:
        return error
    fits = int(advised[1]) // step * step if step else 0
    advice = f"choose --vae.resolution {fits}" if fits else "no resolution that small fits"
    takes = f"both networks take multiples of {step}" if step else f"the blocks of this recipe take {recipe.vae.resolution} alone"
    return ValueError(str(error).replace(advised[0], f"{advice} ({takes})").replace("allow upscale", "allow --data.upscale"))


def check_attention(recipe: Recipe, preset: Recipe | None = None) -> list[str]:
    """Words on attention that never happens, because no map has its resolution.

    Raises:
        ValueError: It is not the `preset` that asks for it.
    """
    words = []
    for part, side in (("vae", recipe.vae.resolution), ("diffusion", _side_of_unet(recipe))):
        config = getattr(recipe, part)
        asked = getattr(config, "attention_resolutions", ())
        if getattr(config, "architecture", None) == "toy" and asked:
            sides = []
        else:
            sides = [side // 2**level for level in range(len(getattr(config, "channel_multipliers", ())))]
        if not (never := [resolution for resolution in asked if resolution not in sides]):
            continue
        name = flag(part, "attention_resolutions")
        word = (
            f"{name} {' '.join(map(str, never))} never occurs: the maps there have {' '.join(map(str, sides)) or 'no attention'}"
        )
        if preset is not None and asked != getattr(preset, part).attention_resolutions:
            raise ValueError(word)
        words.append(word)
    return words


def check_norms(vae: nn.Module, diffusion: nn.Module) -> list[str]:
    """Words on norms with one channel a group, which take out what beta and the time step shift."""
    words = []
    for part, network in (("vae", vae), ("diffusion", diffusion)):
        norms = [block.norm2 if isinstance(block, ResBlock) else block.norm for block in network.modules() if _is_shifted(block)]
        alone = sorted(
            {norm.num_channels for norm in norms if isinstance(norm, GroupNormAct) and norm.num_channels == norm.num_groups}
        )
        if alone:
            word = f"{', '.join(map(str, alone))} channels in groups of one take out the shift by beta or time"
            words.append(f"{word}: {flag(part, 'num_groups')} {max(1, alone[0] // 2)} keeps it")
    return words


def _is_shifted(block: nn.Module) -> bool:
    return isinstance(block, ResBlock | ConditionedConv) and block.embedding_projection is not None


def check_effect(recipe: Recipe, flags: Collection[str]) -> None:
    """`ValueError` where one of the `flags` that were typed does nothing, since what it belongs to is switched off."""
    for part in ("adversarial", *AFTER_STAGES):
        options = getattr(recipe, part, None)
        fields = [] if options is None else [field.name for field in dataclasses.fields(options)]
        given = [name for name in fields if {flag(part, name), flag(part, f"no_{name}")} & set(flags)]
        if getattr(options, "steps", 1) == 0:
            unused = {name: "steps above 0" for name in given if name != "steps"}
        else:
            unused = options.without_effect(given) if isinstance(options, AdversarialOptions) else {}
        for name, needed in unused.items():
            raise ValueError(f"{flag(part, name)} does nothing without {flag(part, needed)}")


def check_counts(recipe: Recipe, num_train: int) -> None:
    """`ValueError` where a stage of a recipe needs more than `num_train` images, mirrored ones counted."""
    for stage in STAGES:
        size = getattr(recipe, stage).batch_size
        if size > num_train:
            raise ValueError(
                f"{flag(stage, 'batch_size')} {size} is more than the {num_train} images to train on: "
                f"give {num_train} or fewer, or more images"
            )
    objective = recipe.diffusion_objective
    statistics = getattr(objective, "statistics_images", None)
    if statistics is not None and min(statistics, num_train) < 2:
        raise ValueError(
            f"the process is measured on at least 2 images, got {flag('diffusion_objective', 'statistics_images')} {statistics} "
            f"of {num_train} to train on"
        )
    components = getattr(objective, "mixture_components", 0)
    name = flag("diffusion_objective", "mixture_components")
    if not 0 <= components <= num_train or (components and num_train < 2):
        raise ValueError(f"{name} must lie between 0 and the {num_train} images to train on, got {components}")
    if components and importlib.util.find_spec("sklearn") is None:
        raise ModuleNotFoundError(f"{name} {components} needs scikit-learn, which is not installed: install it, or give 0")


def fit_batches(recipe: Recipe, num_train: int, given: set[str]) -> tuple[Recipe, list[str]]:
    """The recipe with batches of at most `num_train` images in the stages whose batch size was not `given`, and words on it."""
    words = []
    for stage in STAGES:
        training = getattr(recipe, stage)
        if stage not in given and training.batch_size > num_train >= 1:
            words.append(f"{flag(stage, 'batch_size')} {num_train}, not {training.batch_size}: there are no more images")
            changes = {"batch_size": num_train, "accumulate": min(training.accumulate, num_train)}
            recipe = dataclasses.replace(recipe, **{stage: dataclasses.replace(training, **changes)})
    return recipe, words


def check_place(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """That a recipe is one that `check` takes, and that `folder` has room for the checkpoints of its run, and none of them yet.

    Raises:
        ValueError: See `check`; a new run would be within its images.
        FileNotFoundError, ValueError: The model that stage 2 is to start from, see `check_warm_start`; not where it has started.
        OSError, FileExistsError, NotADirectoryError: The folder cannot hold the run; with `resume` it may hold checkpoints.
    """
    modules = check(recipe)
    check_processes(recipe, distribution.world().size)
    if not (resume and checkpoints.exists(folder / "diffusion" / "checkpoint")):
        check_warm_start(recipe)
    images = Path(data.absolute_source(recipe.data.source))  # of what is no folder the name, which is no absolute path
    if not resume and images.is_absolute() and folder.resolve().is_relative_to(images.resolve()):
        raise ValueError(
            f"{folder} lies within the images, {images}: the pictures of the run would be among them. Choose another folder with "
            "--out"
        )
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: choose another folder with --out")
    for place in (*(folder / stage / "checkpoint" for stage in (*recipe.plan(), FLOW_MAP, DECODER)), folder / "model"):
        if not resume and checkpoints.exists(place):
            raise FileExistsError(f"{place} exists: pass --resume (resume=True) to continue its run, or choose another folder")
    sizes = [4 * sum(tensor.numel() for tensor in module.state_dict().values()) for module in modules]
    needed = SAVED_COPIES * (sum(sizes) + max(sizes)) + sum(sizes)  # while one is replaced both are there; and the model
    free = shutil.disk_usage(there).free
    if free < needed and not resume:
        raise OSError(
            f"the checkpoints of this run take about {needed / 2**20:.0f} MiB, {there} has {free / 2**20:.0f} MiB free: "
            "make room, or choose another folder with --out"
        )


def check_steps(recipe: Recipe, folder: Path) -> None:
    """`ValueError` if a training in `folder` would get other steps than it has, after another was trained on what it made."""
    plan = list(recipe.plan().items())
    for index, (name, (options, _)) in enumerate(plan):
        checkpoint = folder / name / "checkpoint"
        later = [folder / after for after, _ in plan[index + 1 :] if checkpoints.exists(folder / after / "checkpoint")]
        if not later or not checkpoints.exists(checkpoint):
            continue
        with checkpoints.naming(checkpoint, "a training"):
            steps = checkpoints.load_config(checkpoint).get("options", {}).get("steps")
        if steps is not None and steps != options.steps:
            built = " and ".join(map(str, later))
            raise ValueError(
                f"{checkpoint} is of a training of {steps} steps, and {built} was trained on what it made, which "
                f"{options.steps} steps would change: keep {steps}, or choose another folder, or delete {built}, to train anew; "
                f"with --warm-start {folder / 'model'} it then starts from the diffusion network that is there"
            )


def check_processes(recipe: Recipe, processes: int) -> None:
    """`ValueError` where a training of a recipe has smaller batches than there are processes to share them."""
    parts = [stage for stage in STAGES] + [name for name in ("flow_map", "decoder_tuning") if hasattr(recipe, name)]
    for part in parts:
        training = getattr(recipe, part)
        if training.steps and training.batch_size < processes:
            name = flag(part, "batch_size")
            raise ValueError(f"{processes} processes share each batch, {name} {training.batch_size} is fewer images than that")


def check_device(device: str | torch.device) -> None:
    """`ValueError` where torch cannot compute on `device`."""
    try:
        torch.empty(1, device=device).add(1)
    except (RuntimeError, AssertionError) as error:  # a build without it asserts
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error


def _attempt(recipe: Recipe, part: str, build: Callable[[], Built]) -> Built:
    """`build()`, whose failure becomes a `ValueError` that names the part and what would fit."""
    try:
        with naming_flags(part, type(getattr(recipe, part))):
            return build()
    except ValueError as error:
        advice = f"; {fitting_resolutions(recipe)}" if "resolution" in str(error) else ""
        if "heads" in str(error):
            advice = f": change {flag(part, 'head_channels')} or {flag(part, 'num_heads')}"
        raise ValueError(f"{error}{advice} ({part} of {recipe.name})") from error
    except (RuntimeError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"the {part} of this recipe does not fit together: {str(error).splitlines()[0]}; {fitting_resolutions(recipe)}, "
            f"or change its other --{part} flags"
        ) from error


def _run_autoencoder(recipe: Recipe, vae: nn.Module) -> None:
    assert isinstance(vae, MultiBetaVAE | CapacityVAE)
    config = recipe.vae
    images = torch.empty(2, config.image_channels, config.resolution, config.resolution)
    latents = vae.encode(images, 0.5) if isinstance(vae, MultiBetaVAE) else vae.encode(images)
    made = vae.decode(latents)
    if latents.shape[1:] != config.latent_shape or made.shape != images.shape:
        raise RuntimeError(
            f"images {tuple(images.shape[1:])} become latents {tuple(latents.shape[1:])}, which should be {config.latent_shape}, "
            f"and images {tuple(made.shape[1:])} again"
        )


def _run_unet(recipe: Recipe, diffusion: nn.Module) -> None:
    assert isinstance(diffusion, NonlinearDiffusion | GaussianDiffusion | ConditionalDiffusion)
    steps = torch.ones(2, dtype=torch.int64)
    if isinstance(diffusion, NonlinearDiffusion):
        diffusion.heads(torch.empty(2, *recipe.vae.latent_shape), steps)
    elif isinstance(diffusion, GaussianDiffusion):
        diffusion(torch.empty(2, *recipe.vae.latent_shape), steps)
    else:
        config = diffusion.config
        images = torch.empty(2, config.image_channels, config.resolution, config.resolution)
        diffusion(images, steps, images)


def _side_of_unet(recipe: Recipe) -> int:
    """Height and width of what the diffusion network sees."""
    return getattr(recipe.diffusion, "latent_resolution", recipe.vae.resolution)


def _misfit(recipe: Recipe, side: int, levels: int) -> str:
    """Why a U-Net of `levels` cannot halve maps of `side` pixels, and what fits."""
    most = next(depth for depth in range(levels, 0, -1) if side % 2 ** (depth - 1) == 0)
    fewer = f"--diffusion.channel-multipliers with {'one number' if most == 1 else f'{most} numbers'}"
    single = getattr(recipe.vae, "architecture", None) == "toy"  # its latent is a vector at every resolution
    advice = fewer if single else f"{fitting_resolutions(recipe)}, or {fewer}"
    return (
        f"--vae.resolution {recipe.vae.resolution} gives the diffusion network maps of {side} x {side} pixels, its {levels} "
        f"levels need a multiple of {2 ** (levels - 1)}: {advice}"
    )
