"""The report of a Denoising Multi-beta VAE: what its page shows, from the facts of stage 1 to the two heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from multibeta import data, evaluation
from multibeta.evaluation import decoded_and_denoised
from multibeta.pipelines import DenoisingMultiBetaVAE
from multibeta.pipelines.spectrum import KEPT_IDENTITY, MEASURED, with_row_at
from multibeta.report.few_steps import MAP_CURVES, few_samplings, few_steps_section
from multibeta.report.page import (
    DENOISED,
    DIRECT,
    FACTORS,
    FLOOR,
    MEAN,
    Curves,
    figure,
    logarithmic,
    number,
    pictures,
    plot,
    ratio,
    section,
    table,
    values,
    words,
)
from multibeta.report.sections import (
    accuracy_bounds,
    edit_pictures,
    edit_slider,
    generation_table,
    measured_in,
    path_pictures,
    principal_steps,
)
from multibeta.report.sliders import images_that_fit, slider, spaced
from multibeta.report.system import System
from multibeta.schedules import beta_grid

UNMEASURED_BETA, STRENGTHS = 0.7, (-3, -2, -1, 0, 1, 2, 3)
INTERPOLATION_BETAS = (0.0, 0.3, 0.6, 0.9)
QUICK_SAMPLINGS = (
    {"sampler": "ode2", "steps": 20, "delta_sign": 1},
    {"sampler": "dpm2m", "steps": 20, "delta_sign": 1},
    {"sampler": "ancestral", "steps": 50, "delta_sign": 1},
    {"sampler": "resample", "steps": 50, "delta_sign": -1},
    {"sampler": "map", "steps": 1},
    {"sampler": "map", "steps": 2},
    {"sampler": "map_noise", "steps": 4},
)
NUM_IMAGES, QUICK_IMAGES, QUICK_BETAS = 1000, 250, (0.5, 0.7, 0.8, 0.9)

TITLE = "Denoising Multi-β VAE"
LEAD = """<p>One VAE represents an image at every β: at 0 the latent z<sub>β</sub> keeps almost everything, at 1 it is pure
noise, and between them the higher β, the less it keeps and the simpler it is. A non-linear diffusion model takes a latent from
any β back to 0. So an image can be changed where its representation is simple and decoded where it is sharp.</p>
<div class="flow"><b>image</b><i>encode(β) →</i><b>z<sub>β</sub></b><i>denoise(β → 0) →</i><b>z<sub>0</sub></b><i>decode(0) →</i>
<b>image</b></div>"""
CURVES = (
    *(
        Curves(stage, f"{name}: {title}", {key: ""}, logarithmic=key == "mse")
        for stage, name in (("vae", "VAE"), ("vae-untied", "VAE, σ per channel"))
        for key, title in (("loss", "loss per latent dimension"), ("mse", "squared error, all β"), ("sigma_zero", "σ(0)"))
    ),
    Curves("diffusion", "Diffusion: error of the noise", {"noise_error": ""}, DIRECT),
    Curves("diffusion", "Diffusion: error of Δ", {"delta_error": ""}, DIRECT),
    MAP_CURVES,
)
CAPTIONS = {
    "facts": """What must come out of stage 1 by Propositions 3.1 and 3.2 and Figure 3 of the paper, on held-out images. The
        propositions state limits; the targets are this project's, for a trained network.""",
    "representation": """As β rises the noise rises to that of the prior, the encodings of all images draw together, and the
        information falls. The learned variance s² of the decoder equals the squared error at its
        optimum: a gap between line and dots is what training left open.""",
    "levels": """What each β keeps, measured on {num_images:,} images and stored with the model: the KL to the prior; the squared
        error of a latent decoded at β, and of its mean denoised and decoded at 0, as edits are; identity, the share of the detail
        (energy of the gradients) of the image encoded and decoded at 0 that the latter still has. Edits start at the highest β up
        to which identity stays at {kept:g} or above: <b>auto</b>, between measured β interpolated.""",
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
    "dragged": """Drag β: beneath the first held-out images their latents f + σε, ε the same at every β, decoded there, and
        denoised to 0 first. At β = 1 nothing is left of an image, and what is denoised is a new one.""",
    "accuracy": """Is the factor of the input still there? Accuracy of a factor classifier: decoded directly → denoised first,
        and in brackets the mean f denoised. It was trained on unblurred images, so blur alone costs the direct ones; a factor
        that stays near chance after denoising is lost.""",
    "samples": """New images from noise at β = 1, seed 0, not chosen; image i of every sampler starts from the same noise.
        Algorithm 2 as printed draws all noise anew at each step and subtracts Δ, against Eq. 17; it is shown for comparison.""",
    "curves": """Sharpness (mean squared gradient) and Fréchet distance, {measured}, of images encoded at β; denoised by {sampler}
        in {steps} steps, as on all of this page where nothing else is said. The grey distances are between disjoint sets of
        images; encodings of the very images compared with may lie below them.""",
    "headline": """The numbers of the figure; gain is denoised over direct, mean starts from f. The squared error to the input
        favours blur: where the latent leaves much open, a direct image is near the mean of it and a denoised one a draw.""",
    "samplers": """New images against held-out images, {measured}, and sharpness relative to the latter. The last two rows are
        floors: what a perfect sampler and one limited by the decoder reach. The distance is not the FID of the literature and
        depends on the number of images: compare within this page.""",
    "directions": """Two held-out images moved by −3 to +3 standard deviations along the principal directions of {images:,}
        encodings f at β = {beta:g}{auto}, then denoised and decoded (Algorithm 4). Rows: the direction, counted as
        by <code>multibeta edit --direction</code>, and its share of the variance. Found without labels, a direction may mix
        factors.""",
    "moved": """Choose a direction and drag how far the first held-out images move along it, −3 to +3 standard deviations, at
        β = {beta:g}{auto} (Algorithm 4).""",
    "way": """Drag from the image on the left to the one on the right, at several β at once (Algorithm 5).""",
    "interpolations": """Spherical interpolation of two encodings f at β, then denoised and decoded (Algorithm 5; compare Figure
        7 of the paper). At β = 0 what lies between is a blend; the higher β, the more each step is an image of its own.""",
    "training": """As logged during training, each point the mean since the last; the errors of the heads are in units of their
        own targets.""",
    "heads": """R² of the two predictions on held-out images: 1 is exact, 0 no better than predicting zero. Neither can be exact:
        the noise hides where σ is small, the velocity depends on what the latent at β no longer holds.""",
}


