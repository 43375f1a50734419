"""What a report is made of: sections, tables, figures, pictures and plots as HTML, and whole files."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from multibeta.data.grid import image_grid
from multibeta.markup import embedded
from multibeta.training import read_metrics

if "matplotlib" not in sys.modules:
    # Importing it fails where MPLBACKEND names a backend that is not here, such as a notebook's; pages need none.
    _backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = _backend
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Draw = Callable[[list[Axes]], None]
_STYLING = threading.Lock()  # settings of matplotlib are of the process: threads that drew at once would restore each other's
WIDE = 1000  # pixels across the page
PICTURE_BYTES = 180_000  # of one grid of images: with the sheets of `sliders` a page stays under 8 MB at any resolution
QUALITIES = (98, 90, 75, 60, 45, 30)  # of lossy WebP
LOSSLESS_PIXELS = 4  # of a byte, at most: a picture that would need fewer bits is not tried without loss

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
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1c1a; --soft: #625f58; --caption: #3f3d38; --line: #d8d4cb;
  --accent: #1f6680; --missed: #b4543f }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #151617; --ink: #e6e3dd; --soft: #a5a199; --caption: #c3bfb7; --line: #45433f; --accent: #6db8d4;
    --missed: #e58a74 }
  .plot { filter: invert(.9) hue-rotate(180deg) brightness(1.2) } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); counter-reset: figure table;
  font: 17px/1.55 "Iowan Old Style", Charter, "Palatino Linotype", Georgia, "Liberation Serif", serif }
main { max-width: 1060px; margin: 0 auto; padding: 3.5rem 30px 5rem }
h1 { font-size: 2.1rem; line-height: 1.2; font-weight: 600; margin: 0 } code { font-size: .82em; overflow-wrap: anywhere }
h2 { font-size: 1.3rem; font-weight: 600; margin: 3.8rem 0 .6rem; break-after: avoid }
p, figcaption { max-width: 44rem; margin: .7rem 0 } .soft { color: var(--soft) }
figcaption { font-size: .9rem; color: var(--caption) }
figure { margin: 1.8rem 0; break-inside: avoid } img { display: block; max-width: 100%; height: auto }
figcaption::before { font-weight: 600; counter-increment: figure; content: "Figure " counter(figure) ". " }
.table figcaption::before { counter-increment: table; content: "Table " counter(table) ". " }
.scroll { overflow-x: auto } .pixels { image-rendering: pixelated }
@media screen { .plot { min-width: calc(17rem * var(--columns)) } }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums lining-nums; line-height: 1.35 }
table { border-top: 1.5px solid var(--ink); border-bottom: 1.5px solid var(--ink) }
th, td { text-align: right; padding: .32rem 0 .32rem clamp(.5rem, 1.2vw, 1.2rem); font-weight: 400 } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; min-width: 4.2em; white-space: normal }
thead th { border-bottom: 1px solid var(--ink); color: var(--soft); vertical-align: bottom }
.left td { text-align: left; vertical-align: top; white-space: normal } .missed { color: var(--missed) }
.holds, .flow i { color: var(--accent) }
.flow { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .6rem; margin: 1.6rem 0 }
.flow b { font-weight: 400; border: 1px solid var(--line); border-radius: 4px; padding: .1rem .6rem }
.blocks { display: flex; flex-wrap: wrap; gap: 1.1rem 1rem; align-items: flex-start }
.block { max-width: 100%; break-inside: avoid } .block > p { margin: 0 0 .3rem; font-size: .9rem; break-after: avoid }
.stack { display: grid; gap: 1.1rem }
.grid { display: grid; font-size: .78rem; line-height: 1.15; color: var(--soft) } .grid img { width: 100% }
.columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); text-align: center; break-after: avoid }
.rows { display: grid; grid-auto-rows: minmax(0, 1fr); align-items: center; text-align: right }
.columns span { padding-bottom: .25rem } .rows span { padding-right: .5rem; white-space: nowrap }
/* Without contain: size print would break the sheet over pages, and clip none of it. */
.frames { overflow: hidden; aspect-ratio: var(--shape); contain: size }
.frames img { width: var(--sheet); max-width: none;
  transform: translate(calc(var(--choice) * var(--across)), calc(var(--position) * var(--down))) }
.slider { width: fit-content } .controls { font-size: .9rem; width: 0; min-width: 100% }
.controls :is(div, fieldset) { margin: .5rem 0 0 }
.controls fieldset { border: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; min-width: 0 }
.controls legend { padding: 0; color: var(--soft) }
.controls label { display: inline-flex; align-items: center; gap: .35rem; min-height: 2rem; cursor: pointer }
.controls .range { display: flex; align-items: center; gap: .8rem } .range label { gap: .8rem; color: var(--soft) }
.live .range label { flex: 1 }
.controls input { accent-color: var(--accent); margin: 0 } .controls [type="range"] { flex: 1; min-width: 6rem; height: 2rem }
.controls output { min-width: 3.4em; font-variant-numeric: tabular-nums lining-nums }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px }
.slider:not(.live) :is([type="range"], label:not(.range *):not(:has(:checked))) { display: none }
@media (max-width: 600px) { body { font-size: 16px } main { padding: 1.5rem 16px } .grid { font-size: .62rem } }
@media print { body { font-size: 10.5pt } main { padding: 0; max-width: none } * { print-color-adjust: exact }
  table { font-size: 8pt } td { white-space: normal } figcaption:last-child { break-before: avoid }
  .slider :is(input, label:not(.range *):not(:has(:checked))) { display: none } .slider .range label { flex: none } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {name}</title><style>{css}</style></head>
<body><main><header><h1>{title}</h1><p class="soft">Report of one trained model: {name}</p>
{lead}{introduction}</header>
{sections}
</main><script>{script}</script></body></html>
"""


