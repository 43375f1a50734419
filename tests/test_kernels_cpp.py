"""The C++ kernels are the reference, only faster; and building them never gets in the way."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from multibeta import ops
from multibeta.kernels import cpp

# a missing compiler is the user's right; with one, a failing build is our fault
if reason := cpp.load():
    if not reason.startswith(("no C++ compiler", "ninja not found", "MULTIBETA_NO_BUILD")):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

REFERENCE = ops.find("group_norm_act").reference

SHAPES = {
    "usual": ((2, 64, 16, 16), 32),
    "one group": ((2, 24, 5, 7), 1),
    "three channels a group, odd width": ((3, 24, 6, 5), 8),
    "1x1 map": ((2, 48, 1, 1), 8),
    "channels that no vector divides": ((2, 38, 9, 3), 19),
    "one sample in several chunks": ((1, 40, 65, 33), 8),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
}
# measured: 4e-7 and half a unit in the last place of the largest values
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


def example(shape, dtype=torch.float32, layout="contiguous", shift=True, residual=False, parameter_dtype=torch.float32):
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    weight, bias = torch.randn(2, shape[1]).to(parameter_dtype).unbind()
    return (
        x,
        weight,
        bias,
        torch.randn(shape[:2]) if shift else None,
        LAYOUTS[layout](torch.randn(shape).to(dtype)) if residual else None,
    )


def run(function, x, weight, bias, shift, residual, num_groups, activation, grads=None, dtype=None):
    """Outputs and the gradients of all inputs, of `function` evaluated on copies in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias, shift, residual)]
    x, weight, bias, shift, residual = leaves
    result = function(x, weight, bias, num_groups, shift=shift, residual=residual, activation=activation)
    outputs = result if isinstance(result, tuple) else (result,)
    grads = [grad.to(output.dtype) for grad, output in zip(grads, outputs, strict=False)]
    inputs = [leaf for leaf in leaves if leaf is not None]
    return outputs, torch.autograd.grad(outputs, inputs, grads)


def assert_close(actual, exact, dtype, factor=1.0):
    """Within rounding error of the values' scale."""
    scale = exact.abs().max().clamp_min(1e-30)
    worst = ((actual.double() - exact).abs().max() / scale).item()
    assert worst <= factor * TOLERANCE[dtype], f"error {worst:.2e} of the scale {scale:.2e}"


