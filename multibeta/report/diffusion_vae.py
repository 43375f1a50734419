"""The report of a DiffusionVAE: the figures of its paper, and what refining costs and buys in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from multibeta import data, latents, ops
from multibeta.evaluation import checked_samplings, decoded_and_denoised, evaluate_images, latent_sources, mean_energy
from multibeta.flow_map import MAP_SAMPLERS
from multibeta.pipelines import DiffusionVAE
from multibeta.report.few_steps import MAP_CURVES, few_samplings, few_steps_section
from multibeta.report.page import (
    DIRECT,
    Curves,
    figure,
    number,
    pictures,
    section,
    table,
)
from multibeta.report.sections import (
    edit_pictures,
    edit_slider,
    generation_table,
    measured_in,
    path_pictures,
    principal_steps,
    similarity_table,
)
from multibeta.report.sliders import images_that_fit, slider, spaced
from multibeta.report.system import System

NUM_IMAGES, QUICK_IMAGES, QUICK_STEPS = 1000, 200, 20
PATHS, WEIGHTS = 8, tuple(index / 7 for index in range(8))  # measured paths, of which SHOWN are shown
AT_WEIGHTS = tuple(f"λ = {weight:.2g}" for weight in WEIGHTS)
SHOWN, SLID = 2, 4  # of paths and edited images: side by side, under a slider
DECODED_AND_REFINED: tuple[str, str] = ("x̂", "refined")
ATTRIBUTES, EDIT_IMAGES, STRENGTHS = 8, 1000, (-2, -1, 0, 1, 2)

TITLE = "DiffusionVAE"
LEAD = """<p>A VAE with a small latent z keeps what is large in an image and decodes it to a reconstruction x̂, which is blurred. A
diffusion model that sees x̂ at every step refines it: it makes, from noise, an image of which x̂ is the outline.</p>
<div class="flow"><b>image</b><i>encode →</i><b>z</b><i>decode →</i><b>x̂</b><i>denoise →</i><b>image</b></div>"""
CURVES = (
    Curves("vae", "VAE: squared error, summed", {"reconstruction": ""}, logarithmic=True),
    Curves("vae", "VAE: nats per image", {"kl": "KL", "capacity": "capacity C"}),
    Curves("vae", "VAE: penalty γ |KL − C|", {"penalty": ""}),
    Curves("diffusion", "Diffusion: error of the noise", {"noise_error": ""}, DIRECT, logarithmic=True),
    MAP_CURVES,
)
CAPTIONS = {
    "samples": """New images, seed 0, not chosen: what the VAE decodes from a new latent, x̂, and beneath it the same refined
        (compare Figure 4 of the paper).{mixture}""",
    "mixture": """ Above, latents of the prior N(0, I), as the paper's text has them; below, of the Gaussian mixture fitted to
        those of the training images, as its published scripts do.""",
    "reconstructions": """The first held-out images, not chosen; x̂ of a sample of their latent; and x̂ refined, from noise alone.
        What x̂ does not hold is invented: the refined image is plausible, not faithful.""",
    "similarity": """Held-out images, {measured}: x̂ and what became of it. The Fréchet distance is to the very images they were
        encoded from, sharpness relative to these; the squared error favours blur. {accuracy}""",
    "distances": """New images against held-out images, {measured}, and sharpness relative to the latter; {count} from each
        source of latents. The floors are what perfect latents and a perfect model would reach. The distance is not the FID of
        the literature and depends on the number of images: compare within this page.""",
    "latents": """From one latent of the prior to another along a straight line (Eq. 10; compare Figure 5 of the paper): x̂, and
        beneath it the same refined, all of a path from the same noise.""",
    "noise": """One latent, and x<sub>T</sub> from one draw of noise to another (Eq. 11; compare Figure 6 of the paper): what
        changes is what the refiner adds. A straight line (lerp, as printed) leaves half the variance in the middle, less than the
        network was trained to start from; slerp keeps it.""",
    "noise_numbers": "Sharpness along such paths, mean of {paths}, relative to their ends.",
    "shared": """The paths of the interpolation above by ddpm, which draws noise at every step. Above, all images of both paths
        take the same noise, below each draws its own (compare Figure 7 of the paper).""",
    "shared_numbers": """Mean squared difference of neighbours, mean of {paths} paths: what noise of their own adds to the way of
        x̂ is no interpolation. ddim with η = 0 draws none after the start.""",
    "way": """Drag from one latent of the prior to another (Eq. 10): x̂, and beneath it the same refined, all of a path from the
        same noise.""",
    "moved": """Choose {a_way} and drag how far the first held-out images move along it: x̂, and the same refined, each image
        from one noise wherever it is moved; {unit}""",
    "edits": """Two held-out images moved along {ways} of {images} training images, and refined from the same noise; {unit}""",
    "training": """As logged during training, each point the mean since the last. The KL follows the capacity where the
        constraint binds.""",
}


ALONG = {
    "Attribute": {
        "a_way": "an attribute",
        "ways": "the differences of mean latents with and without an attribute,",
        "unit": "±1 is as far as the two groups are apart on average. In brackets: how many have it.",
    },
    "Direction": {
        "a_way": "a direction",
        "ways": "the principal directions of the latents",
        "unit": "±1 is a standard deviation. In brackets: the share of the variance.",
    },
}


def facts_of(model: DiffusionVAE) -> dict:
    """What only models of this class have to say of themselves."""
    config = model.diffusion.config
    components = None if model.mixture is None else len(model.mixture.weights)
    return {"form": config.form, "conditional": config.conditional, "mixture_components": components}


def fact_rows(facts: dict) -> list[tuple[str, str]]:
    """The same for the page."""
    components = facts["mixture_components"]
    return [
        ("Forward process", f"{facts['num_steps']:,} steps, {escape(facts['form'])}"),
        ("New latents", f"mixture of {components} Gaussians, or N(0, I)" if components else "N(0, I)"),
    ]


def sampling_of_figures(model: DiffusionVAE, quick: bool) -> dict:
    """The sampling options of the figures."""
    return samplings(model, quick)[0]


def samplings(model: DiffusionVAE, quick: bool) -> list[dict]:
    """Those of `evaluation.checked_samplings` but a flow map's, in QUICK_STEPS where it is `quick`."""
    usual = [options for options in checked_samplings(model) if options["sampler"] not in MAP_SAMPLERS]
    return [options | {"steps": min(QUICK_STEPS, options["steps"])} for options in usual] if quick else usual


