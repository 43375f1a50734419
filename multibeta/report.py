"""The report of a trained model: one self-contained HTML page of figures and tables, and its numbers as JSON beside it."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from multibeta import data, evaluation, latents, recipes
from multibeta.data.grid import image_grid
from multibeta.environment import processor
from multibeta.evaluation import DENOISER, json_ready
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.schedules import beta_grid

DIRECTIONS_BETA, STRENGTHS = 0.7, (-3, -2, -1, 0, 1, 2, 3)
INTERPOLATION_BETAS = (0.0, 0.3, 0.6, 0.9)
QUICK_SAMPLERS = (("ode2", 20, 1), ("ancestral", 50, 1), ("resample", 50, -1))
QUICK_IMAGES, QUICK_CLASSIFIER_STEPS, QUICK_BETAS = 400, 400, (0.5, 0.7, 0.8, 0.9)
WIDE = 1000  # pixels across the page

DIRECT, DENOISED, MEAN, FLOOR = "#b4543f", "#1f6680", "#c99a2e", "#8b8880"
FACTORS = (DIRECT, DENOISED, MEAN, "#6b8e4e", "#7a5c93", "#2f2d2a", "#c98aa8")
PLOT_STYLE = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e9e6e0",
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "multibeta",
}
CSS = """
:root { --ink: #1d1c1a; --soft: #625f58; --line: #d8d4cb }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink); counter-reset: figure table;
  font: 17px/1.55 "Iowan Old Style", Charter, "Palatino Linotype", Georgia, "Liberation Serif", serif }
