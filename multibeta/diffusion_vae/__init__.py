"""DiffusionVAE: a VAE held to a capacity sketches an image, a conditional DDPM refines it (DiffusionVAE Eq. 6-9 and 12).

Stage 1 trains `CapacityVAE` by `CapacityObjective`; stage 2 keeps it frozen and trains `ConditionalDiffusion` on its
reconstructions by `ConditionalDiffusionObjective`. New images are x_hat = decode(z), then the reverse process given x_hat:

    rows = sampler_rows(diffusion.process.alpha_bars, "ddim", 100)
    residual = sampling.sample(diffusion.predictor(reconstruction), rows, diffusion.process.prior(noise), seeds)
    images = diffusion.process.image(residual, reconstruction)

Noise belongs to the sample. Shared stochasticity (section 4.2, Fig. 7: one tensor of noise per step for every image) is therefore
to give every sample the same seed; `test_diffusion_vae.py` samples both ways.

Steps are indices 0 ... T - 1 as the network sees them: r at index t carries the noise of t + 1 steps. x_T is the paper's z_T, X_T
and x_T alike.

Paper note: the paper is a fork of DiffuseVAE (Pandey et al. 2022), and its published scripts train what its text does not say
in several places; each is settled where it belongs. Those without code: Eq. 6 lacks the logarithms of both likelihoods;
"Figure 4 (top row)" in section 4.2 is Fig. 5; the data is CelebAMask-HQ, not the CelebA-HQ that is cited; stage 2 is given in
days only, its steps are a recipe's choice; the abstract's better fidelity holds against the VAE, the DDPM of Table 1 is
better than the model.
"""

from multibeta.diffusion_vae.process import FORMS, ForwardProcess
from multibeta.diffusion_vae.refiner import (
    ConditionalDiffusion,
    ConditionalDiffusionConfig,
    ConditionalDiffusionObjective,
    ConditionalDiffusionObjectiveOptions,
)
from multibeta.diffusion_vae.samplers import SAMPLERS, SPACINGS, VARIANCES, sampler_rows, spaced_indices, walk_rows
from multibeta.diffusion_vae.spans import ConditionalSpans
from multibeta.diffusion_vae.vae import CapacityObjective, CapacityObjectiveOptions, CapacityVAE

__all__ = [
    "FORMS",
    "SAMPLERS",
    "SPACINGS",
    "VARIANCES",
    "CapacityObjective",
    "CapacityObjectiveOptions",
    "CapacityVAE",
    "ConditionalDiffusion",
    "ConditionalDiffusionConfig",
    "ConditionalDiffusionObjective",
    "ConditionalDiffusionObjectiveOptions",
    "ConditionalSpans",
    "ForwardProcess",
    "sampler_rows",
    "spaced_indices",
    "walk_rows",
]