def document(title: str, name: str, lead: str, introduction: str, sections: Sequence[str], script: str = "") -> str:
    """The whole page; `title` and `name` are text, `script` is JavaScript, the rest is HTML. Empty sections are left out."""
    content = "\n".join(filter(None, sections))
    names = {"title": escape(title), "name": escape(name)}
    return PAGE.format(**names, css=CSS, lead=lead, introduction=introduction, sections=content, script=script)


def section(name: str, title: str, *content: str) -> str:
    """One section with its heading."""
    return f'<section id="{name}"><h2>{title}</h2>\n' + "\n".join(content) + "\n</section>"


def figure(content: str, caption: str) -> str:
    """A numbered figure."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, style_class: str = "") -> str:
    """A numbered table; cells are HTML, all but the first right-aligned."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    content = f'<div class="scroll"><table class="{style_class}">{head}<tbody>{body}</tbody></table></div>'
    return f'<figure class="table"><figcaption>{caption}</figcaption>{content}</figure>'


def pictures(
    images: Tensor, columns: int, title: str, *, above: Sequence[str] = (), left: Sequence[str] = (), width: int = WIDE
) -> str:
    """A titled grid of images (N, C, H, W), enlarged by the largest whole number that keeps it within `width` pixels.

    Args:
        above, left: Labels of the columns and of the rows.
    """
    canvas = grid_canvas(images, columns)
    shown = enlarged(canvas.width, width)
    if canvas.width > 2 * width:
        canvas = canvas.resize((2 * width, round(canvas.height * 2 * width / canvas.width)), Image.Resampling.LANCZOS)
    attributes = 'class="pixels"' if shown > canvas.width else ""
    picture = embedded(compressed(canvas, PICTURE_BYTES), "webp", title, attributes)
    return f'<div class="block"><p>{title}</p>{labelled(picture, shown, above, left)}</div>'


def grid_canvas(images: Tensor, columns: int) -> Image.Image:
    """An `image_grid` whose gaps are transparent: pages are light or dark."""
    opaque = 255 - image_grid(torch.full_like(images[:, :1], -1), columns)[..., :1]
    return Image.fromarray(torch.cat([image_grid(images, columns), opaque], -1).numpy())