main { max-width: 1060px; margin: 0 auto; padding: 3.5rem 30px 5rem }
h1 { font-size: 2.1rem; line-height: 1.2; font-weight: 600; margin: 0 } code { font-size: .82em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; font-weight: 600; margin: 3.8rem 0 .6rem; break-after: avoid }
p, figcaption { max-width: 44rem; margin: .7rem 0 } .soft { color: var(--soft) } figcaption { font-size: .9rem; color: #3f3d38 }
figure { margin: 1.8rem 0; break-inside: avoid } img { display: block; max-width: 100%; height: auto }
figcaption::before { font-weight: 600; counter-increment: figure; content: "Figure " counter(figure) ". " }
.table figcaption::before { counter-increment: table; content: "Table " counter(table) ". " }
.scroll { overflow-x: auto } .pixels { image-rendering: pixelated }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums lining-nums; line-height: 1.35 }
table { border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink) }
th, td { text-align: right; padding: .32rem 0 .32rem 1.2rem; font-weight: 400; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 4.2em; white-space: normal }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft); vertical-align: bottom }
.left td { text-align: left; vertical-align: top; white-space: normal } .missed { color: #b4543f } .holds { color: #1f6680 }
.flow { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .6rem; margin: 1.6rem 0 }
.flow b { font-weight: 400; border: 1px solid var(--line); border-radius: 4px; padding: .1rem .6rem } .flow i { color: #1f6680 }
.blocks { display: flex; flex-wrap: wrap; gap: 1.1rem 1rem; align-items: flex-start }
.block { max-width: 100% } .block > p { margin: 0 0 .3rem; font-size: .9rem } .stack { display: grid; gap: 1.1rem }
.grid { display: grid; font-size: .78rem; line-height: 1.15; color: var(--soft) } .grid img { width: 100% }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); text-align: center }
.rows { display: grid; grid-auto-rows: minmax(0, 1fr); align-items: center; text-align: right }
.columns span { padding-bottom: .25rem } .rows span { padding-right: .5rem; white-space: nowrap }
@media (max-width: 600px) { body { font-size: 16px } main { padding: 1.5rem 16px } .grid { font-size: .62rem } }
@media print { body { font-size: 10.5pt } main { padding: 0; max-width: none } * { print-color-adjust: exact } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Denoising Multi-beta VAE: {name}</title><style>{css}</style></head>
<body><main><header><h1>Denoising Multi-β VAE</h1><p class="soft">Report of one trained model: {name}</p>
<p>One VAE represents an image at every β: at 0 the latent z<sub>β</sub> keeps almost everything, at 1 it is pure noise, and
between them the higher β, the less it keeps and the simpler it is. A non-linear diffusion model takes a latent from any β back
to 0. So an image can be changed where its representation is simple and decoded where it is sharp.</p>
<div class="flow"><b>image</b><i>encode(β) →</i><b>z<sub>β</sub></b><i>denoise(β → 0) →</i><b>z<sub>0</sub></b><i>decode(0) →</i>
<b>image</b></div>{introduction}</header>
{sections}
</main></body></html>
"""
CAPTIONS = {
    "model": "The model and the images it is measured on.",
    "facts": """What must come out of stage 1 by Propositions 3.1 and 3.2 and Figure 3 of the paper, on held-out images. The
        propositions state limits; the targets are this project's, for a trained network.""",
    "representation": """As β rises the noise rises to that of the prior, the encodings of all images draw together, and the
        information falls. The learned variance s² of the decoder equals the squared error at its
        optimum: a gap between line and dots is what training left open.""",
    "factors": """MIG: of the two codes that tell most about a factor, how much more the first tells than the second, as a share
        of the factor's entropy; the mean over factors. It is 1 where one code alone knows each factor. Thin line: the same codes,
        their channels rotated at random, mean of {rotations}. Noise with one σ is blind to rotations, so the axes of such a
        latent are no better than that unless its principal ones were folded into the weights.{spatial} Right: the most that any
        single code tells of a factor (compare Figure 4 of the paper); dotted, what the estimate makes of shuffled images.
        {images:,} held-out images, codes in 20 bins; no β is selected here.""",
    "information": "The numbers of the figure: MIG, and the information of the best code as a share of each factor's entropy.",
    "spatial": """ This latent has {positions} positions, which repeat what they know of a factor: its MIG measures that
        redundancy, not entanglement.""",
    "reconstructions": """The first held-out images, not chosen, encoded at each β; the first two blocks start from the same
        latents f + σε (compare Figures 5 and 2 of the paper). Direct decoding blurs what the latent no longer holds; denoising
        fills it in, so that at high β the image is plausible, not faithful. The mean f alone, from which edits start, is no
        sample of z<sub>β</sub> and keeps more.""",
    "accuracy": """Is the factor of the input still there? Accuracy of a factor classifier: decoded directly → denoised first,
        and in brackets the mean f denoised. It was trained on unblurred images, so blur alone costs the direct ones; a factor
        that stays near chance after denoising is lost.""",
    "samples": """New images from noise at β = 1, seed 0, not chosen; image i of every sampler starts from the same noise.
        Algorithm 2 as printed draws all noise anew at each step and subtracts Δ, against Eq. 17; it is shown for comparison.""",
    "curves": """Sharpness (mean squared gradient) and Fréchet distance, {measured}, of images encoded at β. The grey distances
        are between disjoint sets of images; encodings of the very images compared with may lie below them.""",
    "headline": """The numbers of the figure; gain is denoised over direct, mean starts from f. The squared error to the input
        favours blur: where the latent leaves much open, a direct image is near the mean of it and a denoised one a draw.""",
    "samplers": """New images against held-out images, {measured}, and sharpness relative to the latter. The last two rows are
        floors: what a perfect sampler and one limited by the decoder reach. The distance is not the FID of the literature and
        depends on the number of images: compare within this page.""",
    "directions": """Two held-out images moved by −3 to +3 standard deviations along the principal directions of {images:,}
        encodings f at β = {beta:g}, then denoised and decoded (Algorithm 4). Rows: the direction and its share of the variance.
        Found without labels, a direction may mix factors.""",
    "interpolations": """Spherical interpolation of two encodings f at β, then denoised and decoded (Algorithm 5; compare Figure
        7 of the paper). At β = 0 what lies between is a blend; the higher β, the more each step is an image of its own.""",
    "training": """As logged during training, each point the mean since the last; the errors of the heads are in units of their
        own targets.""",
    "heads": """R² of the two predictions on held-out images: 1 is exact, 0 no better than predicting zero. Neither can be exact:
        the noise hides where σ is small, the velocity depends on what the latent at β no longer holds.""",
    "environment": "What this page was made with. Its numbers are in <code>{name}</code>.",
}


