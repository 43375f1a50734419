"""Weights from and to latent-diffusion and diffusers, tensor by tensor, all of them or none.

`load_ldm` and `load_diffusers` fill a `ResBlock`, `AttentionBlock`, `Encoder`, `Decoder` or `UNet`; `to_ldm` and `to_diffusers`
go back; `read_networks` and `write_networks` do either with files. Names and layouts are those of CompVis/latent-diffusion
(openaimodel.py, which is OpenAI's guided-diffusion, and model.py) and of `UNet2DModel` and `AutoencoderKL` of diffusers. What
a state dict cannot show (heads, groups, eps, ...) is compared with `config` where one is given.
"""

from multibeta.interop.conversion import Report, freeze, freeze_vae, load_diffusers, load_ldm, to_diffusers, to_ldm
from multibeta.interop.differences import diffusers_config
from multibeta.interop.files import FORMATS, Networks, is_ours, load_networks, model_networks, read_networks, write_networks

__all__ = [
    "load_ldm",
    "load_diffusers",
    "to_ldm",
    "to_diffusers",
    "freeze",
    "freeze_vae",
    "diffusers_config",
    "read_networks",
    "write_networks",
    "load_networks",
    "model_networks",
    "is_ours",
    "Networks",
    "Report",
    "FORMATS",
]
