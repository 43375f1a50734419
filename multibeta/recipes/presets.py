"""The presets: one row each, with what was measured of it; what a recipe changes of the preset of its name."""

from __future__ import annotations

import dataclasses
from typing import Any

from multibeta.adversarial import ADAM_BETAS, AdversarialOptions
from multibeta.diffusion_vae import CapacityObjectiveOptions, ConditionalDiffusionConfig
from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import BLOCKS_32, BlockAutoencoderConfig
from multibeta.networks.autoencoder import TOY
from multibeta.nonlinear_diffusion import DiffusionConfig
from multibeta.recipes.recipe import (
    DataOptions,
    DiffusionObjectiveOptions,
    DiffusionVAERecipe,
    LatentDiffusionRecipe,
    MultiBetaRecipe,
    Recipe,
    RefinerObjectiveOptions,
    VAEObjectiveOptions,
    from_dict,
    located,
)
from multibeta.training import TrainingOptions

PAPER_256: dict[str, Any] = {
    "vae": VAEConfig(resolution=256, base_channels=128, channel_multipliers=(1, 2, 4, 6), embedding_channels=512),
    "diffusion": DiffusionConfig(base_channels=256, channel_multipliers=(1, 3, 5), attention_resolutions=(32, 16, 8)),
}
CELEBA_64: dict[str, Any] = {
    "vae": VAEConfig(
        resolution=64,
        base_channels=32,
        channel_multipliers=(1, 2, 4),
        num_groups=16,  # 32 groups of one channel would normalise the shift by beta away
        embedding_channels=128,
    ),
    "diffusion": DiffusionConfig(
        base_channels=64,
        channel_multipliers=(1, 2, 4, 4),
        attention_resolutions=(16, 8, 4),
        head_channels=None,
        num_heads=8,
    ),
}
# "LPIPS + GAN + KL" of Table 4, as latent-diffusion trains: its discriminator begins at step 50,001
GAN: dict[str, Any] = {"adversarial": AdversarialOptions(start=0.5), "adam_betas": ADAM_BETAS}
TOY_64: dict[str, Any] = {
    "vae": VAEConfig(**vars(TOY), num_steps=500),
    "diffusion": DiffusionConfig(base_channels=256, channel_multipliers=(1,), attention_resolutions=()),
}
SCENES_64: dict[str, Any] = {
    "vae": dataclasses.replace(TOY_64["vae"], activation="silu", num_groups=8),
    "diffusion": dataclasses.replace(TOY_64["diffusion"], base_channels=128, num_groups=8),
    "balance": 2.0,
    "source": "built-in scenes, after C.1.2",
}
SCENES_32: dict[str, Any] = {
    "vae": VAEConfig(
        resolution=32,
        base_channels=32,
        channel_multipliers=(1, 2, 2),
        num_res_blocks=1,
        mid_attention=False,
        num_groups=8,
        embedding_channels=128,
    ),
    "diffusion": DiffusionConfig(
        base_channels=60,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8, 4),
        head_channels=20,
        num_groups=12,
    ),
    "balance": 1.0,
}
PHOTOS_64: dict[str, Any] = {  # 64 x 64 pixels to 8 x 8 x 8
    "vae": dataclasses.replace(SCENES_32["vae"], resolution=64, channel_multipliers=(1, 2, 2, 2), latent_channels=8),
    "diffusion": dataclasses.replace(SCENES_32["diffusion"], base_channels=96, head_channels=32, num_groups=16),
}
PHOTOS_128: dict[str, Any] = {  # 128 x 128 pixels to 16 x 16 x 8
    "vae": dataclasses.replace(PHOTOS_64["vae"], resolution=128),
    "diffusion": dataclasses.replace(PHOTOS_64["diffusion"], channel_multipliers=(1, 2, 2)),
}
REFINER_32 = ConditionalDiffusionConfig(
    resolution=32,
    base_channels=32,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    num_heads=4,
    dropout=0.0,
    num_groups=8,
    form="eq7",
)
SMALL: dict[str, Any] = {"source": "built-in scenes, small budget", "validate_every": 200}

