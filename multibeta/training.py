"""One training loop for every stage: an objective in, averaged weights out, resumable at every checkpoint."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from multibeta import checkpoints
from multibeta.metrics.weights import shorten

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
# These say how the work is cut and watched, not what is learned, so a resumed run may change them.
_FREE_OPTIONS = ("accumulate", "log_every", "validate_every", "checkpoint_every")
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_LEAST = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "validate_every", "checkpoint_every"), 1),
    **dict.fromkeys(("learning_rate", "warmup_steps", "final_learning_rate", "weight_decay", "clip_norm"), 0),
    "ema_decay": 0,
}


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why and which checkpoint is the last good one."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, after the current step was finished and saved."""


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to learn.

    `final_learning_rate` is the fraction of `learning_rate` that cosine decay reaches at the last step (1 = constant).
    `batch_size` images make one update, in `accumulate` pieces. `clip_norm` 0 and `ema_decay` 0 switch these off.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_learning_rate: float = 0.05
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.999
    precision: Literal["bf16", "fp32"] = "bf16"
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self):
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least {least}, got {getattr(self, name)}")
        if not self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} pieces need at least as many images, got {self.batch_size}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}")


@dataclass(frozen=True)
class Batch:
    """What an objective sees: images (N, C, H, W) in [-1, 1] on its device, their dataset indices (N,) on the CPU."""

    images: torch.Tensor
    indices: torch.Tensor
    step: int
    progress: float

    def __repr__(self) -> str:
        return f"Batch(images {tuple(self.images.shape)}, step={self.step}, progress={self.progress:g})"


def train(
    objective,
    dataset,
    options,
    folder,
    *,
    validation=None,
    resume=False,
    on_validate=None,
    progress=True,
    description="train",
    context=None,
):
    """Minimise `objective` over `dataset` and return the averaged weights.

    Every random draw is keyed by (seed, step), so a resumed run continues exactly where the uninterrupted one was.

    Args:
        objective: `module` and `(batch, generator) -> (loss, scalars)`, the loss being a mean over the batch. The
            module is in training mode, and in evaluation mode for validation. Optional are `check(step)`, called after
            each logged interval, which raises to stop, and `parameter_groups()`, a list of dicts of "params" and
            "learning_rate_scale".
        dataset: Has `__len__` and `images(indices) -> uint8 (N, C, H, W)`.
        options: `TrainingOptions`.
        folder: Receives `checkpoint/`, `metrics.jsonl` and, where TensorBoard is installed, its events.
        validation: Dataset for "validation/loss": the mean over up to 8 fixed batches with averaged weights.
        resume: Continue from the checkpoint in `folder`, if there is one.
        on_validate: `(step, module) -> dict of scalars or None`, called with averaged weights in evaluation mode.
        context: JSON-ready dict saved with the checkpoint, such as the recipe; a resumed run must bring the same.

    Returns:
        The averaged state dict of `objective.module`; its own weights if `ema_decay` is 0.

    Raises:
        FileExistsError: `folder` holds a checkpoint and `resume` is False.
        ValueError: The dataset is smaller than a batch, or the checkpoint was made with other options or context.
        TrainingStopped: The loss or the gradient is not finite.
        TrainingInterrupted: Ctrl-C; the finished steps are saved.
        MemoryError: A batch does not fit; says what to try.
    """
    run = _Run(objective, dataset, options, Path(folder), context)
    run.restore(resume)
    run.module.train()
    validate = functools.partial(run.validate, validation, on_validate)
    devices = [run.device] if run.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        contextlib.closing(_Metrics(Path(folder), run.step)) as metrics,
        _deferred_interrupt() as interrupted,
        tqdm(total=options.steps, initial=run.step, desc=description, unit="step", disable=not progress) as bar,
        run.advice_on_memory(),
    ):
        while run.step < options.steps:
            loss = run.advance()
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()
            if run.due(options.log_every):
                metrics.write(run.summary())
                run.check()
            if run.due(options.checkpoint_every):
                run.save()
            if run.due(options.validate_every) and not interrupted.is_set():
                metrics.write(validate())
            if interrupted.is_set():
                run.save()
                raise TrainingInterrupted(
                    f"stopped after step {run.step} of {options.steps}, saved in {run.checkpoint}: "
                    "run the same command with --resume (resume=True) to go on"
                )
    return run.average.state


