"""How the studio shows pictures: HTML that holds the images themselves, and files of them to download."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from multibeta import data
from multibeta.data.grid import grid_picture
from multibeta.markup import embedded
from multibeta.studio.origins import as_png
from multibeta.studio.pictures import Drawn

WIDE, LARGEST = 840, 288  # pixels on the page: of a row of images, and of one image
FRAME_MILLISECONDS = 120
CSS = """
.shown { display: grid; gap: .6rem; justify-content: start;
  grid-template-columns: repeat(var(--columns), minmax(0, var(--wide))) }
.shown figure { margin: 0; min-width: 0 } .shown img { width: 100%; display: block; border-radius: 2px }
.shown .pixels { image-rendering: pixelated }
.shown figcaption { font-size: .85rem; line-height: 1.3; padding-top: .3rem; overflow-wrap: anywhere }
.shown figcaption, .said { color: var(--body-text-color); opacity: .8 } .said { min-height: 1.6em; font-size: .9rem }
.said a { color: var(--link-text-color); margin-left: 1rem; text-decoration: underline }
.said.wrong { opacity: 1; color: #b4543f }
.dark .said.wrong { color: #f08c78 }
.hint { font-size: .85rem; opacity: .8; max-width: 46rem }
input[type=range]:focus-visible { outline: 2px solid; outline-offset: 3px }
.many { gap: .25rem .4rem }
@media (max-width: 700px) { .shown { gap: .25rem } .shown figcaption { font-size: .7rem }
  .gradio-container { overflow: clip !important } /* or nothing in it sticks */
  .picture { position: sticky !important; top: 0; z-index: 100; background: var(--body-background-fill) !important } }
"""


def as_html(drawn: Drawn) -> str:
    """The images of a picture, each with its label below."""
    side, many = drawn.images.shape[-1], drawn.columns > 4
    wide = max(side, min(LARGEST, WIDE // drawn.columns) // side * side)
    style = 'class="pixels"' if wide > side else ""
    figures = [
        f"<figure>{embedded(as_png(image), 'png', label, style)}<figcaption>{escape(caption)}</figcaption></figure>"
        for image, label, caption in zip(data.to_uint8(drawn.images), drawn.labels, drawn.captions or drawn.labels, strict=True)
    ]
    grid = f"--columns: {drawn.columns}; --wide: {wide}px"
    return f'<div class="shown{" many" if many else ""}" style="{grid}">{"".join(figures)}</div>'


def said(text: str, *links: str, wrong: bool = False) -> str:
    """A line about what is shown; screen readers say it when it changes."""
    style = "said wrong" if wrong else "said"
    return f'<div class="{style}" role="status" aria-live="polite">{" ".join([escape(text), *links])}</div>'


def downloads(drawn: Drawn, lines: str) -> list[str]:
    """Links that hold the picture as a PNG file, which says in its header how it was made, and its animation as a GIF file."""
    links = [link(png_file(drawn, lines), "png", f"{drawn.name}.png", "PNG")]
    if drawn.moving:
        links.append(link(gif_file(drawn.images[list(drawn.moving)]), "gif", f"{drawn.name}.gif", "GIF"))
    return links


def link(content: bytes, media: str, name: str, title: str) -> str:
    address = f"data:image/{media};base64,{base64.b64encode(content).decode()}"
    return f'<a download="{escape(name)}" href="{address}">{title}</a>'


def png_file(drawn: Drawn, lines: str) -> bytes:
    """What `data.save_grid` writes, with the lines that make it as its description."""
    buffer, header = io.BytesIO(), PngInfo()
    header.add_itxt("Description", lines)
    grid_picture(drawn.images, drawn.columns).save(buffer, format="PNG", pnginfo=header)
    return buffer.getvalue()


def gif_file(frames: Tensor) -> bytes:
    """Images (N, C, H, W) in [-1, 1] one after another, for ever."""
    pictures: list[Image.Image] = [grid_picture(frame[None], 1) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=FRAME_MILLISECONDS, loop=0, optimize=False
    )
    return buffer.getvalue()