def measure(model: DiffusionVAE, train_set: data.Subset, test_set: data.Subset, *, quick: bool, **options: Any) -> dict:
    """`evaluation.evaluate_images`, and how the page denoises: its figures by the first of "walks", Figure 7 by both."""
    chosen = samplings(model, quick)
    measured = chosen[:1] if quick else chosen
    if few := few_samplings(model):
        measured = [*measured, *few, *(each for each in checked_samplings(model) if each["sampler"] in MAP_SAMPLERS)]
    return {"walks": chosen} | evaluate_images(model, train_set, test_set, samplings=measured, **options)


def sections(numbers: dict, model: DiffusionVAE, train_set: data.Subset, test_set: data.Subset) -> list[Callable[[], str]]:
    """What makes the sections of the page, in their order."""
    shown = data.to_float(test_set.images(range(min(8, len(test_set)))))
    return [
        lambda: samples_section(model, numbers["walks"][0]),
        lambda: reconstruction_section(numbers, model, shown),
        lambda: distances_section(numbers["generation"]),
        lambda: few_steps_section(model, numbers["generation"]),
        lambda: latents_section(numbers, model),
        lambda: noise_section(numbers, model),
        lambda: shared_section(numbers, model),
        lambda: attributes_section(numbers, model, train_set, shown),
        lambda: directions_section(numbers, model, train_set, shown),
    ]


