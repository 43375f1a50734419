"""Pictures that change under a slider: all their frames lie in one image, and the page shows the one that was chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from torch import Tensor

from multibeta.markup import embedded
from multibeta.report.page import compressed, enlarged, grid_canvas, labelled

SHEET_BYTES = 850_000  # of all frames of one slider
SHEET_PIXELS = 5_000_000  # about: what so many bytes show without harm
WIDTH, HEIGHT = 800, 600  # of a picture, in pixels of the page: it is seen together with its handle
FINE_RESOLUTION = 64  # larger images have half as many positions
SCRIPT = """
for (const slider of document.querySelectorAll(".slider")) {
  const range = slider.querySelector("[type=range]"), output = slider.querySelector("output");
  const picture = slider.querySelector("img"), values = JSON.parse(range.dataset.values);
  const show = () => {
    const choice = slider.querySelector("[type=radio]:checked"), value = values[range.value];
    picture.style.setProperty("--position", range.value);
    picture.style.setProperty("--choice", choice ? choice.value : 0);
    const chosen = choice ? `${slider.querySelector("legend").textContent} ${choice.parentNode.textContent}` : "";
    picture.alt = [slider.getAttribute("aria-label"), chosen, `${range.name} ${value}`].filter(Boolean).join(", ");
    range.setAttribute("aria-valuetext", output.value = value);
  };
  slider.addEventListener("input", show);
  slider.classList.add("live");
  show();
}
"""


def spaced(low: float, high: float, steps: int, resolution: int, quick: bool) -> list[float]:
    """Where a slider stops: `steps` of one length from `low` to `high`, or half as many of large images and in quick reports."""
    steps = steps if resolution <= FINE_RESOLUTION and not quick else steps // 2
    return [low + (high - low) * index / steps for index in range(steps + 1)]


def images_that_fit(frames: int, rows: int, resolution: int, most: int) -> int:
    """How many columns of `rows` images each of the `frames` has room for, at least one."""
    return max(1, min(most, SHEET_PIXELS // (frames * rows * resolution**2)))


def slider(
    frames: Tensor,
    title: str,
    name: str,
    values: Sequence[str],
    start: int,
    *,
    choice: str = "",
    choices: Sequence[str] = (),
    above: Sequence[str] = (),
    left: Sequence[str] = (),
) -> str:
    """A titled grid of images that changes as a handle is dragged, and buttons where there is something to choose.

    The page needs `SCRIPT`. Without scripts the frame at `start` is shown, in print the one that was chosen.

    Args:
        frames: (choices, positions, rows, columns, C, H, W), in [-1, 1].
        title: Of the picture, text that no other slider of the page has.
        name, values: Of the handle, and what each of its positions stands for, text.
        start: The position that is shown first.
        choice, choices: What the buttons choose and their labels, text; the first is shown first.
        above, left: As of `pictures`, HTML.
    """
    num_choices, _, rows, columns, _, height, _ = frames.shape
    sheet = grid_canvas(frames.permute(1, 2, 0, 3, 4, 5, 6).flatten(0, 3), num_choices * columns)
    frame_width, frame_height = (sheet.width + 1) // num_choices - 1, rows * (height + 1) - 1
    shown = enlarged(frame_width, min(WIDTH, HEIGHT * frame_width // frame_height))
    chosen = f"{choice} {choices[0]}, " if choices else ""
    attributes = f'style="--choice: 0; --position: {start}"' + ' class="pixels"' * (shown > frame_width)
    picture = embedded(compressed(sheet, SHEET_BYTES), "webp", f"{title}, {chosen}{name} {values[start]}", attributes)
    geometry = {
        "shape": f"{frame_width} / {frame_height}",
        "sheet": f"{sheet.width / frame_width:.6%}",
        "across": f"{-(frame_width + 1) / sheet.width:.6%}",
        "down": f"{-(frame_height + 1) / sheet.height:.6%}",
    }
    style = "; ".join(f"--{key}: {value}" for key, value in geometry.items())
    grid = labelled(f'<div class="frames" style="{style}">{picture}</div>', shown, above, left)
    return (
        f'<div class="block slider" role="group" aria-label="{escape(title)}"><p>{escape(title)}</p>{grid}'
        f'<div class="controls">{buttons(title, choice, choices) if choices else ""}{handle(name, values, start)}</div></div>'
    )


def buttons(title: str, choice: str, choices: Sequence[str]) -> str:
    """Radio buttons, one for each choice."""
    labels = [
        f'<label><input type="radio" name="{escape(title)}" value="{index}" autocomplete="off"{" checked" * (index == 0)}>'
        f"<span>{escape(label)}</span></label>"
        for index, label in enumerate(choices)
    ]
    return f"<fieldset><legend>{escape(choice)}</legend>{''.join(labels)}</fieldset>"


def handle(name: str, values: Sequence[str], start: int) -> str:
    """What is dragged, and the value where it stands."""
    known = escape(json.dumps(list(values), ensure_ascii=False))
    return (
        f'<div class="range"><label>{escape(name)}<input type="range" name="{escape(name)}" min="0" max="{len(values) - 1}"'
        f' step="1" value="{start}" autocomplete="off" aria-valuetext="{escape(values[start])}" data-values="{known}"></label>'
        f'<output aria-live="off">{escape(values[start])}</output></div>'
    )
