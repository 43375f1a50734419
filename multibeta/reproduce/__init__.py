"""The experiments of the papers as recipes: every method trained on one backbone, measured, set beside the printed numbers."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from multibeta import data, evaluation, recipes
from multibeta.evaluation import refinement
from multibeta.files import occupy, read_json, write_atomically, write_text, write_together
from multibeta.metrics import information_gap, mig, tad, tad_from_codes
from multibeta.reproduce.study import (
    AXES,
    BASELINES,
    FOLDED,
    MULTI_BETA,
    SEPARATE_BETAS,
    UNTIED,
    Study,
    denoising_model,
    disco_representation,
    open_data,
    refiner,
    refiner_recipe,
    representations,
    select,
    trained,
)

REFINING = {"sampler": "ddim", "steps": 50}
HEADLINE_BETAS = (0.3, 0.5, 0.7, 0.9)
# Rows of Table 1: methods that compete, the axes of their codes, and what makes the images where it is another method.
TABLE1: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), "trained", None),
    "InfoVAE": (("info-vae",), "trained", None),
    "multi-beta VAE": ((MULTI_BETA,), "pca", FOLDED),
}
# Rows of Table 2: methods whose representations compete, and the axes they are read in.
FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "VAE": (("beta-vae-1",), ("trained",)),
    "beta-VAE, best of 5": (tuple(f"beta-vae-{beta}" for beta in SEPARATE_BETAS), ("trained", "pca")),
    "annealed VAE": (("annealed-vae",), ("trained",)),
    "beta-TCVAE": (("beta-tcvae",), ("trained",)),
    "FactorVAE": (("factor-vae",), ("trained",)),
    "InfoVAE": (("info-vae",), ("trained",)),
    "multi-beta VAE": ((MULTI_BETA,), ("trained", "random", "pca", "ica")),
    "multi-beta VAE, sigma per channel": ((UNTIED,), ("trained", "pca")),
}


def table2(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 2: MIG and DCI of all methods, beta chosen on one half of the images, reported on the other.

    Paper note: the paper reports the beta of the highest score, which selects on the test metric.
    """
    rows = []
    for seed in study.seeds:
        for name, (methods, all_axes) in FAMILIES.items():
            place = folder / f"seed-{seed}"
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            for axes in all_axes:
                score = select(candidates, axes).score(axes, study, folder / "dci", progress)
                rows.append({"name": name, "axes": axes, **score})
    return {"rows": rows, "summary": summarise(rows, ("name", "axes"), ("mig", "dci", "completeness", "informativeness"))}