def check(tensors, num_groups, activation, dtype):
    x, _, _, _, residual = tensors
    # with a residual, the definition's statistics are those of the rounded sum
    rounded = x if residual is None else x + residual
    grads = [torch.randn(x.shape).to(dtype), torch.randn(x.shape).to(dtype)]
    outputs, gradients = run(cpp.group_norm_act, *tensors, num_groups, activation, grads)
    exact_tensors = (rounded, *tensors[1:4], None if residual is None else torch.zeros_like(x))
    exact, exact_gradients = run(REFERENCE, *exact_tensors, num_groups, activation, grads, torch.float64)
    assert_close(outputs[0], exact[0], dtype)
    if residual is not None:
        assert torch.equal(outputs[1], rounded)
    names = [
        name for name, tensor in zip(("x", "weight", "bias", "shift", "residual"), tensors, strict=True) if tensor is not None
    ]
    for name, gradient, exact_gradient in zip(names, gradients, exact_gradients, strict=True):
        assert gradient.isfinite().all(), name
        # float32 parameters' gradients are sums of many terms of both signs, and of bfloat16 sigmoids
        assert_close(gradient, exact_gradient, dtype, 4.0)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_the_references(name, dtype, layout, nan_empty):
    shape, num_groups = SHAPES[name]
    for activation in ops.ACTIVATIONS:
        check(example(shape, dtype, layout), num_groups, activation, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shift", (False, True))
def test_residual_and_shift(dtype, layout, shift, nan_empty):
    for shape, groups in (((2, 24, 5, 7), 8), ((2, 64, 8, 8), 4)):
        tensors = example(shape, dtype, layout, shift=shift, residual=True)
        check(tensors, groups, "silu", dtype)
        check((*tensors[:4], None), groups, "silu", dtype)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
def test_large_map_of_either_dtype(layout):
    for dtype in (torch.float32, torch.bfloat16):  # beyond 24 MiB of float32, stores bypass the caches
        tensors = example((1, 32, 480, 480), dtype, layout)
        y = cpp.group_norm_act(*tensors[:3], 8, shift=tensors[3], activation="silu")
        exact = REFERENCE(*(t.double() for t in tensors[:3]), 8, shift=tensors[3].double(), activation="silu")
        assert_close(y, exact, dtype)


def test_parameters_and_shift_of_any_dtype_and_stride():
    x, weight, bias, shift, _ = example((3, 24, 5, 5), torch.bfloat16, parameter_dtype=torch.bfloat16)
    table = torch.randn(24, 6)
    for other in (shift[:1].expand(3, -1), shift.bfloat16(), table.t()[:3], table.t()[::2]):
        check((x, torch.stack([weight] * 2, 1)[:, 0], bias, other, None), 8, "sigmoid", torch.bfloat16)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
def test_a_mean_of_300_deviations_keeps_the_variance(layout):
    x = LAYOUTS[layout](300 + torch.randn(2, 32, 64, 64))
    shift = 300 * torch.ones(2, 32)
    for given in (None, shift):
        _, _, mean, rstd = torch.ops.multibeta.group_norm_act_cpp(x, torch.ones(32), torch.zeros(32), 8, 0.0, given, None, "none")
        grouped = (x.double() + (0 if given is None else given[:, :, None, None])).reshape(2, 8, -1)
        torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-7, atol=0)
        torch.testing.assert_close(rstd.double(), grouped.var(-1, correction=0).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_sample_is_the_same_alone_in_a_batch_and_for_any_threads(dtype, layout):
    threads = torch.get_num_threads()
    x, weight, bias, shift, _ = example((3, 40, 65, 33), dtype, layout)
    grad = torch.randn(x.shape).to(dtype)

    def all_results(n, count):
        torch.set_num_threads(count)
        part = LAYOUTS[layout](x[n])
        outputs = torch.ops.multibeta.group_norm_act_cpp(part, weight, bias, 8, 1e-6, shift[n], None, "silu")
        gradients = torch.ops.multibeta.group_norm_act_backward_cpp(
            LAYOUTS[layout](grad[n]), part, weight, bias, *outputs[2:], shift[n], "silu"
        )
        return outputs[0], *outputs[2:], gradients[0], gradients[3]

    try:
        batch = all_results(slice(None), 1)
        for count in (1, 2):
            for expected, actual in zip(batch, all_results(slice(None), count), strict=True):
                assert torch.equal(expected, actual)
            for expected, actual in zip(batch, all_results(slice(1, 2), count), strict=True):
                assert torch.equal(expected[1:2], actual)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_infinity_spread_over_their_group(layout, value):
    x, weight, bias, _, _ = example((2, 24, 5, 7), layout=layout, shift=False)
    x[0, 4, 2, 2] = value
    for activation in ops.ACTIVATIONS:
        y = cpp.group_norm_act(x, weight, bias, 8, activation=activation)
        expected = REFERENCE(x, weight, bias, 8, activation=activation)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
        assert y[0, 3:6].isnan().all() and y.isnan().sum() == 3 * 35


def test_saturated_activations():
    x = torch.tensor([-1.0, 1.0]).repeat(16).reshape(1, 32, 1, 1).expand(1, 32, 8, 8).contiguous()
    for scale in (20.0, 90.0, 1e4):
        weight = torch.full((32,), scale)
        for activation in ("silu", "sigmoid"):
            for dtype in (torch.float32, torch.bfloat16):
                y = cpp.group_norm_act(x.to(dtype), weight, torch.zeros(32), 16, activation=activation)
                exact = REFERENCE(x.double(), weight.double(), torch.zeros(32).double(), 16, activation=activation)
                torch.testing.assert_close(y.double(), exact, rtol=3 * TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_obey_the_rules_of_torch_library(layout):
    x, weight, bias, shift, residual = example((2, 24, 5, 7), layout=layout, residual=True)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias, shift, residual)]
    for arguments in ((*leaves[:3], 8, 1e-6, shift, residual, "silu"), (*leaves[:3], 8, 1e-6, None, None, "none")):
        torch.library.opcheck(torch.ops.multibeta.group_norm_act_cpp.default, arguments)
    _, total, mean, rstd = torch.ops.multibeta.group_norm_act_cpp(x, weight, bias, 8, 1e-6, shift, residual, "silu")
    saved = (torch.randn(x.shape), *(t.detach() for t in (total, weight, bias, mean, rstd, shift)), "silu")
    torch.library.opcheck(torch.ops.multibeta.group_norm_act_backward_cpp.default, saved)


