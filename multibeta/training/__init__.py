"""One training loop for every stage: an objective in, averaged weights out, resumable at every checkpoint."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
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

from multibeta import checkpoints, data, draws, files, processors
from multibeta.checks import check_integer, check_number, check_weights
from multibeta.saving import unwrapped
from multibeta.seeds import as_seed
from multibeta.weights import shorten

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
# What a terminal or a scheduler sends before it kills; those that a program handles itself are left to it, but for Ctrl-C.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU")
# These say how the work is cut and watched, not what is learned, so a resumed run may change them.
_FREE_OPTIONS = ("accumulate", "log_every", "validate_every", "checkpoint_every")
_FREE = (("context", "source"),)  # where a recipe is published: words
_SOURCES = (("context", "data", "source"),)  # of images; a relative one is of the folder where it is compared
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
_COUNTS = {
    **dict.fromkeys(("steps", "batch_size", "accumulate", "log_every", "validate_every", "checkpoint_every"), 1),
    "warmup_steps": 0,
}


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why and which checkpoint is the last good one."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or another signal of `SIGNALS`, after the current step was finished and saved; `signal` is its number."""

    def __init__(self, message, signal=signal.SIGINT):
        super().__init__(message)
        self.signal = signal


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
        for name, least in _COUNTS.items():
            check_integer(name, getattr(self, name), least, 2**63)
        check_weights(**{name: getattr(self, name) for name in ("learning_rate", "final_learning_rate", "weight_decay")})
        check_number("clip_norm", self.clip_norm, least=0)
        check_number("ema_decay", self.ema_decay, least=0, below=1)
        if not isinstance(self.adam_betas, tuple | list) or len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas!r}")
        for decay in self.adam_betas:
            check_number("adam_betas", decay, least=0, below=1)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} pieces need at least as many images, got {self.batch_size}")
        object.__setattr__(self, "seed", as_seed(self.seed))
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}")


