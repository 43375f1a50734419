"""Non-linear diffusion over beta with a noise head and a delta head: MultiBeta section 4.2, Eq. 13-19.

The process is z_t = f(x, t) + sigma_t eps. `encode` and `sigmas` come in as arguments; this module knows no VAE.

sigma_t may be one number or one for each latent channel. Given x the dimensions of z_t are independent, so every equation of the
section holds for each of them with its own sigma_t, unchanged and exact.
"""

from multibeta.nonlinear_diffusion.multistep import MULTISTEP, Motion, multistep_rows
from multibeta.nonlinear_diffusion.network import (
    PARAMETERIZATIONS,
    PROCESS_SAMPLERS,
    SPACINGS,
    DiffusionConfig,
    NonlinearDiffusion,
)
from multibeta.nonlinear_diffusion.objective import NonlinearDiffusionObjective, NonlinearDiffusionObjectiveOptions
from multibeta.nonlinear_diffusion.process import (
    between,
    encoding_table,
    interval_of,
    process_statistics,
    table_nodes,
    table_statistics,
)
from multibeta.nonlinear_diffusion.samplers import INVERTIBLE, SAMPLERS, sampler_rows, walk_rows
from multibeta.nonlinear_diffusion.spans import Spans

__all__ = [
    "INVERTIBLE",
    "MULTISTEP",
    "PARAMETERIZATIONS",
    "PROCESS_SAMPLERS",
    "SAMPLERS",
    "SPACINGS",
    "DiffusionConfig",
    "NonlinearDiffusion",
    "NonlinearDiffusionObjective",
    "NonlinearDiffusionObjectiveOptions",
    "process_statistics",
    "table_nodes",
    "encoding_table",
    "interval_of",
    "between",
    "table_statistics",
    "Spans",
    "sampler_rows",
    "walk_rows",
    "Motion",
    "multistep_rows",
]
