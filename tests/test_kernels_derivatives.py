"""Derivatives of every kind are right under "auto", or refused: against float64, finite differences and torch.autograd."""

import contextlib

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from multibeta import ops
from multibeta.blocks import AttentionBlock, GroupNormAct, ResBlock
from multibeta.kernels import cpp, shared
from multibeta.networks import UNet

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "neither": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPE = (2, 4, 2, 3)
AFFINE, COTANGENT, DIRECTION = rand(2, 4, seed=1), rand(*SHAPE, seed=2), rand(*SHAPE, seed=3)


def norm(x, activation="silu", **sums):
    weight, bias = AFFINE.to(x.dtype)
    return ops.group_norm_act(x, weight, bias, 2, shift=x.mean((2, 3)), activation=activation, **sums)


def norm_of_a_sum(x):
    y, total = norm(x, residual=x.sin())
    return y + total


def norm_of_a_pair(x):
    weight, bias = AFFINE.to(x.dtype)
    return ops.group_norm_act_pair(x[:, :2], x[:, 2:].sin(), weight, bias, 2, activation="silu")


def attend(x):
    query = x.flatten(2).transpose(1, 2).unflatten(2, (2, 2))
    return ops.attention(query, query.sin(), query.cos()).flatten(2).transpose(1, 2).reshape(x.shape)


FUNCTIONS = {
    "sigmoid": lambda x: norm(x, "sigmoid"),
    "silu": norm,
    "no activation": lambda x: norm(x, "none"),
    "sum": norm_of_a_sum,
    "pair": norm_of_a_pair,
    "attention": attend,
}


def along(jacobian):
    return torch.tensordot(jacobian, DIRECTION.to(jacobian), dims=DIRECTION.dim())


def by_sample(function):
    return lambda x: function(x[None])[0]


def through_a_dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, DIRECTION.to(x)))).tangent


def loss(function):
    return lambda x: (COTANGENT.to(x) * function(x).square()).sum()


def sample_loss(function):
    return lambda x, cotangent: (cotangent * function(x[None])[0].square()).sum()


TANGENTS = {
    "jvp": lambda f, x: jvp(f, (x,), (DIRECTION.to(x),))[1],
    "forward mode": through_a_dual,
    "jacfwd": lambda f, x: along(jacfwd(f)(x)),
    "jacrev": lambda f, x: along(jacrev(f)(x)),
    "autograd jvp": lambda f, x: functional.jvp(f, x, DIRECTION.to(x))[1],
}
GRADIENTS = {
    "grad": lambda f, x: grad(loss(f))(x),
    "vjp": lambda f, x: vjp(loss(f), x)[1](torch.ones(()).to(x))[0],
    "vmap of grad": lambda f, x: vmap(grad(sample_loss(f)))(x, COTANGENT.to(x)),
    "grad of vmap": lambda f, x: grad(loss(vmap(by_sample(f))))(x),
    "autograd": lambda f, x: torch.autograd.grad(loss(f)(leaf := x.detach().requires_grad_()), leaf)[0],
}
CURVATURES = {
    "hessian": lambda f, x: along(hessian(loss(f))(x)),
    "jvp of grad": lambda f, x: jvp(grad(loss(f)), (x,), (DIRECTION.to(x),))[1],
    "grad of grad": lambda f, x: grad(lambda y: (grad(loss(f))(y) * DIRECTION.to(x)).sum())(x),
    "autograd hvp": lambda f, x: functional.hvp(loss(f), x, DIRECTION.to(x))[1],
}


def difference(function, x, step=1e-5):
    """Along DIRECTION, by central differences in float64."""
    x, direction = x.double(), step * DIRECTION.double()
    return (function(x + direction) - function(x - direction)) / (2 * step)


def exact_gradient(function, x):
    x = x.double().requires_grad_()
    return torch.autograd.grad(loss(function)(x), x)[0]


@contextlib.contextmanager
def right_or_refused(name, kind):
    """torch refuses the second derivative of scaled_dot_product_attention wherever a fused kernel serves it."""
    try:
        yield
    except RuntimeError as error:
        assert name == "attention" and kind in ("autograd jvp", "autograd hvp") and "is not implemented" in str(error)


