"""A decoder tuned against a discriminator, so that what was denoised is decoded sharp (MultiBeta section 4.2)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from multibeta import checkpoints, data
from multibeta.adversarial import ADAM_BETAS, AdversarialObjective, AdversarialOptions, DecoderObjective, against_discriminator
from multibeta.checks import check_integer, check_number
from multibeta.metrics.fidelity import mean_energy, sharpness
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.pipelines import DenoisingMultiBetaVAE, LatentDiffusion, Pipeline
from multibeta.pipelines.spectrum import SPECTRUM_IMAGES
from multibeta.recipes import pictures
from multibeta.recipes.later_training import own_fields, training_of
from multibeta.training import TrainingOptions, train

logger = logging.getLogger(__name__)

DECODER = "decoder"  # folder of the training in that of a run
SHOWN_BETAS = (0.0, 0.5, 0.8)


@dataclass(frozen=True)
class DecoderTuningOptions(AdversarialOptions):
    """How a decoder is tuned.

    Attributes:
        steps: Updates of the decoder; 0 tunes none.
        batch_size: Images of an update.
        learning_rate: Of Adam, constant but for 100 steps of warm-up, with betas 0.5 and 0.9 as in latent-diffusion.
        accumulate: Pieces that a batch is cut into where memory is short; the result is the same.
        ema_decay: Of the average of the decoder's weights over steps, which is what is kept; 0 keeps the last ones.
        precision: bf16 computes networks in bfloat16 under autocast, fp32 all in float32.
        validate_every: Steps between pictures and measures of held-out images.
        checkpoint_every: Steps between checkpoints, which --resume goes on from.
        seed: Of the discriminator, the order of the images and the noise.
        penalty: R1, see `AdversarialOptions`; with it tuned images measured nearer to real ones and to their own than without.
        num_workers: Threads that read the images of coming steps, see `TrainingOptions`.
        largest_beta: The decoder learns on latents of betas from 0 to this, below 1. At 0 it learns on those that sampling
            ends in alone; raise it to 0.8 or so to decode edits and compressed images sharply as well.
    """

    steps: int = 0
    batch_size: int = 32
    learning_rate: float = 1.5e-4
    accumulate: int = 1
    ema_decay: float = 0.995
    precision: Literal["bf16", "fp32"] = "bf16"
    validate_every: int = 500
    checkpoint_every: int = 500
    seed: int = 0
    penalty: float = 10.0
    num_workers: int = 0
    largest_beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("steps", self.steps, 0, 2**63)
        check_number("largest_beta", self.largest_beta, least=0, below=1)
        if self.steps:
            self.training()
        else:
            dataclasses.replace(self, steps=1)  # where no training follows its numbers must be possible as well

    def training(self) -> TrainingOptions:
        """The options of `training.train`: a constant rate, Adam as of latent-diffusion, and the last weights are taken."""
        return training_of(self, adam_betas=ADAM_BETAS, final_learning_rate=1.0, keep_best=False, log_every=50)


def tune_decoder(
    model: Pipeline,
    train_images: data.Dataset,
    test_images: data.Dataset,
    folder: str | Path,
    options: DecoderTuningOptions,
    *,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Train the decoder of a model against a discriminator; its encoder, curves and embedding of beta stay as they are.

    Latents keep their meaning, so that the diffusion network and a flow map need no further training. What the model knows of
    each beta is measured anew, and its `info` says how the decoder was tuned.

    Args:
        model: A `DenoisingMultiBetaVAE` or a `LatentDiffusion`; after an error its decoder is what it was.
        train_images, test_images: Of its size.
        folder: Receives checkpoint/, metrics.jsonl and pictures along the way: held-out images, and what is decoded of them,
            before and after.
        options: See `DecoderTuningOptions`.
        resume: Continue from the checkpoint in `folder`, if there is one; the model is the one that it began with.

    Raises:
        ValueError: The model has another decoder, or the images are too small for the discriminator; and what `training.train`
            raises.
    """
    if not isinstance(model, DenoisingMultiBetaVAE | LatentDiffusion):
        raise ValueError(f"a decoder is tuned of a DenoisingMultiBetaVAE or a LatentDiffusion, got a {type(model).__name__}")
    if not options.steps:
        raise ValueError("steps must be at least 1 to tune a decoder, got 0")
    vae, folder = model.vae, Path(folder)
    objective = against_discriminator(DecoderObjective(vae, options.largest_beta), vae, options, options.seed)
    options.say_what_is_left_out()
    before = copy.deepcopy(vae.decoder)
    shown = pictures.shown_images(train_images, test_images).to(model.device)
    with learning(objective):
        state = train(
            objective,
            train_images,
            options.training(),
            folder,
            validation=test_images if len(test_images) else None,
            resume=resume,
            on_validate=functools.partial(look, vae, before, shown, folder),
            progress=progress,
            description="decoder",
            context={"vae": checkpoints.digest(vae.state_dict()), **own_fields(options)},
        )
        vae.decoder.load_state_dict(state)
    model.info["decoder_tuning"] = dataclasses.asdict(options)
    if isinstance(model, DenoisingMultiBetaVAE) and model.spectrum is not None:
        images = test_images if len(test_images) else train_images
        model.measure_spectrum(data.to_float(images.images(range(min(SPECTRUM_IMAGES, len(images))))), progress=progress)


@contextlib.contextmanager
def learning(objective: AdversarialObjective) -> Iterator[None]:
    """The parameters of an objective learn, all others are as they were; after an error all of them."""
    module = objective.module
    before = copy.deepcopy(module.state_dict())
    for group in objective.parameter_groups():
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    try:
        yield
    except BaseException:
        module.load_state_dict(before)
        raise
    finally:
        module.eval().requires_grad_(False)


def look(vae: MultiBetaVAE, before: nn.Module, images: Tensor, folder: Path, step: int, decoder: nn.Module) -> dict[str, float]:
    """A picture of what images are decoded to, before the tuning and now, and how sharp it is beside them at beta = 0."""
    rows, measured = {"input": images}, {}
    for beta in SHOWN_BETAS:
        betas = images.new_full((len(images),), beta)
        latents = vae.encode(images, betas)
        for name, network in (("before", before), ("tuned", decoder)):
            rows[f"{name}, beta {beta:g}"] = made = network(latents, betas).float()
            if beta == 0:
                measured[name] = sharpness(mean_energy(made), mean_energy(images))
    path = folder / f"reconstructions-{step:06d}.png"
    data.save_grid(torch.cat(list(rows.values())), path, columns=len(images), labels=list(rows))
    logger.info("after step %d: %s; sharpness %.3f, before %.3f", step, path, measured["tuned"], measured["before"])
    return {"sharpness": measured["tuned"], "sharpness_before": measured["before"]}
