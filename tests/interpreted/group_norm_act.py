"""Triton kernels of `group_norm_act` against the float64 reference, interpreted or not: run by tests/test_kernels_triton.py."""

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from multibeta import ops
from multibeta.kernels import group_norm_act as kernels

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
LAYOUTS = ("contiguous", "channels_last", "permuted")
# Largest error allowed, as a part of the largest value. The interpreter cuts to bfloat16 where a GPU rounds: one more ulp.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-10}

CASES = {  # (N, C, H, W), groups, layout, (kind of the forward, of the backward)
    "usual": ((2, 64, 8, 8), 32, "channels_last", ("one-pass", "one-pass")),
    "usual, contiguous": ((2, 64, 8, 8), 32, "contiguous", ("one-pass", "one-pass")),
    "one group, odd width": ((3, 24, 5, 7), 1, "channels_last", ("one-pass", "one-pass")),
    "three channels a group, odd width": ((2, 9, 5, 7), 3, "contiguous", ("one-pass", "one-pass")),
    "groups of less than a sector": ((2, 9, 5, 7), 3, "channels_last", ("split", "split")),
    "padded groups": ((2, 80, 6, 6), 2, "channels_last", ("one-pass", "one-pass")),
    "1 x 1 map": ((2, 48, 1, 1), 8, "contiguous", ("one-pass", "one-pass")),
    "a tile over the limit of the backward": ((1, 8, 66, 66), 2, "contiguous", ("one-pass", "split")),
    "a tile over the limit": ((1, 16, 66, 66), 2, "contiguous", ("split", "split")),
    "a tile over the limit, channels last": ((1, 16, 66, 66), 1, "channels_last", ("split", "split")),
    "neither layout": ((2, 12, 5, 6), 3, "permuted", None),
}


def same(actual, expected):
    """Equal in the interpreter; compiled, a tile adds its values in an order that follows strides and outputs, so to rounding."""
    ulps = 0 if DEVICE == "cpu" else 4 if expected.dtype == torch.float32 else 1  # a sum's, or those of rounding it once
    tolerance = ulps * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def in_layout(x, layout):
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x if layout == "contiguous" else x.transpose(2, 3).contiguous().transpose(2, 3)


def tensors(shape, dtype, layout, *, shift=True, residual=True, expanded=False):
    """Arguments of a call, each a leaf."""
    x = in_layout(torch.randn(shape), layout).to(DEVICE, dtype)
    affine = torch.randn(2, shape[1]).to(DEVICE, dtype)
    rows = torch.randn(1 if expanded else shape[0], shape[1]).to(DEVICE).expand(shape[:2])
    others = {
        "shift": rows if shift else None,  # float32 beside any x
        "residual": torch.randn(shape).to(DEVICE, dtype) if residual else None,
    }
    return x, affine[0].clone(), affine[1].clone(), others