PAIRS = {  # (N, C1, C2, H, W), groups of both together
    "usual": ((2, 64, 32, 16, 16), 24),
    "unlike parts, odd sizes": ((3, 24, 15, 5, 7), 13),
    "channels that no vector divides": ((2, 14, 24, 9, 3), 19),
    "1x1 map": ((2, 48, 16, 1, 1), 8),
    "one sample in several chunks": ((1, 40, 24, 65, 33), 8),
    "stores past the caches": ((2, 128, 64, 192, 192), 24),
    "past the caches, but rows straddle cache lines": ((2, 64, 8, 304, 304), 9),
}


def pair_example(shape, dtype=torch.float32, shift=True):
    n, first, second, height, width = shape
    x, beside = (LAYOUTS["channels-last"](torch.randn(n, c, height, width).to(dtype)) for c in (first, second))
    weight, bias = torch.randn(2, first + second).unbind()
    return x, beside, weight, bias, torch.randn(n, first + second) if shift else None


@pytest.mark.parametrize("shift", (False, True))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_equals_its_concatenation(name, dtype, shift, nan_empty):
    shape, groups = PAIRS[name]
    x, beside, weight, bias, shift = pair_example(shape, dtype, shift)
    assert cpp.accepts_group_norm_act_pair(x, beside, weight, bias, groups, shift=shift) is None
    y = cpp.group_norm_act_pair(x, beside, weight, bias, groups, shift=shift, activation="silu")
    both = LAYOUTS["channels-last"](torch.cat([x, beside], dim=1))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, cpp.group_norm_act(both, weight, bias, groups, shift=shift, activation="silu"))


def test_a_slice_is_written_and_nothing_beside_it():
    _, beside, weight, bias, _ = pair_example((2, 24, 15, 5, 7))
    out = torch.full((2, 39, 5, 7), 7.0).to(memory_format=torch.channels_last)
    arguments = (beside, weight[24:], bias[24:], 5, 1e-6, None, "silu")
    torch.ops.multibeta.group_norm_act_into_cpp(*arguments, out[:, 24:])
    assert (out[:, :24] == 7).all() and not (out[:, 24:] == 7).any()
    torch.library.opcheck(torch.ops.multibeta.group_norm_act_into_cpp.default, (*arguments, out[:, 24:]))
    with pytest.raises(RuntimeError, match="slice of the channels"):
        torch.ops.multibeta.group_norm_act_into_cpp(*arguments, torch.empty(2, 15, 5, 7))


def test_compile_keeps_one_graph_of_a_pair():
    *tensors, shift = pair_example((2, 24, 15, 5, 7))

    def block(x, beside, weight, bias):
        assert cpp.accepts_group_norm_act_pair(x, beside, weight, bias, 13, shift=shift) is None
        return cpp.group_norm_act_pair(x, beside, weight, bias, 13, shift=shift)

    with torch.inference_mode():
        assert torch.equal(torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors), block(*tensors))


