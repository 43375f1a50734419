"""The section of two models: the same held-out images through both, or the new images of both."""

from __future__ import annotations

from html import escape

import torch
from torch import Tensor

from multibeta import data, evaluation, recipes
from multibeta.evaluation import decoded_and_denoised
from multibeta.evaluation.images import new_images
from multibeta.pipelines import Pipeline
from multibeta.report.facts import is_own, model_facts, system_of
from multibeta.report.page import figure, number, pictures, section, table
from multibeta.report.sections import measured_in, similarity_table

CAPTIONS = {
    "beside": """The first held-out images, not chosen, through two models. Each decodes a sample of their latent at once, and
        denoises: a multi-β VAE the latent, from β = {beta:g}, a DiffusionVAE the decoded image x̂.{seen}""",
    "seen": " The other model was not trained with this split: some of these images may not be new to it.",
    "samples": """New images of two models, seed 0, not chosen.""",
    "distances": """New images against held-out images, {measured}, and sharpness relative to these.""",
    "similarity": """The two models on the same held-out images, {measured}; sharpness relative to these. {accuracy}""",
}


def comparison_section(
    numbers: dict,
    models: tuple[Pipeline, Pipeline],
    images: Tensor,
    factors: Tensor | None,
    features: evaluation.Features,
    beta: float,
    trained: tuple[recipes.Recipe, data.Subset],
    progress: bool,
) -> str:
    """Held-out images through two models, decoded at once and denoised; what was measured of that goes to `numbers`."""
    energy, columns = evaluation.mean_energy(images), min(8, len(images))
    numbers["beside"], rows, measured, titles = [], {"input": images[:columns]}, {}, []
    for which, model in zip(("this model", "beside it"), models, strict=True):
        system, (level,) = system_of(model), model.levels(default=(beta,))
        sampling, label = system.sampling(model, numbers["quick"]), "through both models" if progress else None
        made = decoded_and_denoised(model, images, level, label=label, **sampling)
        similar = [evaluation.similarity(features, result, images, factors, energy) for result in made]
        names = [f"{which}: {name}" for name in system.rendered(level)]
        measured |= dict(zip(names, similar, strict=True))
        rows |= {name: result[:columns] for name, result in zip(names, made, strict=True)}
        facts = {"model": model_facts(model), "beta": level, "walk": sampling, "own_split": is_own(model, *trained)}
        numbers["beside"].append(facts | dict(zip(("decoded", "denoised"), similar, strict=True)))
        titles.append(f"{which}: {system.title}, {escape(facts['model']['recipe'] or 'unnamed')}")
    seen = "" if numbers["beside"][1]["own_split"] else CAPTIONS["seen"]
    shown = pictures(torch.cat(list(rows.values())), columns, "; ".join(titles), left=list(rows), width=100 * columns)
    content = figure(shown, CAPTIONS["beside"].format(beta=beta, seen=seen))
    return section("beside", "Two models beside each other", content, similarity_table(measured, numbers, CAPTIONS["similarity"]))


def new_images_section(
    numbers: dict, models: tuple[Pipeline, Pipeline], real: Tensor, features: evaluation.Features, progress: bool
) -> str:
    """New images of two models, as many as there are held-out images; what was measured of them goes to `numbers`."""
    energy, columns, shown, lines = evaluation.mean_energy(real), min(8, len(real)), {}, []
    numbers["beside"] = []
    for which, model in zip(("this model", "beside it"), models, strict=True):
        facts, sampling = model_facts(model), model.sampling_options()
        made = new_images(model, len(real), progress=progress, **sampling)
        quality = {
            "frechet": features.distance(made, real),
            "sharpness": evaluation.sharpness(evaluation.mean_energy(made), energy),
        }
        numbers["beside"].append({"model": facts, "walk": sampling} | quality)
        name = f"{which}: {facts['class']}, {escape(facts['recipe'] or 'unnamed')}"
        shown[name] = made[:columns]
        lines.append((name, "{sampler}, {steps} steps".format(**sampling), *map(number, quality.values())))
    grid = pictures(torch.cat(list(shown.values())), columns, "New images", left=list(shown), width=100 * columns)
    caption = CAPTIONS["distances"].format(measured=measured_in(numbers["generation"]))
    distances = table(("", "denoised by", "Fréchet distance", "sharpness"), lines, caption)
    return section("beside", "Two models beside each other", figure(grid, CAPTIONS["samples"]), distances)
