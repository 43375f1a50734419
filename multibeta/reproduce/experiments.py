"""Running an experiment of the papers: what it needs, what it leaves in its folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from multibeta import data
from multibeta.files import occupy, read_json, write_text, write_together
from multibeta.reproduce.latent_diffusion import latent_diffusion
from multibeta.reproduce.models import Study, study_images
from multibeta.reproduce.printed import PRINTED
from multibeta.reproduce.summary import draw_over_beta, markdown, markdown_summary
from multibeta.reproduce.tables import codes_and_sharpness, diffusion_vae_table1, figure4, table1, table2, table7

EXPERIMENTS: dict[str, Callable[[Study, Path, bool], dict]] = {
    "table1": table1,
    "table2": table2,
    "table7": table7,
    "figure4": figure4,
    "headline": codes_and_sharpness,
    "dv-table1": diffusion_vae_table1,
    "latent_diffusion": latent_diffusion,
}

NEEDED = {"table1": "attributes", "dv-table1": None, "latent_diffusion": None}  # to be known of the images, else factors


def reproduce(name: str, study: Study, folder: Path, *, progress: bool = True, command: str | None = None) -> str:
    """Run one of `EXPERIMENTS`; returns its tables as Markdown.

    `folder` receives the trainings, one folder a seed, which all experiments share and which go on where they stopped;
    NAME.json with every number, NAME.md with the tables, and a figure of what varies over beta. Of several processes that share
    `folder`, one waits for the other.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    study = dataclasses.replace(study, source=data.absolute_source(study.source))
    if study.vae and Path(study.vae).exists():
        study = dataclasses.replace(study, vae=str(Path(study.vae).absolute()))
    if name != "latent_diffusion" and (study.networks or study.vae):
        raise ValueError(f"networks and vae are of latent_diffusion, {name} has networks of its own")
    needed = NEEDED.get(name, "factors")
    if needed == "factors" and study.dci_train + study.dci_test > study.num_images:
        asked = f"dci_train + dci_test = {study.dci_train + study.dci_test}"
        raise ValueError(f"{asked} must be at most num_images, the {study.num_images} held-out images that are reported on")
    if needed and not data.KNOWS[needed](study_images(study)[1]):
        raise ValueError(f"{name} needs images with known {needed}; {study.source} has none")
    with occupy(folder, "reproducing an experiment in", wait=True):
        claim(folder, study)
        result = EXPERIMENTS[name](study, folder, progress)
    record = {"experiment": name, "command": command, "study": dataclasses.asdict(study), **result}
    tables = [markdown_summary(result[key]) for key in result if key.endswith("summary")]
    if name in PRINTED:
        tables.append("As printed in the paper:\n\n" + markdown(PRINTED[name]))
    text = "\n\n".join(tables + ([result["picture"]] if "picture" in result else []))
    write_together({folder / f"{name}.json": json.dumps(record, indent=1), folder / f"{name}.md": text + "\n"})
    if "beta" in result["summary"][0]:
        draw_over_beta(result["summary"], folder / f"{name}.png")
    return text


def claim(folder: Path, study: Study) -> None:
    """Write down what the trainings in `folder` share; `ValueError` if another study has left its own there."""
    shared = {name: value for name, value in dataclasses.asdict(study).items() if name not in ("seeds", "dci_train", "dci_test")}
    path = folder / "study.json"
    before = cast("dict[str, Any]", read_json(path)) if path.exists() else shared
    before = {"networks": None, "vae": None, **before}  # which older studies did not have
    before, shared = (each | {"source": data.absolute_source(each["source"])} for each in (before, shared))
    if before != shared:
        differing = ", ".join(
            f"{name} {before.get(name)} (now {value})" for name, value in shared.items() if before.get(name) != value
        )
        raise ValueError(f"{folder} holds another study: {differing}; choose another folder")
    write_text(path, json.dumps(shared))
