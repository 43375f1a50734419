"""The stages of the protocol, the cheap and decisive first, and the seconds that each is given."""

from __future__ import annotations

from common.stages import Stage
from protocol import correctness, device, kernels, models

STAGES = {
    "facts": Stage((device.facts,), 12),
    "parity": Stage((correctness.parity,), 60),
    "ceilings": Stage((device.ceilings,), 20),
    "step": Stage((models.step, models.step_float32, models.step_diffusers), 90),
    "drift": Stage((correctness.drift,), 12),
    "compiled": Stage((models.compiled_diffusers, models.compiled_multibeta), 120),
    "norms": Stage((kernels.norms, kernels.sampler_kernels), 35),
    "kernel_sums": Stage((models.kernel_sums,), 22),
    "decoder": Stage((models.vae_decoder,), 25),
    "correctness": Stage((correctness.words, correctness.all_kernels), 60),
    "autotune": Stage(
        (
            kernels.convolutions,
            kernels.attention,
            models.whole_sampling,
            kernels.fp8,
            kernels.op_calls,
            models.autotuned_diffusers,
        ),
        85,
    ),
}
