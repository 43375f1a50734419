"""The blocks of diffusers, and blocks shaped like latent-diffusion's, compute what they computed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accelerated_models import DTYPES, close, conditional_unet, gradients, needs_packing, outputs, unet
from multibeta import ops
from multibeta.acceleration import accelerate, check, report, restore
from multibeta.acceleration.base import listening


@pytest.mark.parametrize(
    "changes",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "mish"},  # none of ours: normalised by the op, activated by its own
        {"downsample_type": "resnet", "upsample_type": "resnet"},
    ],
    ids=lambda changes: next(iter(changes)),
)
@torch.no_grad()
def test_variants_of_the_block_compute_the_same(changes):
    model = unet(**changes)
    expected = outputs(model)
    close(outputs(accelerate(model)), expected)


@pytest.mark.parametrize(
    "changes", [{"up": True}, {"down": True}, {"up": True, "kernel": "fir"}, {"down": True, "kernel": "sde_vp"}]
)
@torch.no_grad()
def test_blocks_that_resample_compute_the_same(changes):
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(
        in_channels=8, out_channels=12, temb_channels=6, groups=4, output_scale_factor=1.5, **changes
    ).eval()
    x, temb = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    expected = block(x, temb)
    close(accelerate(block)(x, temb), expected)


def test_a_block_without_the_embedding_that_scales_it_says_what_the_original_says():
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, time_embedding_norm="scale_shift")
    with pytest.raises(ValueError, match="should not be None"):
        accelerate(block)(torch.randn(2, 8, 6, 6), None)


@torch.no_grad()
def test_sizes_that_do_not_halve_are_forced():
    model = conditional_unet()
    inputs = {"sample": torch.randn(1, 4, 9, 7), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 12)}
    expected = model(**inputs).sample
    close(accelerate(model)(**inputs).sample, expected)


@torch.no_grad()
def test_masks_and_conditions_take_the_original_attention():
    model = conditional_unet()
    mask = torch.tensor([[1, 1, 0, 0, 1]])
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 12)}
    expected = model(**inputs, encoder_attention_mask=mask).sample
    close(accelerate(model)(**inputs, encoder_attention_mask=mask).sample, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_blocks_have_no_breaks(dtype):
    block = unet().to(dtype).mid_block
    x, temb = torch.randn(2, 32, 4, 4, dtype=dtype), torch.randn(2, 64, dtype=dtype)
    for part, arguments in ((block.resnets[0], (x, temb)), (block.attentions[0], (x,))):
        expected = part(*arguments)
        compiled = torch.compile(accelerate(part), backend="aot_eager", fullgraph=True)
        close(compiled(*arguments), expected)
        with torch.no_grad():
            close(compiled(*arguments), expected)
    torch._dynamo.reset()


# Stand-ins with the structure that the blocks of latent-diffusion document


class SiLU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Upsample(nn.Module):
    def __init__(self, channels, use_conv=True):
        super().__init__()
        self.use_conv, self.dims = use_conv, 2
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        doubled = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(doubled) if self.use_conv else doubled


class ResBlock(nn.Module):
    def __init__(self, channels, out_channels, embedding, scale_shift=False, up=False):
        super().__init__()
        self.updown, self.use_scale_shift_norm = up, scale_shift
        self.in_layers = nn.Sequential(GroupNorm32(4, channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.h_upd, self.x_upd = (Upsample(channels, use_conv=False) if up else nn.Identity() for _ in range(2))
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(embedding, (1 + scale_shift) * out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out_channels), SiLU(), nn.Dropout(0.1), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        return self._forward(x, emb)

    def _forward(self, x, emb):
        h = self.in_layers[2](self.h_upd(self.in_layers[:2](x)))
        shift = self.emb_layers(emb)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self.x_upd(x)) + h


class QKVAttention(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    def parts(self, qkv):
        return (part.unflatten(1, (self.heads, -1)) for part in qkv.chunk(3, dim=1))

    def forward(self, qkv):
        query, key, value = self.parts(qkv)
        scores = torch.einsum("nhct,nhcs->nhts", query, key) / math.sqrt(query.shape[2])
        return torch.einsum("nhts,nhcs->nhct", scores.float().softmax(-1).to(value.dtype), value).flatten(1, 2)


class QKVAttentionLegacy(QKVAttention):
    def parts(self, qkv):
        return qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads, attention):
        super().__init__()
        self.num_heads = heads
        self.norm, self.attention = GroupNorm32(4, channels), attention(heads)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        return self._forward(x)

    def _forward(self, x):
        tokens = x.flatten(2)
        return (tokens + self.proj_out(self.attention(self.qkv(self.norm(tokens))))).reshape(x.shape)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, temb_channels=0):
        super().__init__()
        self.in_channels, self.out_channels, self.use_conv_shortcut = in_channels, out_channels, False
        self.norm1, self.norm2 = nn.GroupNorm(4, in_channels, 1e-6), nn.GroupNorm(4, out_channels, 1e-6)
        self.conv1, self.conv2 = (nn.Conv2d(c, out_channels, 3, padding=1) for c in (in_channels, out_channels))
        self.dropout = nn.Dropout(0.0)
        if temb_channels:
            self.temb_proj = nn.Linear(temb_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.in_channels == self.out_channels else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        query, key, value = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out((value @ weights.transpose(1, 2)).reshape(x.shape))


LDM_BLOCKS = {
    "ResBlock": (lambda: ResBlock(8, 16, 12), True),
    "ResBlock, same width": (lambda: ResBlock(8, 8, 12), True),
    "ResBlock, scale and shift": (lambda: ResBlock(8, 16, 12, scale_shift=True), True),
    "ResBlock, up": (lambda: ResBlock(8, 16, 12, up=True), True),
    "AttentionBlock": (lambda: AttentionBlock(8, 2, QKVAttention), False),
    "AttentionBlock, legacy": (lambda: AttentionBlock(8, 2, QKVAttentionLegacy), False),
    "ResnetBlock": (lambda: ResnetBlock(8, 16, 12), True),
    "AttnBlock": (lambda: AttnBlock(8), False),
    "Upsample": (lambda: Upsample(8), False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LDM_BLOCKS)
def test_blocks_of_latent_diffusion_compute_the_same(name, dtype):
    make, embedded = LDM_BLOCKS[name]
    block = make().eval()
    for part in block.modules():  # GroupNorm32 keeps float32
        if not isinstance(part, GroupNorm32):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    x = torch.randn(2, 8, 6, 5, dtype=dtype)
    arguments = (x, torch.randn(2, 12, dtype=dtype)) if embedded else (x,)
    before = gradients(block, lambda block: block(*arguments))
    with torch.no_grad():
        expected = block(*arguments)
        (row,) = check(block, *arguments, repetitions=1)
        assert row.accelerated and row.type == name.split(",")[0], row.reason
        close(block(*arguments), expected)
    if dtype == torch.float32:
        after = gradients(block, lambda block: block(*arguments))
        assert set(after) == set(before)
        for key, gradient in after.items():
            torch.testing.assert_close(gradient, before[key], rtol=1e-3, atol=1e-4, msg=key)


def test_classes_with_the_name_alone_are_left_alone():
    class ResBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

    block = ResBlock()
    rows = report(accelerate(block))
    assert rows[0].reason == "not the block of latent-diffusion: it has no in_layers"
    assert [row.name for row in rows if row.accelerated] == ["conv"]


@needs_packing
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("folded", [True, False])
@torch.no_grad()
def test_both_forms_of_upsampling_agree(dtype, folded, monkeypatch):
    times = iter([1.0, 2.0] if folded else [2.0, 1.0])
    monkeypatch.setattr(ops, "latency_ms", lambda function, device, repetitions: next(times))
    block, x = Upsample(8).to(dtype), torch.randn(2, 8, 5, 6, dtype=dtype)
    expected = block(x)
    with listening() as notes:
        close(accelerate(block)(x), expected)
    assert notes[0].startswith("upsample: folded" if folded else "upsample: plain")
    block.conv.weight.data.mul_(2)  # followed by the folded weights as well
    block.conv.bias.data.add_(3)
    close(block(x), restore(block)(x))
