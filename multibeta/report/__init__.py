"""The report of a trained model: one self-contained HTML page of figures and tables, and its numbers as JSON beside it."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from multibeta import evaluation, recipes
from multibeta.checks import check_beta
from multibeta.data import Subset, fingerprint_of, knows_factors
from multibeta.environment import processor, version
from multibeta.evaluation import json_ready
from multibeta.evaluation.refinement import before_and_after
from multibeta.evaluation.scores import described_training, of_recorded_data, recorded_recipe, recorded_training
from multibeta.files import write_together
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.report import diffusion_vae, multi_beta
from multibeta.report.diffusion_vae import likeness_table
from multibeta.report.page import document, figure, pictures, section, table, training_section

SYSTEMS = {DenoisingMultiBetaVAE: multi_beta, DiffusionVAE: diffusion_vae}
PRESETS = {DenoisingMultiBetaVAE: "scenes32-small", DiffusionVAE: "diffusion-vae-scenes32-small"}  # of a model without a recipe
QUICK_CLASSIFIER_STEPS = 400
CAPTIONS = {
    "model": "The model and the images it is measured on.",
    "beside": """The first held-out images, not chosen, through two models. Each decodes a sample of their latent at once, and
        denoises: a multi-β VAE the latent, from β = {beta:g}, a DiffusionVAE the decoded image x̂.{seen}""",
    "seen": " The other model was not trained with this split: some of these images may not be new to it.",
    "likeness": """The two models on the same held-out images, {measured}; sharpness relative to these. {accuracy}""",
    "environment": "What this page was made with. Its numbers are in <code>{name}</code>.",
}


def write_report(
    model: DenoisingMultiBetaVAE | DiffusionVAE,
    path: str | Path,
    source: str | None = None,
    *,
    quick: bool = False,
    progress: bool = True,
    training_folder: str | Path | None = None,
    beside: DenoisingMultiBetaVAE | DiffusionVAE | None = None,
    beta: float = 0.9,
) -> dict:
    """Measure a model; write the page to `path` and its numbers beside it, with the suffix .json, when both are complete.

    Args:
        path: An HTML file, "report.html" or the like.
        source: As `data.open_dataset` takes it; by default the data of the model's own recipe, or the scenes without one.
        quick: Fewer images, samplers and classifier steps: for a look, not for a comparison.
        training_folder: Where `recipes.run` trained the model, for the training curves.
        beside: Another model of images of the same size, which the same held-out images go through.
        beta: Where a multi-beta VAE encodes them for that, in [0, 1].

    Returns:
        What the JSON file holds: the figures of `evaluation.evaluate` or `refinement.evaluate_refiner`, those of the sections,
        "model", "data" and "environment".

    Raises:
        ValueError, OSError: A path that cannot take the page, a model without a report, data that cannot be opened.
    """
    started, path = time.perf_counter(), Path(path)
    if path.suffix.lower() != ".html" or path.is_dir():
        raise ValueError(f"the report needs the name of an HTML file, which ends in .html, got {path}")
    check_models(model, beside)
    check_beta(beta)
    system, recipe = SYSTEMS[type(model)], chosen_recipe(model, source)
    with of_recorded_data(recipe.data.source, source, "source (--data)"):
        train_set, test_set = recipes.open_data(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_images = system.QUICK_IMAGES if quick else system.NUM_IMAGES
    training = {"steps": QUICK_CLASSIFIER_STEPS} if quick else {}
    features = evaluation.usual_features(train_set, test_set, progress=progress, **training)
    numbers = {"model": model_facts(model), "data": data_facts(model, recipe, train_set, test_set)}
    options = {"num_images": num_images, "features": features, "progress": progress}
    numbers |= json_ready(system.measure(model, train_set, test_set, quick=quick, **options))
    numbers["quick"] = quick

    makers = system.sections(numbers, model, train_set, test_set)
    if beside is not None:
        _, real, factors = evaluation.as_many(train_set, test_set, num_images)
        makers.append(
            lambda: beside_section(numbers, (model, beside), real, factors, features, beta, (recipe, train_set), progress)
        )
    makers.append(lambda: training_section(training_folder, system.CURVES, system.CAPTIONS["training"]))
    sections = [make() for make in tqdm(makers, desc="figures", unit="section", disable=not progress)]
    numbers["environment"] = environment(model, started)
    numbers = json_ready(numbers)
    numbers_path = path.with_suffix(".json")
    sections.append(environment_section(numbers["environment"], numbers_path.name))
    page = document(system.TITLE, described_training(numbers["model"]), system.LEAD, introduction(numbers, system), sections)
    write_together({path: page, numbers_path: json.dumps(numbers, indent=1, allow_nan=False) + "\n"})
    return numbers


def check_models(model: Pipeline, beside: Pipeline | None) -> None:
    """`ValueError` unless there are reports of the models, and both are of images of one size."""
    for given in filter(None, (model, beside)):
        if type(given) not in SYSTEMS:
            kinds = " or a ".join(kind.__name__ for kind in SYSTEMS)
            raise ValueError(f"a report is of a {kinds}, got a {type(given).__name__}: `multibeta evaluate` measures that")
    sizes = [(given.vae.config.image_channels, given.vae.config.resolution) for given in filter(None, (model, beside))]
    if len(set(sizes)) > 1:
        shown = " and ".join(f"{channels} channels and {resolution} pixels" for channels, resolution in sizes)
        raise ValueError(f"models beside each other must be of images of one size, got {shown}")


def chosen_recipe(model: Pipeline, source: str | None) -> recipes.Recipe:
    """The model's own recipe, or that of the small scenes around its VAE; `source` replaces the images."""
    if "data" in (recorded := recorded_recipe(model)):
        recipe = recipes.from_dict(recorded)
    else:
        recipe = dataclasses.replace(recipes.find(PRESETS[type(model)]), vae=model.vae.config)
    if source is None or source == recipe.data.source:
        return recipe
    images = dataclasses.replace(recipe.data, source=source, num_train=8000 if source == "scenes" else None)
    return dataclasses.replace(recipe, data=images)


