"""How fast is each layer and kernel, and what does the device reach on a product and a copy?"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import calls, layers
from common.stages import Run
from multibeta import inference, ops
from multibeta.blocks import Upsample
from protocol.device import fp8_arms, random_like


def norms(run: Run) -> None:
    """Every GroupNorm of the U-Net and the decoder, every pair of the U-Net, eager and by each kernel, warm and cold.

    The largest are timed with the sums too that convolutions leave to them, and maps cut into blocks in one round as well.
    """
    unet, decoder = layers.unet_layers(run.recipe), layers.decoder_layers(run.recipe)
    plain = layers.of_type(unet, layers.Norm)
    largest = sorted((n for n in plain if not n.shifted), key=lambda n: n.channels * n.height * n.width)[-3:]
    cases = [(run.batches[-1], layer, False) for layer in layers.of_type(unet, layers.Norm, layers.Pair)]
    cases += [(run.decoder_batch, layer, False) for layer in layers.of_type(decoder, layers.Norm)]
    cases += [(run.batches[-1], layer, True) for layer in largest]
    for batch, layer, sums in run.within(cases[:4] if run.small else cases):
        shape, where = (batch, layer.channels, layer.height, layer.width), (layer.groups, run.device, run.dtype)
        if isinstance(layer, layers.Pair):
            op, (args, kwargs) = ops.find("group_norm_act_pair"), pair_call(run, layer, batch)
        else:
            op, options = ops.find("group_norm_act"), {"activation": layer.activation, "shifted": layer.shifted}
            args, kwargs = calls.norm_call(shape, *where, **options, x_bias=sums, residual=sums)
        able, unable = run.checked(op, args, kwargs)
        if run.cuda and batch == run.decoder_batch and "triton" in able:
            able["triton, one round"] = partial(in_one_round, able["triton"])
        what = f"{layer} + bias + residual" if sums else layer
        run.compare(what, batch, able, moved=calls.bytes_moved(op.name, args, kwargs) or 0, declined=unable)


def in_one_round(norm: Callable[[], Tensor]) -> Tensor:
    """A norm that reads a map cut into blocks whole before it reads it again, whether it fits the L2 cache or not."""
    from multibeta.kernels import launch

    sized, launch.l2_bytes = launch.l2_bytes, lambda device: None
    try:
        return norm()
    finally:
        launch.l2_bytes = sized


def pair_call(run: Run, layer: layers.Pair, batch: int) -> tuple[tuple, dict]:
    """`calls.pair_call` at the shape of a layer."""
    shape = (batch, layer.channels, layer.height, layer.width)
    return calls.pair_call(shape, layer.skip_channels, layer.groups, run.device, run.dtype, activation=layer.activation)


def sampler_kernels(run: Run) -> None:
    """The sampler's kernels: latent, history and network output are read and written."""
    for name, batch in run.within(itertools.product(("sampler_update", "sampler_step"), reversed(run.batches))):
        for label, args, kwargs in calls.sampler_calls(name, (batch, *run.recipe.vae.latent_shape), run.device, run.dtype):
            able, unable = run.checked(ops.find(name), args, kwargs)
            moved = 8 * args[0].numel() * args[0].element_size()
            run.compare(f"{name} {label}", batch, able, moved=moved, declined=unable)


def convolutions(run: Run) -> None:
    """Every convolution and linear layer of the U-Net, cuDNN's search off and on; every upsampling in its three forms."""
    counts, batch, spent = layers.unet_layers(run.recipe), run.batches[-1], Counter()
    for layer in run.within(layers.of_type(counts, layers.Conv, layers.Linear, layers.Doubling)):
        if isinstance(layer, layers.Doubling):
            arms = upsample_arms(run, layer, batch)
        else:
            arms = conv_arms(run, layer, batch) if isinstance(layer, layers.Conv) else linear_arms(run, layer, batch)
        times = run.compare(layer, batch, arms, flop=batch * layer.flop, count=counts[layer])
        able = [timing["median_ms"] for timing in times.values() if "error" not in timing]
        if isinstance(layer, layers.Conv) and able:
            spent += Counter(ms=counts[layer] * min(able), flop=counts[layer] * batch * layer.flop)
    if spent:
        what, rate = f"all convolutions B{batch}", spent["flop"] / spent["ms"] / 1e9
        run.record(what=what, arm="best", median_ms=spent["ms"], rate=rate, unit="TF/s")