def close(found, exact):
    assert exact.norm() > 0.1
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
class TestOps:
    @pytest.fixture
    def case(self, name, layout):
        return FUNCTIONS[name], LAYOUTS[layout](rand(*SHAPE))

    @pytest.mark.parametrize("kind", TANGENTS)
    def test_tangents_are_the_finite_differences(self, case, name, kind):
        function, x = case
        exact = difference(function, x)
        with ops.backend("reference"):
            close(TANGENTS[kind](function, x), exact)
        with right_or_refused(name, kind):
            close(TANGENTS[kind](function, x), exact)

    @pytest.mark.parametrize("kind", GRADIENTS)
    def test_gradients_are_those_of_float64(self, case, kind):
        function, x = case
        exact = exact_gradient(function, x)
        for name in ("reference", "auto"):
            with ops.backend(name):
                close(GRADIENTS[kind](function, x), exact)

    @pytest.mark.parametrize("kind", CURVATURES)
    def test_second_derivatives_are_the_differences_of_gradients(self, case, name, kind):
        function, x = case
        exact = difference(lambda y: exact_gradient(function, y), x)
        with ops.backend("reference"):
            close(CURVATURES[kind](function, x), exact)
        with right_or_refused(name, kind):
            close(CURVATURES[kind](function, x), exact)

    def test_vmap_is_a_loop(self, case):
        function, x = case
        for name in ("reference", "auto"):
            with ops.backend(name):
                torch.testing.assert_close(vmap(by_sample(function))(x), function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["silu", "pair", "attention"])
def test_a_kernel_that_is_asked_for_refuses_transforms(name):
    function, x = FUNCTIONS[name], rand(*SHAPE)
    for backend in ("cpp", "sdpa") if name == "attention" else ("cpp", "triton"):
        with ops.backend(backend):
            with pytest.raises(RuntimeError, match=r"cannot run \w+: a transform of torch.func is active"):
                jvp(function, (x,), (DIRECTION,))
            with pytest.raises(RuntimeError, match=r"cannot run \w+: forward-mode differentiation is on"):
                through_a_dual(function, x)


def test_explain_names_the_transform():
    seen = []
    weight, bias = AFFINE

    def explained(x):
        seen.append(ops.explain("group_norm_act", x, weight, bias, 2))
        return x

    explained(rand(*SHAPE))
    vmap(explained)(rand(2, *SHAPE))
    through_a_dual(explained, rand(*SHAPE))
    assert seen[1:] == [
        "group_norm_act: reference (a transform of torch.func is active, which the reference alone follows)",
        "group_norm_act: reference (forward-mode differentiation is on, which the reference alone follows)",
    ]
    explained(rand(*SHAPE))
    assert seen[0] == seen[-1]


def modules():
    yield GroupNormAct(2, 4)
    yield ResBlock(4, 4, num_groups=2)
    yield AttentionBlock(4, num_heads=2, num_groups=2)


def tiny_unet():
    shape = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    unet = UNet(in_channels=3, out_channels=3, resolution=8, head_channels=4, num_groups=4, **shape).requires_grad_(False)
    for parameter in unet.parameters():  # its last convolutions start at zero
        parameter.normal_(0, 0.3)
    return unet


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_u_net_has_all_derivatives(memory_format):
    unet = tiny_unet().to(memory_format=memory_format)
    x, direction = (rand(2, 3, 8, 8, seed=s).contiguous(memory_format=memory_format) for s in range(2))
    step = torch.tensor([3.0, 700.0])
    with ops.backend("reference"):
        precise, step64, h = tiny_unet().double(), step.double(), 1e-5 * direction.double()
        for mine, theirs in zip(precise.parameters(), unet.parameters(), strict=True):
            mine.copy_(theirs)
        tangent = (precise(x.double() + h, step64) - precise(x.double() - h, step64)) / 2e-5
        leaf = x.double().requires_grad_()
        gradient = torch.autograd.grad(precise(leaf, step64).square().sum(), leaf)[0]

    def energy(x, step):
        return unet(x[None], step[None]).square().sum()

    def near(found, exact):
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))

    near(jvp(lambda x: unet(x, step), (x,), (direction,))[1], tangent)
    near(vmap(lambda x, step, v: jvp(lambda x: unet(x[None], step[None])[0], (x,), (v,))[1])(x, step, direction), tangent)
    near(vmap(grad(energy))(x, step), gradient)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("module", list(modules()), ids=lambda module: type(module).__name__)
