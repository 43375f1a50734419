"""Rows of an experiment over seeds, summed up: as numbers, as Markdown, as curves over beta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from multibeta.files import write_atomically
from multibeta.reproduce.models import BASELINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def summarise(rows: list[dict], keys: tuple[str, ...], measures: tuple[str, ...]) -> list[dict]:
    """Mean and standard deviation over the rows that agree in `keys`, in order of appearance; `chosen`: what was selected."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        {
            **dict(zip(keys, group, strict=True)),
            "seeds": len(members),
            **({} if "beta" in keys or "beta" not in members[0] else {"chosen": [selected(member) for member in members]}),
            **{name: mean_and_deviation([member[name] for member in members]) for name in measures},
        }
        for group, members in groups.items()
    ]


def selected(row: dict) -> str:
    """What was selected in a row: a method that was trained for one beta, or a beta of the multi-beta VAE."""
    return row["method"] if row["method"] in BASELINES else f"beta {row['beta']:g}"


def mean_and_deviation(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def markdown_summary(summary: list[dict]) -> str:
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

    def draw(axes: list[Axes]) -> None:
        for axis, name in zip(axes, measures, strict=False):
            for label, rows in groups.items():
                mean, deviation = ([row[name][key] for row in rows] for key in ("mean", "std"))
                axis.errorbar([row["beta"] for row in rows], mean, deviation, marker="o", capsize=2, label=label or None)
            axis.set(title=name, xlabel="β", ylim=(0, None))
            if len(groups) > 1:
                axis.legend()
        for axis in axes[len(measures) :]:
            axis.set_axis_off()

    picture = drawn(draw, rows=-(-len(measures) // 3), columns=3, file_format="png")
    write_atomically(path, lambda file: file.write(picture))
