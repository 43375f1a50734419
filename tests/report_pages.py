"""What a report in a browser does: its sliders moved by mouse and keys, what they show compared with what lies in the page."""

import base64
import io
import re

import numpy as np
from PIL import Image

from browser import visited
from multibeta.report.page import PICTURE_BYTES
from multibeta.report.sliders import SHEET_BYTES

PAGE_BYTES = 8_000_000  # what a page may have
WHITE, BLACK = (255, 255, 255), (21, 22, 23)  # the paper of light and dark pages


def most_bytes(page, more_pictures=0):
    """How long a page may get with as many pictures and sliders as this one, each as large as is allowed."""
    sheets, pictures = page.count('class="frames"'), page.count("data:image/webp")
    content = SHEET_BYTES * sheets + PICTURE_BYTES * (pictures - sheets + more_pictures)
    return len(re.sub(r"data:image/webp;base64,[^\"]*", "", page).encode()) + content * 4 // 3  # in base64


def picture_of(address):
    """The picture of a data: address."""
    return Image.open(io.BytesIO(base64.b64decode(address.split(",", 1)[1]))).convert("RGBA")


def screenshot(locator):
    """What an element looks like, (H, W, 3) uint8; it is painted on whole pixels, wherever its lines of text put it."""
    locator.scroll_into_view_if_needed()
    place = {name: round(value) for name, value in locator.bounding_box().items()}
    return np.asarray(Image.open(io.BytesIO(locator.page.screenshot(clip=place))).convert("RGB"))


class Slider:
    """A slider of an open page."""

    def __init__(self, locator):
        self.handle, self.frames = locator.locator("[type=range]"), locator.locator(".frames")
        self.buttons, self.image, self.output = (locator.locator(name) for name in ("[type=radio]", "img", "output"))
        self.values = self.handle.evaluate("handle => JSON.parse(handle.dataset.values)")
        self.sheet = picture_of(self.image.get_attribute("src"))

    def expected(self, choice, position, paper=WHITE):
        """The frame of a choice at a position as it lies in the sheet, on paper, enlarged as the page shows it."""
        choices, positions = max(1, self.buttons.count()), len(self.values)
        width, height = (self.sheet.width + 1) // choices - 1, (self.sheet.height + 1) // positions - 1
        left, top = choice * (width + 1), position * (height + 1)
        frame = self.sheet.crop((left, top, left + width, top + height))
        box = self.frames.bounding_box()
        scale = round(box["width"] / width)
        assert (box["width"], box["height"]) == (scale * width, scale * height)  # a whole number of times
        page = Image.new("RGBA", frame.size, paper)
        page.alpha_composite(frame)
        return np.asarray(page.convert("RGB").resize((scale * width, scale * height), Image.Resampling.NEAREST))

    def shows(self, choice, position, paper=WHITE):
        """Whether picture, texts and the handle are those of a choice at a position."""
        value = self.values[position]
        told = {self.output.inner_text(), self.handle.get_attribute("aria-valuetext")}
        named = self.image.get_attribute("alt").endswith(f" {value}")
        seen = np.array_equal(screenshot(self.frames), self.expected(choice, position, paper))
        return told == {value} and named and seen

    def drag(self, page, position):
        """The handle from where it is to a position, with the mouse."""
        self.handle.scroll_into_view_if_needed()
        box, last = self.handle.bounding_box(), len(self.values) - 1
        inset = 8  # the handle's half width
        at = lambda place: box["x"] + inset + (box["width"] - 2 * inset) * place / last  # noqa: E731
        height = box["y"] + box["height"] / 2
        page.mouse.move(at(int(self.handle.input_value())), height)
        page.mouse.down()
        page.mouse.move(at(position), height, steps=4)
        page.mouse.up()


def check_sliders(browser, address):
    """Every slider of a page shows what is chosen and where it is dragged, or moved by keys; how many there are.

    The page complains of nothing and asks for nothing.
    """
    with visited(browser, address) as visit:
        sliders = [Slider(locator) for locator in visit.page.locator(".slider").all()]
        for slider in sliders:
            check_slider(slider, visit.page)
        assert visit.messages == [] and visit.requests == [address]
    return len(sliders)


def check_slider(slider, page):
    """By keys, by the mouse, by its buttons."""
    last, choices = len(slider.values) - 1, slider.buttons.count()
    assert slider.shows(0, int(slider.handle.get_attribute("value")))
    for key, position in (("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowLeft", last - 1)):
        slider.handle.press(key)
        assert slider.shows(0, position)
    slider.drag(page, last // 2)
    assert slider.shows(0, last // 2)
    if choices:
        slider.buttons.nth(choices - 1).check()
        assert slider.shows(choices - 1, last // 2)
        slider.buttons.nth(choices - 1).press("ArrowLeft")
        assert slider.shows(choices - 2, last // 2)
