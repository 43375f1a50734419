"""The verbs of the library on trained models: encode, decode, render, generate, manipulate, interpolate, save and load."""

from __future__ import annotations

from pathlib import Path

import torch

from multibeta.pipelines.base import config_from_dict, contents_of, read_pretrained, resolve_pretrained
from multibeta.pipelines.diffusion_vae import DiffusionVAE
from multibeta.pipelines.directions import named_directions
from multibeta.pipelines.folders import generate_folder, generate_npz, generate_share, generate_shared
from multibeta.pipelines.generation import convert_output
from multibeta.pipelines.latent_diffusion import LatentDiffusion
from multibeta.pipelines.multi_beta import DenoisingMultiBetaVAE
from multibeta.pipelines.protocol import Pipeline
from multibeta.pipelines.vae import BaselineVAE

__all__ = [
    "PIPELINES",
    "BaselineVAE",
    "DenoisingMultiBetaVAE",
    "DiffusionVAE",
    "LatentDiffusion",
    "Pipeline",
    "config_from_dict",
    "convert_output",
    "generate_folder",
    "generate_npz",
    "generate_share",
    "generate_shared",
    "load_pretrained",
    "named_directions",
    "resolve_pretrained",
]

PIPELINES: dict[str, type[Pipeline]] = {
    each.__name__: each for each in (DenoisingMultiBetaVAE, BaselineVAE, DiffusionVAE, LatentDiffusion)
}


def load_pretrained(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Pipeline:
    """Load a saved model of any class; see `Pipeline.from_pretrained`.

    Raises:
        FileNotFoundError, ValueError: What is missing or does not fit; of an unknown class, the classes there are.
    """
    folder, weights, config = read_pretrained(folder)
    if (name := config.get("class")) not in PIPELINES:
        raise ValueError(f"{folder} holds {contents_of(config)}, which is none of the models known here: {', '.join(PIPELINES)}")
    return PIPELINES[name]._assemble(folder, weights, config).to(device, dtype)