def model_facts(model: Pipeline) -> dict:
    """Where the model comes from, how large it is, and what its class has to say."""
    config = model.vae.config
    return {
        "class": type(model).__name__,
        **recorded_training(model),
        "vae_parameters": sum(p.numel() for p in model.vae.parameters()),
        "diffusion_parameters": sum(p.numel() for p in model.diffusion.parameters()),
        "resolution": config.resolution,
        "latent_shape": list(config.latent_shape),
        "num_steps": model.num_steps,
        **SYSTEMS[type(model)].facts_of(model),
    }


def data_facts(model: Pipeline, recipe: recipes.Recipe, train_set, test_set) -> dict:
    """The images, and whether they are those the model was trained with, split as they were."""
    return {
        "source": recipe.data.source,
        "own_split": is_own(model, recipe, train_set),
        "train_images": len(train_set),
        "held_out_images": len(test_set),
        "factor_sizes": list(test_set.factor_sizes) if knows_factors(test_set) else None,
    }


def environment(model: Pipeline, started: float) -> dict:
    """What the numbers were computed with, and how long it took."""
    return {
        "multibeta": version("multibeta") or "not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "seconds": round(time.perf_counter() - started, 1),
    }


def is_own(model: Pipeline, recipe: recipes.Recipe, train_set) -> bool:
    """Whether the model was trained with the split of images of a recipe, and these are still the same images."""
    if "data" not in (recorded := recorded_recipe(model)):
        return False
    trained = recipes.from_dict(recorded).data
    fingerprints = model.info.get("images", {}).get("fingerprint"), fingerprint_of(train_set)
    same = None in fingerprints or len(set(fingerprints)) == 1
    return same and dataclasses.replace(trained, mirror=recipe.data.mirror) == recipe.data


