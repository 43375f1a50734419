"""Models of one representation: what they share, and the VAEs of `multibeta.baselines`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Normal

from multibeta import ops
from multibeta.baselines import VAE
from multibeta.blocks import input_dtype
from multibeta.networks import AutoencoderConfig
from multibeta.pipelines.base import INITIAL_STREAM
from multibeta.pipelines.inputs import Images
from multibeta.pipelines.protocol import Pipeline
from multibeta.sampling import Callback
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from multibeta.pipelines.protocol import Beta


class VAEPipeline(Pipeline):
    """What models of one representation share, whose VAE has a posterior q(z|x) and which generate from N(0, I); beta is None."""

    @torch.no_grad()
    def encode(self, images: Images, beta: Beta = None, *, seeds: Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of images, (N, c, h, w) float32: the mean of q(z|x), or with one seed per image a sample of it.

        Args:
            images: See `inputs.as_images`.

        Raises:
            ValueError: Images of another size or range, or a beta, which this model does not have.
        """
        self._refuse(beta)
        posterior = self._posterior(self._check_images(images))
        return posterior.mean if seeds is None else posterior.mean + posterior.stddev * self._encoder_noise(seeds, posterior.mean)

    def _posterior(self, images: Tensor) -> Normal:
        """q(z|x) of checked images, over (N, c, h, w), float32."""
        return self.vae.posterior(images)

    @torch.no_grad()
    def decode(self, latents: Tensor, beta: Beta = None) -> Tensor:
        """Mean images of latents (N, c, h, w), (N, C, H, W) float32 in [-1, 1]."""
        self._refuse(beta)
        return self.vae.decode(self._check_latents(latents).to(input_dtype(self.vae.decoder)))

    def draw_latents(self, seeds: Sequence[int] | Tensor) -> Tensor:
        """New latents of N(0, I), one for each seed, (N, c, h, w)."""
        return ops.standard_normal(as_seeds(seeds).to(self.device), 0, self.vae.config.latent_shape, stream=INITIAL_STREAM)

    def _refuse(self, beta: Beta) -> None:
        if beta is not None:
            raise ValueError(f"a {type(self).__name__} has one representation and takes no beta, got {beta}")


class BaselineVAE(VAEPipeline):
    """A VAE of `multibeta.baselines`, whichever objective trained it, with the verbs of the house.

    Args:
        vae: Trained.
        info: Where the model comes from (method, recipe, command); saved with it.
    """

    parts: ClassVar = {"vae": (VAE, AutoencoderConfig)}
    summary = "A variational autoencoder. Images are encoded, their latents moved or interpolated, and decoded."
    tags = ("variational-autoencoder", "representation-learning", "disentanglement")
    vae: VAE

    def __init__(self, vae: VAE, info: dict[str, Any] | None = None):
        self._require_parts(info)
        self.vae = vae.eval().requires_grad_(False)
        self.info = info or {}

    def generate(  # without a sampler and steps before the seed
        self,
        num_images: int,
        seed: int = 0,
        batch_size: int = 64,
        output_type: str = "pt",
        callback: Callback | None = None,
        **options: Any,
    ) -> Any:
        """New images: decoded noise of the prior. Arguments and result as of `Pipeline.generate`."""
        options |= {"seed": seed, "batch_size": batch_size, "output_type": output_type, "callback": callback}
        return super().generate(num_images, **options)

    def generate_batches(self, num_images: int, seed: int = 0, batch_size: int = 64, **options: Any) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each."""
        return super().generate_batches(num_images, seed=seed, batch_size=batch_size, **options)