def write_report(
    model: DenoisingMultiBetaVAE,
    path: str | Path,
    source: str | None = None,
    *,
    quick: bool = False,
    progress: bool = True,
    training_folder: str | Path | None = None,
) -> dict:
    """Measure a model; write the page to `path` and its numbers beside it, with the suffix .json, when both are complete.

    Args:
        path: An HTML file, "report.html" or the like.
        source: As `data.open_dataset` takes it; by default the data of the model's own recipe, or the scenes without one.
        quick: Fewer images, samplers and classifier steps: for a look, not for a comparison.
        training_folder: Where `recipes.run` trained the model, for the training curves.

    Returns:
        What the JSON file holds: the figures of `evaluation.evaluate`, "model", "data", "directions" and "environment".

    Raises:
        ValueError, OSError: A path that cannot take the page, data that cannot be opened.
    """
    started, path = time.perf_counter(), Path(path)
    if path.suffix == ".json" or path.is_dir():
        raise ValueError(f"the report needs the name of an HTML file, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = chosen_recipe(model, source)
    train_set, test_set = recipes.open_data(recipe)
    numbers = {"model": model_facts(model), "data": data_facts(model, recipe, train_set, test_set)}
    numbers |= json_ready(measure(model, train_set, test_set, quick, progress))
    numbers["quick"] = quick

    shown = data.to_float(test_set.images(range(min(6, len(test_set)))))
    sample = data.to_float(train_set.images(range(min(1000, len(train_set)))))
    makers = (
        lambda: facts_section(numbers["facts"]),
        lambda: representation_section(numbers["spectrum"], model),
        lambda: factors_section(numbers),
        lambda: reconstruction_section(numbers, model, shown),
        lambda: samples_section(model),
        lambda: headline_section(numbers["headline"], numbers["generation"]),
        lambda: directions_section(numbers, model, sample, shown[:2]),
        lambda: interpolation_section(model, shown),
        lambda: training_section(training_folder),
        lambda: heads_section(numbers["heads"]),
    )
    sections = [make() for make in tqdm(makers, desc="figures", unit="section", disable=not progress)]
    numbers["environment"] = environment(model, started)
    numbers = json_ready(numbers)
    numbers_path = path.with_suffix(".json")
    sections.append(environment_section(numbers["environment"], numbers_path.name))
    name = escape(numbers["model"]["recipe"] or "unnamed")
    page = PAGE.format(name=name, css=CSS, introduction=introduction(numbers), sections="\n".join(filter(None, sections)))
    write_together({path: page, numbers_path: json.dumps(numbers, indent=1, allow_nan=False) + "\n"})
    return numbers


def chosen_recipe(model: DenoisingMultiBetaVAE, source: str | None) -> recipes.Recipe:
    """The model's own recipe, or that of the small scenes around its VAE; `source` replaces the images."""
    if model.info.get("recipe"):
        recipe = recipes.from_dict(model.info["recipe"])
    else:
        recipe = dataclasses.replace(recipes.find("scenes32-small"), vae=model.vae.config)
    if source is None or source == recipe.data.source:
        return recipe
    images = dataclasses.replace(recipe.data, source=source, num_train=8000 if source == "scenes" else None)
    return dataclasses.replace(recipe, data=images)


def measure(model: DenoisingMultiBetaVAE, train_set, test_set, quick: bool, progress: bool) -> dict:
    """`evaluation.evaluate` with the samplers the grid of the model has steps for."""
    samplers = [row for row in (QUICK_SAMPLERS if quick else evaluation.SAMPLERS) if row[1] <= model.num_steps]
    options = {"samplers": samplers, "progress": progress}
    if quick:
        options |= {"num_images": QUICK_IMAGES, "betas": QUICK_BETAS}
    if quick and hasattr(test_set, "factors"):
        steps = QUICK_CLASSIFIER_STEPS
        options["features"] = evaluation.classifier_features(train_set, test_set, steps=steps, progress=progress)
    return evaluation.evaluate(model, train_set, test_set, **options)


def model_facts(model: DenoisingMultiBetaVAE) -> dict:
    """Where the model comes from and how large it is."""
    recipe, config = model.info.get("recipe") or {}, model.vae.config
    return {
        "recipe": recipe.get("name"),
        "source": recipe.get("source"),
        "command": model.info.get("command"),
        "training_steps": [recipe[stage]["steps"] for stage in ("vae_training", "diffusion_training")] if recipe else None,
        "vae_parameters": sum(p.numel() for p in model.vae.parameters()),
        "diffusion_parameters": sum(p.numel() for p in model.diffusion.parameters()),
        "resolution": config.resolution,
        "latent_shape": list(config.latent_shape),
        "num_steps": config.num_steps,
        "schedule": config.schedule,
        "parameterization": model.diffusion.config.parameterization,
    }


def data_facts(model: DenoisingMultiBetaVAE, recipe: recipes.Recipe, train_set, test_set) -> dict:
    """The images, and whether they are those the model was trained with, split as they were."""
    own = (model.info.get("recipe") or {}).get("data", {}).get("source")
    return {
        "source": recipe.data.source,
        "own_split": own == recipe.data.source,
        "train_images": len(train_set),
        "held_out_images": len(test_set),
        "factor_sizes": list(test_set.factor_sizes) if hasattr(test_set, "factors") else None,
    }


def environment(model: DenoisingMultiBetaVAE, started: float) -> dict:
    """What the numbers were computed with, and how long it took."""
    return {
        "multibeta": importlib.metadata.version("multibeta"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "seconds": round(time.perf_counter() - started, 1),
    }


def write_together(files: dict[Path, str]) -> None:
    """Write several text files; none is replaced before all are written."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, text in files.items():
            with parts[path].open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def section(name: str, title: str, *content: str) -> str:
    """One section with its heading."""
    return f'<section id="{name}"><h2>{title}</h2>\n' + "\n".join(content) + "\n</section>"


def figure(content: str, caption: str) -> str:
    """A numbered figure."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    """A numbered table; cells are HTML, all but the first right-aligned."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    content = f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'
    return f'<figure class="table"><figcaption>{caption}</figcaption>{content}</figure>'


def embedded(content: bytes, kind: str, alt: str, attributes: str = "") -> str:
    """An image inside the page."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{escape(alt)}" {attributes}>'


def pictures(images: Tensor, columns: int, title: str, *, above=(), beside=(), width: int = WIDE) -> str:
    """A titled grid of images (N, C, H, W), enlarged by the largest whole number that keeps it within `width` pixels."""
    canvas = Image.fromarray(image_grid(images, columns).numpy())
    shown = min(canvas.width * max(1, width // canvas.width), width)
    if canvas.width > 2 * width:
        canvas = canvas.resize((2 * width, round(canvas.height * 2 * width / canvas.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    top, left = ("".join(f"<span>{label}</span>" for label in labels) for labels in (above, beside))
    picture = embedded(buffer.getvalue(), "png", title, 'class="pixels"' if shown > canvas.width else "")
    template = f"grid-template-columns: max-content minmax(0, {shown}px)"
    content = f'<span></span><div class="columns">{top}</div><div class="rows">{left}</div>{picture}'
    return f'<div class="block"><p>{title}</p><div class="grid" style="{template}">{content}</div></div>'


def plot(draw: Callable, alt: str, *, rows: int = 1, columns: int = 2, height: float = 2.9) -> str:
    """`draw(axes)` on a row-major list of axes, as SVG inside the page."""
    content = drawn(draw, rows=rows, columns=columns, height=height)
    return embedded(content, "svg+xml", alt, f'width="{min(WIDE, 460 * columns)}"')


def drawn(draw: Callable, *, rows: int = 1, columns: int = 2, height: float = 2.9, kind: Literal["svg", "png"] = "svg") -> bytes:
    """`draw(axes)` on a row-major list of axes, as the bytes of an image file."""
    with matplotlib.rc_context(PLOT_STYLE):
        canvas = Figure(figsize=(4.55 * columns, height * rows))
        draw(list(canvas.subplots(rows, columns, squeeze=False).flat))
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def logarithmic(*axes) -> None:
    """A logarithmic scale with plain numbers at 1, 2 and 5."""
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def over_beta(*axes) -> None:
    """All betas across."""
    for axis in axes:
        axis.set(xlabel="β", xlim=(-0.02, 1.02))


def values(rows: Sequence[dict], *keys: str) -> list[float]:
    """One number per row, under nested keys; NaN where there is none."""
    found = []
    for row in rows:
        for key in keys:
            row = row[key]
        found.append(math.nan if row is None else row)
    return found


def number(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def words(name: str) -> str:
    """The name of a factor as text."""
    return escape(name.replace("_", " "))


def ratio(numerator: float, denominator: float) -> str:
    """How many times `denominator` is in `numerator`."""
    quotient = numerator / denominator if denominator else math.nan
    return "–" if math.isnan(quotient) else f"{number(quotient)} ×"


def introduction(numbers: dict) -> str:
    """What came out, in a few sentences, and the facts of the model."""
    facts, images, generated = numbers["model"], numbers["data"], numbers["generation"]
    row = min(numbers["headline"], key=lambda row: abs(row["beta"] - 0.8))
    sharpness, distance = ([number(row[made][key]) for made in ("direct", "denoised")] for key in ("sharpness", "frechet"))
    best = min((r for r in generated["samples"] if r["frechet"] is not None), key=lambda r: r["frechet"], default=None)
    text = [
        f"Measured on {generated['num_images']:,} held-out images, Fréchet distances in {escape(generated['features'])}:",
        f"{sum(fact['holds'] for fact in numbers['facts'])} of {len(numbers['facts'])} facts of stage 1 hold.",
        f"At β = {row['beta']:g} an image decoded directly has {sharpness[0]} of the sharpness of a reconstruction at β = 0,",
        f"and {sharpness[1]} when its latent is denoised first; its Fréchet distance goes from {distance[0]} to {distance[1]}.",
    ]
    if best:
        name = f"{sampler_name(best)}, {best['steps']} steps"
        text += [f"New images of the best sampler ({name}) are at {number(best['frechet'])},"]
        text += [f"where other real images are at {number(generated['real_floor'])}."]
    if not images["own_split"]:
        text += ["The model was not trained with this split of images: some held-out images may not be new to it."]
    if numbers["quick"]:
        text += ["A quick report: compare it with other quick reports only."]
    steps = facts["training_steps"]
    rows = [
        ("Recipe", escape(f"{facts['recipe']} ({facts['source']})" if facts["recipe"] else "not recorded")),
        ("Training", f"{steps[0]:,} steps VAE, {steps[1]:,} steps diffusion" if steps else "not recorded"),
        ("Parameters", f"{facts['vae_parameters']:,} VAE, {facts['diffusion_parameters']:,} diffusion"),
        ("Image", f"{facts['resolution']} × {facts['resolution']} pixels"),
        ("Latent", f"{' × '.join(map(str, facts['latent_shape']))} numbers"),
        ("Grid of β", f"{facts['num_steps']:,} steps, {escape(facts['schedule'].replace('_', ' '))}"),
        ("Images", f"{escape(images['source'])}: {images['train_images']:,} training, {images['held_out_images']:,} held out"),
        ("Command", f"<code>{escape(facts['command'])}</code>" if facts["command"] else "not recorded"),
    ]
    return f"<p>{' '.join(text)}</p>" + table((), rows, CAPTIONS["model"], "left")


def facts_section(facts: Sequence[dict]) -> str:
    """Table of what must come out of stage 1."""
    rows = []
    for fact in facts:
        target = f"≤ {fact['high']:g}" if fact["low"] == 0 else f"{fact['low']:g} – {fact['high']:g}"
        mark = '<span class="holds">✓ holds</span>' if fact["holds"] else '<span class="missed">✗ missed</span>'
        rows.append((escape(fact["name"]), number(fact["value"]), "0" if fact["high"] == 0 else target, mark))
    return section("facts", "Facts of stage 1", table(("", "value", "target", ""), rows, CAPTIONS["facts"]))


def representation_section(rows: Sequence[dict], model: DenoisingMultiBetaVAE) -> str:
    """Curves of the learned deviations, the information and the error over beta."""
    betas, grid = values(rows, "beta"), beta_grid(model.num_steps, model.vae.config.schedule)
    with torch.no_grad():
        sigma, decoder_sigma = (curve(grid.to(model.device)).cpu() for curve in (model.vae.sigma, model.vae.decoder_sigma))

    def draw(axes):
        noise, deviation, kl, error = axes
        noise.plot(grid, sigma, color=DENOISED)
        noise.set(title="Noise of the encoding", ylabel=r"$\sigma(\beta)$")
        deviation.plot(betas, values(rows, "encoding_deviation"), "o-", color=DENOISED)
        deviation.set(title="Deviation of the mean over images", ylabel=r"deviation of $f(x, \beta)$", ylim=(0, None))
        kl.plot(betas, values(rows, "kl"), "o-", color=DENOISED)
        kl.set(title="Information", ylabel="KL, nats per image")
        error.plot(betas, values(rows, "mse"), "o", color=DENOISED, label="mean squared error")
        error.plot(grid, decoder_sigma**2, color=DIRECT, label=r"$s(\beta)^2$, learned")
        error.set(title="Reconstruction at the same β", ylabel="per value, images in [−1, 1]")
        error.legend()
        logarithmic(kl, error)
        over_beta(*axes)

    drawn = plot(draw, "Over beta: sigma, deviation of f, KL in nats, squared error with the square of s", rows=2)
    return section("representation", "The representation at every β", figure(drawn, CAPTIONS["representation"]))


def factors_section(numbers: dict) -> str:
    """MIG and what single codes tell of each factor over beta (MultiBeta Fig. 4); nothing where no factors are known."""
    rows = numbers["disentanglement"]
    if not rows:
        return ""
    betas, names = values(rows, "beta"), list(rows[0]["information"])

    def draw(axes):
        gap, information = axes
        gap.plot(betas, values(rows, "mig_random_rotation"), color=FLOOR, linewidth=1, label="channels rotated at random")
        gap.plot(betas, values(rows, "mig"), "o-", color=DENOISED, label="the model's own axes")
        gap.set(title="Mutual information gap (MIG)", ylabel="share of the entropy", ylim=(0, None))
        information.set_prop_cycle(color=FACTORS)
        for name in names:
            information.plot(betas, values(rows, "information", name), "o-", label=name.replace("_", " "))
        information.plot(betas, values(rows, "information_by_chance"), ":", color=FLOOR, label="images shuffled")
        information.set(title="Information of the best single code", ylabel="share of the factor's entropy", ylim=(0, 1))
        gap.legend()
        information.figure.legend(handles=information.lines, loc="outside right center")
        over_beta(*axes)

    positions = math.prod(numbers["model"]["latent_shape"][1:])
    spatial = CAPTIONS["spatial"].format(positions=positions) if positions > 1 else ""
    facts = {"rotations": evaluation.ROTATIONS, "images": numbers["generation"]["num_images"], "spatial": spatial}
    drawn = plot(draw, "Over beta: MIG, also of rotated channels, and the information of the best code by factor", height=3.4)
    keys = ("mig",), ("mig_random_rotation",), *(("information", name) for name in names), ("information_by_chance",)
    columns = [values(rows, *key) for key in keys]
    cells = [(f"{beta:g}", *map(number, found)) for beta, *found in zip(betas, *columns, strict=True)]
    header = ("β", "MIG", "rotated", *map(words, names), "shuffled")
    content = figure(drawn, CAPTIONS["factors"].format(**facts)), table(header, cells, CAPTIONS["information"])
    return section("factors", "What the representation tells of the factors", *content)


def reconstruction_section(numbers: dict, model: DenoisingMultiBetaVAE, images: Tensor) -> str:
    """The same latents decoded directly and denoised first, and what the classifier still reads from them."""
    betas = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
    means = {beta: model.encode(images, beta) for beta in betas}
    samples = {beta: evaluation.add_noise(model, mean, beta) for beta, mean in means.items()}
    made = {"Decoded directly at β": [model.decode(z, beta).cpu() for beta, z in samples.items()]}
    for title, encoded in (("Denoised to 0, then decoded", samples), ("The mean f, denoised and decoded", means)):
        made[title] = [model.decode(model.denoise(z, beta, **DENOISER)).cpu() for beta, z in encoded.items()]
    above = ["input", *(f"β = {beta:g}" for beta in betas)]
    blocks = [
        pictures(torch.stack([images, *columns], 1).flatten(0, 1), len(above), title, above=above, width=700)
        for title, columns in made.items()
    ]
    shown = figure(f'<div class="stack">{"".join(blocks)}</div>', CAPTIONS["reconstructions"])
    text = "<p>No factors of these images are known: how faithful the denoised images are is left to the eye.</p>"
    if numbers["factor_names"] and numbers["classifier_accuracy"]:
        text = accuracy_table(numbers)
    return section("reconstructions", "Reconstructions over β", shown, text)


def accuracy_table(numbers: dict) -> str:
    """What a classifier reads from the images made, per beta and factor."""
    names = numbers["factor_names"]
    rows = [("real images", *(f"{numbers['classifier_accuracy'][name]:.2f}" for name in names))]
    for row in numbers["headline"]:
        made = zip(*(row[name]["accuracy"] for name in ("direct", "denoised", "denoised_mean")), strict=True)
        rows.append((f"β = {row['beta']:g}", *(f"{direct:.2f} → {after:.2f} ({mean:.2f})" for direct, after, mean in made)))
    rows.append(("chance", *(f"{1 / size:.2f}" for size in numbers["data"]["factor_sizes"])))
    return table(("", *map(words, names)), rows, CAPTIONS["accuracy"])


def samples_section(model: DenoisingMultiBetaVAE) -> str:
    """Generated images of three samplers from the same starting noise."""

    def samples(count: int, columns: int, title: str, sampler: str, steps: int, sign: int = 1) -> str:
        steps = min(steps, model.num_steps)
        images = model.generate(count, sampler, steps, delta_sign=sign)
        return pictures(images, columns, f"{title}, {steps} steps", width=66 * columns)

    small = samples(16, 4, "ancestral", "ancestral", 50), samples(16, 4, "Algorithm 2 as printed", "resample", 50, -1)
    blocks = f'<div class="blocks">{samples(64, 8, "ode2", "ode2", 20)}<div class="stack">{"".join(small)}</div></div>'
    return section("samples", "Samples", figure(blocks, CAPTIONS["samples"]))


def headline_section(rows: Sequence[dict], generated: dict) -> str:
    """Sharpness and distance per beta, direct and denoised, and the samplers."""

    def draw(axes):
        for axis, key in zip(axes, ("sharpness", "frechet"), strict=True):
            axis.plot(values(rows, "beta"), values(rows, "direct", key), "o-", color=DIRECT, label="decoded directly")
            axis.plot(values(rows, "beta"), values(rows, "denoised", key), "s-", color=DENOISED, label="denoised first")
            axis.plot(values(rows, "beta"), values(rows, "denoised_mean", key), "^:", color=MEAN, label="mean f, denoised")
        over_beta(*axes)
        axes[0].axhline(1, color=FLOOR, linestyle="--", label="reconstruction at β = 0")
        axes[0].set(title="Sharpness", ylabel="relative to a reconstruction at β = 0")
        floors = {"autoencoder_floor": ("--", "autoencoded training images"), "real_floor": (":", "training images")}
        for key, (style, label) in floors.items():
            axes[1].axhline(values([generated], key)[0], color=FLOOR, linestyle=style, label=label)
        axes[1].set(title="Fréchet distance to the images", ylabel="lower is better")
        axes[0].legend()
        axes[1].legend(handles=axes[1].lines[3:])
        logarithmic(*axes)

    lines = []
    for row in rows:
        made = row["direct"], row["denoised"], row["denoised_mean"]
        sharpness, distance, error = (values(made, key) for key in ("sharpness", "frechet", "mse"))
        gains = ratio(sharpness[1], sharpness[0]), ratio(distance[0], distance[1])
        groups = [*map(number, sharpness), gains[0], *map(number, distance), gains[1], *map(number, error)]
        lines.append((f"{row['beta']:g}", *groups))
    header = ["β", "sharpness,<br>direct", "denoised", "mean", "gain", "Fréchet,<br>direct", "denoised", "mean", "gain"]
    header += ["squared error,<br>direct", "denoised", "mean"]
    measured = f"in {escape(generated['features'])} over {generated['num_images']:,} images"
    drawn = plot(draw, "Sharpness and Frechet distance over beta, decoded directly and denoised first", height=3.4)
    curves = figure(drawn, CAPTIONS["curves"].format(measured=measured))
    samplers = samplers_table(generated, CAPTIONS["samplers"].format(measured=measured))
    return section("sharpness", "What denoising buys", curves, table(header, lines, CAPTIONS["headline"]), samplers)


def sampler_name(row: dict) -> str:
    """A sampler, told apart from its other sign of delta."""
    return row["sampler"] + (" subtracting Δ: Algorithm 2 as printed" if row["delta_sign"] < 0 else "")


def samplers_table(generated: dict, caption: str) -> str:
    """Distance and sharpness of generated images per sampler, and the floors."""
    rows = []
    for row in generated["samples"]:
        rows.append((sampler_name(row), f"{row['steps']}", number(row["frechet"]), number(row["sharpness"])))
    rebuilt = number(generated["autoencoder_floor"]), number(generated["autoencoder_sharpness"])
    rows.append(("floor: training images, encoded and decoded at β = 0", "", *rebuilt))
    rows.append(("floor: training images", "", number(generated["real_floor"]), ""))
    return table(("sampler", "steps", "Fréchet distance", "sharpness"), rows, caption)


def directions_section(numbers: dict, model: DenoisingMultiBetaVAE, sample: Tensor, images: Tensor) -> str:
    """Edits along the principal directions of the encodings (MultiBeta Algorithm 4); adds their shares to `numbers`."""
    found = model.principal_directions(sample, DIRECTIONS_BETA)
    variances = found.deviations.double().square().cpu()
    shares = (variances / variances.sum())[:8].tolist()
    numbers["directions"] = {"beta": DIRECTIONS_BETA, "images": len(sample), "variance_share": shares}
    steps = found.directions[:8] * found.deviations[:8, None, None, None]
    above = [f"{strength:+d}".replace("-", "−") if strength else "0" for strength in STRENGTHS]
    beside = [f"{index} · {share:.0%}" for index, share in enumerate(shares, 1)]
    blocks = []
    for index, latent in enumerate(model.encode(images, DIRECTIONS_BETA), 1):
        moved = torch.cat([latents.manipulate(latent[None], step, strength) for step in steps for strength in STRENGTHS])
        made = model.decode(model.denoise(moved, DIRECTIONS_BETA, **DENOISER))
        blocks.append(pictures(made, len(STRENGTHS), f"Image {index}", above=above, beside=beside, width=464))
        beside = ()  # the same rows in the next block
    content = figure(f'<div class="blocks">{"".join(blocks)}</div>', CAPTIONS["directions"].format(**numbers["directions"]))
    return section("directions", "Principal directions", content)


def interpolation_section(model: DenoisingMultiBetaVAE, images: Tensor) -> str:
    """Interpolations of two pairs at four betas (MultiBeta Algorithm 5)."""
    pairs = min(2, len(images) // 2)
    first, second = images[: 2 * pairs : 2], images[1 : 2 * pairs : 2]
    weights = [index / 7 for index in range(8)]
    rows = [model.interpolate(first, second, weights, beta, **DENOISER).cpu() for beta in INTERPOLATION_BETAS]
    beside = [f"β = {beta:g}" for beta in INTERPOLATION_BETAS]
    of_pairs = enumerate(zip(*rows, strict=True), 1)
    blocks = [pictures(torch.cat(made), 8, f"Pair {pair}", beside=beside, width=800) for pair, made in of_pairs]
    content = figure(f'<div class="stack">{"".join(blocks)}</div>', CAPTIONS["interpolations"])
    return section("interpolations", "Interpolations", content)


def training_section(folder: str | Path | None) -> str:
    """Curves of both stages, from the records of their training."""
    titles = {"loss": "loss per latent dimension", "mse": "squared error, all β", "sigma_zero": "σ(0)"}
    titles |= {"noise_error": "error of the noise", "delta_error": "error of Δ"}
    stages = {
        "vae": ("VAE", ("loss", "mse", "sigma_zero")),
        "vae-untied": ("VAE, σ per channel", ("loss", "mse", "sigma_zero")),
        "diffusion": ("Diffusion", ("noise_error", "delta_error")),
    }
    panels = []
    for stage, (name, keys) in stages.items():
        path = Path(folder or ".") / stage / "metrics.jsonl"
        if folder is not None and path.is_file():
            records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            panels += [(name, key, [record for record in records if record.get(key) is not None]) for key in keys]
    if not any(records for _, _, records in panels):
        return section("training", "Training", "<p>No records of the training were given with this model.</p>")

    def draw(axes):
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, key, records) in zip(axes, panels, strict=False):
            color = DIRECT if name == "Diffusion" else DENOISED
            axis.plot(values(records, "step"), values(records, key), color=color, linewidth=1.1)
            axis.set(title=f"{name}: {titles[key]}", xlabel="step")
            if key == "mse":
                logarithmic(axis)

    drawn = plot(draw, "Training curves of both stages", rows=-(-len(panels) // 3), columns=3)
    return section("training", "Training", figure(drawn, CAPTIONS["training"]))


def heads_section(rows: Sequence[dict]) -> str:
    """R^2 of the two predictions per beta."""
    cells = [(f"{row['beta']:g}", number(row["noise_r2"]), number(row["velocity_r2"])) for row in rows]
    return section("heads", "The two heads", table(("β", "noise", "velocity of f"), cells, CAPTIONS["heads"]))


def environment_section(facts: dict, numbers_name: str) -> str:
    """What the page was made with."""
    rows = [(escape(name), escape(str(value))) for name, value in facts.items()]
    made_with = table((), rows, CAPTIONS["environment"].format(name=escape(numbers_name)), "left")
    return section("environment", "Environment", made_with)
