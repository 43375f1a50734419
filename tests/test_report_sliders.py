"""Sliders of a report: where frames lie in their sheet, and in a browser, what is shown where; limits that keep pages small."""

import io
import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from browser import WIDTHS, visited
from multibeta.report.page import compressed, document, figure, grid_canvas, section
from multibeta.report.sliders import SCRIPT, SHEET_PIXELS, images_that_fit, slider, spaced
from report_pages import BLACK, WHITE, Slider, check_sliders, picture_of

VALUES, CHOICES = [f"{index / 4:g}" for index in range(5)], ["0 · 60%", "<b>", '"quoted"']


@pytest.fixture(scope="module")
def frames():
    """Three choices, five positions, two rows of three images: (3, 5, 2, 3, 3, 8, 8)."""
    return torch.rand(3, 5, 2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def address(frames, tmp_path_factory):
    """A page of two sliders."""
    plain = slider(frames[:1], "A path", "way", VALUES, 2, above=("from", "between", "to"))
    choice = slider(frames, "Edits & more", "strength", VALUES, 3, choice="Direction", choices=CHOICES, left=("input", "edited"))
    path = tmp_path_factory.mktemp("sliders") / "page.html"
    content = section("one", "One", figure(plain, "A figure."), figure(choice, "Another."))
    path.write_text(document("Sliders", "two", "", "", [content], SCRIPT), encoding="utf-8")
    return path.as_uri()


def sheet_of(content):
    """The sheet of a slider."""
    return picture_of(re.search(r'<img src="([^"]+)"', content)[1])


def test_frames_lie_side_by_side_by_choice_and_beneath_each_other_by_position(frames):
    sheet = sheet_of(slider(frames, "Edits", "strength", VALUES, 0, choice="Direction", choices=CHOICES))
    width, height = 3 * 9, 2 * 9  # three columns and two rows of 8 pixels with gaps of one
    assert sheet.size == (3 * width - 1, 5 * height - 1)
    for choice, position in itertools.product(range(3), range(5)):
        left, top = choice * width, position * height
        seen = sheet.crop((left, top, left + width - 1, top + height - 1))
        expected = grid_canvas(frames[choice, position].flatten(0, 1), 3)
        assert np.array_equal(np.asarray(seen)[..., 3], np.asarray(expected)[..., 3])  # gaps are transparent
        assert np.array_equal(*(np.asarray(each.convert("RGBa")) for each in (seen, expected)))


def test_texts_are_text(frames):
    content = slider(frames, "Edits & more", "strength", VALUES, 3, choice="Direction", choices=CHOICES)
    assert "<span>&lt;b&gt;</span>" in content and 'alt="Edits &amp; more, Direction 0 · 60%, strength 0.75"' in content


def test_pictures_are_lossless_as_long_as_they_fit_and_never_larger_than_allowed():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    whole = compressed(noise, 300_000)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(whole))), np.asarray(noise))
    for most, size in ((100_000, (300, 200)), (10_000, (150, 100)), (1000, (75, 50))):
        made = compressed(noise, most)
        assert len(made) <= most and Image.open(io.BytesIO(made)).size == size


def test_large_images_have_fewer_positions_and_columns():
    assert spaced(-3, 3, 12, 32, False) == [-3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert spaced(-3, 3, 12, 32, True) == spaced(-3, 3, 12, 128, False) == [-3, -2, -1, 0, 1, 2, 3]
    fits = [images_that_fit(8 * len(spaced(-3, 3, 12, pixels, False)), 2, pixels, 6) for pixels in (32, 64, 128, 256, 512)]
    assert fits == [6, 5, 2, 1, 1]
    assert fits[2] * 8 * 7 * 2 * 128**2 <= SHEET_PIXELS


def test_every_frame_is_shown_where_the_slider_is_put(chromium, address):
    assert check_sliders(chromium, address) == 2
    with visited(chromium, address) as visit:
        second = visit.page.locator(".slider").nth(1)
        assert second.locator("img").get_attribute("alt") == "Edits & more, Direction 0 · 60%, strength 0.75"
        assert visit.page.get_by_role("slider", name="strength").count() == 1
        assert visit.page.get_by_role("group", name="Direction").get_by_role("radio", name='"quoted"').count() == 1


def test_the_handle_shows_that_it_has_the_focus(chromium, address):
    with visited(chromium, address) as visit:
        visit.page.keyboard.press("Tab")
        outline = visit.page.locator(":focus").evaluate("element => [element.type, getComputedStyle(element).outlineStyle]")
        assert outline == ["range", "solid"]


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_into_windows_dark_and_light(chromium, address, width):
    for scheme, paper in (("light", WHITE), ("dark", BLACK)):
        with visited(chromium, address, width, color_scheme=scheme) as visit:
            assert visit.overflow == 0
            body = "getComputedStyle(document.body)"
            assert visit.page.evaluate(f"{body}.backgroundColor") == f"rgb{paper}"
            ink = re.findall(r"\d+", visit.page.evaluate(f"{body}.color"))
            assert abs(luminance(map(int, ink)) - luminance(paper)) > 0.6
            if width == WIDTHS[-1]:
                assert all(Slider(each).shows(0, position, paper) for each, position in sliders_at_rest(visit))
            boxes = [each.bounding_box() for each in visit.page.locator(".frames, [type=range], [type=radio]").all()]
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)


