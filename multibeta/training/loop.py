"""One training loop for every stage: an objective in, averaged weights out, resumable at every checkpoint."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from multibeta import data, distribution, files, processors, seeds
from multibeta.data import Dataset
from multibeta.progress import log_above_bars, progress_bar
from multibeta.training.batches import Objective
from multibeta.training.checkpointing import require_agreement
from multibeta.training.interrupts import TrainingInterrupted, deferred_interrupt
from multibeta.training.metrics_log import MetricsLog
from multibeta.training.options import TrainingOptions
from multibeta.training.parallel import Parallel
from multibeta.training.run import Run, TrainingStopped, Validate

Outlook = Callable[[int, float | None], str]


def train(
    objective: Objective,
    dataset: Dataset,
    options: TrainingOptions,
    folder: str | Path,
    *,
    validation: Dataset | None = None,
    resume: bool = False,
    on_validate: Validate | None = None,
    progress: bool = True,
    description: str = "train",
    context: dict[str, Any] | None = None,
    outlook: Outlook | None = None,
    parallel: Parallel = "ddp",
) -> dict[str, Tensor]:
    """Minimise `objective` over `dataset` and return the averaged weights.

    Every random draw is keyed by (seed, step), so a resumed run continues exactly where the uninterrupted one was. Torch computes
    with no more threads than `processors.cores()` meanwhile, unless more were asked for; the log says where other work slows it.

    A resumed run may have more steps than the one before, finished or not, and fewer as long as they were not passed: everything
    that depends on progress, the learning rate (`learning_rate_at`) and what an objective anneals, is from there on what it is at
    this step of a training of the new length.

    In several processes, see `distribution`, each computes the gradients of its share of every batch, on the random numbers that
    one process would draw, and all take the same steps; the first writes and draws. All of them must see `folder`. How many there
    are may change from one run to the next that resumes it. Of several threads of one process one trains, and the others wait;
    what draws from torch's global generator in another thread meanwhile changes dropout here.

    Args:
        objective: `module` and `(batch, generator) -> (loss, scalars)`, the loss being a mean over the batch. The
            module is in training mode, and in evaluation mode for validation. Optional are `check(step)`, called after
            each logged interval, which raises to stop; `parameter_groups()`, a list of dicts of "params" and, where they differ,
            "learning_rate_scale" and "betas"; and an `opponent`, another objective with a module of its own, such as that of a
            discriminator. After each update of the one, in which the other's parameters are constants, the other is updated, on
            the same batch with fresh random numbers. How an update is cut by `accumulate` changes nothing where random numbers
            are drawn by `draws.rows`, and where the loss is a mean over images. Where it is not, `gather(batch, generator)` names
            what is needed of every image, see `Batch.complete` and `Batch.share`; or `whole_batch`, a reason, refuses it.
        dataset: Anything that is a `data.Dataset`; its images are uint8 (N, C, H, W).
            Losses that change their meaning on the way compare from the progress `comparable_from`, by default 0, on: only these
            decide which weights were best.
        options: `TrainingOptions`.
        folder: Receives `checkpoint/`, `metrics.jsonl` and, where TensorBoard is installed, its events.
        validation: Dataset for "validation/loss": the mean over up to 8 fixed batches, with fixed noise, of averaged weights.
        resume: Continue from the checkpoint in `folder`, if there is one.
        on_validate: `(step, module) -> dict of scalars or None`, called with averaged weights in evaluation mode: every
            `validate_every` steps and after the last; and once after `FIRST_LOOK_SECONDS`, if it was not before.
        context: JSON-ready dict saved with the checkpoint, such as the recipe; a resumed run must bring the same, but for the
            `diffusion_training.steps` of a recipe, which repeat the options.
        parallel: How several processes share the work: "ddp", each holds all weights; "fsdp", each holds a part of weights,
            gradients, averages and moments, and writes its part of checkpoints while the training goes on; "hsdp", the processes
            of each machine do.
        outlook: `(steps that are left, seconds a step, None at first) -> words` that the progress bar shows besides.

    Returns:
        The averaged state dict of `objective.module`, `saving.unwrapped`; its own weights if `ema_decay` is 0. With
        `options.keep_best` and `validation` images that of the lowest validation loss; where it is not the last, the log says so.

    Raises:
        FileExistsError: `folder` holds a checkpoint and `resume` is False, or another process or thread is training in it.
        ValueError: The dataset is smaller than a batch, the objective takes no pieces, the checkpoint was made with other
            options or context, or has more steps; or processes disagree on any of these.
        TrainingStopped: The loss or the gradient is not finite.
        TrainingInterrupted: Ctrl-C or another signal of `SIGNALS`; the finished steps are saved.
        MemoryError: A batch does not fit; says what to try.
    """
    folder = Path(folder)
    require_agreement(
        {
            "parallel": parallel,
            "resume": resume,
            "validation": None if validation is None else (len(validation), data.chosen_digest(validation)),
            "on_validate": on_validate is not None,
        }
    )
    run = Run(objective, dataset, options, folder, context, parallel)
    occupied = distribution.held_by_first(files.occupy(folder, "training in"))
    with contextlib.closing(run), occupied, seeds.global_generators():
        run.restore(resume)
        return _train(run, folder, functools.partial(run.validate, validation, on_validate), progress, description, outlook)


def left(bar: tqdm, steps: int, outlook: Outlook | None) -> dict[str, str]:
    """What the bar says of the time that is left, by its own rate."""
    if outlook is None:
        return {}
    rate = bar.format_dict["rate"]
    return {"left": outlook(steps, 1 / rate if rate else None)}


def _train(
    run: Run,
    folder: Path,
    validate: Callable[..., dict[str, float]],
    progress: bool,
    description: str,
    outlook: Outlook | None,
) -> dict[str, Tensor]:
    """The steps that are left of a run, and what it gives."""
    options = run.options
    speaks = progress and run.world.first
    for learner in run.learners:
        learner.module.train()
    on_cuda = run.device.type == "cuda"
    waiting = processors.Waiting(idle=math.inf if on_cuda else 3.0)  # who computes on the GPU may idle
    with (
        processors.fitting_threads(),
        torch.enable_grad(),
        torch.random.fork_rng([run.device] if on_cuda else []),
        contextlib.closing(MetricsLog(folder, run.step, validated=not run.owes_validation)) as metrics,
        deferred_interrupt() as signals,
        log_above_bars(),
        progress_bar(total=options.steps, initial=run.step, desc=description, unit="step", disable=not speaks) as bar,
        run.advice_on_memory(),
    ):
        if run.owes_validation:
            metrics.write(validate())
        while run.step < options.steps:
            try:
                loss = run.advance()
            except TrainingStopped:
                metrics.write({"step": run.step + 1, "loss": math.nan})
                raise
            waiting.look()
            bar.set_postfix({"loss": f"{loss:.4g}", **left(bar, options.steps - run.step, outlook)}, refresh=False)
            bar.update()
            if run.due(options.log_every):
                metrics.write(run.summary())
                run.check()
            if run.due(options.snapshot_every):
                run.posthoc.save(run.step)
            if run.due(options.checkpoint_every) and run.guard.settled:
                run.save()
            distribution.tell_step(run.step)
            interrupted, early = distribution.anywhere(bool(signals), run.due_early and run.world.first)
            looks = run.due(options.validate_every) or early
            if looks and not interrupted:
                metrics.write(validate(early=not run.due(options.validate_every)))
            if run.due(options.checkpoint_every) or looks:
                waiting.restart()  # disks are waited for as well
            if interrupted:
                run.end()
                raise TrainingInterrupted(
                    f"stopped after step {run.step} of {options.steps}, saved in {run.checkpoint}: "
                    "run the same command with --resume (resume=True) to go on",
                    next(iter(signals), signal.SIGTERM),
                )
        run.end()  # with what the last validation said
    return run.result()
