"""Small shapes of the networks, and what their tests share."""

import torch

SMALL = {
    "resolution": 16,
    "base_channels": 8,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "mid_attention": False,
    "num_groups": 4,
    "embedding_channels": 16,
}
SMALL_TOY = {"resolution": 16, "channels": (8, 16), "latent_channels": 6, "num_groups": 4, "embedding_channels": 16}
SMALL_UNET = {
    "resolution": 8,
    "base_channels": 16,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 8,
    "num_groups": 4,
}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def count(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
