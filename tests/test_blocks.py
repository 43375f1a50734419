import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multibeta import ops
from multibeta.blocks import (
    BETA_FREQUENCY_MAX,
    AttentionBlock,
    Downsample,
    GroupNormAct,
    ResBlock,
    Upsample,
    beta_embedding,
    divisible_groups,
    timestep_embedding,
)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestResBlock:
    @pytest.mark.parametrize("activation", ["sigmoid", "silu"])
    @pytest.mark.parametrize("out_channels", [8, 12])  # identity skip; 1x1 skip
    def test_is_algorithm_3(self, activation, out_channels):
        block = ResBlock(8, out_channels, 6, activation=activation, num_groups=4)
        x, temb = rand(2, 8, 5, 5), rand(2, 6, seed=1)
        nonlinearity = {"sigmoid": torch.sigmoid, "silu": lambda v: v * torch.sigmoid(v)}[activation]

        h = F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)
        h = nonlinearity(h)
        h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
        h = h + F.linear(nonlinearity(temb), block.embedding_projection.weight, block.embedding_projection.bias)[:, :, None, None]
        h = F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-6)
        h = nonlinearity(h)
        h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
        skip = x if out_channels == 8 else torch.einsum("oi,nihw->nohw", block.skip.weight[:, :, 0, 0], x)
        skip = skip if out_channels == 8 else skip + block.skip.bias[:, None, None]
        torch.testing.assert_close(block(x, temb), skip + h, rtol=1e-5, atol=1e-5)

    def test_zero_init_starts_as_its_skip_path(self):
        block, x = ResBlock(8, 8, 6, num_groups=4, zero_init=True), rand(1, 8, 4, 4)
        assert torch.equal(block(x, rand(1, 6)), x)

    def test_dropout_acts_in_training_only(self):
        block, x = ResBlock(8, 8, dropout=0.5, num_groups=4), rand(1, 8, 4, 4)
        assert not torch.equal(block(x), block(x))
        block.eval()
        assert torch.equal(block(x), block(x))

    def test_without_an_embedding_it_has_no_projection(self):
        block = ResBlock(8, 8, num_groups=4)
        assert block.embedding_projection is None
        assert block(rand(1, 8, 4, 4)).shape == (1, 8, 4, 4)


class TestEmbeddings:
    def slope_ratio(self, max_frequency):
        """Rms slope over 0.001 relative to rms slope over 0.02, as `slope_ratio` of an encoder."""
        beta = torch.linspace(0.1, 0.9, 81)
        here, near, far = (beta_embedding(beta - width, 128, max_frequency) for width in (0, 0.001, 0.02))
        return float((near - here).square().mean().sqrt() / 0.001 / ((far - here).square().mean().sqrt() / 0.02))

    def test_beta_embedding_is_smooth_where_a_time_step_embedding_is_not(self):
        assert self.slope_ratio(BETA_FREQUENCY_MAX) < 1.3
        assert self.slope_ratio(200 * math.pi) > 2

    def test_beta_embedding_tells_all_grid_points_apart(self):
        embedding = beta_embedding(torch.linspace(0, 1, 1001), 16)
        distance = torch.cdist(embedding, embedding) + 10 * torch.eye(1001)
        assert distance.min() > 1e-3

    def test_timestep_embedding_is_the_transformer_one(self):
        embedding = timestep_embedding(torch.tensor([250.0]), 4)
        expected = [math.sin(250), math.sin(250 / 100), math.cos(250), math.cos(250 / 100)]
        torch.testing.assert_close(embedding, torch.tensor([expected]), rtol=1e-5, atol=1e-5)


class TestAttentionBlock:
    @pytest.mark.parametrize("heads", [{}, {"head_channels": 4}, {"num_heads": 4}])
    def test_equals_multi_head_attention_of_torch(self, heads):
        block = AttentionBlock(8, num_groups=4, **heads)
        x = rand(2, 8, 3, 2)
        tokens = F.group_norm(x, 4, eps=1e-6).flatten(2).transpose(1, 2)
        num_heads = {(): 1, ("head_channels",): 2, ("num_heads",): 4}[tuple(heads)]
        attended, _ = F.multi_head_attention_forward(
            *[tokens.transpose(0, 1)] * 3, 8, num_heads, block.qkv.weight, block.qkv.bias, None, None, False, 0.0,
            block.projection.weight, block.projection.bias, need_weights=False,
        )  # fmt: skip
        expected = x + attended.permute(1, 2, 0).reshape(x.shape)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)

    def test_commutes_with_permutations_of_the_positions(self):
        block, x = AttentionBlock(8, num_groups=4), rand(1, 8, 3, 3)
        torch.testing.assert_close(block(x.flip(2, 3)), block(x).flip(2, 3), rtol=1e-5, atol=1e-5)

    def test_impossible_heads(self):
        with pytest.raises(ValueError, match="8 channels and 3 heads"):
            AttentionBlock(8, num_heads=3)


