"""Models of diffusers as they come, compiled, and after `multibeta.accelerate`, interleaved in one run.

    python bench/acceleration.py --model unet --batch 1
    python bench/acceleration.py --model decoder --size 32

Random weights, inference without gradients. `cpu_ms` is the median of processor time, which other work on the machine does not
lengthen: compare it where the machine is shared. Appends one JSON line to acceleration.jsonl in the folder that --results names.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common import measure
from common.networks import channels_last
from multibeta import acceleration

UNET = {
    "block_out_channels": (128, 256, 384, 512),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
AUTOENCODER = {  # of Stable Diffusion
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
DEFAULT_SIZES = {"unet": 64, "decoder": 32, "encoder": 256}
ARMS = ("fp32", "bf16", "compile-bf16", "accelerate-bf16", "accelerate-fp32")
MORE_ARMS = ("bf16-channels-last", "compile-frozen-bf16")  # what a careful user tries; Inductor's freezing packs weights too


def build(model: str, head_dim: int, small: bool) -> nn.Module:
    """The network on random weights, as diffusers makes it; `head_dim` is of the U-Net's attention."""
    from diffusers import AutoencoderKL, UNet2DModel  # pyright: ignore[reportPrivateImportUsage]

    torch.manual_seed(0)
    shrunk = SMALL if small else {}
    if model == "unet":
        network: nn.Module = UNet2DModel(**UNET | shrunk, attention_head_dim=head_dim)
    else:
        network = getattr(AutoencoderKL(**AUTOENCODER | shrunk), model)
    return network.eval().requires_grad_(False)


def inputs(model: str, batch: int, size: int) -> tuple[Tensor, ...]:
    """Random inputs of `build`'s network; `size` is the height and width of what goes in."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4 if model == "decoder" else 3, size, size, generator=generator)
    return (sample, torch.full((batch,), 500)) if model == "unet" else (sample,)


def build_arm(name: str, model: str, head_dim: int, small: bool) -> Callable[..., Tensor]:
    """One of `ARMS`, which takes float32 inputs and gives the network's output."""
    network = build(model, head_dim, small)
    dtype = torch.bfloat16 if name.endswith("bf16") or "bf16-" in name else torch.float32
    network = network.to(dtype)
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    if name.startswith("accelerate"):
        acceleration.accelerate(network)
    elif name != "fp32" and name != "bf16":
        network = channels_last(network)
    if name.startswith("compile"):
        measure.allow_many_compilations()
        network = torch.compile(network, dynamic=False)
        if "frozen" in name:
            import torch._inductor.config as inductor

            context = functools.partial(inductor.patch, freezing=True)

    @torch.no_grad()
    def run(sample: Tensor, *times: Tensor) -> Tensor:
        with context():
            output = network(sample.to(dtype), *times)
        return output if isinstance(output, Tensor) else output.sample

    return run


def counted(function: Callable[[], object], cpu_ms: list[float]) -> Callable[[], None]:
    """`function`, adding its processor time to a list at each call."""

    def run() -> None:
        start = time.process_time()
        function()
        cpu_ms.append(1e3 * (time.process_time() - start))

    return run


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", choices=tuple(DEFAULT_SIZES), default="unet")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="height and width of the input: 64 pixels, 32 of latents or 256 by default")
    parser.add_argument("--head-dim", type=int, default=8, help="of the U-Net's attention; 8 is the default of diffusers")
    parser.add_argument("--arms", nargs="+", choices=ARMS + MORE_ARMS, default=ARMS)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="narrow networks, to try the script")
    arguments = parser.parse_args()
    device, size = torch.device("cpu"), arguments.size or DEFAULT_SIZES[arguments.model]
    given = inputs(arguments.model, arguments.batch, size)

    arms: dict[str, Callable[[], Tensor]] = {}
    needs, failed, outputs = {}, {}, {}
    for name in arguments.arms:
        try:
            arms[name] = functools.partial(build_arm(name, arguments.model, arguments.head_dim, arguments.small), *given)
            needs[name] = measure.first_call(lambda name=name: outputs.update({name: arms[name]().float()}), device)
        except Exception as error:  # one arm that cannot run must not cost the others
            arms.pop(name, None)
            failed[name] = measure.one_line(error)
        print(f"{name}: {failed.get(name) or '{build_seconds:.1f} s to build'.format(**needs[name])}", flush=True)
    cpu_ms: dict[str, list[float]] = {name: [] for name in arms}
    calls = {name: counted(arm, cpu_ms[name]) for name, arm in arms.items()}
    times = measure.interleaved(calls, device, repetitions=arguments.repetitions, warmup=1)
    for name, row in times.items():
        row["cpu_ms"] = statistics.median(cpu_ms[name][1:])
    expected = outputs.get("fp32")
    errors = {} if expected is None else {name: float((y - expected).norm() / expected.norm()) for name, y in outputs.items()}
    measure.record(
        arguments.results,
        "acceleration.jsonl",
        {
            **{name: getattr(arguments, name) for name in ("model", "batch", "head_dim", "small")},
            "size": size,
            "arms": {name: {**times[name], **needs[name]} for name in arms},
            "failed": failed,
            "relative_error": errors,
        },
    )
    measure.tell_missing_packages()
    base = next(iter(times.values()), {})
    for name, row in times.items():
        spread = "{median_ms:9.1f} ms ({p10_ms:.1f} to {p90_ms:.1f}), {cpu_ms:.1f} ms of processor time".format(**row)
        gains = f"{base['median_ms'] / row['median_ms']:.2f}x, {base['cpu_ms'] / row['cpu_ms']:.2f}x"
        print(f"{name:20s} {spread}: {gains}, relative error {errors.get(name, float('nan')):.1e}")


if __name__ == "__main__":
    main()