def sliders_at_rest(visit):
    """The sliders of the page and where they stand before they are moved."""
    return zip(visit.page.locator(".slider").all(), (2, 3), strict=True)


def luminance(color):
    """Of an sRGB color, WCAG 2: 0 is black, 1 white."""
    linear = [((value / 255 + 0.055) / 1.055) ** 2.4 for value in color]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_without_scripts_and_in_print_a_frame_and_its_value_are_there(chromium, address):
    with visited(chromium, address, java_script_enabled=False) as visit:
        assert_still(visit, "0.75")
    with visited(chromium, address) as visit:
        handle = visit.page.locator("[type=range]").nth(1)
        handle.press("End")
        visit.page.emulate_media(media="print", color_scheme="dark")
        assert_still(visit, "1")


@pytest.mark.parametrize("choice, position", [(0, 0), (1, 1)])
def test_paper_shows_the_whole_chosen_frame_and_nothing_of_the_others(chromium, tmp_path, choice, position):
    colors = torch.tensor([color for color in itertools.product((-1.0, 1.0), repeat=3) if len(set(color)) > 1])
    shown = slider(
        colors.view(2, 3, 1, 1, 3, 1, 1).expand(2, 3, 1, 1, 3, 8, 8), "Edits", "strength", "abc", 2, choice="Way", choices="de"
    )
    filled = '<div style="height: 18cm"></div>'  # the picture does not fit beneath it, and the figure on no page at all
    page = tmp_path / "page.html"
    page.write_text(document("Sliders", "one", "", "", [figure(filled + shown, "A figure.")], SCRIPT), encoding="utf-8")
    with visited(chromium, page.as_uri()) as visit:
        visit.page.get_by_role("radio").nth(choice).check()
        for key in ["Home", *["ArrowRight"] * position]:
            visit.page.get_by_role("slider").press(key)
        visit.page.pdf(path=tmp_path / "page.pdf", format="A4", margin=dict.fromkeys(("top", "right", "bottom", "left"), "1cm"))
    paper = drawn_paper(chromium, (tmp_path / "page.pdf").as_uri())
    (top, left), (bottom, right) = (edge(np.argwhere(saturated(paper)), 0) for edge in (np.min, np.max))
    assert right - left > 300 and abs((bottom - top) - (right - left)) <= 1  # a square, in one piece
    assert paper[top - 20 : top].min() < 128 and paper[bottom + 1 : bottom + 20].min() < 128  # texts stay with it
    expected = (colors.view(2, 3, 3)[choice, position].numpy() > 0) * 255
    assert (paper[top : bottom + 1, left : right + 1] == expected).all()


def saturated(picture):
    """Which pixels have a color of the frames: neither paper nor ink, nor between a frame and paper."""
    return np.ptp(picture, -1) == 255


def drawn_paper(browser, address):
    """What the first pages of a PDF look like in the browser's own viewer, which says nowhere when it is done."""
    with visited(browser, address + "#toolbar=0", 500, 2200) as visit:
        before = None
        for _ in range(50):
            picture = np.asarray(Image.open(io.BytesIO(visit.page.screenshot())).convert("RGB"))
            if saturated(picture).any() and np.array_equal(picture, before):
                return picture
            before = picture
            visit.page.wait_for_timeout(200)
    raise AssertionError(f"{address} shows no frame")


def assert_still(visit, value):
    """Frame, chosen direction and value of the second slider are there, and nothing to be moved."""
    slider = visit.page.locator(".slider").nth(1)
    assert slider.locator(".frames").bounding_box()["height"] > 100 and slider.locator("output").inner_text() == value
    assert slider.locator("[type=range]").is_hidden()
    assert [label.is_visible() for label in slider.locator("fieldset label").all()] == [True, False, False]
