"""Pieces of HTML that are whole in themselves."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta import data, markup

RAMP = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)


@pytest.mark.parametrize("image", [RAMP, RAMP[:1]], ids=["colour", "grey"])
def test_a_picture_holds_every_pixel_and_says_what_it_is(image):
    shown = markup.picture(image, 'a "ramp" < 1')
    assert 'alt="a &quot;ramp&quot; &lt; 1"' in shown and "width: 64px" in shown and "pixelated" in shown
    content = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', shown)[1])
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels, data.to_uint8(image).expand(3, -1, -1).permute(1, 2, 0).numpy())


def test_large_pictures_keep_their_size():
    shown = markup.picture(torch.zeros(3, 96, 96), "grey")
    assert "width: 96px" in shown and "pixelated" not in shown


def test_a_table_names_its_rows_and_columns_for_a_reader():
    made = markup.table(["−3", "a & b"], {"<0>": ["<b>1</b>", "2"]})
    assert made.count('scope="col"') == 2 and ">a &amp; b</th>" in made
    assert '<th scope="row" style="text-align: left">&lt;0&gt;</th>' in made and "<b>1</b>" in made
    assert "<thead>" not in markup.table([], {"0": ["1"]})
