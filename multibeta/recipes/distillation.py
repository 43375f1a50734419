"""A flow map for a trained model: the third training, on trajectories that the model draws itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from multibeta import checkpoints, data, distribution, files
from multibeta.checks import check_integer, check_number
from multibeta.diffusion_vae import ConditionalSpans
from multibeta.flow_map import FlowMap, FlowMapObjective, FlowMapObjectiveOptions, Starts
from multibeta.flow_map.trajectories import Walk
from multibeta.networks import UNet
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.recipes.later_training import options_of, own_fields, training_of
from multibeta.training import Batch, TrainingOptions, check_folder, train
from multibeta.training.batches import generator_of

logger = logging.getLogger(__name__)

FLOW_MAP = "flow_map"  # folder of the training in that of a run
LARGEST_POOL = 2**30  # bytes of trajectories that are kept
SHOWN_STEPS = (1, 2, 4)  # evaluations of the pictures along the way
HELD_OUT_CHUNKS = 8  # as many more of held-out trajectories
MEASURED = 64  # trajectories whose deviation and velocity are measured
KNOTS = 33  # at which the velocity is kept


@dataclass(frozen=True)
class DistillationOptions(FlowMapObjectiveOptions):
    """How a flow map is learned.

    Attributes:
        steps: Of the training; 0 trains none.
        batch_size: Spans a step.
        learning_rate: Of Adam.
        ema_decay: Of the average of the weights, which is the flow map.
        precision: bf16 or fp32, see `TrainingOptions`.
        validate_every: Steps between looks at trajectories that are held out.
        checkpoint_every: Steps between checkpoints.
        seed: Of the weights, the trajectories and the spans.
        trajectory_steps: Evaluations of the teacher on each trajectory.
        uses: Spans of each trajectory that are trained on.
        pool: Trajectories that are kept, of which a batch takes some; fewer where they take more than a GiB, or where the
            training ends before it has taken them all.
        held_out: Trajectories of the validation.
        chunk: Trajectories that are made together.
        span_channels: See `UNetConfig`.
        guidance: Of the teacher, where it is a DiffusionVAE trained with `condition_dropout`; the map has it within.
    """

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 8e-4
    ema_decay: float = 0.995
    precision: Literal["bf16", "fp32"] = "bf16"
    validate_every: int = 500
    checkpoint_every: int = 500
    seed: int = 0
    trajectory_steps: int = 24
    uses: int = 5
    pool: int = 16384
    held_out: int = 512
    chunk: int = 256
    span_channels: int = 256
    guidance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("steps", self.steps, 0, 2**63)
        for name in ("batch_size", "uses", "pool", "held_out", "chunk", "span_channels"):
            check_integer(name, getattr(self, name), 1, 2**40)
        check_integer("trajectory_steps", self.trajectory_steps, 2, 2**40)
        check_number("guidance", self.guidance)
        if self.steps:
            self.training()
        else:
            dataclasses.replace(self, steps=1)  # where no training follows its numbers must be possible as well

    def training(self) -> TrainingOptions:
        """The options of `training.train`: the rate falls to nothing, and the last weights are taken."""
        return training_of(self, warmup_steps=50, final_learning_rate=0.005, keep_best=False, log_every=50)


def distill(
    model: Pipeline,
    folder: str | Path,
    options: DistillationOptions,
    *,
    resume: bool = False,
    progress: bool = True,
) -> FlowMap:
    """Train a flow map for a model, which has it from then on, and says so in its `info`; nothing else of the model changes.

    Its trajectories are walks of the model itself from noise: no images are needed. Which of them a step sees depends on the seed
    and the step alone, and a resumed training makes those of its pool anew, so it goes on exactly. Several processes share that.

    Args:
        model: A `DenoisingMultiBetaVAE` or a `DiffusionVAE`.
        folder: Receives checkpoint/, metrics.jsonl and pictures along the way: new images in 1, 2 and 4 evaluations.
        options: See `DistillationOptions`.
        resume: Continue from the checkpoint in `folder`, if there is one.

    Raises:
        ValueError: The model has nothing that a flow map can learn from; and what `training.train` raises.
    """
    check_teacher(model)
    assert isinstance(model, DenoisingMultiBetaVAE | DiffusionVAE)
    if not options.steps:
        raise ValueError("steps must be at least 1 to train a flow map, got 0")
    walk = functools.partial(model.trajectories, steps=min(options.trajectory_steps, model.num_steps))
    if isinstance(model, DiffusionVAE):
        walk = functools.partial(walk, guidance=options.guidance)
    elif options.guidance:
        raise ValueError(f"guidance is of a DiffusionVAE, got {options.guidance} for a {type(model).__name__}")
    flow_map = new_flow_map(model, options, walk)
    begun = resumed(folder, resume)
    chunk, pool = min(options.chunk, options.pool), begun.get("dataset_size") or pool_size(options, model)
    key = options.seed, teacher_digest(model), options.trajectory_steps
    starts = Starts(walk, pool, chunk, options.uses, *key, device=model.device)
    few = max(min(chunk, options.held_out) // HELD_OUT_CHUNKS, 1)  # those made together stand at the same indices
    held_out = Starts(walk, options.held_out // few * few, few, None, "held-out", *key, device=model.device)
    teacher = model.span_teacher(flow_map.config)
    objective = FlowMapObjective(flow_map, teacher, starts, held_out, options_of(FlowMapObjectiveOptions, options))
    context = {"teacher": key[1], **own_fields(options)}
    check_folder(folder, options.training(), starts, resume=resume, context=context)  # before the work of a minute or more
    with trying(model, flow_map):
        if (done := begun.get("step", 0)) < options.steps:
            with distribution.held_by_first(
                files.occupy(Path(folder), "training in")
            ):  # whoever else trains there is refused before this work
                starts.fill(done * options.batch_size // len(starts), progress=progress and distribution.world().first)
                held_out.fill(0, progress=False)
        state = train(
            objective,
            starts,
            options.training(),
            Path(folder),
            validation=held_out,
            resume=resume,
            on_validate=functools.partial(look, model, objective, Path(folder), options),
            progress=progress,
            description="flow map",
            context=context,
        )
        flow_map.load_state_dict(state)
    model.info["flow_map"] = dataclasses.asdict(options)
    return flow_map


def new_flow_map(model: DenoisingMultiBetaVAE | DiffusionVAE, options: DistillationOptions, walk: Walk) -> FlowMap:
    """The map that a training begins with."""
    others: dict[str, Any] = {"span_channels": options.span_channels}
    if isinstance(model, DiffusionVAE):
        walked = walk(torch.arange(MEASURED), generator_of("deviation"))
        deviation = float(walked.latents[-1].std())
        velocities = ConditionalSpans(model.diffusion, deviation).velocities(walked.steps, walked.latents, KNOTS)
        others |= {"deviation": deviation, "velocities": velocities, "guidance": options.guidance}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, **others).to(model.device)


def check_teacher(model: Pipeline) -> None:
    """`ValueError` unless a flow map can be learned from a model."""
    if not isinstance(model, DenoisingMultiBetaVAE | DiffusionVAE):
        raise ValueError(f"a flow map is of a DenoisingMultiBetaVAE or a DiffusionVAE, got a {type(model).__name__}")
    if not isinstance(model.diffusion.unet, UNet):
        raise ValueError(f"a flow map starts from a UNet of multibeta, the network is a {type(model.diffusion.unet).__name__}")
    if isinstance(model, DenoisingMultiBetaVAE):
        model.diffusion.check_spans()


def resumed(folder: str | Path, resume: bool) -> dict[str, Any]:
    """What the checkpoint of a training in `folder` says where it is resumed: how far it is, how many trajectories it has."""
    checkpoint = Path(folder) / "checkpoint"
    if not (resume and checkpoints.exists(checkpoint)):
        return {}
    said = checkpoints.load_config(checkpoint)
    checkpoints.require_entries(checkpoint, {}, said, (), {"step": int, "dataset_size": int})
    return said


def teacher_digest(model: Pipeline) -> str:
    """What the trajectories of a model depend on: all of its weights but those of a flow map."""
    states = {name: state for name, state in model._weights().items() if name != FLOW_MAP}
    return checkpoints.digest({f"{name}.{key}": value for name, state in states.items() for key, value in state.items()})


def pool_size(options: DistillationOptions, model: DenoisingMultiBetaVAE | DiffusionVAE) -> int:
    """Trajectories that are kept, whole chunks of them: as many as were asked for, or the training takes, or memory may hold."""
    latents = options.trajectory_steps + 1
    kept = latents + 1 if isinstance(model, DiffusionVAE) else 2 * latents  # with the sketch, or with what noise moved
    each = 4 * kept * math.prod(model.walked_shape)
    chunk = min(options.chunk, options.pool)
    wanted = max(min(options.pool, options.steps * options.batch_size), options.batch_size)
    fits = max(LARGEST_POOL // each, options.batch_size)
    if fits < wanted:
        logger.info("%d trajectories are kept, not %d, which would take %d MiB", fits, wanted, wanted * each >> 20)
    return -(-min(wanted, fits) // chunk) * chunk


@contextlib.contextmanager
def trying(model: DenoisingMultiBetaVAE | DiffusionVAE, flow_map: FlowMap) -> Iterator[None]:
    """The model has this flow map, whose weights learn; after an error the one before."""
    before = model.flow_map
    model.flow_map = flow_map
    flow_map.requires_grad_(True)
    if model.device.type == "cpu":
        flow_map.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]: torch documents it
    try:
        yield
    except BaseException:
        model.flow_map = before
        raise
    flow_map.unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]: torch documents it
    flow_map.eval().requires_grad_(False)


def look(
    model: DenoisingMultiBetaVAE | DiffusionVAE,
    objective: FlowMapObjective,
    folder: Path,
    options: DistillationOptions,
    step: int,
    module: nn.Module,
) -> dict[str, float]:
    """A picture of what the map makes, and its errors on trajectories that it learns from and on held-out ones."""
    path = folder / f"samples-{step:06d}.png"
    shown = [steps for steps in SHOWN_STEPS if steps <= model.num_steps]
    rows = {f"{steps} evaluation{'s' * (steps > 1)}": model.generate(8, sampler="map", steps=steps) for steps in shown}
    data.save_grid(torch.cat(list(rows.values())), path, columns=8, labels=list(rows))
    count, before = min(len(objective.starts), len(objective.held_out)), (step - 1) * options.batch_size
    errors = {}
    for name, held_out in (("seen", False), ("unseen", True)):
        indices, images = torch.arange(count), torch.empty(count, 0, 1, 1, device=model.device)
        total = 0.0
        for part in indices.split(options.batch_size):
            batch = Batch(
                images[part], part, step, 1.0, held_out=held_out, before=before // len(objective.starts) * len(objective.starts)
            )
            total += float(objective(batch, generator_of("look", options.seed, int(part[0])))[0]) * len(part)
        errors[name] = total / count
    errors["ratio"] = errors["unseen"] / errors["seen"]
    logger.info(
        "after step %d: %s; error on held-out trajectories %.3g, %.2f of that on those of the training",
        step,
        path,
        errors["unseen"],
        errors["ratio"],
    )
    return errors