def facts_of(model: DenoisingMultiBetaVAE) -> dict:
    """What only models of this class have to say of themselves."""
    known = model.spectrum is not None
    return {
        "schedule": model.vae.config.schedule,
        "parameterization": model.diffusion.config.parameterization,
        "spectrum": model.info["spectrum"] if known else None,
        "auto_beta": model.auto_beta if known else None,
    }


def fact_rows(facts: dict) -> list[tuple[str, str]]:
    """The same for the page."""
    unknown = "not known: <code>multibeta spectrum MODEL --save</code> measures it"
    return [
        ("Grid of β", f"{facts['num_steps']:,} steps, {escape(facts['schedule'].replace('_', ' '))}"),
        ("Edits at", unknown if facts["auto_beta"] is None else f"β = {facts['auto_beta']:g} (auto)"),
    ]


def sampling_of_figures(model: DenoisingMultiBetaVAE, quick: bool) -> dict:
    """The sampling options of the figures."""
    return model.sampling_options()


def measure(model: DenoisingMultiBetaVAE, train_set: data.Subset, test_set: data.Subset, *, quick: bool, **options: Any) -> dict:
    """`evaluation.evaluate_multi_beta` with the samplers the grid of the model has steps for."""
    compared = QUICK_SAMPLINGS if quick else evaluation.COMPARED_SAMPLINGS
    samplings = [row for row in compared if row["sampler"] in model.samplers and row["steps"] <= model.num_steps]
    samplings += few_samplings(model)
    options |= {"betas": QUICK_BETAS} if quick else {}
    return evaluation.evaluate_multi_beta(model, train_set, test_set, samplings=samplings, **options)


