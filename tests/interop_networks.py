"""Small networks that the tests of interop share, and how closely they must agree with those of others."""

import torch
from torch import nn

SMALL_UNET = {
    "in_channels": 3,
    "out_channels": 5,
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_groups": 8,
}


UNETS = {
    "attention below": {},
    "attention above, two blocks": {"attention_resolutions": (8,), "num_res_blocks": 2},
    "three levels, one head": {"channel_multipliers": (1, 2, 2), "attention_resolutions": (8, 2), "head_channels": None},
    "one level": {"channel_multipliers": (1,), "attention_resolutions": ()},
    "as many heads everywhere": {"channel_multipliers": (1, 1), "head_channels": None, "num_heads": 4},
}


SMALL = {
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 8,
    "embedding_channels": 12,
}


LDM_SMALL = {**SMALL, "base_channels": 64, "channel_multipliers": (1, 1), "num_groups": 32}  # theirs has 32 groups, always


LDM_UNET = {**SMALL_UNET, "base_channels": 64, "head_channels": 16, "num_groups": 32}


STEPS, BETA = torch.tensor([3.0, 700.0]), torch.tensor([0.2, 0.9])


def random(module):
    """The module with all weights drawn, those that start at zero too."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.eval()


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def autoencoder_kl(diffusers, **changed):
    """A small AutoencoderKL with weights drawn; its latents have 4 channels."""
    shape = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return random(diffusers.AutoencoderKL(**{**shape, **types, **changed}))


def without_bias(conv):
    nn.init.zeros_(conv.bias)
