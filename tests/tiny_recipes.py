"""A recipe of each system that trains in seconds."""

import dataclasses

from multibeta.networks import BlockAutoencoderConfig
from multibeta.recipes import RECIPES, LatentDiffusionRecipe

TRAINING = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "validate_every": 3, "checkpoint_every": 2}


def tiny():
    """Three steps of each stage on a few 16x16 scenes."""
    base = RECIPES["scenes32-small"]
    return dataclasses.replace(
        base,
        name="tiny",
        data=dataclasses.replace(base.data, num_train=16, num_test=8),
        vae=dataclasses.replace(
            base.vae,
            resolution=16,
            base_channels=8,
            channel_multipliers=(1, 2),
            num_groups=4,
            embedding_channels=16,
            num_steps=50,
        ),
        vae_training=dataclasses.replace(base.vae_training, **TRAINING),
        diffusion=dataclasses.replace(
            base.diffusion, base_channels=8, channel_multipliers=(1,), attention_resolutions=(), head_channels=8, num_groups=4
        ),
        diffusion_training=dataclasses.replace(base.diffusion_training, **TRAINING),
    )


def tiny_latent_diffusion():
    """Plain latent diffusion on the VAE of `tiny`."""
    recipe = LatentDiffusionRecipe.beside(tiny(), "tiny")
    return dataclasses.replace(recipe, diffusion=dataclasses.replace(recipe.diffusion, num_steps=50))


def tiny_diffusion_vae(**objective):
    """The same of the second system."""
    base = RECIPES["diffusion-vae-scenes32-small"]
    blocks = {"encoder_blocks": "16d2,16t8,8d8,8t1,1x1", "decoder_blocks": "1u8,1t8,8u2,8t16,16x1", "channels": "16:8,8:8,1:6"}
    unet = {"base_channels": 8, "channel_multipliers": (1, 2), "num_steps": 20, "num_heads": 2}
    return dataclasses.replace(
        base,
        name="tiny",
        data=dataclasses.replace(base.data, num_train=16, num_test=8, mirror=True),
        vae=BlockAutoencoderConfig(resolution=16, **blocks),
        vae_training=dataclasses.replace(base.vae_training, **TRAINING),
        diffusion=dataclasses.replace(base.diffusion, **unet),
        diffusion_objective=dataclasses.replace(base.diffusion_objective, **objective),
        diffusion_training=dataclasses.replace(base.diffusion_training, **TRAINING),
    )