def sections(
    numbers: dict, model: DenoisingMultiBetaVAE, train_set: data.Subset, test_set: data.Subset
) -> list[Callable[[], str]]:
    """What makes the sections of the page, in their order."""
    shown = data.to_float(test_set.images(range(min(6, len(test_set)))))
    sample = data.to_float(train_set.images(range(min(1000, len(train_set)))))
    return [
        lambda: facts_section(numbers["facts"]),
        lambda: representation_section(numbers["spectrum"], model, numbers["model"]["auto_beta"]),
        lambda: factors_section(numbers),
        lambda: reconstruction_section(numbers, model, shown),
        lambda: samples_section(model),
        lambda: sharpness_section(numbers["headline"], numbers["generation"], numbers["walk"]),
        lambda: directions_section(numbers, model, sample, shown),
        lambda: interpolation_section(numbers, model, shown),
        lambda: few_steps_section(model, numbers["generation"]),
        lambda: heads_section(numbers["heads"]),
    ]


def findings(numbers: dict) -> list[str]:
    """What came out, in a few sentences."""
    generated = numbers["generation"]
    row = min(numbers["headline"], key=lambda row: abs(row["beta"] - 0.8))
    sharpness, distance = ([number(row[made][key]) for made in ("direct", "denoised")] for key in ("sharpness", "frechet"))
    best = min((r for r in generated["samples"] if r["frechet"] is not None), key=lambda r: r["frechet"], default=None)
    text = [
        f"{sum(fact['holds'] for fact in numbers['facts'])} of {len(numbers['facts'])} facts of stage 1 hold.",
        f"At β = {row['beta']:g} an image decoded directly has {sharpness[0]} of the sharpness of a reconstruction at β = 0,",
        f"and {sharpness[1]} when its latent is denoised first; its Fréchet distance goes from {distance[0]} to {distance[1]}.",
    ]
    if best:
        name = f"{sampler_name(best)}, {best['steps']} steps"
        text += [f"New images of the best sampler ({name}) are at {number(best['frechet'])},"]
        text += [f"where other real images are at {number(generated['real_floor'])}."]
    return text


def over_beta(*axes: Axes) -> None:
    """All betas across."""
    for axis in axes:
        axis.set(xlabel="β", xlim=(-0.02, 1.02))


def facts_section(facts: Sequence[dict]) -> str:
    """Table of what must come out of stage 1."""
    rows = []
    for fact in facts:
        target = f"≤ {fact['high']:g}" if fact["low"] == 0 else f"{fact['low']:g} – {fact['high']:g}"
        mark = '<span class="holds">✓ holds</span>' if fact["holds"] else '<span class="missed">✗ missed</span>'
        rows.append((escape(fact["name"]), number(fact["value"]), "0" if fact["high"] == 0 else target, mark))
    return section("facts", "Facts of stage 1", table(("", "value", "target", ""), rows, CAPTIONS["facts"]))


def representation_section(rows: Sequence[dict], model: DenoisingMultiBetaVAE, auto_beta: float | None) -> str:
    """Curves of the learned deviations, the information and the error over beta; what each beta keeps, where the model knows."""
    betas, grid = values(rows, "beta"), beta_grid(model.num_steps, model.vae.config.schedule)
    with torch.no_grad():
        sigma, decoder_sigma = (curve(grid.to(model.device)).cpu() for curve in (model.vae.sigma, model.vae.decoder_sigma))

    def draw(axes: list[Axes]) -> None:
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
    levels = [] if auto_beta is None else [levels_table(model, auto_beta)]
    return section("representation", "The representation at every β", figure(drawn, CAPTIONS["representation"]), *levels)


def levels_table(model: DenoisingMultiBetaVAE, auto_beta: float) -> str:
    """The spectrum that is stored with a model, its auto beta among the rows."""
    assert model.spectrum is not None
    cells = []
    for row in with_row_at(model.spectrum, auto_beta):
        beta = f"{row['beta']:g}"
        cells.append(
            (f"<b>{beta}, auto</b>" if row["beta"] == auto_beta else beta, *(number(row[name]) for name in MEASURED[1:]))
        )
    header = ("β", "nats", "squared error,<br>decoded", "mean denoised", "identity")
    caption = CAPTIONS["levels"].format(num_images=model.info["spectrum"]["num_images"], kept=KEPT_IDENTITY)
    return table(header, cells, caption)


def factors_section(numbers: dict) -> str:
    """MIG and what single codes tell of each factor over beta (MultiBeta Fig. 4); nothing where no factors are known."""
    rows = numbers["disentanglement"]
    if not rows:
        return ""
    betas, names = values(rows, "beta"), list(rows[0]["information"])

    def draw(axes: list[Axes]) -> None:
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
    cells = [(f"{beta:g}", *map(number, measured)) for beta, *measured in zip(betas, *columns, strict=True)]
    header = ("β", "MIG", "rotated", *map(words, names), "shuffled")
    content = figure(drawn, CAPTIONS["factors"].format(**facts)), table(header, cells, CAPTIONS["information"])
    return section("factors", "What the representation tells of the factors", *content)