def test_pairs_declined_have_reasons():
    x, beside, weight, bias, shift = pair_example((2, 24, 15, 5, 7))

    def reason(x=x, beside=beside, num_groups=13, shift=shift, weight=weight):
        return cpp.accepts_group_norm_act_pair(x, beside, weight, bias, num_groups, shift=shift)

    assert reason() is None
    assert reason(num_groups=3) == "a group lies across the boundary of x and beside"
    assert "divide" in reason(num_groups=4)
    assert "channels-last" in reason(beside=beside.contiguous())
    assert "dtype" in reason(beside=beside.bfloat16())
    assert "more than their channels" in reason(beside=beside[:, :, 1:])
    assert "shift" in reason(shift=shift[:, 1:])
    assert "float64" in reason(shift=shift.double())
    assert "(N, C, H, W)" in reason(x=x[0])
    assert "backward" in reason(weight=weight.clone().requires_grad_())
    with torch.no_grad():
        assert reason(weight=weight.clone().requires_grad_()) is None


def test_sampler_operators_obey_the_rules_of_torch_library():
    for (latent, noise, delta, row, seeds, step), options in ops.find("sampler_update").examples():
        arguments = (latent, noise.bfloat16(), delta, row, seeds, step, *options["previous"])
        torch.library.opcheck(torch.ops.multibeta.sampler_update_cpp.default, arguments)
        torch.library.opcheck(torch.ops.multibeta.standard_normal_cpp.default, (seeds, step, 30, 1))
    for arguments, _ in ops.find("sampler_step").examples():
        torch.library.opcheck(torch.ops.multibeta.sampler_step_cpp.default, arguments)


