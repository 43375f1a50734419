"""The state of one training, and its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from multibeta import checkpoints, distribution, draws, files
from multibeta.data import Dataset, read_images, to_float
from multibeta.training.average import Average
from multibeta.training.batches import Batch, Objective, Scalars, batch_indices, generator_of, order_of, permutation, seed_of
from multibeta.training.best import Best, Validated
from multibeta.training.checkpointing import identity_of, require_agreement, require_progress, require_same, say_changes
from multibeta.training.guard import REMEMBERED, Guard
from multibeta.training.learner import Learner
from multibeta.training.operations import counted, peak_of
from multibeta.training.options import TrainingOptions, learning_rate_at
from multibeta.training.parallel import Parallel, check_parallel, exchanging, is_sharded, whole, whole_tensor
from multibeta.training.posthoc import PostHocAverages
from multibeta.training.reading import Reader
from multibeta.training.rotation import EARLIER, earlier, keep
from multibeta.training.shards import Writer, load
from multibeta.weights import shorten

logger = logging.getLogger(__name__)

VALIDATION_BATCHES = 8
FIRST_LOOK_SECONDS = 75.0  # until the first validation and picture, unless they are due before
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")

Validate = Callable[[int, nn.Module], Scalars | None]


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says why and which checkpoint is the last good one."""