def figure4(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Fig. 4: MIG and, per factor, the highest mutual information with any code (nats), over beta of one model.

    "kept" is what z_beta could tell of x if f were Gaussian, sum_j 1/2 ln(1 + var f_j / sigma^2) nats over the principal axes;
    "kept, first" is the largest term of the sum.
    """
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        vae = trained(MULTI_BETA, study, seed, place, progress)
        for item in representations(MULTI_BETA, study, seed, place, progress):
            gaps = {axes: information_gap(*item.half(axes, 1)) for axes in AXES}
            sigma = vae.sigma(torch.tensor([item.beta])).item()
            kept = np.log1p(item.half("pca", 1)[0].var(0) / sigma**2) / 2
            information = gaps["pca"]["mutual_information"].max(1)
            rows.append(
                {
                    "seed": seed,
                    "beta": item.beta,
                    **{f"mig, {axes}": gap["mig"] for axes, gap in gaps.items()},
                    **dict(zip(open_data(study)[1].factor_names, information.tolist(), strict=True)),
                    "kept": float(kept.sum()),
                    "kept, first": float(kept.max()),
                }
            )
    measures = tuple(name for name in rows[0] if name not in ("seed", "beta"))
    return {"rows": rows, "summary": summarise(rows, ("beta",), measures)}


def headline(study: Study, folder: Path, progress: bool = True) -> dict:
    """What the paper is about: disentanglement of the encoding at beta beside the images decoded from it, directly and denoised.

    Of the two variants of axes that a diffusion model can follow. TAD and MIG are those of the codes in the model's own axes.
    """
    train_set, test_set = open_data(study)
    count = min(1000, study.num_images, len(train_set))
    images = data.to_float(test_set.images(range(count)))
    features = evaluation.usual_features(train_set, test_set, progress=progress)
    rows, samples = [], []
    for seed in study.seeds:
        for method in (FOLDED, UNTIED):
            model = denoising_model(method, study, seed, folder / f"seed-{seed}", progress)
            quality = evaluation.headline(model, features, images, None, HEADLINE_BETAS)
            for beta, made in zip(HEADLINE_BETAS, quality, strict=True):
                encode = functools.partial(model.encode, beta=beta)
                protocol = {"num_images": count, "batch_size": 250, "progress": progress}
                row = {"method": method, "seed": seed, "beta": beta}
                if data.knows_factors(test_set):
                    row["mig"] = mig(encode, test_set, **protocol)["mig"]
                if data.knows_attributes(test_set):
                    row["tad"] = tad(encode, test_set, **protocol)["tad"]
                for kind in ("direct", "denoised"):
                    row |= {f"{kind} {measure}": made[kind][measure] for measure in ("frechet", "sharpness")}
                rows.append(row)
            train_images = data.to_float(train_set.images(range(count)))
            made = evaluation.generation(model, features, train_images, images, (("ode2", 20, 1),), progress=progress)
            floors = {name: made[name] for name in ("real_floor", "autoencoder_floor")}
            samples.append({"method": method, "seed": seed, **floors, **made["samples"][0]})
    measures = tuple(name for name in rows[0] if name not in ("method", "seed", "beta"))
    return {
        "features": features.name,
        "num_images": count,
        "rows": rows,
        "summary": summarise(rows, ("method", "beta"), measures),
        "samples": samples,
        "samples_summary": summarise(samples, ("method",), ("frechet", "sharpness", "autoencoder_floor", "real_floor")),
    }


def table1(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 1: TAD of the encoding, and Frechet distance of new images, of beta-VAE, InfoVAE and the multi-beta VAE.

    beta is chosen by TAD on one half of the images; the other methods of the table have networks of their own and are quoted.
    """
    train_set, test_set = open_data(study)
    count = min(1000, study.num_images)
    real = data.to_float(test_set.images(range(count)))
    features = evaluation.usual_features(train_set, test_set, progress=progress)
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, (methods, axes, generator) in TABLE1.items():
            candidates = [item for method in methods for item in representations(method, study, seed, place, progress)]
            chosen = max(candidates, key=lambda item: tad_from_codes(*item.half(axes, 0, "attributes"))["tad"])
            score = tad_from_codes(*chosen.half(axes, 1, "attributes"))
            fake = new_images(generator or chosen.method, study, seed, place, count, progress)
            row = {"name": name, "method": chosen.method, "beta": chosen.beta, "seed": seed, "tad": score["tad"]}
            rows.append(row | {"captured": len(score["captured"]), "frechet": features.distance(fake, real)})
    summary = summarise(rows, ("name",), ("tad", "captured", "frechet"))
    return {"features": features.name, "num_images": count, "rows": rows, "summary": summary}


def new_images(method: str, study: Study, seed: int, folder: Path, count: int, progress: bool = True) -> Tensor:
    """Images (count, C, H, W) from noise, by a method of the study."""
    if method not in BASELINES:
        return denoising_model(method, study, seed, folder, progress).generate(count)
    vae = trained(method, study, seed, folder, progress)
    noise = torch.randn(count, *vae.config.latent_shape, generator=torch.Generator().manual_seed(seed))
    return evaluation.batched(vae.decode, noise)


def table7(study: Study, folder: Path, progress: bool = True) -> dict:
    """MultiBeta Table 7: the codes of a VAE and of the multi-beta VAE, and those that DisCo learns on the decoder of either."""
    rows = []
    for seed in study.seeds:
        place = folder / f"seed-{seed}"
        for name, method in (("VAE", "beta-vae-1"), ("multi-beta VAE", MULTI_BETA)):
            chosen = select(representations(method, study, seed, place, progress), "pca")
            found = disco_representation(chosen, study, place, progress)
            for label, item, axes in ((name, chosen, "pca"), (f"DisCo on {name}", found, "trained")):
                rows.append({"name": label, **item.score(axes, study, folder / "dci", progress)})
    return {"rows": rows, "summary": summarise(rows, ("name",), ("mig", "dci"))}


def dv_table1(study: Study, folder: Path, progress: bool = True) -> dict:
    """DiffusionVAE Table 1: Frechet distance of new images by a VAE, by a DDPM, and by both, which share the VAE's z.

    Sampled by `ddim` in 50 steps, where the published scripts take 100. New z are drawn from N(0, I), as the text says, and from
    the mixture of Gaussians that the recipe fits to encodings, as the scripts do. Beside it what a classifier of the factors
    still reads from held-out images, sketched and refined.
    """
    count = min(1000, study.num_images)
    rows, reconstructions = [], []
    for seed in study.seeds:
        train_set, test_set = recipes.open_data(refiner_recipe(study, seed))
        features = evaluation.usual_features(train_set, test_set, progress=progress)
        model, ddpm = (refiner(study, seed, folder / f"seed-{seed}", conditional, progress) for conditional in (True, False))
        sets = {"num_images": count, "walks": (REFINING,), "features": features, "progress": progress}
        measured = refinement.evaluate_refiner(model, train_set, test_set, **sets)
        made = measured["generation"]
        distances = {"training images": made["real_floor"], "training images, refined": made["refined_floor"]}
        for sample in made["samples"]:
            name = "VAE" if sample["sampler"] is None else "DiffusionVAE"
            distances[f"{name}, z from the {sample['latents']}"] = sample["frechet"]
        real = data.to_float(test_set.images(range(count)))
        distances["DDPM"] = features.distance(ddpm.generate(count, **REFINING).cpu(), real)
        rows += [{"name": name, "seed": seed, "frechet": distance} for name, distance in distances.items()]
        for name, found in measured["reconstructions"].items():
            accuracy = found.pop("accuracy", None)
            read = {} if accuracy is None else dict(zip(measured["factor_names"], accuracy, strict=True))
            reconstructions.append({"name": name, "seed": seed, **found, **read})
    measures = tuple(name for name in reconstructions[0] if name not in ("name", "seed"))
    return {
        "features": features.name,
        "num_images": count,
        "rows": rows,
        "summary": summarise(rows, ("name",), ("frechet",)),
        "reconstructions": reconstructions,
        "reconstructions_summary": summarise(reconstructions, ("name",), measures),
    }


def summarise(rows: list[dict], keys: tuple[str, ...], measures: tuple[str, ...]) -> list[dict]:
    """Mean and standard deviation over the rows that agree in `keys`, in order of appearance; `chosen`: what was selected."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, group, strict=True)),
            "seeds": len(members),
            **({} if "beta" in keys or "beta" not in members[0] else {"chosen": [chosen(member) for member in members]}),
            **{name: spread([member[name] for member in members]) for name in measures},
        }
        for group, members in groups.items()
    ]


def chosen(row: dict) -> str:
    """What was selected in a row: a method that was trained for one beta, or a beta of the multi-beta VAE."""
    return row["method"] if row["method"] in BASELINES else f"beta {row['beta']:g}"


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


EXPERIMENTS: dict[str, Callable[[Study, Path, bool], dict]] = {
    "table1": table1,
    "table2": table2,
    "table7": table7,
    "figure4": figure4,
    "headline": headline,
    "dv-table1": dv_table1,
}
# fmt: off
# What the paper prints, by experiment: a header, then rows.
PRINTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "table1": (
        ("CelebA",               "TAD",           "FID"),
        ("beta-VAE",             "0.088 ± 0.043", "99.8 ± 2.4"),
        ("InfoVAE",              "0.000 ± 0.000", "77.8 ± 1.6"),
        ("DiffAE",               "0.155 ± 0.010", "22.7 ± 2.1"),
        ("InfoDiffusion",        "0.299 ± 0.006", "23.6 ± 1.3"),
        ("DisDiff",              "0.305 ± 0.010", "18.3 ± 2.1"),
        ("multi-beta VAE",       "0.378 ± 0.017", "17.9 ± 1.9"),
    ),
    "table2": (
        ("MIG, DCI",             "Cars3D",                       "Shapes3D",                     "MPI3D"),
        ("FactorVAE",            "0.128 ± 0.036, 0.160 ± 0.020", "0.411 ± 0.163, 0.611 ± 0.127", "0.098 ± 0.027, 0.246 ± 0.066"),
        ("beta-TCVAE",           "0.080 ± 0.024, 0.140 ± 0.020", "0.406 ± 0.190, 0.613 ± 0.151", "0.108 ± 0.053, 0.239 ± 0.062"),
        ("InfoGAN-CR",           "0.011 ± 0.009, 0.020 ± 0.011", "0.297 ± 0.124, 0.478 ± 0.055", "0.161 ± 0.077, 0.242 ± 0.076"),
        ("multi-beta VAE",       "0.117 ± 0.009, 0.157 ± 0.010", "0.422 ± 0.090, 0.621 ± 0.090", "0.147 ± 0.035, 0.253 ± 0.043"),
    ),
    "table7": (
        ("MIG, DCI",             "Cars3D",                       "Shapes3D",                     "MPI3D"),
        ("VAE",                  "0.037 ± 0.022, 0.063 ± 0.037", "0.167 ± 0.112, 0.363 ± 0.027", "0.021 ± 0.013, 0.096 ± 0.024"),
        ("DisCo on VAE",         "0.071 ± 0.029, 0.127 ± 0.044", "0.237 ± 0.134, 0.526 ± 0.045", "0.047 ± 0.027, 0.188 ± 0.042"),
        ("multi-beta VAE",       "0.114 ± 0.009, 0.157 ± 0.010", "0.422 ± 0.090, 0.621 ± 0.090", "0.147 ± 0.035, 0.253 ± 0.043"),
        ("DisCo on multi-beta",  "0.116 ± 0.011, 0.171 ± 0.010", "0.434 ± 0.090, 0.678 ± 0.081", "0.152 ± 0.029, 0.284 ± 0.060"),
    ),
    "dv-table1": (
        ("CelebA-HQ 128x128",    "FID"),
        ("VAE",                  "115.82"),
        ("DDPM",                 "43.87"),
        ("DiffusionVAE",         "51.44"),
    ),
}
# fmt: on


def reproduce(name: str, study: Study, folder: Path, *, progress: bool = True, command: str | None = None) -> str:
    """Run one of `EXPERIMENTS`; returns its tables as Markdown.

    `folder` receives the trainings, one folder a seed, which all experiments share and which go on where they stopped;
    NAME.json with every number, NAME.md with the tables, and a figure of what varies over beta. Of several processes that share
    `folder`, one waits for the other.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    if study.dci_train + study.dci_test > study.num_images:
        asked = f"dci_train + dci_test = {study.dci_train + study.dci_test}"
        raise ValueError(f"{asked} must be at most num_images, the {study.num_images} held-out images that are reported on")
    study = dataclasses.replace(study, source=data.absolute_source(study.source))
    needed = {"table1": "attributes", "dv-table1": None}.get(name, "factors")
    if needed and not data.KNOWS[needed](open_data(study)[1]):
        raise ValueError(f"{name} needs images with known {needed}; {study.source} has none")
    with occupy(folder, "reproducing an experiment in", wait=True):
        claim(folder, study)
        result = EXPERIMENTS[name](study, folder, progress)
    record = {"experiment": name, "command": command, "study": dataclasses.asdict(study), **result}
    tables = [table(result[key]) for key in result if key.endswith("summary")]
    if name in PRINTED:
        tables.append("As printed in the paper:\n\n" + markdown(PRINTED[name]))
    text = "\n\n".join(tables)
    write_together({folder / f"{name}.json": json.dumps(record, indent=1), folder / f"{name}.md": text + "\n"})
    if "beta" in result["summary"][0]:
        draw_over_beta(result["summary"], folder / f"{name}.png")
    return text


def claim(folder: Path, study: Study) -> None:
    """Write down what the trainings in `folder` share; `ValueError` if another study has left its own there."""
    shared = {name: value for name, value in dataclasses.asdict(study).items() if name not in ("seeds", "dci_train", "dci_test")}
    path = folder / "study.json"
    before = read_json(path) if path.exists() else shared
    before, shared = (each | {"source": data.absolute_source(each["source"])} for each in (before, shared))
    if before != shared:
        differing = ", ".join(
            f"{name} {before.get(name)} (now {value})" for name, value in shared.items() if before.get(name) != value
        )
        raise ValueError(f"{folder} holds another study: {differing}; choose another folder")
    write_text(path, json.dumps(shared))


def table(summary: list[dict]) -> str:
    """What `summarise` returns as a Markdown table of mean ± standard deviation."""
    rows = [tuple(summary[0])]
    for entry in summary:
        cells = (f"{v['mean']:.3f} ± {v['std']:.3f}" if isinstance(v, dict) else v for v in entry.values())
        rows.append(tuple(", ".join(sorted(set(cell))) if isinstance(cell, list) else str(cell) for cell in cells))
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its header."""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def draw_over_beta(summary: list[dict], path: Path) -> None:
    """Every measure over beta, mean and deviation over seeds, a curve for each method."""
    from multibeta.report.page import drawn  # brings matplotlib

    measures = [name for name, value in summary[0].items() if isinstance(value, dict)]
    groups: dict[str, list[dict]] = {}
    for row in summary:
        groups.setdefault(row.get("method", ""), []).append(row)

    def draw(axes):
        for axis, name in zip(axes, measures, strict=False):
            for label, rows in groups.items():
                mean, deviation = ([row[name][key] for row in rows] for key in ("mean", "std"))
                axis.errorbar([row["beta"] for row in rows], mean, deviation, marker="o", capsize=2, label=label or None)
            axis.set(title=name, xlabel="β", ylim=(0, None))
            if len(groups) > 1:
                axis.legend()
        for axis in axes[len(measures) :]:
            axis.set_axis_off()

    picture = drawn(draw, rows=-(-len(measures) // 3), columns=3, kind="png")
    write_atomically(path, lambda file: file.write(picture))
