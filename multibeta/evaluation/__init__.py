"""How good is a model? What it does, in numbers: its codes, the images it makes of others and new ones, and what it records."""

from multibeta.evaluation.averages import compare_averages
from multibeta.evaluation.codes import ROTATIONS, disentanglement, encodings
from multibeta.evaluation.editing import EDITED_BETAS, compare_editing
from multibeta.evaluation.features import Features, batched, classifier_features, pixel_features, usual_features
from multibeta.evaluation.images import (
    COMPARED_BETAS,
    COMPARED_SAMPLINGS,
    ImageComparison,
    checked_samplings,
    compare_denoising,
    decoded_and_denoised,
    equally_many,
    evaluate_images,
    generation,
    latent_sources,
    similarity,
)
from multibeta.evaluation.likelihood import LIKELIHOOD_IMAGES, likelihood_measure, pixel_gaussian_bits
from multibeta.evaluation.multi_beta import evaluate_multi_beta, facts, head_fit
from multibeta.evaluation.paths import CHOICE_IMAGES, LEAST_IMAGES, choose_paths, choose_recorded_paths
from multibeta.evaluation.probe import ClassProbe, class_probe
from multibeta.evaluation.records import (
    described_training,
    json_ready,
    of_recorded_data,
    recorded_recipe,
    recorded_split,
    recorded_training,
    source_of,
)
from multibeta.evaluation.summary import evaluate, results_table
from multibeta.metrics.fidelity import mean_energy, sharpness
from multibeta.pipelines.spectrum import SPECTRUM_BETAS, add_noise, spectrum

__all__ = [
    "evaluate",
    "CHOICE_IMAGES",
    "LEAST_IMAGES",
    "choose_paths",
    "choose_recorded_paths",
    "compare_averages",
    "results_table",
    "Features",
    "classifier_features",
    "pixel_features",
    "usual_features",
    "batched",
    "EDITED_BETAS",
    "compare_editing",
    "ROTATIONS",
    "disentanglement",
    "encodings",
    "COMPARED_BETAS",
    "COMPARED_SAMPLINGS",
    "ImageComparison",
    "checked_samplings",
    "compare_denoising",
    "decoded_and_denoised",
    "equally_many",
    "evaluate_images",
    "generation",
    "latent_sources",
    "mean_energy",
    "sharpness",
    "similarity",
    "SPECTRUM_BETAS",
    "add_noise",
    "LIKELIHOOD_IMAGES",
    "likelihood_measure",
    "pixel_gaussian_bits",
    "evaluate_multi_beta",
    "facts",
    "head_fit",
    "spectrum",
    "ClassProbe",
    "class_probe",
    "described_training",
    "json_ready",
    "of_recorded_data",
    "recorded_recipe",
    "recorded_split",
    "recorded_training",
    "source_of",
]