class TestResampling:
    def test_asymmetric_downsampling_pads_right_and_bottom_only(self):
        layer, x = Downsample(1, asymmetric=True), torch.zeros(1, 1, 4, 4)
        torch.nn.init.ones_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
        x[..., 0, 0] = 1
        assert layer(x).flatten().tolist() == [1, 0, 0, 0]
        x = x.flip(2, 3)  # the bottom right corner
        assert layer(x).flatten().tolist() == [0, 0, 0, 1]
        x = torch.zeros(1, 1, 4, 4)
        x[..., 2, 2] = 1  # seen by every window
        assert layer(x).flatten().tolist() == [1, 1, 1, 1]

    def test_sizes_halve_and_double(self):
        x = rand(2, 4, 6, 8)
        assert Downsample(4)(x).shape == Downsample(4, asymmetric=True)(x).shape == (2, 4, 3, 4)
        assert Upsample(4)(x).shape == (2, 4, 12, 16)


def test_divisible_groups_is_the_largest_divisor():
    assert [divisible_groups(*pair) for pair in ((64, 32), (48, 32), (7, 4), (30, 8))] == [32, 24, 1, 6]


def test_group_norm_act_is_served_by_the_op(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "group_norm_act", lambda x, *args, **kwargs: calls.append((args, kwargs)) or x)
    GroupNormAct(2, 4, activation="sigmoid")(rand(1, 4, 2, 2), rand(1, 4))
    (args, kwargs), *rest = calls
    assert args[2:] == (2, 1e-5) and kwargs["activation"] == "sigmoid" and not rest


@pytest.mark.parametrize("heads", [{"head_channels": 32}, {"num_heads": 3}])
def test_heads_must_divide_the_channels(heads):
    with pytest.raises(ValueError, match="channels must divide into heads, got 16 channels"):
        AttentionBlock(16, **heads)


class PlainAttention(nn.Module):
    """`AttentionBlock(12, num_heads=3, num_groups=4)` of torch's own modules."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(4, 12, 1e-6)
        self.qkv, self.projection = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        query, key, value = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.projection(attended).transpose(1, 2).reshape(x.shape)


class PlainResBlock(nn.Module):
    """`ResBlock(12, 8, 5, num_groups=4)` of torch's own modules."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, 12, 1e-6), nn.Conv2d(12, 8, 3, padding=1)
        self.embedding_projection = nn.Linear(5, 8)
        self.norm2, self.conv2 = nn.GroupNorm(4, 8, 1e-6), nn.Conv2d(8, 8, 3, padding=1)
        self.skip = nn.Conv2d(12, 8, 1)

    def forward(self, x, embedding):
        h = self.conv1(F.silu(self.norm1(x))) + self.embedding_projection(F.silu(embedding))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class PlainUpsample(nn.Module):
    """`Upsample(12)` of torch's own modules."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0))


def normed(num_channels, **options):
    """`GroupNormAct` of torch's own modules, under its own names of parameters."""

    class PlainNorm(nn.GroupNorm):
        def forward(self, x):
            return F.silu(super().forward(x))

    return PlainNorm(4, num_channels, **options)


DROP_INS = {
    "GroupNormAct": (lambda **given: GroupNormAct(4, 12, **given), lambda: normed(12)),
    "GroupNormAct without affine": (
        lambda **given: GroupNormAct(4, 12, affine=False, **given),
        lambda: normed(12, affine=False),
    ),
    "ResBlock": (lambda **given: ResBlock(12, 8, 5, num_groups=4, **given), PlainResBlock),
    "AttentionBlock": (lambda **given: AttentionBlock(12, num_heads=3, num_groups=4, **given), PlainAttention),
    "Upsample": (lambda **given: Upsample(12, **given), PlainUpsample),
}
# of values around one
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


@pytest.fixture(params=DROP_INS)
def pair(request):
    """One of our modules and the same of torch's own modules, with one set of weights, and what they take."""
    make, make_plain = DROP_INS[request.param]
    ours, plain = make(), make_plain()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(plain.state_dict())
    return ours, plain, (rand(2, 12, 6, 5), rand(2, 5, seed=1))[: 1 + (request.param == "ResBlock")]