class Run:
    """The state of one training: weights, average, optimiser, and the number of finished steps."""

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        options: TrainingOptions,
        folder: Path,
        context: dict[str, Any] | None,
        parallel: Parallel = "ddp",
    ):
        self.dataset, self.options, self.world = dataset, options, distribution.world()
        self.checkpoint = folder / "checkpoint"
        self.identity = identity_of(options, context, dataset)
        require_agreement(self.identity)
        check_parallel(parallel)
        if len(dataset) < options.batch_size:
            raise ValueError(f"batch_size={options.batch_size} is more than the {len(dataset)} images of the dataset")
        if self.world.size > options.batch_size:
            raise ValueError(f"{self.world.size} processes need a batch_size of as many images, got {options.batch_size}")
        opponent: Objective | None = getattr(objective, "opponent", None)
        self.own = Learner(objective, options, way=parallel)
        self.learners = [self.own] if opponent is None else [self.own, Learner(opponent, options, "opponent")]
        self.objective, self.module = self.own.objective, self.own.module
        self.device = next(self.module.parameters()).device
        self.check_pieces()
        if self.world.size > 1:
            logger.info("%d processes share this training, %s", self.world.size, parallel)
        self.writer = Writer(overlaps=self.device.type != "cpu") if is_sharded(parallel) else None
        self.average = Average(self.own.plain, options.ema_decay)
        self.posthoc = PostHocAverages(self.own.plain, options.posthoc_ema, folder)
        self.step = 0
        self.saved_step: int | None = None
        self.validated, self.saved_validated = Validated(), Validated()
        self.best = Best(getattr(objective, "comparable_from", 0.0))
        self.guard = Guard(options.spike_factor)
        self.damaged: list[Path] = []  # checkpoints that could not be read
        self.looked = False  # at what it has learned, early in the training
        self.order = order_of(dataset)
        self.reader = Reader(self.fetch, options.steps, options.num_workers, self.device)
        self.totals: dict[str, tuple[Tensor | float, float]] = {}  # sum of the weighted values, and of the weights
        self.interval_seconds = self.interval_cpu_seconds = self.interval_data_seconds = 0.0
        self.interval_steps = 0
        self.flops: dict[int, float] = {}  # of an image, forward and backward, by number of the learner
        self.peak = peak_of(self.device, options.precision)
        self.started = time.perf_counter()

    def end(self) -> None:
        """Save, and go on when that is done."""
        self.save()
        if self.writer is not None:
            self.writer.close()

    def close(self) -> None:
        """Leave the module as it was given, and read no more."""
        self.reader.close()
        self.own.close()

    def check_pieces(self) -> None:
        """Refuse, or say, what depends on how an update is cut."""
        if self.options.accumulate * self.world.size == 1:
            return
        for learner in self.learners:
            if reason := getattr(learner.objective, "whole_batch", None):
                several = f"accumulate={self.options.accumulate} in {self.world.size} processes"
                raise ValueError(f"accumulate must be 1, in one process, got {several}: {reason}")
        parts = itertools.chain.from_iterable(learner.module.modules() for learner in self.learners)
        if any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in parts):
            logger.warning(
                "batch normalisation sees one of the pieces at a time, accumulate=%d in %d processes: it learns other statistics "
                "than of the batch in one",
                *(self.options.accumulate, self.world.size),
            )

    def due(self, every: int) -> bool:
        """Whether something that happens once in `every` steps, and after the last, happens now."""
        return self.step % every == 0 or self.step == self.options.steps

    @property
    def seconds(self) -> float:
        """Since the training began, without those between its end and a resumed run."""
        return time.perf_counter() - self.started

    @property
    def progress(self) -> float:
        """Fraction of the training that is done."""
        return self.step / self.options.steps

    @property
    def owes_validation(self) -> bool:
        """Whether the run that saved this step ended before it looked at it."""
        return 0 < self.step != self.validated.step and self.due(self.options.validate_every)

    @property
    def due_early(self) -> bool:
        """Whether something should be seen now, because none was after the first seconds."""
        return not self.looked and not self.validated.step and self.seconds >= FIRST_LOOK_SECONDS

    def advance(self) -> float:
        """One update of the weights, and of the opponent's where there is one; returns the loss of the objective."""
        began, computed = time.perf_counter(), time.process_time()
        indices, images = self.reader.take(self.step)
        self.interval_data_seconds += time.perf_counter() - began
        loss, *_ = [self.update(number, indices, images) for number in range(len(self.learners))]
        if not self.guard.left_out:
            self.average.update(self.step)
            self.posthoc.update(self.step)
        self.step += 1
        self.interval_steps += 1
        if self.guard.factor:
            self.add("left_out", float(self.guard.left_out > 0), 1.0)
        if self.guard.gives_up:
            self.roll_back()
        self.interval_seconds += time.perf_counter() - began
        self.interval_cpu_seconds += time.process_time() - computed
        return loss

    def update(self, number: int, indices: Tensor, images: Tensor) -> float:
        """One update of the learner of this number, while the other, if there is one, stays as it is; returns its loss."""
        learner = self.learners[number]
        learner.set_rate(learning_rate_at(self.step, self.options))
        before = dict(self.totals)
        with contextlib.ExitStack() as others:
            for other in self.learners:
                if other is not learner:
                    others.enter_context(other.frozen())
            loss = self.accumulate_gradients(indices, images, number)
        norm = whole_tensor(torch.nn.utils.clip_grad_norm_(learner.names, self.options.clip_norm or math.inf))
        reading = time.perf_counter()
        self.reader.read_ahead(self.step + 1)  # while the accelerator works; the two numbers below wait for it
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():  # which else works meanwhile
            self.interval_data_seconds += time.perf_counter() - reading
        loss, norm = torch.stack([loss, norm.float()]).tolist()
        reason = self.guard.refuses(loss, norm) if learner is self.own else self.guard.refuses_beside(loss, norm)
        if reason is not None:
            logger.warning("step %d is left out%s: %s", self.step, f" of the {learner.file}" * (learner is not self.own), reason)
            self.totals = before
        elif not (math.isfinite(loss) and math.isfinite(norm)):
            self.stop(learner.prefix, loss, norm, indices)
        elif not self.guard.left_out:
            learner.optimizer.step()
        learner.optimizer.zero_grad()
        if reason is None:
            self.add(f"{learner.prefix}grad_norm", norm, 1.0)
        return loss

    def fetch(self, step: int) -> tuple[Tensor, Tensor]:
        """Indices of a step, (N,), and the images of this process's share of them, uint8, ready to be copied to the device."""
        indices = batch_indices(step, len(self.dataset), self.options.batch_size, self.options.seed, self.order)
        images = read_images(self.dataset, indices[self.share(len(indices))])
        return indices, images.pin_memory() if self.device.type == "cuda" and not images.is_cuda else images

    def share(self, count: int) -> slice:
        """Which of `count` images this process sees; of fewer than there are processes each sees all."""
        own = self.world.share(count) if count >= self.world.size else range(count)
        return slice(own.start, own.stop)

    def accumulate_gradients(self, indices: Tensor, images: Tensor, number: int = 0) -> Tensor:
        """Gradient of a learner's mean loss over the batch, piece by piece; returns that loss, still on the device."""
        learner, key = self.learners[number], ("train", self.step, number)
        mean = torch.zeros((), device=self.device)
        for weight, last, compute in self.pieces(learner, indices, images, key):
            counting = contextlib.nullcontext() if number in self.flops else counted()
            with exchanging(learner.step, last), counting as counter:
                loss, scalars = compute()
                (loss * (weight * self.world.size)).backward()  # of which the mean over the processes is taken
            if counter is not None:  # the first piece
                self.flops[number] = counter.total / (weight * len(indices))
            mean += loss.detach().float() * weight
            for name, value in {**scalars, f"{learner.prefix}loss": loss}.items():
                self.add(name, value, weight)
        return distribution.total(mean)

    def pieces(
        self, learner: Learner, indices: Tensor, images: Tensor, key: tuple[int | str, ...]
    ) -> Iterator[tuple[float, bool, Callable[[], tuple[Tensor, Scalars]]]]:
        """(share of all images, whether it is the last, what computes (loss, scalars)) of each piece of this process's images.

        Args:
            indices: Of all images, (N,).
            images: Those of this process, uint8.
            key: Fixes every random number that is drawn; those of an image are the same however the images are cut.
        """
        own, each = self.share(len(indices)), len(indices) >= self.world.size
        count = min(self.options.accumulate, max(1, len(indices) // self.world.size))  # the same in all processes
        first = self.world.rank * count if each else 0
        pieces = list(zip(indices[own].tensor_split(count), images.tensor_split(count), strict=True))
        starts = list(itertools.accumulate((len(part) for part, _ in pieces), initial=own.start))
        call = functools.partial(self.call, learner, key=key, total=len(indices))
        update = None
        if len(pieces[0][0]) < len(indices) and hasattr(learner.objective, "gather"):
            with torch.no_grad():
                calls = enumerate(zip(starts, pieces, strict=False))
                gathered = [call("gather", *piece, first + number, start) for number, (start, piece) in calls]
            rows = {name: torch.cat([each[name] for each in gathered]) for name in gathered[0]}
            update = {name: distribution.gather_rows(value) for name, value in rows.items()} if each else rows
        for number, (start, piece) in enumerate(zip(starts, pieces, strict=False)):
            share = len(piece[0]) / len(indices) / (1 if each else self.world.size)
            yield share, number == count - 1, functools.partial(call, "__call__", *piece, first + number, start, update)

    def call(
        self,
        learner: Learner,
        method: str,
        indices: Tensor,
        images: Tensor,
        number: int,
        start: int,
        update: dict[str, Tensor] | None = None,
        *,
        key: tuple[int | str, ...],
        total: int,
    ) -> Any:
        """A method of the objective on piece `number` of `total` uint8 images."""
        images = to_float(images.to(self.device, non_blocking=True))
        before = self.step * self.options.batch_size + start
        batch = Batch(images, indices, self.step, self.progress, start, update, key[0] == "validation", before)
        seed, own = self.options.seed, (*key, number) if number else key
        torch.manual_seed(seed_of("global", seed, *own))
        generator, dropout = generator_of("objective", seed, *key), contextlib.nullcontext()
        if len(images) < total:
            generator = draws.PieceGenerator.of(seed_of("objective", seed, *own), generator.initial_seed(), start, total)
            dropout = draws.PieceDropout(seed_of("global", seed, *key), start, len(images), total)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16"), dropout:
            return learner.step(batch, generator, method=method)

    def add(self, name: str, value: Tensor | float, weight: float) -> None:
        """Count a scalar towards its mean in the next `summary`."""
        value = value.detach().float() if isinstance(value, torch.Tensor) else value
        total, weights = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = total + value * weight, weights + weight

    def summary(self) -> dict[str, float]:
        """Means over the steps since the last summary, and over all processes."""
        steps = self.interval_steps
        rate = steps * self.options.batch_size / self.interval_seconds
        flops = rate * sum(self.flops.values())
        sums = torch.tensor([(float(value), weight) for value, weight in self.totals.values()], dtype=torch.float64)
        record = {
            "step": self.step,
            **{name: float(value / weight) for name, (value, weight) in zip(self.totals, distribution.total(sums), strict=True)},
            "learning_rate": learning_rate_at(self.step - 1, self.options),
            "images_per_second": rate,
            "flops_per_second": flops,
            **({} if self.peak is None else {"mfu": flops / (self.peak * self.world.size)}),
            "cpu_seconds_per_step": self.interval_cpu_seconds / steps,  # of all threads of a process
            "data_seconds_share": self.interval_data_seconds / self.interval_seconds,  # of the time, waited for images
            "seconds": self.seconds,
        }
        self.totals, self.interval_steps = {}, 0
        self.interval_seconds = self.interval_cpu_seconds = self.interval_data_seconds = 0.0
        return record

    def check(self) -> None:
        """Let the objective, or its opponent, stop the training."""
        for learner in self.learners:
            if hasattr(learner.objective, "check"):
                with torch.no_grad():
                    learner.step(self.step, method="check")

    def validate(self, dataset: Dataset | None, on_validate: Validate | None, early: bool = False) -> dict[str, float]:
        """Validation scalars of the averaged weights; an `early` one, whose step depends on the clock, decides nothing."""
        self.looked = True
        if dataset is None and on_validate is None:
            return {}
        scalars: dict[str, Tensor | float] = {}
        loss: float | None = None
        with self.average.in_place(self.module), torch.no_grad():
            if dataset is not None:
                scalars["loss"] = loss = self.validation_loss(dataset)
            if on_validate is not None:
                self.own.show()
                scalars.update(distribution.by_first(lambda: on_validate(self.step, self.own.shown) or {}))
        if not early:
            self.validated = Validated.of(self.step, loss)
            if self.options.keep_best:
                self.best.offer(self.validated, self.progress, self.average.state)
        return {"step": self.step, **{f"validation/{name}": float(value) for name, value in scalars.items()}}

    def validation_loss(self, dataset: Dataset) -> float:
        """Mean loss over the same few batches of `dataset` every time."""
        size = self.options.batch_size
        chosen = permutation(len(dataset), self.options.seed, "validation")[: VALIDATION_BATCHES * size]
        total = torch.zeros((), dtype=torch.float64)
        for number, indices in enumerate(chosen.split(size)):
            images = read_images(dataset, indices[self.share(len(indices))])
            for share, _, compute in self.pieces(self.own, indices, images, ("validation", number)):
                total += float(compute()[0]) * share * len(indices)
        return float(distribution.total(total)) / len(chosen)

    def result(self) -> dict[str, Tensor]:
        """What the training gives: the average of lowest validation loss where it is kept, else the last."""
        at = self.best.at
        if not self.options.keep_best or at is None or at.step == self.step or self.best.state is None:
            return whole(self.average.state)
        last = "unknown" if self.validated.loss is None else f"{self.validated.loss:.4g}"
        logger.info(
            "the weights of step %d are taken: their validation loss is %.4g, after the last step, %d, it is %s",
            *(at.step, at.loss, self.step, last),
        )
        return {name: value.to(self.device) for name, value in whole(self.best.state).items()}

    def save(self) -> None:
        """Write the checkpoint of this step, unless it is there: the first process, or where each holds a part all of them."""
        if (self.saved_step, self.saved_validated) == (self.step, self.validated):
            return
        weights = {"ema": self.average.state} | ({"posthoc": self.posthoc.state} if self.posthoc.state else {})
        for learner in self.learners:
            weights |= {learner.file: learner.plain.state_dict(), f"{learner.prefix}optimizer": learner.slots()}
        progress: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "validated": dataclasses.asdict(self.validated)}
        if self.best.at is not None and self.best.state is not None:
            progress["best"] = dataclasses.asdict(self.best.at)
            weights |= {"best": self.best.state} if self.best.at.step != self.step else {}  # else it is the average itself
        config = {**progress, **self.identity, "guard": self.guard.state(), "averaged": self.posthoc.time}
        if self.damaged or self.saved_step != self.step:  # else it is written again, because it was looked at since
            distribution.by_first(lambda: keep(self.checkpoint, self.options.keep_checkpoints - 1, damaged=self.damaged))
        self.damaged = []
        if self.writer is None:
            distribution.by_first(lambda: checkpoints.save_folder(self.checkpoint, weights, config))
        else:
            self.writer.write(self.checkpoint, weights, config)
        self.saved_step, self.saved_validated = self.step, self.validated

    def restore(self, resume: bool) -> None:
        """Continue from the checkpoint; without one, start from the beginning."""
        files.require_no_file(self.checkpoint.with_name(EARLIER))
        places = [place for place in (self.checkpoint, *earlier(self.checkpoint)) if checkpoints.exists(place)]
        names = [place.name for place in places]
        distribution.agree(f"what is in {self.checkpoint.parent}, a folder that all of them see,", names)
        if not places:
            self.posthoc.restore(0)
            if resume:
                logger.warning("no checkpoint in %s: starting from the beginning", self.checkpoint)
            return
        distribution.by_first(lambda: checkpoints.settle(self.checkpoint))
        place, weights, config = self.take_newest(places, resume)
        self.step = self.saved_step = config["step"]
        self.guard.restore(config.get("guard", {}))
        self.started -= config["seconds"]
        self.looked = self.seconds >= FIRST_LOOK_SECONDS
        self.validated = self.saved_validated = Validated(**config.get("validated", {"step": self.step}))
        if self.options.keep_best and "best" in config:
            best = weights.get("best", weights["ema"])
            checkpoints.compare_state(self.own.plain, best, self.checkpoint / "best.safetensors")
            self.best.restore(config["best"], self.options.steps, best)
        logger.info("resumed %s at step %d of %d", place, self.step, self.options.steps)
        say_changes(config, self.options)

    def take_newest(self, places: list[Path], resume: bool) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]]:
        """The first of these checkpoints that is not damaged, and `take` of it; it must be of this training."""
        for number, place in enumerate(places):
            try:
                checkpoints.load_config(place)
            except (ValueError, OSError) as error:
                problem = error
            else:
                require_same(place, self.identity, resume)
                try:
                    taken = (place, *self.take(place))
                except (ValueError, OSError) as error:
                    problem = error
                else:
                    self.damaged = places[:number]
                    return taken
            if place is places[-1]:
                raise problem
            logger.warning("%s. Going on from %s", problem, places[number + 1])
        raise AssertionError("there is a last one")

    def take(self, checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Go on from the weights, averages and moments of a checkpoint; returns all that it holds."""
        own = self.own.layouts()
        own |= {"ema": own[self.own.file], "best": own[self.own.file], "posthoc": self.posthoc.state}
        weights, config = load(checkpoint, own)
        parts = [
            "ema",
            *(["posthoc"] if self.posthoc.state else []),
            *itertools.chain.from_iterable((each.file, f"{each.prefix}optimizer") for each in self.learners),
        ]
        checkpoints.require_entries(checkpoint, weights, config, parts, {"step": int, "seconds": (int, float)})
        require_progress(checkpoint, config)
        self.own.take(weights["ema"], checkpoint / "ema.safetensors")
        self.average = Average(self.own.plain, self.options.ema_decay)
        for learner in self.learners:
            learner.take(weights[learner.file], checkpoint / f"{learner.file}.safetensors")
            learner.take_slots(weights[f"{learner.prefix}optimizer"])
        self.posthoc.restore(config["step"], weights.get("posthoc"), config.get("averaged"))
        return weights, config

    def roll_back(self) -> None:
        """Go on from the weights of a checkpoint, and from this step: the images since are left out.

        It is the last one; where that was taken since it was written, the one before.

        Raises:
            TrainingStopped: There is no other.
        """
        if self.writer is not None:
            self.writer.wait()
        if self.saved_step is None and self.guard.left_out < REMEMBERED:  # so far the weights are hardly other than at the start
            return
        places = [self.checkpoint, *earlier(self.checkpoint)][self.guard.rolled_back :] if self.saved_step is not None else []
        config = None
        while places and config is None:
            self.guard.rolled_back += 1
            try:
                _, config = self.take(places.pop(0))
            except (ValueError, OSError) as error:
                logger.warning("%s", error)
        if config is None:
            raise TrainingStopped(
                f"after step {self.step} {self.guard.left_out} updates in a row were left out, and there is no other checkpoint "
                f"to go back to. {self.last_checkpoint()}. A lower learning_rate, a longer warm-up or more keep_checkpoints may "
                "help"
            )
        self.guard.left_out = 0
        self.guard.norms.clear()
        logger.warning("after step %d training goes on with the weights of step %d", self.step, config["step"])

    def stop(self, prefix: str, loss: float, norm: float, indices: Tensor) -> NoReturn:
        """`TrainingStopped` for a loss or gradient that is not finite."""
        raise TrainingStopped(
            f"{prefix}loss {loss:g} and gradient norm {norm:g} at step {self.step} are not finite; the weights were not "
            f"updated. Batch indices: {shorten(indices.tolist(), 64)}. {self.last_checkpoint()}. "
            "A lower learning_rate, a clip_norm, precision='fp32' or a spike_factor usually helps: --resume takes another"
        )

    def last_checkpoint(self) -> str:
        """Which checkpoint is the last good one, for messages."""
        if self.saved_step is None:
            return "No checkpoint had been saved yet"
        return f"The last good checkpoint is {self.checkpoint}, at step {self.saved_step}"

    @contextlib.contextmanager
    def advice_on_memory(self) -> Iterator[None]:
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