def learning_rate_at(step, options):
    """Learning rate of the update that follows `step` finished ones: linear warm-up, then cosine decay."""
    update = step + 1
    if update < options.warmup_steps:
        return options.learning_rate * update / options.warmup_steps
    decayed = (update - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    final = options.final_learning_rate
    return options.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * decayed)) / 2)


def batch_indices(step, dataset_size, batch_size, seed):
    """Dataset indices of a step, (batch_size,): consecutive pieces of one seeded permutation per epoch.

    Batches run across the end of an epoch, so each epoch holds every image exactly once, whatever the batch size.
    """
    start, end = step * batch_size, (step + 1) * batch_size
    pieces = [
        _permutation(dataset_size, seed, epoch)[max(0, start - epoch * dataset_size) : end - epoch * dataset_size]
        for epoch in range(start // dataset_size, (end - 1) // dataset_size + 1)
    ]
    return torch.cat(pieces)


@functools.lru_cache(maxsize=4)
def _permutation(size, *key):
    return torch.randperm(size, generator=_generator("order", *key))


def _generator(*key):
    return torch.Generator().manual_seed(_seed(*key))


def _seed(*key):
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


class _Run:
    """The state of one training: weights, average, optimiser, and the number of finished steps."""

    def __init__(self, objective, dataset, options, folder, context):
        self.objective, self.dataset, self.options = objective, dataset, options
        self.module = objective.module
        self.checkpoint = folder / "checkpoint"
        self.device = next(self.module.parameters()).device
        if len(dataset) < options.batch_size:
            raise ValueError(f"batch_size={options.batch_size} is more than the {len(dataset)} images of the dataset")
        checkpoints.separate(self.module.state_dict(), "module")  # tied weights show now, not at the first save
        identity = {"options": dataclasses.asdict(options), "context": context or {}, "dataset_size": len(dataset)}
        self.identity = json.loads(json.dumps(identity))  # as it will be read back: tuples become lists
        self.optimizer, self.names = _optimizer(objective, options)
        self.average = _Average(self.module, options.ema_decay)
        self.step, self.saved_step, self.upcoming = 0, None, None
        self.totals, self.interval_seconds = {}, 0.0
        self.started = time.perf_counter()

    def due(self, every):
        return self.step % every == 0 or self.step == self.options.steps

    def advance(self):
        """One update of the weights; returns its loss."""
        began = time.perf_counter()
        indices, images = self.upcoming or self.fetch(self.step)
        rate = learning_rate_at(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["learning_rate_scale"]
        loss = self.accumulate_gradients(indices, images)
        norm = torch.nn.utils.clip_grad_norm_(self.names, self.options.clip_norm or math.inf)
        # the next images are read while the accelerator works; the two numbers below wait for it
        self.upcoming = self.fetch(self.step + 1) if self.step + 1 < self.options.steps else None
        loss, norm = torch.stack([loss, norm.float()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.stop(loss, norm, indices)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step)
        self.step += 1
        self.add("grad_norm", norm, 1.0)
        self.interval_seconds += time.perf_counter() - began
        return loss

    def fetch(self, step):
        indices = batch_indices(step, len(self.dataset), self.options.batch_size, self.options.seed)
        images = self.dataset.images(indices)
        return indices, images.pin_memory() if self.device.type == "cuda" and not images.is_cuda else images

    def accumulate_gradients(self, indices, images):
        """Gradient of the mean loss over the batch, piece by piece; returns that loss, still on the device."""
        total = torch.zeros((), device=self.device)
        pieces = [tensor.tensor_split(self.options.accumulate) for tensor in (indices, images)]
        for piece, (part, pixels) in enumerate(zip(*pieces, strict=True)):
            weight = len(part) / len(indices)
            loss, scalars = self.evaluate(part, pixels, ("train", self.step, piece))
            (loss * weight).backward()
            total += loss.detach().float() * weight
            for name, value in {**scalars, "loss": loss}.items():
                self.add(name, value, weight)
        return total

    def evaluate(self, indices, images, key):
        """The objective on uint8 images; `key` fixes every random number it draws."""
        images = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        batch = Batch(images, indices, self.step, self.step / self.options.steps)
        torch.manual_seed(_seed("global", self.options.seed, *key))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            return self.objective(batch, _generator("objective", self.options.seed, *key))

    def add(self, name, value, weight):
        value = value.detach().float() if isinstance(value, torch.Tensor) else value
        total, weights = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = total + value * weight, weights + weight

    def summary(self):
        """Means over the steps since the last summary."""
        means = {name: float(total) / weight for name, (total, weight) in self.totals.items()}
        images = self.totals["grad_norm"][1] * self.options.batch_size
        record = {
            "step": self.step,
            **means,
            "learning_rate": learning_rate_at(self.step - 1, self.options),
            "images_per_second": images / self.interval_seconds,
            "seconds": time.perf_counter() - self.started,
        }
        self.totals, self.interval_seconds = {}, 0.0
        return record

    def check(self):
        if hasattr(self.objective, "check"):
            self.objective.check(self.step)

    def validate(self, dataset, on_validate):
        """Validation scalars of the averaged weights."""
        if dataset is None and on_validate is None:
            return {}
        scalars = {}
        with self.average.in_place(), torch.no_grad():
            if dataset is not None:
                scalars["loss"] = self.validation_loss(dataset)
            if on_validate is not None:
                scalars.update(on_validate(self.step, self.module) or {})
        return {"step": self.step, **{f"validation/{name}": float(value) for name, value in scalars.items()}}

    def validation_loss(self, dataset):
        size = math.ceil(self.options.batch_size / self.options.accumulate)
        chosen = _permutation(len(dataset), self.options.seed, "validation")[: VALIDATION_BATCHES * size]
        total = 0.0
        for number, indices in enumerate(chosen.split(size)):
            loss, _ = self.evaluate(indices, dataset.images(indices), ("validation", number))
            total += float(loss) * len(indices)
        return total / len(chosen)

    def save(self):
        if self.saved_step == self.step:
            return
        slots = checkpoints.flatten({self.names[parameter]: slot for parameter, slot in self.optimizer.state.items()})
        weights = {"module": self.module.state_dict(), "ema": self.average.state, "optimizer": slots}
        progress = {"step": self.step, "seconds": time.perf_counter() - self.started}
        checkpoints.save_folder(self.checkpoint, weights, {**progress, **self.identity})
        self.saved_step = self.step

    def restore(self, resume):
        """Continue from the checkpoint; without one, start from the beginning."""
        if not checkpoints.exists(self.checkpoint):
            if resume:
                logger.warning("no checkpoint in %s: starting from the beginning", self.checkpoint)
            return
        if not resume:
            raise FileExistsError(
                f"{self.checkpoint} exists: pass --resume (resume=True) to continue it, or choose another folder"
            )
        weights, config = checkpoints.load_folder(self.checkpoint)
        differing = list(_differences({key: config.get(key) for key in self.identity}, self.identity))
        if differing:
            raise ValueError(f"{self.checkpoint} was trained differently: " + "; ".join(differing))
        checkpoints.load_state(self.module, weights["ema"], self.checkpoint / "ema.safetensors")
        self.average = _Average(self.module, self.options.ema_decay)
        checkpoints.load_state(self.module, weights["module"], self.checkpoint / "module.safetensors")
        slots = checkpoints.unflatten(weights["optimizer"])
        state = {index: slots[name] for index, name in enumerate(self.names.values()) if name in slots}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = self.saved_step = config["step"]
        self.started -= config["seconds"]
        logger.info("resumed %s at step %d of %d", self.checkpoint, self.step, self.options.steps)

    def stop(self, loss, norm, indices):
        raise TrainingStopped(
            f"loss {loss:g} and gradient norm {norm:g} at step {self.step} are not finite; the weights were not "
            f"updated. Batch indices: {shorten(indices.tolist(), 64)}. {self.last_checkpoint()}. "
            "A lower learning_rate, a longer warm-up or precision='fp32' usually helps"
        )

    def last_checkpoint(self):
        if self.saved_step is None:
            return "No checkpoint had been saved yet"
        return f"The last good checkpoint is {self.checkpoint}, at step {self.saved_step}"

    @contextlib.contextmanager
    def advice_on_memory(self):
        """Turn a failed allocation into advice."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(text in str(error).lower() for text in _NO_MEMORY):
                raise
            batch, pieces = self.options.batch_size, self.options.accumulate
            at_once = math.ceil(batch / pieces)
            halves = f"accumulate={pieces * 2} (the same batch, {at_once // 2} at once; --resume allows it) or "
            raise MemoryError(
                f"out of memory on {self.device} at step {self.step} with batch_size={batch}, {at_once} images at "
                f"once: try {halves if at_once > 1 else ''}batch_size={max(1, batch // 2)}. "
                f"{self.last_checkpoint()}: {error}"
            ) from error


class _Average:
    """Exponential moving average of the trainable parameters; everything else follows the module."""

    def __init__(self, module, decay):
        self.module, self.decay = module, decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        trainable = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.weights, self.averages = list(trainable.values()), [self.state[name] for name in trainable]

    @torch.no_grad()
    def update(self, step):
        """average <- d average + (1 - d) weights, with d = min(decay, (1 + step) / (10 + step))."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        for name, buffer in self.module.named_buffers():
            if name in self.state:
                self.state[name].copy_(buffer)

    @contextlib.contextmanager
    def in_place(self):
        """The module holds the average, in evaluation mode; afterwards its own weights, in training mode."""
        self.exchange()
        self.module.eval()
        try:
            yield
        finally:
            self.exchange()
            self.module.train()

    @torch.no_grad()
    def exchange(self):
        for name, live in self.module.state_dict().items():
            kept = live.clone()
            live.copy_(self.state[name])
            self.state[name].copy_(kept)


class _Metrics:
    """`metrics.jsonl`, one JSON object a line, and TensorBoard events where it is installed."""

    def __init__(self, folder, step):
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.keep_until(step)
        self.board = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=step + 1)

    def keep_until(self, step):
        """Drop the lines of steps that will be run again, and a last line cut short by a crash."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, record):
        if not record:
            return
        strict = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(strict) + "\n")
        if self.board is not None:
            for name in record.keys() - {"step"}:
                self.board.add_scalar(name, record[name], record["step"])

    def close(self):
        if self.board is not None:
            self.board.close()


def _optimizer(objective, options):
    """AdamW over the groups of the objective, and its parameters with their names, in its order."""
    names = {parameter: name for name, parameter in objective.module.named_parameters()}
    default = [{"params": [parameter for parameter in names if parameter.requires_grad]}]
    groups = objective.parameter_groups() if hasattr(objective, "parameter_groups") else default
    groups = [{"learning_rate_scale": 1.0, **group, "params": list(group["params"])} for group in groups]
    ordered = [parameter for group in groups for parameter in group["params"]]
    if not all(parameter in names for parameter in ordered):
        raise ValueError("parameter_groups() holds parameters outside objective.module, which no checkpoint would hold")
    rates = {"lr": options.learning_rate, "betas": options.adam_betas, "weight_decay": options.weight_decay}
    return torch.optim.AdamW(groups, **rates, fused=True), {parameter: names[parameter] for parameter in ordered}


@contextlib.contextmanager
def _deferred_interrupt():
    """The first Ctrl-C sets the event that is yielded, a second one stops at once. Main thread only."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def handle(signum, frame):
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")  # print may not re-enter

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


def _differences(saved, current, path=()):
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            if key not in _FREE_OPTIONS:  # at any depth: a recipe in the context repeats the options
                yield from _differences(saved.get(key), current.get(key), (*path, key))
    elif saved != current:
        yield f"{'.'.join(path)} was {saved!r}, now {current!r}"
