"""multibeta: generative models whose latent space a person can read and steer.

Denoising Multi-beta VAE: one VAE for every beta, and a non-linear diffusion model that walks its latents back to beta = 0.
"""

from multibeta import nonlinear_diffusion, ops, sampling
from multibeta.blocks import AttentionBlock, ResBlock
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.networks import Decoder, Encoder, UNet
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.ops import backend
from multibeta.pipelines import DenoisingMultiBetaVAE

__version__ = "0.1.0"

__all__ = [
    "AttentionBlock",
    "Decoder",
    "DenoisingMultiBetaVAE",
    "Encoder",
    "MultiBetaVAE",
    "NonlinearDiffusion",
    "ResBlock",
    "UNet",
    "backend",
    "nonlinear_diffusion",
    "ops",
    "sampling",
]