def enlarged(pixels: int, width: int) -> int:
    """How wide a picture of so many pixels across is shown: a whole number of times, or as much as fits into `width`."""
    return min(pixels * max(1, width // pixels), width)


def compressed(canvas: Image.Image, most_bytes: int) -> bytes:
    """A picture as WebP of at most so many bytes: lossless where that suffices, else lossy, else with half the pixels a side."""
    options: list[dict[str, Any]] = [{"quality": quality} for quality in QUALITIES]
    if canvas.width * canvas.height <= LOSSLESS_PIXELS * most_bytes:
        options.insert(0, {"lossless": True})
    for each in options:
        buffer = io.BytesIO()
        canvas.save(buffer, format="WEBP", **each)
        if buffer.tell() <= most_bytes:
            return buffer.getvalue()
    return compressed(canvas.reduce(2), most_bytes)


def labelled(picture: str, width: int, above: Sequence[str], left: Sequence[str]) -> str:
    """A picture, at most `width` pixels wide, with labels of its columns and rows, all of them HTML."""
    top, side = ("".join(f"<span>{label}</span>" for label in labels) for labels in (above, left))
    content = f'<span></span><div class="columns">{top}</div><div class="rows">{side}</div>{picture}'
    return f'<div class="grid" style="grid-template-columns: max-content minmax(0, {width}px)">{content}</div>'


def plot(draw: Draw, alt: str, *, rows: int = 1, columns: int = 2, height: float = 2.9) -> str:
    """`draw(axes)` on a row-major list of axes, as SVG inside the page."""
    content = drawn(draw, rows=rows, columns=columns, height=height)
    attributes = f'class="plot" style="--columns: {columns}" width="{min(WIDE, 460 * columns)}"'
    return f'<div class="scroll">{embedded(content, "svg+xml", alt, attributes)}</div>'


def drawn(
    draw: Draw, *, rows: int = 1, columns: int = 2, height: float = 2.9, file_format: Literal["svg", "png"] = "svg"
) -> bytes:
    """`draw(axes)` on a row-major list of axes, as the bytes of an image file; SVG without a background.

    The picture is that of matplotlib's own defaults and `PLOT_STYLE`, whatever style, backend and figures the process has, which
    stay as they are.
    """
    buffer = io.BytesIO()
    with _STYLING, style.context(["default", PLOT_STYLE]):
        canvas = FigureCanvasAgg(Figure(figsize=(4.55 * columns, height * rows)))
        draw(list(canvas.figure.subplots(rows, columns, squeeze=False).flat))
        options = {"transparent": True, "metadata": {"Date": None}} if file_format == "svg" else {}
        canvas.figure.savefig(buffer, format=file_format, **options)
    return buffer.getvalue()


def logarithmic(*axes: Axes) -> None:
    """A logarithmic scale with plain numbers at 1, 2 and 5."""
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def values(rows: Sequence[dict], *keys: str) -> list[float]:
    """One number per row, under nested keys; NaN where there is none."""
    numbers = []
    for row in rows:
        for key in keys:
            row = row[key]
        numbers.append(math.nan if row is None else row)
    return numbers


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


@dataclass(frozen=True)
class Curves:
    """A panel of the training's records: the `keys` of one stage, each with its label, on one axis.

    Attributes:
        stage: Folder of the records.
        keys: Key to label; a single curve goes without.
    """

    stage: str
    title: str
    keys: dict[str, str]
    color: str = DENOISED
    logarithmic: bool = False

    def records(self, folder: Path) -> list[dict]:
        """The lines of metrics.jsonl that hold all keys; the last may still be being written."""
        records = read_metrics(folder / self.stage)
        return [record for record in records if all(record.get(key) is not None for key in self.keys)]


def training_section(folder: str | Path | None, curves: Sequence[Curves], caption: str) -> str:
    """Curves of both stages, from the records of their training in `folder`; those without records are left out."""
    recorded = [(panel, [] if folder is None else panel.records(Path(folder))) for panel in curves]
    panels = [(panel, records) for panel, records in recorded if records]
    if not panels:
        return section("training", "Training", "<p>No records of the training were given with this model.</p>")

    def draw(axes: list[Axes]) -> None:
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for axis, (panel, records) in zip(axes, panels, strict=False):
            for (key, label), color in zip(panel.keys.items(), (panel.color, FLOOR), strict=False):
                axis.plot(values(records, "step"), values(records, key), color=color, linewidth=1.1, label=label)
            axis.set(title=panel.title, xlabel="step")
            if len(panel.keys) > 1:
                axis.legend()
            if panel.logarithmic:
                logarithmic(axis)

    drawn = plot(draw, "Training curves of both stages", rows=-(-len(panels) // 3), columns=3)
    return section("training", "Training", figure(drawn, caption))