def introduction(numbers: dict, system) -> str:
    """What came out, in a few sentences, and the facts of the model."""
    facts, images, generated = numbers["model"], numbers["data"], numbers["generation"]
    text = [
        f"Measured on {generated['num_images']:,} held-out images, Fréchet distances in {escape(generated['features'])}:",
        *system.findings(numbers),
    ]
    if not images["own_split"]:
        text += ["The model was not trained with this split of images: some held-out images may not be new to it."]
    if numbers["quick"]:
        text += ["A quick report: compare it with other quick reports only."]
    steps, changed = facts["training_steps"], (facts["changed"] or {}).items()
    rows = [
        ("Recipe", escape(facts["recipe"] or "not recorded")),
        *[("Changed", "; ".join(escape(f"{name} {here}, in the recipe {there}") for name, (there, here) in changed))]
        * bool(changed),
        ("Trained on", escape(facts["trained_on"] or "not recorded")),
        ("Training", f"{steps[0]:,} steps VAE, {steps[1]:,} steps diffusion" if steps else "not recorded"),
        ("Parameters", f"{facts['vae_parameters']:,} VAE, {facts['diffusion_parameters']:,} diffusion"),
        ("Image", f"{facts['resolution']} × {facts['resolution']} pixels"),
        ("Latent", f"{' × '.join(map(str, facts['latent_shape']))} numbers"),
        *system.fact_rows(facts),
        (
            "Measured on",
            f"{escape(images['source'])}: {images['train_images']:,} training, {images['held_out_images']:,} held out",
        ),
        ("Command", f"<code>{escape(facts['command'])}</code>" if facts["command"] else "not recorded"),
    ]
    return f"<p>{' '.join(text)}</p>" + table((), rows, CAPTIONS["model"], "left")


def beside_section(
    numbers: dict,
    models: tuple[Pipeline, Pipeline],
    images: Tensor,
    factors: Tensor | None,
    features: evaluation.Features,
    beta: float,
    trained: tuple[recipes.Recipe, Subset],
    progress: bool,
) -> str:
    """Held-out images through two models, decoded at once and denoised; what was measured of that goes to `numbers`."""
    energy, columns = evaluation.mean_energy(images), min(8, len(images))
    numbers["beside"], rows, found, titles = [], {"input": images[:columns]}, {}, []
    for which, model in zip(("this model", "beside it"), models, strict=True):
        multi = isinstance(model, DenoisingMultiBetaVAE)
        walk, label = SYSTEMS[type(model)].walk(model, numbers["quick"]), "through both models" if progress else None
        made = before_and_after(model, images, beta if multi else None, label=label, **walk)
        measured = [evaluation.likeness(features, result, images, factors, energy) for result in made]
        names = [f"{which}: {name}" for name in ((f"decoded at β = {beta:g}", "denoised") if multi else ("x̂", "refined"))]
        found |= dict(zip(names, measured, strict=True))
        rows |= {name: result[:columns] for name, result in zip(names, made, strict=True)}
        facts = {"model": model_facts(model), "beta": beta if multi else None, "walk": walk, "own_split": is_own(model, *trained)}
        numbers["beside"].append(facts | dict(zip(("decoded", "denoised"), measured, strict=True)))
        titles.append(f"{which}: {SYSTEMS[type(model)].TITLE}, {escape(facts['model']['recipe'] or 'unnamed')}")
    seen = "" if numbers["beside"][1]["own_split"] else CAPTIONS["seen"]
    shown = pictures(torch.cat(list(rows.values())), columns, "; ".join(titles), beside=list(rows), width=100 * columns)
    content = figure(shown, CAPTIONS["beside"].format(beta=beta, seen=seen))
    return section("beside", "Two models beside each other", content, likeness_table(found, numbers, CAPTIONS["likeness"]))


def environment_section(facts: dict, numbers_name: str) -> str:
    """What the page was made with."""
    rows = [(escape(name), escape(str(value))) for name, value in facts.items()]
    made_with = table((), rows, CAPTIONS["environment"].format(name=escape(numbers_name)), "left")
    return section("environment", "Environment", made_with)
