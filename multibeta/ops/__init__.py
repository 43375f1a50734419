"""The few operations the library spends its time in, each with its plain PyTorch reference, which is its definition.

Modules call `group_norm_act` and `attention`, samplers `sampler_update` and `sampler_step`; which code serves a call is chosen
at call time by `backend`, and `explain` says which and why: see `registry`.
"""

from multibeta.kernels.columns import (
    ONE_HEAD_COLUMNS,
    SAMPLER_COLUMNS,
    TWO_HEAD_COLUMNS,
    GuidanceRow,
    OneHeadRow,
    SamplerRow,
    TwoHeadRow,
    head_row,
    pack,
    pack_rows,
    with_next_input,
)
from multibeta.ops.dot_product_attention import attention
from multibeta.ops.noise import philox, sample_seeds, standard_normal
from multibeta.ops.normalization import ACTIVATIONS, group_norm_act, group_norm_act_pair, total_of
from multibeta.ops.registry import (
    BACKENDS,
    FAMILIES,
    Kernel,
    Op,
    Pin,
    active_transform,
    all_ops,
    backend,
    current_backend,
    explain,
    find,
    measuring,
    register,
)
from multibeta.ops.sampler import sampler_step, sampler_update
from multibeta.ops.timing import CYCLES_PER_SECOND, MAX_SLEEP_SECONDS, latency_ms, measure, measured_lines

__all__ = [
    "group_norm_act",
    "group_norm_act_pair",
    "attention",
    "sampler_update",
    "sampler_step",
    "standard_normal",
    "philox",
    "sample_seeds",
    "SamplerRow",
    "TwoHeadRow",
    "OneHeadRow",
    "GuidanceRow",
    "SAMPLER_COLUMNS",
    "TWO_HEAD_COLUMNS",
    "ONE_HEAD_COLUMNS",
    "pack",
    "pack_rows",
    "head_row",
    "with_next_input",
    "backend",
    "current_backend",
    "explain",
    "measuring",
    "active_transform",
    "find",
    "all_ops",
    "register",
    "Op",
    "Kernel",
    "Pin",
    "ACTIVATIONS",
    "BACKENDS",
    "FAMILIES",
    "latency_ms",
    "measure",
    "measured_lines",
    "total_of",
    "CYCLES_PER_SECOND",
    "MAX_SLEEP_SECONDS",
]
