"""What to train and how: recipes, one preset per table of the papers, and their training in two stages.

`train` on a folder of images in one call (`own_images.py`), in the minutes that are given (`planning.py`); or `find` a preset, or
build a recipe from its parts (`recipe.py`), and `run` it (`stages.py`). What can be known before is checked first
(`preflight.py`).
"""

from multibeta.adversarial import AdversarialOptions
from multibeta.diffusion_vae import CapacityObjectiveOptions, ConditionalDiffusionConfig
from multibeta.gaussian_diffusion import GaussianDiffusionConfig
from multibeta.multibeta_vae import VAEConfig
from multibeta.networks import AutoencoderConfig, BlockAutoencoderConfig
from multibeta.nonlinear_diffusion import DiffusionConfig
from multibeta.recipes import preflight
from multibeta.recipes.averaging import average, check_averages
from multibeta.recipes.decoder_tuning import DECODER, DecoderTuningOptions, tune_decoder
from multibeta.recipes.distillation import FLOW_MAP, DistillationOptions, distill
from multibeta.recipes.fitting import flags_of, keep_factors, lacks_images, resolve
from multibeta.recipes.own_images import choose, train
from multibeta.recipes.planning import fit_to_time, plan_time
from multibeta.recipes.preflight import check, check_place, prepare
from multibeta.recipes.presets import MINUTES, PHOTOS, RECIPES, changes, find, literal, recorded_changes, untied
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
    recorded_recipe,
    to_dict,
)
from multibeta.recipes.stages import run, train_diffusion, train_vae
from multibeta.training import TrainingOptions

__all__ = [
    "RECIPES",
    "PHOTOS",
    "MINUTES",
    "choose",
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
    "AdversarialOptions",
    "DistillationOptions",
    "DecoderTuningOptions",
    "to_dict",
    "from_dict",
    "changes",
    "recorded_changes",
    "recorded_recipe",
    "located",
    "build",
    "open_images",
    "open_data",
    "flags_of",
    "keep_factors",
    "lacks_images",
    "resolve",
    "plan_time",
    "fit_to_time",
    "preflight",
    "check",
    "check_place",
    "prepare",
    "run",
    "average",
    "check_averages",
    "distill",
    "FLOW_MAP",
    "tune_decoder",
    "DECODER",
    "train",
    "train_vae",
    "train_diffusion",
]
