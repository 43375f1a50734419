"""The forward process around a reconstruction, DiffusionVAE Eq. 7 and 8."""

from __future__ import annotations

from torch import Tensor

from multibeta.schedules import spatial

FORMS = {"form1": (0, 0), "form2": (1, 0), "eq7": (1, 1)}  # multiples of x_hat in x_t and in x_0: see `ForwardProcess`


class ForwardProcess:
    """The forward process around a reconstruction x_hat (DiffusionVAE Eq. 7), in three forms that are one chain.

    In each form r_t is an ordinary DDPM chain, r_t = sqrt(1 - v_t) r_{t-1} + sqrt(v_t) eps, seen around another centre:

        x_t = r_t + shift x_hat,    x_0 = r_0 + offset x_hat.

    | form | shift | offset | |
    | --- | --- | --- | --- |
    | "form1" | 0 | 0 | x_hat enters the network only; what the published scripts train |
    | "form2" | 1 | 0 | DiffuseVAE: the first step is N(sqrt(1 - v_1) x_0 + x_hat, v_1 I), the others are Eq. 7 |
    | "eq7" | 1 | 1 | Eq. 7 from the first step on |

    Schedules, samplers and their rows know r alone; x_t appears at the input of the network, x_0 at the end of the trajectory.

    Args:
        form: As above.
        variances: v_t, (T,) float64; see `schedules.ddpm_variances`.

    Paper note: Eq. 7 and 8 are not what the published scripts train, which is "form1", the default here.
    """

    def __init__(self, form: str, variances: Tensor) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        self.shift, self.offset = FORMS[form]
        self.alpha_bars = (1 - variances).cumprod(0)

    def residual(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """r_0 of x_0 = `image`."""
        return image - self.offset * reconstruction

    def image(self, residual: Tensor, reconstruction: Tensor) -> Tensor:
        """x_0 of r_0 = `residual`: the last thing a sampler does, for "form2" the published subtraction of x_hat."""
        return residual + self.offset * reconstruction

    def noisy_image(self, residual: Tensor, reconstruction: Tensor) -> Tensor:
        """x_t of r_t = `residual`."""
        return residual + self.shift * reconstruction

    def diffuse(self, residual: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """r_t = sqrt(alpha_bar_t) r_0 + sqrt(1 - alpha_bar_t) eps (DiffusionVAE Eq. 8), at indices `steps` (N,).

        That is x_t ~ N(sqrt(alpha_bar_t) x_0 + (shift - offset sqrt(alpha_bar_t)) x_hat, (1 - alpha_bar_t) I).

        Paper note: Eq. 8 prints sqrt(1 - alpha_bar_t) where sqrt(alpha_bar_t) must stand: x_0 would appear as noise is added.
        Iterating Eq. 7 gives the above; `test_diffusion_vae.py` iterates.
        """
        signal, deviation = self.scales(steps, residual)
        return signal * residual + deviation * noise

    def denoised(self, residual: Tensor, noise_prediction: Tensor, steps: Tensor) -> Tensor:
        """r_0 of r_t = `residual` and its noise: the inverse of `diffuse`."""
        signal, deviation = self.scales(steps, residual)
        return (residual - deviation * noise_prediction) / signal

    def prior(self, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """r_T, which `sample` starts from: x_T is noise around shift x_hat. The temperature scales this noise, no other."""
        return temperature * noise

    def without_reconstruction(self, residual: Tensor, reconstruction: Tensor, steps: Tensor) -> Tensor:
        """r_t of the same image and noise for x_hat = 0."""
        return residual + self.offset * self.scales(steps, residual)[0] * reconstruction

    def scales(self, steps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) at `steps` (N,), to multiply (N, C, H, W)."""
        alpha_bar = spatial(self.alpha_bars[steps.to(self.alpha_bars.device)])
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)