@dataclass(frozen=True)
class Batch:
    """What an objective sees: images (N, C, H, W) in [-1, 1] on its device, their dataset indices (N,) on the CPU.

    Of an update in pieces (`accumulate`) it is the piece that begins at image `start`; `update` is then what `gather` of the
    objective gave of all its images.
    """

    images: torch.Tensor
    indices: torch.Tensor
    step: int
    progress: float
    start: int = 0
    update: dict[str, torch.Tensor] | None = None

    def complete(self, own):
        """What `gather` gives, of all images of the update, name to (M, ...): those of this piece are `own`, with gradients."""
        if self.update is None:
            return own
        end = self.start + len(self.images)
        return {name: torch.cat([rows[: self.start], own[name].to(rows.dtype), rows[end:]]) for name, rows in self.update.items()}

    def share(self, loss):
        """The part of a piece in a loss of the whole update: its value, and gradients that add up to its own over the pieces."""
        if self.update is None:
            return loss
        weight = len(self.images) / len(next(iter(self.update.values())))  # what the piece's loss is multiplied by
        return loss.detach() + (loss - loss.detach()) / weight

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

    Every random draw is keyed by (seed, step), so a resumed run continues exactly where the uninterrupted one was. Torch computes
    with no more threads than `processors.cores()` meanwhile, unless more were asked for; the log says where other work slows it.

    Args:
        objective: `module` and `(batch, generator) -> (loss, scalars)`, the loss being a mean over the batch. The
            module is in training mode, and in evaluation mode for validation. Optional are `check(step)`, called after
            each logged interval, which raises to stop, and `parameter_groups()`, a list of dicts of "params" and
            "learning_rate_scale". How an update is cut by `accumulate` changes nothing where random numbers are drawn by
            `draws.rows`, and where the loss is a mean over images. Where it is not, `gather(batch, generator)` names what it
            needs of every image, see `Batch.complete` and `Batch.share`; or `whole_batch`, a reason, refuses `accumulate`.
        dataset: Has `__len__` and `images(indices) -> uint8 (N, C, H, W)`.
        options: `TrainingOptions`.
        folder: Receives `checkpoint/`, `metrics.jsonl` and, where TensorBoard is installed, its events.
        validation: Dataset for "validation/loss": the mean over up to 8 fixed batches with averaged weights.
        resume: Continue from the checkpoint in `folder`, if there is one.
        on_validate: `(step, module) -> dict of scalars or None`, called with averaged weights in evaluation mode.
        context: JSON-ready dict saved with the checkpoint, such as the recipe; a resumed run must bring the same.

    Returns:
        The averaged state dict of `objective.module`, `saving.unwrapped`; its own weights if `ema_decay` is 0.

    Raises:
        FileExistsError: `folder` holds a checkpoint and `resume` is False, or another process or thread is training in it.
        ValueError: The dataset is smaller than a batch, the objective takes no pieces, or the checkpoint was made with other
            options or context.
        TrainingStopped: The loss or the gradient is not finite.
        TrainingInterrupted: Ctrl-C or another signal of `SIGNALS`; the finished steps are saved.
        MemoryError: A batch does not fit; says what to try.
    """
    folder = Path(folder)
    run = _Run(objective, dataset, options, folder, context)
    with files.occupy(folder, "training in"):
        run.restore(resume)
        return _train(run, folder, functools.partial(run.validate, validation, on_validate), progress, description)


def _train(run, folder, validate, progress, description):
    """The steps that are left of a run, and its average."""
    options = run.options
    run.module.train()
    on_cuda = run.device.type == "cuda"
    waiting = processors.Waiting(idle=math.inf if on_cuda else 3.0)  # who computes on the GPU may idle
    with (
        processors.fitting_threads(),
        torch.random.fork_rng([run.device] if on_cuda else []),
        contextlib.closing(_Metrics(folder, run.step)) as metrics,
        _deferred_interrupt() as interrupted,
        tqdm(total=options.steps, initial=run.step, desc=description, unit="step", disable=not progress) as bar,
        run.advice_on_memory(),
    ):
        while run.step < options.steps:
            loss = run.advance()
            waiting.look()
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()
            if run.due(options.log_every):
                metrics.write(run.summary())
                run.check()
            if run.due(options.checkpoint_every):
                run.save()
            if run.due(options.validate_every) and not interrupted:
                metrics.write(validate())
            if run.due(options.checkpoint_every) or run.due(options.validate_every):
                waiting.restart()  # disks are waited for as well
            if interrupted:
                run.save()
                raise TrainingInterrupted(
                    f"stopped after step {run.step} of {options.steps}, saved in {run.checkpoint}: "
                    "run the same command with --resume (resume=True) to go on",
                    interrupted[0],
                )
    return run.average.state


def check_folder(folder, options, dataset, *, resume=False, context=None):
    """Raise what `train` would raise for the checkpoint in `folder`, without a model: `FileExistsError` or `ValueError`."""
    checkpoint = Path(folder) / "checkpoint"
    if checkpoints.exists(checkpoint):
        _require_same(checkpoint, _identity(options, context, dataset), resume)


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
        self.module, self.plain = objective.module, unwrapped(objective.module)
        self.checkpoint = folder / "checkpoint"
        self.device = next(self.module.parameters()).device
        if len(dataset) < options.batch_size:
            raise ValueError(f"batch_size={options.batch_size} is more than the {len(dataset)} images of the dataset")
        self.check_pieces()
        checkpoints.separate(self.plain.state_dict(), "module")  # tied weights show now, not at the first save
        self.identity = _identity(options, context, dataset)
        self.optimizer, self.names = _optimizer(objective, self.plain, options)
        self.average = _Average(self.plain, options.ema_decay)
        self.step, self.saved_step, self.upcoming = 0, None, None
        self.totals, self.interval_seconds = {}, 0.0
        self.started = time.perf_counter()

    def check_pieces(self):
        """Refuse, or say, what depends on how an update is cut."""
        if self.options.accumulate == 1:
            return
        if reason := getattr(self.objective, "whole_batch", None):
            raise ValueError(f"accumulate must be 1, got {self.options.accumulate}: {reason}")
        if any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in self.module.modules()):
            logger.warning(
                "batch normalisation sees one of the accumulate=%d pieces at a time: it learns other statistics than of the "
                "batch in one",
                self.options.accumulate,
            )

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
        for weight, loss, scalars in self.evaluate(indices, images, ("train", self.step, 0)):
            (loss * weight).backward()
            total += loss.detach().float() * weight
            for name, value in {**scalars, "loss": loss}.items():
                self.add(name, value, weight)
        return total

    def evaluate(self, indices, images, key):
        """(share of the images, loss, scalars) of the objective on each piece of uint8 images.

        `key` fixes every random number that is drawn; those of an image are the same however the images are cut.
        """
        cuts = [tensor.tensor_split(min(self.options.accumulate, len(indices))) for tensor in (indices, images)]
        pieces = list(zip(*cuts, strict=True))
        starts = [0, *itertools.accumulate(len(part) for part, _ in pieces)]
        call = functools.partial(self.call, key=key, total=len(indices))
        update = None
        if len(pieces) > 1 and hasattr(self.objective, "gather"):
            with torch.no_grad():
                found = [call(self.objective.gather, *piece, *at) for *at, piece in zip(itertools.count(), starts, pieces)]
            update = {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
        for number, (start, piece) in enumerate(zip(starts, pieces, strict=False)):
            yield len(piece[0]) / len(indices), *call(self.objective, *piece, number, start, update)

    def call(self, function, indices, images, number, start, update=None, *, key, total):
        """`function` of the objective on piece `number` of `total` uint8 images."""
        images = images.to(self.device, non_blocking=True).float() / 127.5 - 1
        batch = Batch(images, indices, self.step, self.step / self.options.steps, start, update)
        seed, own = self.options.seed, (*key, number) if number else key
        torch.manual_seed(_seed("global", seed, *own))
        generator, dropout = _generator("objective", seed, *key), contextlib.nullcontext()
        if len(images) < total:
            generator = draws.PieceGenerator.of(_seed("objective", seed, *own), generator.initial_seed(), start, total)
            dropout = draws.PieceDropout(_seed("global", seed, *key), start, len(images), total)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"), dropout:
            return function(batch, generator)

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
        with self.average.in_place(self.module), torch.no_grad():
            if dataset is not None:
                scalars["loss"] = self.validation_loss(dataset)
            if on_validate is not None:
                scalars.update(on_validate(self.step, self.module) or {})
        return {"step": self.step, **{f"validation/{name}": float(value) for name, value in scalars.items()}}

    def validation_loss(self, dataset):
        size = self.options.batch_size
        chosen = _permutation(len(dataset), self.options.seed, "validation")[: VALIDATION_BATCHES * size]
        total = 0.0
        for number, indices in enumerate(chosen.split(size)):
            for share, loss, _ in self.evaluate(indices, dataset.images(indices), ("validation", number)):
                total += float(loss) * share * len(indices)
        return total / len(chosen)

    def save(self):
        if self.saved_step == self.step:
            return
        slots = checkpoints.flatten({self.names[parameter]: slot for parameter, slot in self.optimizer.state.items()})
        weights = {"module": self.plain.state_dict(), "ema": self.average.state, "optimizer": slots}
        progress = {"step": self.step, "seconds": time.perf_counter() - self.started}
        checkpoints.save_folder(self.checkpoint, weights, {**progress, **self.identity})
        self.saved_step = self.step

    def restore(self, resume):
        """Continue from the checkpoint; without one, start from the beginning."""
        if not checkpoints.exists(self.checkpoint):
            if resume:
                logger.warning("no checkpoint in %s: starting from the beginning", self.checkpoint)
            return
        _require_same(self.checkpoint, self.identity, resume)
        checkpoints.settle(self.checkpoint)
        weights, config = checkpoints.load_folder(self.checkpoint)
        parts, progress = ("module", "ema", "optimizer"), {"step": int, "seconds": (int, float)}
        checkpoints.require_entries(self.checkpoint, weights, config, parts, progress)
        checkpoints.load_state(self.plain, weights["ema"], self.checkpoint / "ema.safetensors")
        self.average = _Average(self.plain, self.options.ema_decay)
        checkpoints.load_state(self.plain, weights["module"], self.checkpoint / "module.safetensors")
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
            smaller = at_once > 1 and not hasattr(self.objective, "whole_batch")
            raise MemoryError(
                f"out of memory on {self.device} at step {self.step} with batch_size={batch}, {at_once} images at "
                f"once: try {halves if smaller else ''}batch_size={max(1, batch // 2)}. "
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
    def in_place(self, module):
        """`module`, which may wrap ours, holds the average, in evaluation mode; afterwards its own weights, in training mode."""
        self.exchange()
        module.eval()
        try:
            yield
        finally:
            self.exchange()
            module.train()

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
        files.write_text(self.path, "".join(kept))

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


def _optimizer(objective, plain, options):
    """AdamW over the groups of the objective, and its parameters with their names in the `plain` module, in its order."""
    names = {parameter: name for name, parameter in plain.named_parameters()}
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
    """A list of the signals of `SIGNALS` that came; a Ctrl-C after any of them stops at once. Main thread only."""
    came = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def handle(number, frame):
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        if len(came) == 1:
            name = "" if number == signal.SIGINT else f"{signal.Signals(number).name}: "
            message = f"\n{name}finishing this step, then saving; Ctrl-C{' again' if not name else ''} stops at once\n"
            os.write(2, message.encode())  # print may not re-enter

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    ours = [number for number in numbers if number == signal.SIGINT or signal.getsignal(number) == signal.SIG_DFL]
    previous = {number: signal.signal(number, handle) for number in ours}
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _identity(options, context, dataset):
    """What a checkpoint says of its training, as it will be read back: tuples become lists."""
    identity = {"options": dataclasses.asdict(options), "context": context or {}, "dataset_size": len(dataset)}
    return json.loads(json.dumps(identity | {"fingerprint": getattr(dataset, "fingerprint", None)}))


def _require_same(checkpoint, identity, resume):
    if not resume:
        raise FileExistsError(f"{checkpoint} exists: pass --resume (resume=True) to continue it, or choose another folder")
    config = checkpoints.load_config(checkpoint)
    saved, now = ({key: of.get(key) for key in identity if key != "fingerprint"} for of in (config, identity))
    differing = list(_differences(saved, now))
    if differing:
        raise ValueError(f"{checkpoint} was trained differently: " + "; ".join(differing))
    fingerprints = config.get("fingerprint"), identity["fingerprint"]
    if None not in fingerprints and len(set(fingerprints)) > 1:
        raise ValueError(
            f"{checkpoint} was trained on other images: files were changed, added, removed or renamed since. Bring them back, or "
            "choose another folder"
        )


def _differences(saved, current, path=()):
    if path in _FREE:
        return
    if path in _SOURCES and None not in (saved, current):
        saved, current = data.absolute_source(saved), data.absolute_source(current)
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in sorted(saved.keys() | current.keys()):
            if key not in _FREE_OPTIONS:  # at any depth: a recipe in the context repeats the options
                yield from _differences(saved.get(key), current.get(key), (*path, key))
    elif saved != current:
        yield f"{'.'.join(path)} was {saved!r}, now {current!r}"
