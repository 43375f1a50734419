"""How long and how fast to learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from multibeta.checks import check_integer, check_number, check_weights
from multibeta.seeds import as_seed

LARGEST_WIDTH = 0.28  # of `posthoc_ema`; that of the plain mean of all steps is 0.289
_COUNTS = {
    **dict.fromkeys(("steps", "batch_size", "accumulate"), 1),
    **dict.fromkeys(("log_every", "validate_every", "checkpoint_every", "snapshot_every", "keep_checkpoints"), 1),
    "warmup_steps": 0,
}


@dataclass(frozen=True)
class TrainingOptions:
    """How long and how fast to learn.

    Attributes:
        steps: Updates of the weights.
        batch_size: Images of an update, in all processes together.
        learning_rate: Of Adam, after the warm-up.
        warmup_steps: Updates over which the learning rate rises to it.
        final_learning_rate: Fraction of `learning_rate` that cosine decay reaches at the last step; 1 keeps it constant.
        weight_decay: Of AdamW; 0 is Adam.
        adam_betas: Decay of both moments of Adam.
        clip_norm: Length to which longer gradients are cut; 0 cuts none.
        accumulate: Pieces of a batch, one after the other: less memory, the same training.
        ema_decay: Of the average of the weights, which is what a training gives; 0 gives the last weights.
        precision: bf16 computes in bfloat16 where autocast does, fp32 in float32.
        log_every: Steps between lines of metrics.jsonl.
        validate_every: Steps between looks at held-out images, and pictures.
        checkpoint_every: Steps between checkpoints.
        seed: Of the weights, the order of images and the noise.
        keep_best: With held-out images give the average of lowest validation loss, among those at every `validate_every` steps,
            not the last.
        spike_factor: An update whose gradient is more than so many times as long as usual, or not finite, is left out; after
            three in a row the weights of the last checkpoint are taken, and training goes on with the images that come next. At 0
            all are made, and one that is not finite ends the training.
        keep_checkpoints: How many of the last are kept, those before the last in `earlier`.
        posthoc_ema: Relative widths, such as 0.05 and 0.1, of averages that are tracked besides, from which `multibeta average`
            (`reconstruct_ema`) makes the average of another width after the training.
        snapshot_every: Steps between the times when those are written down.
        compile: Compile the blocks of the networks (`torch.compile`): faster after the first steps, in numbers that are rounded
            in other places.
        recompute: Keep the inputs of blocks alone, and compute what is in them again in the backward pass: less memory and a
            third more work, for bitwise the same.
        num_workers: Threads that read, decode and pin the images of coming steps, each those of one. At 0 the next ones are read
            while the GPU computes.
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
    keep_best: bool = True
    spike_factor: float = 0.0
    keep_checkpoints: int = 1
    posthoc_ema: tuple[float, ...] = ()
    snapshot_every: int = 250
    compile: bool = False
    recompute: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            check_integer(name, getattr(self, name), least, 2**63)
        check_integer("num_workers", self.num_workers, 0, 256)
        check_weights(**{name: getattr(self, name) for name in ("learning_rate", "final_learning_rate", "weight_decay")})
        check_number("clip_norm", self.clip_norm, least=0)
        check_number("ema_decay", self.ema_decay, least=0, below=1)
        check_number("spike_factor", self.spike_factor, least=0)
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"spike_factor must be above 1, or 0 to make every update, got {self.spike_factor}")
        if not isinstance(self.adam_betas, tuple | list) or len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas!r}")
        for decay in self.adam_betas:
            check_number("adam_betas", decay, least=0, below=1)
        widths = self.posthoc_ema
        if not isinstance(widths, tuple | list) or len(set(widths)) < len(widths):
            raise ValueError(f"posthoc_ema must be different numbers, got {widths!r}")
        for width in widths:
            check_number("posthoc_ema", width, above=0, most=LARGEST_WIDTH)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate={self.accumulate} pieces need at least as many images, got {self.batch_size}")
        for name in ("keep_best", "compile", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        object.__setattr__(self, "seed", as_seed(self.seed))
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be 'bf16' or 'fp32', got {self.precision!r}")


def learning_rate_at(step: int, options: TrainingOptions) -> float:
    """Learning rate of the update that follows `step` finished ones: linear warm-up, then cosine decay.

    It is a function of the step and of `options.steps` alone. A training that is resumed with more steps stands earlier on a
    longer cosine, so that its rate jumps up there: one of 1000 steps that ended at a twentieth of `learning_rate` goes on to 2000
    at about half of it.
    """
    update = step + 1
    if update < options.warmup_steps:
        return options.learning_rate * update / options.warmup_steps
    decayed = (update - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    final = options.final_learning_rate
    return options.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * decayed)) / 2)
