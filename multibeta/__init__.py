"""multibeta: generative models whose latent space a person can read and steer.

Denoising Multi-beta VAE: one VAE for every beta, and a non-linear diffusion model that walks its latents back to beta = 0.
DiffusionVAE: a VAE held to a capacity sketches an image, a conditional diffusion model refines it.
"""

from multibeta import interop, nonlinear_diffusion, ops, sampling
from multibeta.acceleration import accelerate, restore
from multibeta.blocks import AttentionBlock, GroupNormAct, ResBlock, Upsample
from multibeta.interop.scheduler import NonlinearDiffusionScheduler
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.ops import backend
from multibeta.pipelines import BaselineVAE, DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, load_pretrained
from multibeta.recipes.own_images import train

__version__ = "0.1.0"

__all__ = [
    "AttentionBlock",
    "BaselineVAE",
    "Decoder",
    "DenoisingMultiBetaVAE",
    "DiffusionVAE",
    "Encoder",
    "GroupNormAct",
    "LatentDiffusion",
    "MultiBetaVAE",
    "NonlinearDiffusion",
    "NonlinearDiffusionScheduler",
    "ResBlock",
    "UNet",
    "Upsample",
    "accelerate",
    "backend",
    "interop",
    "load_pretrained",
    "nonlinear_diffusion",
    "ops",
    "restore",
    "sampling",
    "train",
]