def test_transforms_within_a_compiled_function(module, backend):
    module.requires_grad_(False)
    x = rand(*SHAPE)

    def tangent(x):
        return jvp(module, (x,), (DIRECTION,))[1]

    def gradient(x):
        return grad(lambda y: (COTANGENT * module(y)).sum())(x)

    for function in (tangent, gradient):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_of_a_compiled_function_break_its_graph_and_are_right(backend, warm):
    module, x = GroupNormAct(2, 4).requires_grad_(False), rand(*SHAPE)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend)
    if warm:  # the graph that it has is for another case
        compiled(x)
    torch.testing.assert_close(jvp(compiled, (x,), (DIRECTION,))[1], jvp(module, (x,), (DIRECTION,))[1])
    torch.testing.assert_close(grad(loss(compiled))(x), grad(loss(module))(x))
    torch.testing.assert_close(vmap(compiled)(x[None]), module(x)[None])
    torch.testing.assert_close(compiled(x), module(x))


needs_cpp = pytest.mark.skipif(cpp.load() is not None, reason=f"no C++ kernels: {cpp.load()}")


@needs_cpp
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_what_the_operator_computes(dtype, layout, activation):
    x, grad_y, shift = LAYOUTS[layout](rand(2, 6, 3, 5)).to(dtype), rand(2, 6, 3, 5, seed=4).to(dtype), rand(2, 6, seed=5)
    weight, bias = rand(2, 6, seed=6)
    _, _, mean, rstd = torch.ops.multibeta.group_norm_act_cpp(x, weight, bias, 2, 1e-6, shift, None, activation)
    found = torch.ops.multibeta.group_norm_act_backward_cpp(grad_y, x, weight, bias, mean, rstd, shift, activation)
    exact = shared.gradients(grad_y, x, weight, bias, 2, 1e-6, shift, activation)
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_three_times_differentiated(activation, layout, residual):
    """With respect to every input, through the operator: each derivative is that of the reference in float64."""
    x, weight, bias, shift = LAYOUTS[layout](rand(*SHAPE)), *AFFINE, rand(2, 4, seed=7)
    inputs = [x, weight, bias, shift] + ([rand(*SHAPE, seed=8)] if residual else [])

    def towers(function, inputs):
        x, weight, bias, shift, *rest = inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(x, weight, bias, 2, 1e-5, shift=shift, residual=rest[0] if rest else None, activation=activation)
        objective, found = (sum(part.square().sin().sum() for part in y) if residual else y.square().sin().sum()), []
        for _ in range(3):
            gradients = torch.autograd.grad(objective, inputs, create_graph=True)
            objective = sum(
                (gradient.sin() * torch.arange(gradient.numel()).view(gradient.shape)).sum() for gradient in gradients
            )
            found += gradients
        return found

    with ops.backend("cpp"):
        found = towers(ops.group_norm_act, inputs)
    exact = towers(ops.find("group_norm_act").reference, [tensor.double() for tensor in inputs])
    for mine, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.detach().abs().max()))


@needs_cpp
def test_the_total_alone_has_a_gradient():
    x, residual = (rand(*SHAPE, seed=s).requires_grad_() for s in range(2))
    weight, bias = AFFINE
    with ops.backend("cpp"):
        _, total = ops.group_norm_act(x, weight, bias, 2, residual=residual)
    total.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * (x + residual).detach())
    assert torch.equal(x.grad, residual.grad)


@needs_cpp
def test_statistics_are_no_way_around_the_formula():
    x = rand(*SHAPE).requires_grad_()
    _, _, mean, rstd = torch.ops.multibeta.group_norm_act_cpp(x, *AFFINE, 2, 1e-6, None, None, "silu")
    assert not mean.requires_grad and not rstd.requires_grad


@needs_cpp
def test_compiled_training_uses_the_backward_operator():
    module, x = GroupNormAct(2, 4), rand(*SHAPE).requires_grad_()
    targets = []

    def record(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.compile(module, fullgraph=True, backend=backend)(x).sum().backward()
    for operator in ("group_norm_act_cpp", "group_norm_act_backward_cpp"):
        assert sum(operator in target for target in targets) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [*modules(), tiny_unet()], ids=lambda module: type(module).__name__)
def test_traced_and_exported_modules_compute_the_same(module):
    module.requires_grad_(False).eval()
    inputs = (rand(2, 3, 8, 8), torch.tensor([3.0, 700.0])) if isinstance(module, UNet) else (rand(*SHAPE),)
    expected = module(*inputs)
    assert torch.equal(torch.jit.trace(module, inputs, check_trace=False)(*inputs), expected)
    for strict in (False, True):
        assert torch.equal(torch.export.export(module, inputs, strict=strict).module()(*inputs), expected)