def findings(numbers: dict) -> list[str]:
    """What came out, in a few sentences."""
    generated, made = numbers["generation"], numbers["reconstructions"]
    sharpness = [number(made[name]["sharpness"]) for name in ("decoded", "refined")]
    decoded, refined = (number(row["frechet"]) for row in generated["samples"][:2])
    text = [
        f"x̂ of a held-out image has {sharpness[0]} of its sharpness, and {sharpness[1]} once it is refined.",
        f"New images from the prior are at {decoded} as the VAE decodes them and at {refined} refined,",
        f"where other real images are at {number(generated['real_floor'])}.",
    ]
    if not numbers["model"]["conditional"]:
        text += ["The diffusion model of this one does not see x̂, it is the paper's baseline: refined are its own images."]
    return text


def two_rows(decoded: Tensor, refined: Tensor, columns: int) -> Tensor:
    """Images (N, C, H, W), a row of `columns` decoded ones over the refined ones, and so on, (2 N, C, H, W)."""
    pairs = zip(decoded.cpu().split(columns), refined.cpu().split(columns), strict=True)
    return torch.cat([row for pair in pairs for row in pair])


def row_labels(images: Tensor, columns: int, *names: str) -> list[str]:
    """`names` over and over, for the rows of a grid of `images`."""
    return list(names) * (len(images) // columns // len(names))


def samples_section(model: DiffusionVAE, sampling: dict) -> str:
    """New images of every source of latents, decoded and refined (DiffusionVAE Fig. 4)."""
    seeds, blocks = ops.sample_seeds(0, torch.arange(16)), []
    for name, source in latent_sources(model).items():
        drawn = source.draw_latents(seeds)
        refined = model.render(drawn, denoise=True, seeds=seeds, **sampling)
        rows = two_rows(model.render(drawn, denoise=False), refined, 8)
        blocks.append(pictures(rows, 8, f"Latents of the {name}", left=row_labels(rows, 8, *DECODED_AND_REFINED), width=800))
    caption = CAPTIONS["samples"].format(mixture=CAPTIONS["mixture"] if len(blocks) > 1 else "")
    return section("samples", "Samples", figure(f'<div class="stack">{"".join(blocks)}</div>', caption))


def reconstruction_section(numbers: dict, model: DiffusionVAE, images: Tensor) -> str:
    """Held-out images, their x_hat, and these refined; with what was measured of them."""
    decoded, refined = decoded_and_denoised(model, images, **numbers["walks"][0])
    rows = torch.cat([images, decoded, refined])
    shown = pictures(rows, len(images), "Held-out images", left=("input", *DECODED_AND_REFINED), width=100 * len(images))
    measured = dict(zip(DECODED_AND_REFINED, numbers["reconstructions"].values(), strict=True))
    content = figure(shown, CAPTIONS["reconstructions"]), similarity_table(measured, numbers, CAPTIONS["similarity"])
    return section("reconstructions", "Reconstructions", *content)


def distances_section(generated: dict) -> str:
    """Distance and sharpness of new images, decoded and refined, and the floors."""

    def describe(row: dict) -> tuple[str]:
        how = f"refined by {row['sampler']}, {row['steps']} steps" if row["sampler"] else "x̂"
        return (f"latents of the {row['latents']}: {how}",)

    floors = {"autoencoder": "their x̂", "refined": "their x̂, refined"}
    caption = CAPTIONS["distances"].format(measured=measured_in(generated), count=f"{generated['num_images']:,}")
    return section("distances", "What refining buys", generation_table(generated, ["new images"], describe, floors, caption))


def path_ends(model: DiffusionVAE, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Latents of the prior where PATHS paths begin and end, (PATHS, c, 1, 1) each."""
    first, second = latent_sources(model)["prior"].draw_latents(ops.sample_seeds(seed, torch.arange(2 * PATHS))).split(PATHS)
    return first, second


def decoded_path(model: DiffusionVAE, weights: Sequence[float] = WEIGHTS) -> Tensor:
    """x_hat along the paths, (PATHS, K, C, H, W)."""
    first, second = path_ends(model)
    return torch.stack([model.decode(latents.between(first, second, weight)).cpu() for weight in weights], 1)


def latents_section(numbers: dict, model: DiffusionVAE) -> str:
    """Interpolation of z, decoded and refined (DiffusionVAE Fig. 5)."""
    resolution = model.vae.config.resolution
    weights = spaced(0, 1, 20, resolution, numbers["quick"])
    slid = images_that_fit(len(weights), 2, resolution, SLID)

    def paths(count: int, weights: Sequence[float]) -> list[Tensor]:
        first, second = (end[:count] for end in path_ends(model))
        return [decoded_path(model, weights)[:count], model.interpolate(first, second, weights, **numbers["walks"][0]).cpu()]

    frames = torch.stack(paths(slid, weights)).permute(2, 0, 1, 3, 4, 5)[None]
    shares = [f"{weight:.0%}" for weight in weights]
    dragged = slider(frames, "From one latent to another", "way", shares, len(weights) // 2, left=DECODED_AND_REFINED)
    shown = path_pictures(dict(zip(DECODED_AND_REFINED, paths(SHOWN, WEIGHTS), strict=True)), "Path", AT_WEIGHTS)
    content = figure(dragged, CAPTIONS["way"]), figure(shown, CAPTIONS["latents"])
    return section("latents", "Interpolation of the latent", *content)


def noise_section(numbers: dict, model: DiffusionVAE) -> str:
    """Interpolation of x_T at one z (DiffusionVAE Fig. 6), and its sharpness; adds this to `numbers`."""
    first, second = torch.arange(PATHS), torch.arange(PATHS, 2 * PATHS)
    start, _ = path_ends(model)
    rows = {
        how: model.interpolate_noise(start, first, second, WEIGHTS, how, **numbers["walks"][0]).cpu() for how in latents.PATHS
    }
    energies = {how: [mean_energy(images) for images in row.unbind(1)] for how, row in rows.items()}
    relative = {how: [2 * energy / (row[0] + row[-1]) for energy in row] for how, row in energies.items()}
    numbers["noise_interpolation"] = {"paths": PATHS, "weights": list(WEIGHTS), **relative}
    header = ["", *AT_WEIGHTS]
    cells = [(how, *map(number, row)) for how, row in relative.items()]
    content = (
        figure(path_pictures({how: row[:SHOWN] for how, row in rows.items()}, "Latent", AT_WEIGHTS), CAPTIONS["noise"]),
        table(header, cells, CAPTIONS["noise_numbers"].format(paths=PATHS)),
    )
    return section("noise", "Interpolation of the noise", *content)


def shared_section(numbers: dict, model: DiffusionVAE) -> str:
    """Interpolation of z with noise shared and not (DiffusionVAE Fig. 7), and how far neighbours differ; adds it to `numbers`."""
    ddim, ddpm = numbers["walks"]
    first, second = path_ends(model)
    rows = {
        "x̂": decoded_path(model),
        "ddim": model.interpolate(first, second, WEIGHTS, **ddim).cpu(),
        "noise shared": model.interpolate(first, second, WEIGHTS, shared_noise=True, **ddpm).cpu(),
        "noise of each": model.interpolate(first, second, WEIGHTS, **ddpm).cpu(),
    }
    differences = [neighbour_difference(row) for row in rows.values()]
    numbers["neighbour_difference"] = {
        "paths": PATHS,
        **dict(zip(("decoded", "ddim", "ddpm_shared", "ddpm"), differences, strict=True)),
    }
    names = ("x̂", f"ddim, {ddim['steps']} steps", *(f"ddpm, {ddpm['steps']} steps, {name}" for name in list(rows)[2:]))
    cells = [(name, number(difference)) for name, difference in zip(names, differences, strict=True)]
    shown = path_pictures({name: rows[name][:SHOWN] for name in list(rows)[2:]}, "Path", AT_WEIGHTS)
    content = (
        figure(shown, CAPTIONS["shared"]),
        table(("", "difference"), cells, CAPTIONS["shared_numbers"].format(paths=PATHS)),
    )
    return section("shared", "Shared stochasticity", *content)


def neighbour_difference(paths: Tensor) -> float:
    """Mean squared difference of neighbours on paths, (N, K, C, H, W)."""
    return float(paths.diff(dim=1).square().mean())


def attributes_section(numbers: dict, model: DiffusionVAE, train_set: data.Subset, images: Tensor) -> str:
    """Edits along the attributes that the data knows, the ATTRIBUTES that split it most evenly; adds these to `numbers`."""
    sample = range(min(EDIT_IMAGES, len(train_set)))
    known = train_set.attributes(sample) if data.knows_attributes(train_set) else torch.empty(0, 0)
    shares = known.float().mean(0)
    even = [column for column in (shares - 0.5).abs().argsort().tolist() if 0 < shares[column] < 1]
    chosen = sorted(even[:ATTRIBUTES])
    numbers["attributes"] = [{"name": train_set.attribute_names[column], "share": float(shares[column])} for column in chosen]
    if not chosen:
        return ""
    training = data.to_float(train_set.images(sample))
    steps = [model.attribute_direction(training[has], training[~has]) for has in known[:, chosen].T]
    labels = [f"{row['name'].replace('_', ' ')} ({row['share']:.0%})" for row in numbers["attributes"]]
    edits = edit_figures(numbers, model, images, "Attribute", dict(zip(labels, steps, strict=True)), len(sample))
    return section("attributes", "Edits along attributes", *edits)


def directions_section(numbers: dict, model: DiffusionVAE, train_set: data.Subset, images: Tensor) -> str:
    """Edits along principal directions of z, where no attributes are known; adds the shares of these to `numbers`."""
    if numbers["attributes"]:
        return ""
    sample = data.to_float(train_set.images(range(min(EDIT_IMAGES, len(train_set)))))
    steps, shares = principal_steps(model.principal_directions(sample))
    numbers["directions"] = {"images": len(sample), "variance_share": shares}
    edits = edit_figures(numbers, model, images, "Direction", steps, len(sample))
    return section("directions", "Principal directions", *edits)


def edit_figures(
    numbers: dict, model: DiffusionVAE, images: Tensor, choice: str, steps: dict[str, Tensor], sample: int
) -> tuple[str, str]:
    """Edits of images along attributes or directions, of which 1 adds `steps`, under a slider and side by side."""
    walk, reach = numbers["walks"][0], STRENGTHS[-1]
    rendered = dict(zip(DECODED_AND_REFINED, (False, True), strict=True))
    dragged = edit_slider(model, images[:SLID], choice, steps, reach, rendered, quick=numbers["quick"], **walk)
    labelled = {escape(label): step for label, step in steps.items()}
    options = {"with_input": True, "width": 400, "shared_noise": True, **walk}
    shown = edit_pictures(model, images[:2], labelled, STRENGTHS, **options)
    moved, edits = (CAPTIONS[name].format(images=f"{sample:,}", **ALONG[choice]) for name in ("moved", "edits"))
    return figure(dragged, moved), figure(shown, edits)


SYSTEM = System(
    title=TITLE,
    lead=LEAD,
    preset="diffusion-vae-scenes32-small",
    num_images=NUM_IMAGES,
    quick_images=QUICK_IMAGES,
    curves=CURVES,
    training_caption=CAPTIONS["training"],
    sampling=sampling_of_figures,
    rendered=lambda _: DECODED_AND_REFINED,
    measure=measure,
    sections=sections,
    findings=findings,
    facts=facts_of,
    fact_rows=fact_rows,
)