# fmt: off
_PAPER: dict[str, dict[str, Any]] = {  # architecture and budget as published; none was trained here
    "celebahq256": dict(PAPER_256, source="MultiBeta Table 6, C.1.3", steps=120_000, batch_size=98,  learning_rate=5.6e-5),
    "ffhq256":     dict(PAPER_256, source="MultiBeta Table 6, C.1.3", steps=180_000, batch_size=98,  learning_rate=4.4e-5),
    "bedrooms256": dict(PAPER_256, source="MultiBeta Table 6, C.1.3", steps=300_000, batch_size=98,  learning_rate=4.4e-5),
    "celeba64":    dict(CELEBA_64, source="MultiBeta Tables 4 and 5", steps=100_000, batch_size=128, learning_rate=1e-4, **GAN),
    "toy64":       dict(TOY_64,    source="MultiBeta C.1.2",          steps=100_000, batch_size=150, learning_rate=5e-4),
}
_SCENES: dict[str, dict[str, Any]] = {  # after a row, of bench/results: Frechet distance of new images, that of its floor
    "scenes32":           dict(SCENES_32, steps=(4000, 3000), batch_size=64, num_train=32_000),  # 1.41, floor 1.23: scenes32.json
    "scenes32-small":     dict(SCENES_32, steps=(700, 600),   batch_size=32, num_train=8_000, statistics_images=250, **SMALL),
    "scenes64-isotropic": dict(SCENES_64, steps=(3000, 3000), batch_size=64, num_train=20_000),
}
_PHOTOS: dict[str, dict[str, Any]] = {  # the steps are those of a recipe that is run as it is: `MINUTES` plans them
    "photos32":  dict(SCENES_32,  steps=(3500, 3500), batch_size=64, learning_rate=2e-3),
    "photos64":  dict(PHOTOS_64,  steps=(6000, 6000), batch_size=32, learning_rate=1.4e-3, balance=1.0),
    "photos128": dict(PHOTOS_128, steps=(9000, 9000), batch_size=16, learning_rate=1e-3, balance=1.0),
}
PHOTOS = tuple(_PHOTOS)
MINUTES = {"photos32": 40.0, "photos64": 120.0, "photos128": 360.0}  # on two CPU cores, where neither time nor steps are said
_SKETCHES: dict[str, dict[str, Any]] = {  # 1.92, floor (refined) 1.97, with (3000, 4000) steps of 32 images: dv_table1.json
    "diffusion-vae-scenes32":       dict(steps=(4000, 4000), batch_size=64, num_train=32_000),
    "diffusion-vae-scenes32-small": dict(steps=(600, 600),   batch_size=32, num_train=8_000, **SMALL),
}
# fmt: on


def _paper(
    name: str,
    source: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    adam_betas: tuple[float, float] = TrainingOptions.adam_betas,
    **parts: Any,
) -> MultiBetaRecipe:
    """A preset of the first paper: its architecture and budget; the balance and the parameterisation are the mended ones."""
    training = TrainingOptions(steps=steps, batch_size=batch_size, learning_rate=learning_rate, final_learning_rate=1.0)
    return MultiBetaRecipe(
        name=name,
        source=source,
        data=DataOptions(source="images"),
        vae_objective=VAEObjectiveOptions(),
        vae_training=dataclasses.replace(training, adam_betas=adam_betas),
        diffusion_objective=DiffusionObjectiveOptions(),
        diffusion_training=dataclasses.replace(training, ema_decay=0.9999),
        **parts,
    )