def reconstruction_section(numbers: dict, model: DenoisingMultiBetaVAE, images: Tensor) -> str:
    """The same latents decoded directly and denoised first, and what the classifier still reads from them."""
    betas = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
    samples, means = (
        [decoded_and_denoised(model, images, beta, samples=samples, **numbers["walk"]) for beta in betas]
        for samples in (True, False)
    )
    made = {
        "Decoded directly at β": [decoded for decoded, _ in samples],
        "Denoised to 0, then decoded": [denoised for _, denoised in samples],
        "The mean f, denoised and decoded": [denoised for _, denoised in means],
    }
    above = ["input", *(f"β = {beta:g}" for beta in betas)]
    blocks = [
        pictures(torch.stack([images, *columns], 1).flatten(0, 1), len(above), title, above=above, width=700)
        for title, columns in made.items()
    ]
    dragged = figure(beta_slider(numbers, model, images), CAPTIONS["dragged"])
    shown = figure(f'<div class="stack">{"".join(blocks)}</div>', CAPTIONS["reconstructions"])
    text = "<p>No factors of these images are known: how faithful the denoised images are is left to the eye.</p>"
    if numbers["factor_names"] and numbers["classifier_accuracy"]:
        text = accuracy_table(numbers)
    return section("reconstructions", "Reconstructions over β", dragged, shown, text)


def beta_slider(numbers: dict, model: DenoisingMultiBetaVAE, images: Tensor) -> str:
    """The same latents decoded directly and denoised first, beneath their images, at the beta of a slider."""
    resolution, quick = images.shape[-1], numbers["quick"]
    betas = spaced(0, 1, 20, resolution, quick)
    images = images[: images_that_fit(len(betas), 3, resolution, len(images))]
    made = [decoded_and_denoised(model, images, beta, **numbers["walk"]) for beta in betas]
    frames = torch.stack([torch.stack([images, *pair]) for pair in made])[None]
    left = "input", "decoded directly", "denoised first"
    shown = [f"{beta:g}" for beta in betas]
    return slider(frames, "The same latents, decoded and denoised", "β", shown, betas.index(0.8), left=left)


def accuracy_table(numbers: dict) -> str:
    """What a classifier reads from the images made, per beta and factor."""
    real, chance = accuracy_bounds(numbers)
    rows = [("real images", *real)]
    for row in numbers["headline"]:
        made = zip(*(row[name]["accuracy"] for name in ("direct", "denoised", "denoised_mean")), strict=True)
        rows.append((f"β = {row['beta']:g}", *(f"{direct:.2f} → {after:.2f} ({mean:.2f})" for direct, after, mean in made)))
    rows.append(("chance", *chance))
    return table(("", *map(words, numbers["factor_names"])), rows, CAPTIONS["accuracy"])


def samples_section(model: DenoisingMultiBetaVAE) -> str:
    """Generated images of three samplers from the same starting noise."""

    def samples(count: int, columns: int, title: str, sampler: str, steps: int, sign: int = 1) -> str:
        steps = min(steps, model.num_steps)
        images = model.generate(count, sampler, steps, delta_sign=sign)
        return pictures(images, columns, f"{title}, {steps} steps", width=66 * columns)

    usual = model.sampling_options()
    small = samples(16, 4, "ancestral", "ancestral", 50), samples(16, 4, "Algorithm 2 as printed", "resample", 50, -1)
    blocks = f'<div class="blocks">{samples(64, 8, usual["sampler"], **usual)}<div class="stack">{"".join(small)}</div></div>'
    return section("samples", "Samples", figure(blocks, CAPTIONS["samples"]))


