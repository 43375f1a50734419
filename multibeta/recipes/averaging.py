"""A model with another average of the weights of its diffusion network, after the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multibeta import checkpoints
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, Pipeline, load_pretrained
from multibeta.training import reconstruct_ema
from multibeta.training.posthoc import exponent_of, kept_snapshots


def average(run: str | Path, sigma_rel: float) -> Pipeline:
    """The model of a run, whose diffusion network has the average of another length: see `training.reconstruct_ema`.

    The VAE stays, because stage 2 was trained on it. What belongs to the weights that were taken before, the flow map and what
    was measured of the model, is left out.

    Args:
        run: Folder of a finished run, trained with `diffusion_training.posthoc_ema`.
        sigma_rel: Relative width of the average, in (0, 0.28].

    Raises:
        FileNotFoundError: The run has no model or no snapshots.
        ValueError: The width is out of range; or what is there is damaged.
    """
    run = Path(run)
    model = denoising_model(run)
    state = reconstruct_ema(run / "diffusion", sigma_rel)
    checkpoints.load_state(model.diffusion, state, run / "diffusion")
    if not isinstance(model, LatentDiffusion):
        model.flow_map = None
    measured = ("spectrum", "flow_map")
    model.info = {**{name: said for name, said in model.info.items() if name not in measured}, "sigma_rel": sigma_rel}
    return model


def denoising_model(run: Path) -> DenoisingMultiBetaVAE | LatentDiffusion | DiffusionVAE:
    """The model of a run; `ValueError` where it has no diffusion network."""
    model = load_pretrained(run / "model")
    if not isinstance(model, DenoisingMultiBetaVAE | LatentDiffusion | DiffusionVAE):
        raise ValueError(f"{run} holds a {type(model).__name__}, which has no diffusion network")
    return model


def check_averages(run: str | Path, widths: Sequence[float]) -> None:
    """That `average` can make a model of each of these widths, before any work.

    Raises:
        FileNotFoundError: The run has no model or no snapshots.
        ValueError: There are no widths, one is out of range or named twice; or what is there is damaged.
    """
    if not widths:
        raise ValueError("name at least one width")
    for width in widths:
        exponent_of(width)
    if twice := sorted({width for width in widths if widths.count(width) > 1}):
        raise ValueError(f"name each width once, {', '.join(f'{width:g}' for width in twice)} came more often")
    denoising_model(Path(run))
    kept_snapshots(Path(run) / "diffusion")
