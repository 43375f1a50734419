"""What a checkpoint says of its training, and whether another run may continue it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multibeta import checkpoints, data, distribution
from multibeta.checks import check_integer, check_number, is_integer
from multibeta.training.best import Validated
from multibeta.training.guard import Guarded
from multibeta.training.options import TrainingOptions

logger = logging.getLogger(__name__)

# These say how the work is done, cut and watched, not what is learned, so a resumed run may change them.
_EVERY = ("log_every", "validate_every", "checkpoint_every", "snapshot_every")
# These are how a training that fails is brought to go on, from a checkpoint before: `say_changes` says what is changed of them.
_STEERED = ("learning_rate", "clip_norm", "precision", "spike_factor")
_FREE_OPTIONS = (*_STEERED, "accumulate", "compile", "recompute", "num_workers", *_EVERY, "keep_checkpoints")
_NEWER = ("keep_best",)  # options that older checkpoints do not say: without it they hold no best weights
# What was so before a field was there; of others that a checkpoint does not say, what is off was always so.
_BEFORE = {"uniform_share": 1.0, "basis": "pixel", "spacing": "uniform"}
# Where a recipe is published: words. How far a training goes and what it gives of it may change, but not of those it builds on.
_OWN = ("steps", "keep_best")
_FREE = {("context", "source"), *((*of, name) for of in (("options",), ("context", "diffusion_training")) for name in _OWN)}
_IMAGES = ("fingerprint", "chosen")  # of the images, where it is known
_SOURCES = (("context", "data", "source"),)  # of images; a relative one is of the folder where it is compared


def check_folder(
    folder: str | Path, options: TrainingOptions, dataset: Sized, *, resume: bool = False, context: dict[str, Any] | None = None
) -> None:
    """Raise what `train` would raise for the checkpoint in `folder`, without a model: `FileExistsError` or `ValueError`."""
    checkpoint = Path(folder) / "checkpoint"
    if checkpoints.exists(checkpoint):
        require_same(checkpoint, identity_of(options, context, dataset), resume)


def identity_of(options: TrainingOptions, context: dict[str, Any] | None, dataset: Sized) -> dict[str, Any]:
    """What a checkpoint says of its training, as it will be read back: tuples become lists."""
    identity = {"options": dataclasses.asdict(options), "context": context or {}, "dataset_size": len(dataset)}
    images = {"fingerprint": data.fingerprint_of(dataset), "chosen": data.chosen_digest(dataset)}
    return json.loads(json.dumps(identity | images))


def require_same(checkpoint: Path, identity: dict[str, Any], resume: bool) -> None:
    """`FileExistsError` unless the checkpoint is to be resumed, `ValueError` where `identity_of` its training was another.

    Another number of steps is no other training, but for one that is passed already.
    """
    if not resume:
        raise FileExistsError(f"{checkpoint} exists: pass --resume (resume=True) to continue it, or choose another folder")
    config = checkpoints.load_config(checkpoint)
    saved, now = ({key: of.get(key) for key in identity if key not in _IMAGES} for of in (config, identity))
    differing = list(_differences(saved, now))
    if differing:
        raise ValueError(f"{checkpoint} was trained differently: " + "; ".join(differing))
    done, steps = config.get("step"), identity["options"]["steps"]
    if isinstance(done, int) and done > steps:
        raise ValueError(
            f"{checkpoint} has {done} finished steps, more than the {steps} that are asked for: steps={done} ends there, "
            "more go on, or choose another folder"
        )
    pairs = [(config.get(key), identity[key]) for key in _IMAGES]
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise ValueError(
            f"{checkpoint} was trained on other images: files were changed, added, removed or renamed since. Bring them back, or "
            "choose another folder"
        )


def say_changes(config: dict[str, Any], options: TrainingOptions) -> None:
    """Log which options a training goes on with that are others than those before, and change what is learned."""
    before = config["options"]
    if (planned := before["steps"]) != options.steps:
        words = "it was to end at step %d: the learning rate goes on as in a training of %d steps"
        logger.info(words, planned, options.steps)
    for name in _STEERED:
        now = getattr(options, name)
        if (value := before.get(name, now)) != now:
            logger.warning("it goes on with %s %s, before %s", name, now, value)


@dataclass(frozen=True)
class Progress:
    """What a checkpoint says of how far its training came, besides what `Validated` and `Guarded` are."""

    step: int = 0
    seconds: float = 0.0
    averaged: int | None = None


def require_progress(checkpoint: Path, config: dict[str, Any]) -> None:
    """`ValueError`, which names config.json, where that does not say how far a training came as `Run.save` does."""
    with checkpoints.naming(checkpoint, "how far a training came"):
        said = {field.name: config[field.name] for field in dataclasses.fields(Progress) if field.name in config}
        progress = Progress(**checkpoints.typed(Progress, said))
        check_integer("step", progress.step, 1, 2**63)
        check_number("seconds", progress.seconds, least=0)
        counts = {"averaged": progress.averaged or 0}  # of steps that were made
        for name, kind in {"validated": Validated, "best": Validated, "guard": Guarded}.items():
            if name in config:
                try:
                    checkpoints.typed(kind, config[name])
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                counts |= {f"{name}.{key}": value for key, value in config[name].items() if is_integer(value) and key != "loss"}
        for name, count in counts.items():
            check_integer(name, count, 0, progress.step)
        if "best" in config and None in (config["best"].get("step"), config["best"].get("loss")):
            raise ValueError("best needs step and loss, which are missing")
        options = config.get("options")
        planned: Any = options.get("steps") if isinstance(options, dict) else None
        check_integer("options.steps", planned, 1, 2**63)


def require_agreement(identity: dict[str, Any]) -> None:
    """`ValueError` in all processes alike, unless `identity_of` their training is the same; says what differs in which."""
    first, *others = distribution.gather(identity)
    for rank, other in enumerate(others, 1):
        if other != first:
            differing = [f"{name} is {of!r}, in process 0 {here!r}" for name, here, of in _differing(first, other)]
            raise ValueError(f"process {rank} of {len(others) + 1} trains something else: {'; '.join(differing)}")


def _differing(first: Any, other: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of each entry of two identities that differs."""
    if isinstance(first, dict) and isinstance(other, dict):
        for key in sorted(first.keys() | other.keys()):
            yield from _differing(first.get(key), other.get(key), (*path, key))
    elif first != other:
        yield ".".join(path), first, other


def _differences(saved: Any, current: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What of two identities differs where it matters, in words."""
    if path in _FREE:
        return
    if path in _SOURCES and None not in (saved, current):
        saved, current = data.absolute_source(saved), data.absolute_source(current)
    if isinstance(saved, dict) and isinstance(current, dict):
        unsaid = {key: current[key] for key in current.keys() - saved.keys()}
        newer = {key for key, value in unsaid.items() if key in _NEWER or not value or value == _BEFORE.get(key)}
        for key in sorted((saved.keys() | current.keys()) - newer):
            if key not in _FREE_OPTIONS:  # at any depth: a recipe in the context repeats the options
                yield from _differences(saved.get(key), current.get(key), (*path, key))
    elif saved != current:
        yield f"{'.'.join(path)} was {saved!r}, now {current!r}"