def run(module, arguments):
    """The result, and the gradients of its weighted sum for every parameter and argument."""
    arguments = [argument.detach().requires_grad_() for argument in arguments]
    result = module(*arguments)
    weights = rand(*result.shape, seed=2).to(result.dtype)
    return result, torch.autograd.grad((result * weights).sum(), [*arguments, *module.parameters()])


class TestDropIns:
    """The blocks in other people's models: what torch's own modules do, they do."""

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_equal_torchs_modules_in_every_dtype_and_layout(self, pair, dtype, layout):
        ours, plain, arguments = pair
        expected, expected_gradients = run(plain.double(), [argument.to(dtype).double() for argument in arguments])
        given = [arguments[0].to(dtype).to(memory_format=layout), *(argument.to(dtype) for argument in arguments[1:])]
        result, gradients = run(ours.to(dtype), given)
        assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            bound = 4 * tolerance * max(float(wanted.abs().max()), 1)  # weights are rounded to `dtype` as well
            torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=bound)
        with torch.no_grad():
            assert ours(*given).is_contiguous(memory_format=layout)

    def test_compile_as_one_graph(self, pair):
        ours, _, arguments = pair
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for found, expected in zip(run(compiled, arguments), run(ours, arguments), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), ours(*arguments), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_export_for_any_batch(self, pair, backend):
        ours, _, arguments = pair
        shapes = tuple({0: torch.export.Dim("batch", min=1, max=64)} for _ in arguments)
        with ops.backend(backend), torch.no_grad():
            program = torch.export.export(ours, arguments, dynamic_shapes=shapes)
        larger = tuple(torch.cat([argument, argument.flip(0), argument]) for argument in arguments)
        torch.testing.assert_close(program.module()(*larger), ours(*larger), rtol=1e-5, atol=1e-5)
        if backend == "reference":  # a program for machines without multibeta
            assert not any("multibeta" in str(node.target) for node in program.graph.nodes)

    def test_export_after_attention_was_measured(self, monkeypatch):
        monkeypatch.setattr(ops.find("attention"), "pins", {})
        block, x = AttentionBlock(12, num_heads=3, num_groups=4), rand(2, 12, 6, 5)
        with torch.no_grad():
            with ops.measuring():
                block(x)
            assert ops.find("attention").pins
            for strict in (False, True):
                shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
                program = torch.export.export(block, (x,), dynamic_shapes=shapes, strict=strict)
                assert program.module()(x.repeat(3, 1, 1, 1)).shape == (6, 12, 6, 5)

    def test_copies_and_pickles(self, pair):
        ours, _, arguments = pair
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(twin(*arguments), ours(*arguments)) and repr(twin) == repr(ours)

    @pytest.mark.parametrize("name", DROP_INS)
    def test_are_made_where_and_as_torch_users_say(self, name):
        make, _ = DROP_INS[name]
        made = make(device="meta", dtype=torch.bfloat16)
        assert all((p.device.type, p.dtype) == ("meta", torch.bfloat16) for p in made.parameters())
        with torch.device("meta"):
            assert all(p.is_meta for p in make().parameters())

    def test_the_arguments_of_group_norm_are_torchs(self):
        ours, theirs = (inspect.signature(kind).parameters for kind in (GroupNormAct, nn.GroupNorm))
        positional = [(name, p.default) for name, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
        assert [(name, ours[name].default) for name in list(ours)[:6]] == positional
        norm, plain = GroupNormAct(3, 6, activation="none"), nn.GroupNorm(3, 6)
        assert (norm.eps, norm.affine) == (plain.eps, plain.affine) and norm.state_dict().keys() == plain.state_dict().keys()
        assert repr(norm) == repr(plain).replace("GroupNorm", "GroupNormAct").replace(")", ", activation='none')")

    def test_errors_say_what_is_possible(self):
        with pytest.raises(ValueError, match="sigmoid, silu, none, got 'relu'"):
            GroupNormAct(3, 6, activation="relu")
        with pytest.raises(ValueError, match=r"num_channels .* must be divisible by num_groups"):
            GroupNormAct(4, 6)


def test_a_block_with_a_projection_says_that_it_takes_an_embedding():
    with pytest.raises(TypeError, match=r"embedding must be \(N, 8\), got None"):
        ResBlock(32, 32, 8)(torch.zeros(1, 32, 4, 4))
