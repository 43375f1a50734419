"""A `DenoisingMultiBetaVAE` over a Gaussian process that only shrinks: exact predictions, and a flow in closed form."""

import math

import torch
from torch import nn

from multibeta.multibeta_vae import MultiBetaVAE, VAEConfig
from multibeta.nonlinear_diffusion import DiffusionConfig, NonlinearDiffusion
from multibeta.pipelines import DenoisingMultiBetaVAE

CHANNELS, SIDE = 3, 4
SHAPE = {"base_channels": 8, "channel_multipliers": (1, 1, 1), "num_res_blocks": 1, "num_groups": 4}


class LinearHeads(nn.Module):
    """A network whose two heads are its input times a number of each grid index and channel, (N + 1, 2, C)."""

    def __init__(self, gains):
        super().__init__()
        self.gains = nn.Parameter(gains.float())

    def forward(self, latents, times):
        gains = self.gains[(times * (len(self.gains) - 1) / 1000).round().long()][..., None, None]
        return (gains * latents[:, None]).flatten(1, 2)


def gaussian_model(
    parameterization="residual", basis="pixel", num_steps=200, sigma_per_channel=False, spacing="uniform", same_scale=False
):
    """f(x, t) is normal with a mean and a deviation of each channel, or coefficient, that both shrink with t.

    E[f - m | z] = F^2 / (F^2 + sigma^2) (z - m), which the heads say exactly. The flow is z_t = m_t + sqrt(F_t^2 + sigma_t^2) u,
    with the same u at every t.
    """
    vae = MultiBetaVAE(
        VAEConfig(
            resolution=SIDE * 4,
            latent_channels=CHANNELS,
            num_steps=num_steps,
            mid_attention=False,
            embedding_channels=16,
            sigma_per_channel=sigma_per_channel,
            **SHAPE,
        )
    )
    knots = (1 - torch.cos(torch.linspace(0, math.pi, vae.config.num_knots))) / 2
    rates = torch.tensor([[2.0], [3.0], [4.0]]) if sigma_per_channel else torch.tensor(3.0)
    with torch.no_grad():
        vae.sigma.raw_increments.copy_((rates * knots.diff()).expm1().log())  # sigma = exp(-rate (1 - beta))
    columns = CHANNELS * (SIDE**2 if basis == "cosine" else 1)
    scale = torch.ones(columns) if same_scale else torch.linspace(0.5, 1.5, columns)
    offset = torch.linspace(-1, 1, columns) * (parameterization == "residual")
    time = torch.linspace(0, 1, num_steps + 1)[:, None]
    deviation, mean = scale * (1 - 0.95 * time**2), offset * (1 - time)
    moved = deviation.diff(dim=0, prepend=deviation[:1]).square() + mean.diff(dim=0, prepend=mean[:1]).square()
    sigmas, rms = vae.sigmas(), moved.sqrt() * num_steps
    config = DiffusionConfig(
        latent_channels=CHANNELS,
        latent_resolution=SIDE,
        num_steps=num_steps,
        parameterization=parameterization,
        basis=basis,
        sigma_per_channel=sigma_per_channel,
        spacing=spacing,
        attention_resolutions=(),
        head_channels=8,
        **SHAPE,
    )
    unet = None  # whose heads are zero before its training
    if parameterization != "residual":
        assert basis == "pixel"
        sigma, shrunken = sigmas.view(num_steps + 1, -1), -deviation.diff(dim=0, prepend=deviation[:1]) / deviation
        total = (deviation**2 + sigma**2).sqrt()
        heads = {
            "v": (torch.zeros_like(total), shrunken * deviation**2 / total * num_steps / rms.clamp(min=1e-4)),
            "literal": (sigma / total**2, shrunken * (deviation / total) ** 2),
        }
        unet = LinearHeads(torch.stack(heads[parameterization], dim=1))
    diffusion = NonlinearDiffusion(config, unet)
    diffusion.set_process(sigmas, mean, deviation, rms.clamp(min=1e-4))
    return DenoisingMultiBetaVAE(vae, diffusion, {"recipe": "none"})