def outputs_and_gradients(function, x, weight, bias, groups, others, activation):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, *others.values()) if t is not None]
    rest = iter(leaves[3:])
    keywords = {name: None if t is None else next(rest) for name, t in others.items()}
    outputs = function(*leaves[:3], groups, 1e-6, activation=activation, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(y.shape, generator=generator).to(x.dtype).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


def check(x, weight, bias, groups, others, activation):
    actual = outputs_and_gradients(kernels.group_norm_act, x, weight, bias, groups, others, activation)
    doubles = {name: None if t is None else t.double() for name, t in others.items()}
    function = ops.find("group_norm_act").reference
    expected = outputs_and_gradients(function, x.double(), weight.double(), bias.double(), groups, doubles, activation)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        # Statistics of a rounded sum differ, so everything is held to the dtype of x, the float32 gradient of the shift too.
        assert (a - e).abs().max() <= TOLERANCES[x.dtype] * e.abs().max()
    return actual


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_match_the_reference(case, dtype, nan_empty):
    shape, groups, layout, kinds = CASES[case]
    x, weight, bias, others = tensors(shape, dtype, layout)
    if kinds:
        for backward, kind in enumerate(kinds):
            pixels = shape[2] * shape[3]
            plan = kernels.configuration(shape[1], pixels, groups, x.element_size(), layout, backward=bool(backward))
            assert plan.kind == kind or dtype == torch.float32  # its rows are longer
    check(x, weight, bias, groups, others, "silu")


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(("shift", "residual"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("case", ["usual", "a tile over the limit"])
def test_every_activation_with_and_without_shift_and_residual(case, shift, residual, activation, nan_empty):
    shape, groups, layout, _ = CASES[case]
    x, weight, bias, others = tensors(shape, torch.float32, layout, shift=shift, residual=residual)
    check(x, weight, bias, groups, others, activation)


def test_a_shift_that_all_samples_share_keeps_its_batch_stride_of_zero():
    x, weight, bias, others = tensors((3, 32, 4, 4), torch.float32, "channels_last", expanded=True)
    assert others["shift"].stride() == (0, 1)
    check(x, weight, bias, 8, others, "silu")


def test_the_gradient_of_the_output_may_come_in_any_strides():
    x, weight, bias, _ = tensors((2, 32, 4, 4), torch.float32, "channels_last")
    x.requires_grad_()
    y = kernels.group_norm_act(x, weight, bias, 8)
    direction = torch.randn(y.shape, device=DEVICE)
    gradients = [torch.autograd.grad(y, x, in_layout(direction, layout), retain_graph=True)[0] for layout in LAYOUTS]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_sum_and_gradient_have_the_layout_of_x(layout):
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, weight, bias, others = tensors((2, 32, 4, 4), torch.float32, layout)
    x.requires_grad_()
    y, total = kernels.group_norm_act(x, weight, bias, 8, **others)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert all(t.is_contiguous(memory_format=memory_format) for t in (y, total, gradient))


@pytest.mark.parametrize("case", ["usual", "usual, contiguous", "groups of less than a sector", "a tile over the limit"])
def test_a_sample_alone_equals_the_sample_in_a_batch(case):
    shape, groups, layout, _ = CASES[case]
    x, weight, bias, others = tensors((3, *shape[1:]), torch.float32, layout)
    together = outputs_and_gradients(kernels.group_norm_act, x, weight, bias, groups, others, "silu")
    outputs = kernels.group_norm_act(
        in_layout(x[1:2], layout), weight, bias, groups, activation="silu", **{k: t[1:2] for k, t in others.items()}
    )
    for alone, batch in zip(outputs, together[:2], strict=True):
        assert torch.equal(alone[0], batch[1])


@pytest.mark.parametrize(("shape", "groups"), [((1, 32, 16, 16), 4), ((1, 16, 66, 66), 1)])  # one-pass, split
def test_a_mean_of_300_deviations_keeps_the_variance(shape, groups):
    x = in_layout(torch.randn(shape) + 300, "channels_last").to(DEVICE)
    weight = torch.ones(shape[1], device=DEVICE)
    _, _, mean, rstd = kernels.forward(x, weight, 0 * weight, groups, 1e-6, None, None, "none")
    grouped = x.double().reshape(shape[0], groups, -1)
    exact = (grouped.var(-1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), grouped.mean(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("full", [False, True])
def test_the_operator_keeps_its_promises_to_torch(layout, full):
    x, weight, bias, others = tensors((2, 12, 3, 5), torch.float32, layout, shift=full, residual=full)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, *others.values())]
    arguments = (*leaves[:3], 4, 1e-6, *leaves[3:], "silu")
    torch.library.opcheck(torch.ops.multibeta.group_norm_act_triton, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_compile_keeps_one_graph(layout):
    x, weight, bias, others = tensors((2, 12, 3, 5), torch.float32, layout)
    compiled = torch.compile(kernels.group_norm_act, fullgraph=True, backend="aot_eager")
    expected = outputs_and_gradients(kernels.group_norm_act, x, weight, bias, 4, others, "silu")
    actual = outputs_and_gradients(compiled, x, weight, bias, 4, others, "silu")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_the_op_is_served_by_triton_when_asked():
    x, weight, bias, others = tensors((2, 12, 3, 5), torch.float32, "channels_last")
    with ops.backend("triton"):
        assert ops.explain("group_norm_act", x, weight, bias, 4, **others).startswith("group_norm_act: triton")
        y, _ = ops.group_norm_act(x, weight, bias, 4, **others)
    torch.testing.assert_close(y, ops.find("group_norm_act").reference(x, weight, bias, 4, **others)[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.double(), "neither float32"),
        (lambda x: x[0], "3 dimensions"),
        (lambda x: in_layout(x, "permuted"), "neither contiguous nor channels-last"),
        (lambda x: x[:0], "empty"),
        (lambda x: x[:, :8], "not (C,)"),  # of the weight
    ],
)
def test_calls_that_do_not_fit_are_declined_with_a_reason(change, reason):
    x, weight, bias, _ = tensors((2, 12, 3, 5), torch.float32, "contiguous")
    assert reason in kernels.accepts_group_norm_act(change(x), weight, bias, 4)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched, in their order."""
    names, kind = [], type(kernels._one_pass_forward)
    run = kind.run

    def recorded(self, *args, **kwargs):
        names.append(self.fn.__name__.strip("_"))
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "run", recorded)
    return names


ULPS = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts to bfloat16


def check_sum(outputs, x, weight, bias, groups, shift, x_bias, residual):
    """The total is the exact sum rounded once, and the norm is of that total."""
    y, total = outputs
    exact = ops.total_of(x.double(), *(None if t is None else t.double() for t in (x_bias, residual)))
    torch.testing.assert_close(total.double(), exact, rtol=ULPS[x.dtype], atol=1e-6)
    doubles = (total.double(), weight.double(), bias.double())
    reference = ops.find("group_norm_act").reference
    expected = reference(*doubles, groups, shift=None if shift is None else shift.double(), activation="silu")
    assert (y - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bias_of_a_convolution_and_the_residual_are_added_in_the_same_pass(case, dtype, nan_empty, launches):
    shape, groups, layout, _ = CASES[case]
    x, weight, bias, others = tensors(shape, dtype, layout)
    x_bias, shift, residual = torch.randn(shape[1]).to(x), others["shift"], others["residual"]
    for sums in ({"x_bias": x_bias}, {"x_bias": x_bias, "residual": residual}, {"residual": residual}):
        launches.clear()
        outputs = kernels.group_norm_act(x, weight, bias, groups, shift=shift, activation="silu", **sums)
        assert launches in (["one_pass_forward"], ["block_moments", "join_moments", "apply_forward"])
        check_sum(outputs, x, weight, bias, groups, shift, sums.get("x_bias"), sums.get("residual"))
        assert outputs[1].stride() == outputs[0].stride()


@pytest.mark.parametrize("case", ["usual", "usual, contiguous", "padded groups", "a tile over the limit"])
def test_inference_gives_the_numbers_of_training(case, nan_empty):
    shape, groups, layout, _ = CASES[case]
    x, weight, bias, others = tensors(shape, torch.float32, layout)
    for residual in (None, others["residual"]):
        keywords = {"shift": others["shift"], "residual": residual, "activation": "silu"}
        inferred = kernels.group_norm_act(x, weight, bias, groups, **keywords)
        trained = kernels.group_norm_act(x.detach().requires_grad_(), weight, bias, groups, **keywords)
        if residual is None:
            inferred, trained = (inferred,), (trained,)
        for i, t in zip(inferred, trained, strict=True):
            assert t.requires_grad
            same(i, t.detach())


class Dispatched(TorchDispatchMode):
    """The names of the operators of torch that were called."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_inference_asks_for_the_memory_of_its_outputs_alone(monkeypatch):
    monkeypatch.setattr(type(kernels._one_pass_forward), "run", lambda self, *args, **kwargs: None)
    x, weight, bias, others = tensors((2, 64, 8, 8), torch.bfloat16, "channels_last")
    norm = (x, None, weight, bias, 32, 1e-6, others["shift"])
    with Dispatched() as dispatched:
        kernels.infer(*norm, "silu")
        assert dispatched.names == ["empty_like"]
        kernels.infer_sum(*norm, weight, others["residual"].contiguous(memory_format=torch.channels_last), "silu")
    assert dispatched.names[1:].count("empty_like") == 2
    assert not any("empty" in name for name in set(dispatched.names) - {"empty_like"})


def test_with_gradients_asked_for_a_bias_is_declined_and_a_residual_is_not():
    x, weight, bias, others = tensors((2, 12, 3, 5), torch.float32, "channels_last", shift=False)
    x_bias = torch.zeros(12, device=DEVICE)
    assert kernels.accepts_group_norm_act(x, weight, bias, 4, x_bias=x_bias) is None
    for asks in (x.clone().requires_grad_(), x):
        given = x_bias.clone().requires_grad_(asks is x)
        reason = kernels.accepts_group_norm_act(asks, weight, bias, 4, x_bias=given)
        assert reason == "gradients are asked for, with an x_bias the kernels have none"
        with torch.no_grad():
            assert kernels.accepts_group_norm_act(asks, weight, bias, 4, x_bias=given) is None
    assert kernels.accepts_group_norm_act(x.requires_grad_(), weight, bias, 4, **others) is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_rounds_that_fit_the_l2_cache_change_no_bit(layout, monkeypatch, launches):
    x, weight, bias, others = tensors((5, 16, 66, 66), torch.float32, layout)
    together = outputs_and_gradients(kernels.group_norm_act, x, weight, bias, 1, others, "silu")
    forward, backward = ["block_moments", "join_moments", "apply_forward"], ["block_sums", "join_sums", "apply_backward"]
    assert launches == [*forward, *backward]
    sample = x[0].numel() * x.element_size()
    # x, residual, total and y of two samples in a round; of grad, total and grad_x
    monkeypatch.setattr(kernels.launch, "l2_bytes", lambda device: 8 * sample)
    launches.clear()
    in_rounds = outputs_and_gradients(kernels.group_norm_act, x, weight, bias, 1, others, "silu")
    assert launches == [*3 * forward, *3 * backward]
    assert all(torch.equal(a, b) for a, b in zip(together, in_rounds, strict=True))
    monkeypatch.setattr(kernels.launch, "l2_bytes", lambda device: 1)  # a sample is never divided
    launches.clear()
    assert torch.equal(kernels.group_norm_act(x, weight, bias, 1, **others, activation="silu")[0], together[0])
    assert launches == 5 * forward


PAIRS = {  # (N, C1, C2, H, W), groups of both together
    "usual": ((2, 64, 32, 8, 8), 24),
    "unlike parts, odd sizes": ((3, 24, 15, 5, 7), 13),
    "padded groups, a program beyond the last": ((2, 36, 60, 6, 6), 8),
    "1 x 1 map": ((2, 40, 8, 1, 1), 6),
    "a tile over the limit": ((1, 16, 8, 66, 66), 3),
}


def pair_tensors(shape, dtype, *, shift=True):
    n, first, second, height, width = shape
    both, weight, bias, others = tensors((n, first + second, height, width), dtype, "channels_last", shift=shift)
    x, beside = (in_layout(part, "channels_last") for part in both.split((first, second), dim=1))
    sums = {"x_bias": torch.randn(first).to(x), "residual": in_layout(others["residual"][:, :first], "channels_last")}
    return both, x, beside, weight, bias, others["shift"], sums


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PAIRS)
def test_a_pair_equals_its_concatenation(case, dtype, shift, nan_empty):
    shape, groups = PAIRS[case]
    both, x, beside, weight, bias, shift, sums = pair_tensors(shape, dtype, shift=shift)
    keywords = {"shift": shift, "activation": "silu"}
    assert kernels.accepts_group_norm_act_pair(x, beside, weight, bias, groups, shift=shift) is None
    y = kernels.group_norm_act_pair(x, beside, weight, bias, groups, **keywords)
    assert y.is_contiguous(memory_format=torch.channels_last)
    same(y, kernels.group_norm_act(both, weight, bias, groups, **keywords))

    assert kernels.accepts_group_norm_act_pair(x, beside, weight, bias, groups, shift=shift, **sums) is None
    y, total = kernels.group_norm_act_pair(x, beside, weight, bias, groups, **keywords, **sums)
    torch.testing.assert_close(
        total.double(), ops.total_of(x.double(), *(t.double() for t in sums.values())), rtol=ULPS[dtype], atol=1e-6
    )
    assert total.is_contiguous(memory_format=torch.channels_last)
    same(y, kernels.group_norm_act(in_layout(torch.cat([total, beside], 1), "channels_last"), weight, bias, groups, **keywords))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", [False, True])
def test_the_operators_of_inference_keep_their_promises_to_torch(layout, pair):
    _, x, beside, weight, bias, shift, sums = pair_tensors((2, 24, 15, 5, 7), torch.float32)
    groups = 13 if pair else 8
    if not pair:
        beside, weight, bias, shift = None, weight[:24].clone(), bias[:24].clone(), shift[:, :24]
    x = in_layout(x, layout)
    norm = (x, beside, weight, bias, groups, 1e-6, shift)
    torch.library.opcheck(torch.ops.multibeta.group_norm_act_inference_triton, (*norm, "silu"))
    torch.library.opcheck(torch.ops.multibeta.group_norm_act_sum_inference_triton, (*norm, *sums.values(), "silu"))


def test_torch_compile_keeps_one_graph_of_a_pair():
    _, x, beside, weight, bias, shift, sums = pair_tensors((2, 24, 15, 5, 7), torch.float32)
    compiled = torch.compile(kernels.group_norm_act_pair, fullgraph=True, backend="aot_eager")
    for keywords in ({}, sums):
        expected = kernels.group_norm_act_pair(x, beside, weight, bias, 13, shift=shift, **keywords)
        torch.testing.assert_close(compiled(x, beside, weight, bias, 13, shift=shift, **keywords), expected)


def test_a_pair_that_does_not_fit_is_declined_with_a_reason():
    _, x, beside, weight, bias, shift, sums = pair_tensors((2, 24, 15, 5, 7), torch.float32)
    accepts = kernels.accepts_group_norm_act_pair
    assert accepts(x, beside, weight, bias, 3) == "a group lies across the boundary of x and beside"
    assert "not channels-last" in accepts(x.contiguous(), beside, weight, bias, 13)
    assert "backward" in accepts(x, beside, weight.requires_grad_(), bias, 13, shift=shift)
    assert accepts(x, beside, weight.detach(), bias, 13, **sums) is None
    assert "backward" in accepts(x, beside, weight.detach(), bias, 13, residual=sums["residual"].requires_grad_())
    assert accepts(x, beside, weight, bias, 13, shift=shift[:, :24]) == "the shift is not (N, C)"
    assert accepts(x, beside, weight, bias, 13, x_bias=bias) == "x_bias is not (C,)"


def test_what_has_no_backward_says_so_when_it_is_not_asked_first():
    _, x, beside, weight, bias, shift, *_ = pair_tensors((2, 24, 15, 5, 7), torch.float32)
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="x_bias has no backward"):
        kernels.group_norm_act(x, weight[:24], bias[:24], 8, x_bias=bias[:24])
    with pytest.raises(RuntimeError, match="the pair has no backward"):
        kernels.group_norm_act_pair(x, beside, weight, bias, 13, shift=shift)