def sharpness_section(rows: Sequence[dict], generated: dict, sampling: dict) -> str:
    """Sharpness and distance per beta, direct and denoised, and the samplers."""

    def draw(axes: list[Axes]) -> None:
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
    measured = measured_in(generated)
    drawn = plot(draw, "Sharpness and Frechet distance over beta, decoded directly and denoised first", height=3.4)
    curves = figure(drawn, CAPTIONS["curves"].format(measured=measured, **sampling))
    describe = lambda row: (sampler_name(row), f"{row['steps']}")  # noqa: E731
    floors = {"autoencoder": "encoded and decoded at β = 0"}
    caption = CAPTIONS["samplers"].format(measured=measured)
    samplers = generation_table(generated, ["sampler", "steps"], describe, floors, caption)
    return section("sharpness", "What denoising buys", curves, table(header, lines, CAPTIONS["headline"]), samplers)


def sampler_name(row: dict) -> str:
    """A sampler, told apart from its other sign of delta."""
    return row["sampler"] + (" subtracting Δ: Algorithm 2 as printed" if row.get("delta_sign", 1) < 0 else "")


def directions_section(numbers: dict, model: DenoisingMultiBetaVAE, sample: Tensor, images: Tensor) -> str:
    """Edits along the principal directions of the encodings (MultiBeta Algorithm 4); adds their shares to `numbers`."""
    known = numbers["model"]["auto_beta"]
    beta, auto = (UNMEASURED_BETA, "") if known is None else (known, " (auto)")
    labelled, shares = principal_steps(model.principal_directions(sample, beta))
    numbers["directions"] = {"beta": beta, "images": len(sample), "variance_share": shares}
    shown = edit_pictures(model, images[:2], labelled, STRENGTHS, beta, width=464, **numbers["walk"])
    options = {"quick": numbers["quick"], **numbers["walk"]}
    moved = edit_slider(model, images, "Direction", labelled, STRENGTHS[-1], {"edited": True}, beta, **options)
    content = (
        figure(moved, CAPTIONS["moved"].format(beta=beta, auto=auto)),
        figure(shown, CAPTIONS["directions"].format(auto=auto, **numbers["directions"])),
    )
    return section("directions", "Principal directions", *content)


def interpolation_section(numbers: dict, model: DenoisingMultiBetaVAE, images: Tensor) -> str:
    """Interpolations of pairs at a few betas, that of edits among them (MultiBeta Algorithm 5)."""
    first, second = images[::2][: len(images) // 2], images[1::2]
    resolution, auto = images.shape[-1], numbers["model"]["auto_beta"]
    betas: list[float] = sorted({*INTERPOLATION_BETAS, *([] if auto is None else [auto])})
    labels = [f"β = {beta:g}" + (" (auto)" if beta == auto else "") for beta in betas]

    def between(pairs: int, weights: Sequence[float]) -> list[Tensor]:
        ends = first[:pairs], second[:pairs]
        return [model.interpolate(*ends, weights, beta, **numbers["walk"]).cpu() for beta in betas]

    weights = spaced(0, 1, 20, resolution, numbers["quick"])
    pairs = images_that_fit(len(weights), len(betas) + 2, resolution, len(first))
    start, end = (images[:pairs, None].expand(-1, len(weights), -1, -1, -1) for images in (first, second))
    frames = torch.stack([start, *between(pairs, weights), end], 2).transpose(0, 1)[None]
    shares, above = [f"{weight:.0%}" for weight in weights], ("from", *labels, "to")
    dragged = slider(frames, "From one held-out image to another", "way", shares, len(weights) // 2, above=above)
    shown = path_pictures(dict(zip(labels, between(2, [index / 7 for index in range(8)]), strict=True)), "Pair")
    content = figure(dragged, CAPTIONS["way"]), figure(shown, CAPTIONS["interpolations"])
    return section("interpolations", "Interpolations", *content)


def heads_section(rows: Sequence[dict]) -> str:
    """R^2 of the two predictions per beta."""
    cells = [(f"{row['beta']:.3g}", number(row["noise_r2"]), number(row["velocity_r2"])) for row in rows]
    return section("heads", "The two heads", table(("β", "noise", "velocity of f"), cells, CAPTIONS["heads"]))


SYSTEM = System(
    title=TITLE,
    lead=LEAD,
    preset="scenes32-small",
    num_images=NUM_IMAGES,
    quick_images=QUICK_IMAGES,
    curves=CURVES,
    training_caption=CAPTIONS["training"],
    sampling=sampling_of_figures,
    rendered=lambda beta: (f"decoded at β = {beta:g}", "denoised"),
    measure=measure,
    sections=sections,
    findings=findings,
    facts=facts_of,
    fact_rows=fact_rows,
)
