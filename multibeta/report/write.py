"""The report of a trained model: one self-contained HTML page of figures and tables, and its numbers as JSON next to it."""

from __future__ import annotations

import json
import time
from html import escape
from pathlib import Path

from multibeta import evaluation, recipes
from multibeta.checks import check_beta
from multibeta.evaluation import described_training, json_ready, of_recorded_data
from multibeta.files import write_together
from multibeta.pipelines import LatentDiffusion, Pipeline
from multibeta.progress import progress_bar
from multibeta.report.comparison import comparison_section, new_images_section
from multibeta.report.facts import chosen_recipe, data_facts, environment, model_facts, system_of
from multibeta.report.page import document, section, table, training_section
from multibeta.report.sliders import SCRIPT
from multibeta.report.system import System

QUICK_CLASSIFIER_STEPS = 400
PARTS = {"VAE": "vae_parameters", "diffusion": "diffusion_parameters", "flow map": "flow_map_parameters"}
CAPTIONS = {
    "model": "The model and the images it is measured on.",
    "environment": "What this page was made with. Its numbers are in <code>{name}</code>.",
}


def write_report(
    model: Pipeline,
    path: str | Path,
    source: str | None = None,
    *,
    quick: bool = False,
    progress: bool = True,
    training_folder: str | Path | None = None,
    beside: Pipeline | None = None,
    beta: float = 0.9,
) -> dict:
    """Measure a model; write the page to `path` and its numbers next to it, with the suffix .json, when both are complete.

    Args:
        model: A `DenoisingMultiBetaVAE` or a `DiffusionVAE`.
        path: An HTML file, "report.html" or the like.
        source: As `data.open_dataset` takes it; by default the data of the model's own recipe, or the scenes without one.
        quick: Fewer images, samplers and classifier steps: for a look, not for a comparison.
        training_folder: Where `recipes.run` trained the model, for the training curves.
        beside: Another model of images of the same size, which the same held-out images go through; a `LatentDiffusion`, which
            gives them no representation to compare, makes new images beside those of the model.
        beta: Where a multi-beta VAE encodes them for that, in [0, 1].

    Returns:
        What the JSON file holds: the figures of `evaluation.evaluate_multi_beta` or `evaluate_images`, those of the sections,
        "model", "data" and "environment".

    Raises:
        ValueError, OSError: A path that cannot take the page, a model without a report, data that cannot be opened.
    """
    started, path = time.perf_counter(), Path(path)
    if path.suffix.lower() != ".html" or path.is_dir():
        raise ValueError(f"the report needs the name of an HTML file, which ends in .html, got {path}")
    check_models(model, beside)
    check_beta(beta)
    system, recipe = system_of(model), chosen_recipe(model, source)
    with of_recorded_data(recipe.data.source, source, "source (--data)"):
        train_set, test_set = recipes.open_data(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_images = system.quick_images if quick else system.num_images
    training = {"steps": QUICK_CLASSIFIER_STEPS} if quick else {}
    features = evaluation.usual_features(train_set, test_set, progress=progress, **training)
    numbers = {"model": model_facts(model), "data": data_facts(model, recipe, train_set, test_set)}
    options = {"num_images": num_images, "features": features, "progress": progress}
    numbers |= json_ready(system.measure(model, train_set, test_set, quick=quick, **options))
    numbers["quick"] = quick

    makers = system.sections(numbers, model, train_set, test_set)
    if beside is not None:
        _, real, factors = evaluation.equally_many(train_set, test_set, num_images)
        if isinstance(beside, LatentDiffusion):
            makers.append(lambda: new_images_section(numbers, (model, beside), real, features, progress))
        else:
            makers.append(
                lambda: comparison_section(numbers, (model, beside), real, factors, features, beta, (recipe, train_set), progress)
            )
    makers.append(lambda: training_section(training_folder, system.curves, system.training_caption))
    sections = [make() for make in progress_bar(makers, desc="figures", unit="section", disable=not progress)]
    numbers["environment"] = environment(model, started)
    numbers = json_ready(numbers)
    numbers_path = path.with_suffix(".json")
    sections.append(environment_section(numbers["environment"], numbers_path.name))
    name, lead = described_training(numbers["model"]), introduction(numbers, system)
    page = document(system.title, name, system.lead, lead, sections, SCRIPT)
    write_together({path: page, numbers_path: json.dumps(numbers, indent=1, allow_nan=False) + "\n"})
    return numbers


def check_models(model: Pipeline, other: Pipeline | None) -> None:
    """`ValueError` unless there are reports of the models, and both are of images of one size."""
    for given in filter(None, (model, other)):
        if given is model or not isinstance(given, LatentDiffusion):
            system_of(given)
    sizes = [(given.vae.config.image_channels, given.vae.config.resolution) for given in filter(None, (model, other))]
    if len(set(sizes)) > 1:
        shown = " and ".join(f"{channels} channels and {resolution} pixels" for channels, resolution in sizes)
        raise ValueError(f"models beside each other must be of images of one size, got {shown}")


def introduction(numbers: dict, system: System) -> str:
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
        ("Parameters", ", ".join(f"{facts[key]:,} {name}" for name, key in PARTS.items() if key in facts)),
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


def environment_section(facts: dict, numbers_name: str) -> str:
    """What the page was made with."""
    rows = [(escape(name), escape(str(value))) for name, value in facts.items()]
    made_with = table((), rows, CAPTIONS["environment"].format(name=escape(numbers_name)), "left")
    return section("environment", "Environment", made_with)
