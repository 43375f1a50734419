"""The stages of the protocol, the cheap and decisive first, and the seconds of each: what it took on an H200, and some."""

from __future__ import annotations

from common.stages import Stage
from protocol import correctness, device, kernels, models

STAGES = {
    "facts": Stage((device.facts,), 12),
    "parity": Stage((correctness.parity,), 75),
    "ceilings": Stage((device.ceilings,), 20),
    "step": Stage((models.step, models.step_float32, models.step_diffusers), 100),
    "drift": Stage((correctness.drift,), 15),
    "compiled": Stage((models.compiled_diffusers, models.compiled_multibeta), 120),
    "norms": Stage((kernels.norms, kernels.sampler_kernels), 35),
    "kernel_sums": Stage((models.kernel_sums,), 35),
    "decoder": Stage((models.vae_decoder,), 35),
    "correctness": Stage((correctness.words, correctness.all_kernels), 90),
    "details": Stage(
        (kernels.convolutions, kernels.attention, models.whole_sampling, kernels.fp8, kernels.op_calls),
        150,
    ),
    "autotuned": Stage((models.autotuned_diffusers,), 400),
}
SECOND = ("details", "autotuned")  # for a command of their own
FIRST = [name for name in STAGES if name not in SECOND]