def conv_arms(run: Run, layer: layers.Conv, batch: int) -> dict[str, Callable[[], Tensor]]:
    """A convolution by the algorithm that cuDNN's heuristic picks, and by the one that its search picks."""
    x = random_like(run, batch, layer.in_channels, layer.height, layer.width)
    weight = random_like(run, layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)

    def convolve(search: bool) -> Tensor:
        # cuDNN keeps one algorithm for a shape and the tf32 flag, chosen either way: the flag, idle here, keeps the two apart
        with torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=search):
            return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)

    return {"heuristic": partial(convolve, False), "searched": partial(convolve, True)}


def linear_arms(run: Run, layer: layers.Linear, batch: int) -> dict[str, Callable[[], Tensor]]:
    """A linear layer."""
    x, weight = random_like(run, batch * layer.tokens, layer.in_features), random_like(run, layer.out_features, layer.in_features)
    return {"linear": partial(F.linear, x, weight)}


def upsample_arms(run: Run, layer: layers.Doubling, batch: int) -> dict[str, Callable[[], Tensor]]:
    """The forms of an upsampling."""
    source, x = Upsample(layer.channels).to(run.device), random_like(run, batch, layer.channels, layer.height, layer.width)
    forms = {
        "plain": inference.PlainUpsample(source, run.dtype, False),
        "folded": inference.FoldedUpsample(source, run.dtype, False),
        "transposed": inference.TransposedUpsample(source, run.dtype),
    }
    return {name: partial(form.requires_grad_(False), x) for name, form in forms.items()}


def attention(run: Run) -> None:
    """Every backend of attention on every shape of the U-Net and the decoder."""
    op = ops.find("attention")
    networks = layers.unet_layers(run.recipe) + layers.decoder_layers(run.recipe)
    batches = tuple(reversed(run.batches))[: 1 if run.small else None]
    for batch, layer in run.within(itertools.product(batches, layers.of_type(networks, layers.Attention))):
        shape = layer.length, layer.heads, layer.head_dim
        args, sample = (calls.attention_call((n, *shape), run.device, run.dtype) for n in (batch, 2))
        able, unable = run.checked(op, args, {}, sample=sample)
        run.compare(layer, batch, able, flop=batch * layer.flop, declined=unable)


def fp8(run: Run) -> None:
    """fp8 on the linear layers and 1x1 convolutions of the U-Net: milliseconds a step that it would save."""
    counts = layers.unet_layers(run.recipe)
    for batch in reversed(run.batches[1:]):
        saved, measured = 0.0, False
        for layer in run.within(layers.of_type(counts, layers.Linear, layers.Conv)):
            if isinstance(layer, layers.Conv) and layer.kernel > 1:
                continue
            if isinstance(layer, layers.Linear):
                rows, inner, columns = batch * layer.tokens, layer.in_features, layer.out_features
            else:
                rows, inner, columns = batch * layer.height * layer.width, layer.in_channels, layer.out_channels
            if rows == batch:  # the time embedding, which is a table
                continue
            arms, error = fp8_arms(run, rows, inner, columns)
            times = run.compare(layer, batch, arms, flop=batch * layer.flop, fp8_relative_error=error, count=counts[layer])
            wide, low = (times.get(name, {}).get("median_ms") for name in (str(run.dtype).removeprefix("torch."), "fp8"))
            if wide and low:
                saved, measured = saved + counts[layer] * max(0.0, wide - low), True
        if measured:
            run.record(what="fp8 linears", batch=batch, saved_ms_a_step=saved)
            print(f"  fp8 would save {saved:.3f} ms a step at batch {batch}", flush=True)


def op_calls(run: Run) -> None:
    """The calls of `op_speed` whose limit is a copy or a product."""
    cases = ((op, *call) for op in ops.all_ops() for call in calls.calls(op.name, run.device, run.dtype, False))
    for op, label, args, kwargs in run.within(itertools.islice(cases, 1) if run.small else cases):
        if moved := calls.bytes_moved(op.name, args):
            able, unable = run.checked(op, args, kwargs)
            run.compare(f"{op.name} {label}", len(args[0]), able, moved=moved, declined=unable)
