"""What to train and how: recipes, one preset per table of the papers, and their training in two stages.

`find` a preset or build a recipe from its parts (`recipe.py`), `run` it (`stages.py`); what can be known before is checked first
(`preflight.py`).
"""

from multibeta.diffusion_vae import CapacityObjectiveOptions, ConditionalDiffusionConfig
from multibeta.gaussian_diffusion import GaussianDiffusionConfig
from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig
from multibeta.recipes import preflight
from multibeta.recipes.fitting import resolve
from multibeta.recipes.preflight import check, check_place, prepare
from multibeta.recipes.presets import RECIPES, changes, find, literal, recorded_changes, untied
from multibeta.recipes.recipe import (
    DataOptions,
    DiffusionObjectiveOptions,
    DiffusionVAERecipe,
    LatentDiffusionObjectiveOptions,
    LatentDiffusionRecipe,
    MultiBetaRecipe,
    Recipe,
    RefinerObjectiveOptions,
    VAEObjectiveOptions,
    build,
    from_dict,
    located,
    open_data,
    open_images,
    to_dict,
)
from multibeta.recipes.stages import run, train_diffusion, train_vae
from multibeta.training import TrainingOptions

__all__ = [
    "RECIPES",
    "find",
    "literal",
    "untied",
    "Recipe",
    "MultiBetaRecipe",
    "LatentDiffusionRecipe",
    "DiffusionVAERecipe",
    "DataOptions",
    "AutoencoderConfig",
    "VAEConfig",
    "VAEObjectiveOptions",
    "DiffusionConfig",
    "DiffusionObjectiveOptions",
    "GaussianDiffusionConfig",
    "LatentDiffusionObjectiveOptions",
    "BlockAutoencoderConfig",
    "CapacityObjectiveOptions",
    "ConditionalDiffusionConfig",
    "RefinerObjectiveOptions",
    "TrainingOptions",
    "to_dict",
    "from_dict",
    "changes",
    "recorded_changes",
    "located",
    "build",
    "open_images",
    "open_data",
    "resolve",
    "preflight",
    "check",
    "check_place",
    "prepare",
    "run",
    "train_vae",
    "train_diffusion",
]
