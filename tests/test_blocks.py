import math

import pytest
import torch
import torch.nn.functional as F

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
    GroupNormAct(2, 4, 1e-5, "sigmoid")(rand(1, 4, 2, 2), rand(1, 4))
    (args, kwargs), *rest = calls
    assert args[2:] == (2, 1e-5) and kwargs["activation"] == "sigmoid" and not rest


@pytest.mark.parametrize("heads", [{"head_channels": 32}, {"num_heads": 3}])
def test_heads_must_divide_the_channels(heads):
    with pytest.raises(ValueError, match="channels must divide into heads, got 16 channels"):
        AttentionBlock(16, **heads)
