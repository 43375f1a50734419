"""Pieces of HTML that are whole in themselves: pictures within the text, and tables of them for notebooks, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image
from torch import Tensor

from multibeta.data.grid import image_grid

LEAST_PIXELS = 64  # that a picture is wide


def embedded(content: bytes, media: str, alt: str, attributes: str = "") -> str:
    """An image inside the page."""
    return f'<img src="data:image/{media};base64,{base64.b64encode(content).decode()}" alt="{escape(alt)}" {attributes}>'


def picture(image: Tensor, alt: str) -> str:
    """An image (C, H, W) in [-1, 1], small ones enlarged to at least 64 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(image_grid(image[None], 1).numpy()).save(buffer, format="PNG", optimize=True)
    scale = max(1, LEAST_PIXELS // image.shape[-1])
    style = f"width: {scale * image.shape[-1]}px; max-width: none; margin: 1px; display: inline-block"
    if scale > 1:
        style += "; image-rendering: pixelated"
    return embedded(buffer.getvalue(), "png", alt, f'style="{style}"')


def signed(value: float) -> str:
    """A number with its sign, none for 0."""
    return f"{value:+g}".replace("-", "−") if value else "0"


def table(header: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in the style of the page that it stands in: `header` and the names of `rows` are text, cells are HTML."""
    top = "".join(f'<th scope="col" style="text-align: center">{escape(cell)}</th>' for cell in header)
    head = f"<thead><tr><td></td>{top}</tr></thead>" if header else ""
    body = "".join(
        f'<tr><th scope="row" style="text-align: left">{escape(name)}</th>'
        + "".join(f'<td style="text-align: left">{cell}</td>' for cell in cells)
        + "</tr>"
        for name, cells in rows.items()
    )
    return f"<table>{head}<tbody>{body}</tbody></table>"