def _scenes(
    name: str,
    source: str = "built-in scenes",
    *,
    balance: float,
    steps: tuple[int, int],
    batch_size: int,
    num_train: int,
    statistics_images: int = 1000,
    validate_every: int = 1000,
    **networks: Any,
) -> MultiBetaRecipe:
    """A preset on the built-in scenes, sized for two CPU cores; each batch of encodings makes a batch of 128 for the U-Net."""
    common = {"batch_size": batch_size, "ema_decay": 0.998, "validate_every": validate_every, "checkpoint_every": 500}
    return MultiBetaRecipe(
        name=name,
        source=source,
        data=DataOptions(source="scenes", num_train=num_train, num_test=4000),
        vae_objective=VAEObjectiveOptions(balance=balance),
        vae_training=TrainingOptions(steps=steps[0], learning_rate=2e-3, **common),
        diffusion_objective=DiffusionObjectiveOptions(noise_draws=128 // batch_size, statistics_images=statistics_images),
        diffusion_training=TrainingOptions(steps=steps[1], learning_rate=1e-3, **common),
        **networks,
    )


def _photos(
    name: str, *, balance: float, steps: tuple[int, int], batch_size: int, learning_rate: float, **networks: Any
) -> MultiBetaRecipe:
    """A preset for a folder of images: all but a tenth, and their mirror images.

    Stage 2 learns a process that is linear between 9 nodes, as residuals of cosine coefficients, most where signal turns into
    noise: `bench/stage_two.py` trains it with and without each of these.
    """
    common = {"batch_size": batch_size, "ema_decay": 0.998}
    diffusion = dataclasses.replace(networks.pop("diffusion"), parameterization="residual", basis="cosine", spacing="turn")
    return MultiBetaRecipe(
        name=name,
        source="your own images",
        data=DataOptions(source="images", num_test=None, mirror=True),
        vae_objective=VAEObjectiveOptions(balance=balance),
        vae_training=TrainingOptions(steps=steps[0], learning_rate=learning_rate, **common),
        diffusion=diffusion,
        diffusion_objective=DiffusionObjectiveOptions(nodes=8, uniform_share=0.2, move_share=0.8),
        diffusion_training=TrainingOptions(steps=steps[1], learning_rate=1e-3, **common),
        **networks,
    )


def _sketches(
    name: str,
    source: str = "built-in scenes",
    *,
    steps: tuple[int, int],
    batch_size: int,
    num_train: int,
    validate_every: int = 1000,
) -> DiffusionVAERecipe:
    """The second system on the built-in scenes, sized for two CPU cores.

    gamma = 6.25 is the published 100 at a sixteenth of the pixels. Without a capacity a linear VAE would keep 5.5 nats of these
    images at that price, so the capacity of 25 binds.
    """
    common = {"batch_size": batch_size, "learning_rate": 1e-3, "ema_decay": 0.998, "validate_every": validate_every}
    return DiffusionVAERecipe(
        name=name,
        source=source,
        data=DataOptions(source="scenes", num_train=num_train, num_test=4000),
        vae=BLOCKS_32,
        vae_objective=CapacityObjectiveOptions(gamma=6.25),
        vae_training=TrainingOptions(steps=steps[0], **common),
        diffusion=REFINER_32,
        diffusion_objective=RefinerObjectiveOptions(mixture_components=10),
        diffusion_training=TrainingOptions(steps=steps[1], **common),
    )


def _second_paper(name: str) -> DiffusionVAERecipe:
    """The preset of the second paper.

    Paper note: 117,000 steps are the 500 epochs of Table 2; stage 2 is given in days, its steps are the 1000 epochs of the
    published script. The published scripts flip each image with probability 1/2.
    """
    training = TrainingOptions(
        steps=117_000,
        batch_size=128,
        learning_rate=1e-4,
        warmup_steps=0,
        final_learning_rate=1.0,
        adam_betas=(0.9, 0.999),
        ema_decay=0.0,
    )
    second = {"steps": 468_000, "batch_size": 64, "learning_rate": 2e-5, "warmup_steps": 5000, "ema_decay": 0.9999}
    return DiffusionVAERecipe(
        name=name,
        source="DiffusionVAE Tables 2 and 3",
        data=DataOptions(source="images", mirror=True),
        vae=BlockAutoencoderConfig(),
        vae_objective=CapacityObjectiveOptions(),
        vae_training=training,
        diffusion=ConditionalDiffusionConfig(),
        diffusion_objective=RefinerObjectiveOptions(),
        diffusion_training=dataclasses.replace(training, **second),
    )


def untied(recipe: MultiBetaRecipe, name: str) -> MultiBetaRecipe:
    """The recipe with one curve sigma_j(beta) per latent channel, which part after a quarter of the steps."""
    shared = recipe.vae_training.steps // 4
    return dataclasses.replace(
        recipe,
        name=name,
        vae_objective=dataclasses.replace(
            recipe.vae_objective, anneal=1.0, fold=True, untie_steps=recipe.vae_training.steps - shared
        ),
        vae_training=dataclasses.replace(recipe.vae_training, steps=shared),
    )


def literal(recipe: MultiBetaRecipe) -> MultiBetaRecipe:
    """The recipe as the paper prints it: the sums of Eq. 4, the heads of Eq. 19, no folded rotation."""
    return dataclasses.replace(
        recipe,
        name=f"{recipe.name}-literal",
        source=f"{recipe.source}; Eq. 4 and Eq. 19 as printed",
        vae=dataclasses.replace(recipe.vae, collapse_exponent=None),
        vae_objective=dataclasses.replace(recipe.vae_objective, balance=None, anneal=0.0, decoder_weight=0.0, fold=False),
        diffusion=dataclasses.replace(recipe.diffusion, parameterization="literal"),
    )


_FIRST_PAPER: dict[str, MultiBetaRecipe] = {
    **{name: _paper(name, **row) for name, row in _PAPER.items()},
    **{name: _scenes(name, **row) for name, row in _SCENES.items()},
    **{name: _photos(name, **row) for name, row in _PHOTOS.items()},
}
RECIPES: dict[str, Recipe] = {
    **_FIRST_PAPER,
    "latent-diffusion-32": LatentDiffusionRecipe.beside(_FIRST_PAPER["scenes32"], "latent-diffusion-32"),
    "diffusion-vae-celebahq128": _second_paper("diffusion-vae-celebahq128"),
    **{name: _sketches(name, **row) for name, row in _SKETCHES.items()},
    "scenes64": untied(_FIRST_PAPER["scenes64-isotropic"], "scenes64"),  # 4.2, floor 3.8, in the budget above: scenes64.json
    "scenes32-small-literal": literal(_FIRST_PAPER["scenes32-small"]),  # 18.75, not 2.03, in 2000 steps a stage
}


def find(name: str) -> Recipe:
    """The preset of that name; `ValueError` lists those that exist."""
    if name not in RECIPES:
        raise ValueError(f"no recipe called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def changes(recipe: Recipe) -> dict[str, tuple[Any, Any]] | None:
    """What a recipe changes of the preset of its name, field to (preset's, its own); None where there is no such preset.

    What follows from the VAE counts with the VAE.
    """
    preset = RECIPES.get(recipe.name)
    if preset is None or type(preset) is not type(recipe):
        return None
    fitted = dataclasses.replace(preset, vae=recipe.vae, vae_objective=recipe.vae_objective)
    changed: dict[str, tuple[Any, Any]] = {} if recipe.warm_start is None else {"warm_start": (None, recipe.warm_start)}
    for part in (field.name for field in dataclasses.fields(recipe) if field.name not in ("name", "source", "warm_start")):
        before = dataclasses.asdict(getattr(fitted if part == "diffusion" else located(preset), part))
        for name, value in dataclasses.asdict(getattr(located(recipe), part)).items():
            implied = name == "num_train" and value is None and "data.source" in changed  # other images, of which all are taken
            if value != before[name] and not implied:
                changed[f"{part}.{name}"] = (before[name], value)
    return changed


def recorded_changes(info: dict[str, Any]) -> dict[str, tuple[Any, Any]] | None:
    """`changes` of the recipe that a model records in its `info`, also one that was saved before they were recorded there."""
    if "changes" in info:
        return info["changes"]
    try:
        return changes(from_dict(info["recipe"]))
    except (KeyError, TypeError, ValueError, AttributeError):  # no recipe, or not a whole one
        return None