@pytest.mark.parametrize("layout", ("contiguous", "channels-last"))
def test_compile_keeps_one_graph(layout):
    x, weight, bias, shift, _ = example((2, 24, 5, 7), layout=layout)

    def block(x):
        assert cpp.accepts_group_norm_act(x, weight, bias, 8, shift=shift, activation="silu") is None
        return cpp.group_norm_act(x, weight, bias, 8, shift=shift, activation="silu").square().sum()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (block, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_calls_declined_have_reasons():
    x, weight, bias, shift, residual = example((2, 24, 5, 7), residual=True)
    accepts = cpp.accepts_group_norm_act
    assert accepts(x, weight, bias, 8, shift=shift, residual=residual) is None
    assert "float64" in accepts(x.double(), weight, bias, 8)
    assert "float16" in accepts(x.half(), weight, bias, 8)
    assert "meta" in accepts(x.to("meta"), weight, bias, 8)
    assert "(N, C, H, W)" in accepts(x[0], weight, bias, 8)
    assert "empty" in accepts(x[:0], weight, bias, 8)
    assert "channels-last" in accepts(LAYOUTS["permuted"](x), weight, bias, 8)
    assert "residual" in accepts(x, weight, bias, 8, residual=residual.bfloat16())
    latent = torch.randn(2, 4, 3, 3)
    row, seeds = torch.ones(7), torch.tensor([1, 2])
    assert cpp.accepts_sampler_update(latent, latent, latent, row, seeds, 1) is None
    for wrong in (torch.ones(6), torch.ones(3, 7), torch.ones(4, 6)):
        shape = tuple(wrong.shape)
        assert cpp.accepts_sampler_update(latent, latent, latent, wrong, seeds, 1) == f"row must be (7,) or (C, 7), got {shape}"
    assert "derivative" in cpp.accepts_sampler_update(latent.requires_grad_(), latent, latent, row, seeds, 1)
    tensors, _ = next(ops.find("sampler_step").examples())
    assert cpp.accepts_sampler_step(*tensors) is None
    one_head = list(ops.find("sampler_step").examples())[4][0]
    assert cpp.accepts_sampler_step(*one_head) is None
    for given, index, wrong, expected in (
        (tensors, 0, latent[0], "latent must be (N, C, H, W) and not empty, got (4, 3, 3)"),
        (tensors, 4, torch.ones(2, 3, 7), "rows must be (S, 7) or (S, C, 7), got (2, 3, 7)"),  # the latent has four channels
        (tensors, 5, one_head[5], "channel_rows must be (S, C, 9) without a condition, got (2, 4, 10)"),
        (one_head, 5, tensors[5], "channel_rows must be (S, C, 10) with a condition, got (2, 4, 9)"),
        (
            tensors,
            3,
            one_head[3],
            "output must have 2 C channels without a condition and be as large as latent, got (3, 4, 8, 8)",
        ),
        (one_head, 3, tensors[3], "output must have 1 C channels with a condition and be as large as latent, got (3, 8, 8, 8)"),
        (one_head, 1, one_head[9][:2], "network_input and each half of history must have the shape of latent"),
        (one_head, 9, one_head[9][:2], "condition must have the shape of latent, got (2, 4, 8, 8)"),
        (one_head, 9, one_head[9].bfloat16(), "latent, history, rows, channel_rows and condition must be contiguous float32"),
    ):
        assert cpp.accepts_sampler_step(*given[:index], wrong, *given[index + 1 :]) == expected


@pytest.mark.parametrize("shape", ((4, 32, 32), (3, 5, 5), (1,), (1, 70, 70)))  # usual; no multiple of four; one; two pieces
def test_normals_are_the_references(shape, nan_empty):
    reference, seeds = ops.find("standard_normal").reference, torch.tensor([0, 3, -1, 2**40 + 5, -(2**63)])
    for step, stream in ((0, 0), (999, 1), (2**32 - 1, 2)):
        normals = cpp.standard_normal(seeds, step, shape, stream=stream)
        torch.testing.assert_close(normals, reference(seeds, step, shape, stream=stream), rtol=0, atol=1e-6)
        assert torch.equal(normals[1:2], cpp.standard_normal(seeds[1:2], step, shape, stream=stream))


def test_normals_are_of_the_words_of_philox():
    """Box-Muller backwards: the numbers of 24 bits that normals were made of, up to what float32 rounds of them."""
    seeds, blocks = torch.tensor([0, 3, -1, 2**40 + 5, -(2**63)]), torch.arange(4096)
    words = ops.philox(seeds[:, None], (blocks[None], 917, 2, 0))
    normals = cpp.standard_normal(seeds, 917, (4 * len(blocks),), stream=2).double().view(5, -1, 4)
    for pair in (0, 2):
        cosine, sine = normals[..., pair], normals[..., pair + 1]
        first = torch.exp(-(cosine**2 + sine**2) / 2) * 2**24 - 1
        second = torch.atan2(sine, cosine) / (2 * torch.pi) % 1 * 2**24
        assert (first - (words[pair] >> 8)).abs().max() < 4
        far = (words[pair] >> 8) < 2**24 - 2**12  # the angle of a radius near zero is lost in rounding
        distance = (second - (words[pair + 1] >> 8)).abs()
        assert far.float().mean() > 0.999 and torch.minimum(distance, 2**24 - distance)[far].max() < 4


@pytest.mark.parametrize("shape", ((3, 4, 8, 8), (2, 3, 5, 5), (1, 1, 70, 70)))
def test_sampler_update_is_the_reference(shape, nan_empty):
    tensors = torch.randn(5, *shape)
    latent, noise, delta, *previous = tensors
    seeds = torch.arange(shape[0]) - 1
    for fresh in (0.0, 0.4):
        row = torch.tensor([1.0, -0.3, 2.0, fresh, 0.2, -2.0, 0.6], dtype=torch.float64)
        for before in (None, tuple(previous)):
            arguments = (latent.to(memory_format=torch.channels_last), noise, delta, row, seeds, 7)
            actual = cpp.sampler_update(*arguments, previous=before)
            torch.testing.assert_close(
                actual, ops.find("sampler_update").reference(*arguments, previous=before), rtol=2e-6, atol=4e-6
            )
            narrow = cpp.sampler_update(latent.bfloat16(), noise.bfloat16(), delta.bfloat16(), row, seeds, 7)
            assert narrow.dtype == torch.bfloat16
    mixed = cpp.sampler_update(latent, noise.bfloat16(), delta.bfloat16().transpose(2, 3), row, seeds, 7)
    exact = ops.find("sampler_update").reference(
        latent, noise.bfloat16().float(), delta.bfloat16().float().transpose(2, 3), row, seeds, 7
    )
    torch.testing.assert_close(mixed, exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", ((3, 4, 8, 8), (2, 3, 5, 5), (2, 5, 1, 1), (1, 3, 50, 70)))  # the last: pieces cross channels
def test_sampler_update_by_channel_is_the_reference(shape, nan_empty):
    latent, noise, delta, *previous = torch.randn(5, *shape)
    seeds = torch.arange(shape[0]) - 1
    rows = torch.randn(shape[1], 7, dtype=torch.float64)
    for fresh in (torch.zeros(shape[1]), torch.arange(shape[1]) / 4):  # none; none in the first channel
        rows[:, 3] = fresh
        for before in (None, tuple(previous)):
            arguments = (latent.to(memory_format=torch.channels_last), noise, delta, rows, seeds, 7)
            expected = ops.find("sampler_update").reference(*arguments, previous=before)
            assert cpp.accepts_sampler_update(*arguments, previous=before) is None
            torch.testing.assert_close(cpp.sampler_update(*arguments, previous=before), expected, rtol=2e-6, atol=4e-6)
    narrow = cpp.sampler_update(latent.bfloat16(), noise.bfloat16(), delta, rows.t().contiguous().t().float(), seeds, 7)
    exact = ops.find("sampler_update").reference(latent.bfloat16().float(), noise.bfloat16().float(), delta, rows, seeds, 7)
    torch.testing.assert_close(narrow, exact, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("shape", ((3, 4, 8, 8), (1, 3, 50, 70)))
def test_equal_rows_of_the_channels_are_the_one_they_share(shape):
    latent, noise, delta, *previous = torch.randn(5, *shape)
    row, seeds = torch.randn(7, dtype=torch.float64), torch.arange(shape[0])
    own = row.expand(shape[1], 7)
    results = [cpp.sampler_update(latent, noise, delta, r, seeds, 7, previous=tuple(previous)) for r in (row, own)]
    assert torch.equal(*results)
    output, channel_rows = torch.randn(shape[0], 2 * shape[1], *shape[2:]), torch.randn(1, shape[1], 9)
    walked = []
    for rows in (row[None].float(), own[None].float().contiguous()):
        written = (latent.clone(), torch.empty(shape), torch.stack(previous))
        cpp.sampler_step(*written, output, rows, channel_rows, torch.tensor([7]), torch.tensor([0]), seeds)
        walked.append(written)
    assert all(torch.equal(*pair) for pair in zip(*walked, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampler_step_is_the_reference(dtype, layout):
    crossing = torch.randn(6, 2, 3, 50, 70)  # pieces cross channels
    tables = (torch.randn(1, 7), torch.randn(1, 3, 10).abs(), torch.tensor([7]), torch.tensor([0]), torch.arange(2))
    large = (*crossing[:2], crossing[2:4], crossing[4], *tables, crossing[5])
    examples = [arguments for arguments, _ in ops.find("sampler_step").examples()]
    for latent, _, history, output, *rest in (*examples, large):
        results = []
        for function in (cpp.sampler_step, ops.find("sampler_step").reference):
            written = [latent.clone(), LAYOUTS[layout](torch.zeros_like(latent).to(dtype)), history.clone()]
            function(*written, LAYOUTS[layout](output.to(dtype)), *rest)
            results.append(written)
        for name, actual, expected in zip(("latent", "network_input", "history"), *results, strict=True):
            tolerance = 2**-7 if name == "network_input" and dtype == torch.bfloat16 else 4e-6
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=name)


# ---- the builder, in processes of its own


def python(code, **environment):
    """The finished process that ran `code` after `from multibeta.kernels import build, cpp`."""
    code = "import torch\nfrom multibeta.kernels import build, cpp\n" + textwrap.dedent(code)
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


TINY = """
    import pathlib
    # one small source in place of ours: the builder is on trial, not the compiler
    folder = pathlib.Path(r"{folder}")
    build.SOURCES, build.HEADERS = ("tiny.cpp",), ()
    build.source_folder = lambda: folder
    build.compiler_flags = lambda: ["-O0"]
    cpp.shared.register_group_norm_act = lambda backend: None
    cpp._register_fakes = lambda: None
    print(cpp.load(), torch.ops.multibeta.tiny_cpp() if cpp.load() is None else "")
"""


@pytest.fixture
def tiny(tmp_path):
    """Code that loads a library of one operator built into `tmp_path / "cache"`."""
    source = tmp_path / "tiny.cpp"
    source.write_text(
        "#include <torch/library.h>\n"
        "int64_t tiny() { return 7; }\n"
        'TORCH_LIBRARY_FRAGMENT(multibeta, m) { m.def("tiny_cpp() -> int", &tiny); }\n'
    )
    return TINY.format(folder=tmp_path), tmp_path / "cache", source


def test_without_a_compiler_there_is_a_reason(tmp_path):
    process = python("print(cpp.load())", MULTIBETA_CACHE=tmp_path, CXX="no-such-compiler")
    assert process.stdout.strip() == "no C++ compiler: no-such-compiler not found; install g++ or set CXX", process.stderr
    environment = {"MULTIBETA_CACHE": tmp_path, "PATH": tmp_path, "CXX": "c++"}
    process = python(
        "print(cpp.load()); print(cpp.accepts_group_norm_act(torch.ones(1, 4, 2, 2), *torch.ones(2, 4), 2))", **environment
    )
    assert process.stdout.splitlines() == ["no C++ compiler: c++ not found; install g++ or set CXX"] * 2, process.stderr


def test_the_build_can_be_declined(tmp_path):
    process = python("print(cpp.load())", MULTIBETA_CACHE=tmp_path, MULTIBETA_NO_BUILD="1")
    assert process.stdout.strip() == "MULTIBETA_NO_BUILD is set", process.stderr
    assert not list(tmp_path.iterdir())


def test_two_processes_build_one_library(tiny):
    code, cache, _ = tiny
    outputs = []
    run_one = lambda: outputs.append(python(code, MULTIBETA_CACHE=cache))  # noqa: E731
    threads = [threading.Thread(target=run_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.stdout.strip() for process in outputs] == ["None 7"] * 2, [process.stderr for process in outputs]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_a_killed_build_and_a_damaged_library_are_built_anew(tiny):
    code, cache, source = tiny
    killed = code.replace("print(", "build.os.replace = lambda *paths: build.os.kill(build.os.getpid(), 9); print(", 1)
    assert python(killed, MULTIBETA_CACHE=cache).returncode == -9
    assert any(path.is_dir() for path in cache.iterdir())
    process = python(code, MULTIBETA_CACHE=cache)
    assert process.stdout.strip() == "None 7", process.stderr
    (library,) = cache.glob("*.so")
    assert not any(path.is_dir() for path in cache.iterdir())
    library.write_bytes(library.read_bytes()[:100])
    process = python(code, MULTIBETA_CACHE=cache)
    assert process.stdout.strip() == "None 7", process.stderr
    source.write_text("no C++")
    process = python(code, MULTIBETA_CACHE=cache)
    assert process.stdout.startswith("the build failed: ") and "log at" in process.stdout, process.stderr


def test_a_failed_build_is_remembered_until_its_cause_changes(tiny, tmp_path):
    code, cache, source = tiny
    source.write_text("no C++")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho call >> "{tmp_path}/calls"\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    calls = lambda: len((tmp_path / "calls").read_text().splitlines())  # noqa: E731
    first = python(code, MULTIBETA_CACHE=cache, CXX=compiler)
    assert first.stdout.startswith("the build failed: "), first.stderr
    made = calls()
    again = python(code, MULTIBETA_CACHE=cache, CXX=compiler)
    assert again.stdout.startswith(first.stdout.strip()[:60]) and "found earlier" in again.stdout, again.stderr
    assert calls() == made
    os.utime(compiler, (0, 0))  # another version of it
    assert "found earlier" not in python(code, MULTIBETA_CACHE=cache, CXX=compiler).stdout
    assert calls() > made


def test_a_failure_that_may_pass_is_not_remembered(tiny, tmp_path):
    code, cache, _ = tiny
    compiler = tmp_path / "compiler"
    full = "echo 'fatal error: No space left on device' >&2; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *tiny*) {full};; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    assert "No space left on device" in python(code, MULTIBETA_CACHE=cache, CXX=compiler).stdout
    compiler.write_text('#!/bin/sh\nexec c++ "$@"\n')
    os.utime(compiler, (0, 0))
    assert python(code, MULTIBETA_CACHE=cache, CXX=compiler).stdout.strip() == "None 7"


def test_a_folder_mounted_noexec_is_no_place_for_a_library(tiny):
    code, cache, _ = tiny
    noexec = 'build.os.statvfs = lambda place: type("Mount", (), {"f_flag": build.os.ST_NOEXEC}); print('
    process = python(code.replace("print(", noexec, 1), MULTIBETA_CACHE=cache)
    assert f"{cache}: it is mounted noexec" in process.stdout, process.stderr
    assert not cache.exists()


def test_without_a_home_libraries_are_built_among_temporary_files(tiny, tmp_path):
    code, *_ = tiny
    nobody = "import os, pwd\n    os.environ.pop('HOME', None)\n    pwd.getpwuid = lambda user: {}[user]"
    environment = {"MULTIBETA_CACHE": "", "XDG_CACHE_HOME": "", "TMPDIR": tmp_path / "temporary"}
    (tmp_path / "temporary").mkdir()
    process = python(code.replace("import pathlib", f"import pathlib\n    {nobody}", 1), **environment)
    assert process.stdout.strip() == "None 7", process.stderr
    (folder,) = (tmp_path / "temporary").glob("multibeta-*")
    assert folder.stat().st_mode & 0o077 == 0 and [path.suffix for path in folder.iterdir()] == [".so"]


def test_a_library_in_a_read_only_cache_is_loaded_from_there(tiny, tmp_path):
    code, *_ = tiny
    environment = {"MULTIBETA_CACHE": "", "XDG_CACHE_HOME": tmp_path / "home", "TMPDIR": tmp_path / "temporary"}
    (tmp_path / "temporary").mkdir()
    assert python(code, **environment).stdout.strip() == "None 7"
    closed = "from multibeta import caches; caches.why_not_writable = lambda folder: 'closed'; print("
    process = python(code.replace("print(", closed, 1), CXX="no-such-compiler", **environment)
    assert process.stdout.strip() == "None 7", process.stderr


@pytest.mark.slow
def test_avx2_machines_get_the_same_numbers():
    if not torch.cpu._is_avx2_supported():
        pytest.skip("needs AVX2")
    process = python(
        """
        assert torch.backends.cpu.get_cpu_capability() == "AVX2"
        from multibeta import ops
        assert cpp.load() is None, cpp.load()
        for name in ("group_norm_act", "sampler_update"):
            for arguments, options in ops.find(name).examples():
                expected = ops.find(name).reference(*arguments, **options)
                torch.testing.assert_close(getattr(cpp, name)(*arguments, **options), expected, rtol=1e-5, atol=1e-5)
        x, weight, bias, groups = next(ops.find("group_norm_act").examples())[0]
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = x.contiguous(memory_format=layout).bfloat16().requires_grad_()
            y = cpp.group_norm_act(leaf, weight, bias, groups, activation="silu")
            y.float().square().sum().backward()
            same = leaf.detach().float().requires_grad_()
            z = ops.find("group_norm_act").reference(same, weight, bias, groups, activation="silu")
            z.square().sum().backward()
            torch.testing.assert_close(y.float(), z, rtol=2**-8, atol=1e-4)
            torch.testing.assert_close(leaf.grad.float(), same.grad, rtol=0.02, atol=0.05)
        """,
        ATEN_CPU_CAPABILITY="avx2",
    )
    assert process.returncode == 0, process.stderr
