"""The studio in a real browser: answers a second while a slider is dragged, and minutes of random use, each picture checked.

    python bench/studio.py --record
    python bench/studio.py --minutes 10 --record

Starts `multibeta studio` and a Chromium beside it, on the same cores. An answer is a new picture on the page: the image decoded
at once and the one denoised in 4 evaluations, both anew. Random use moves what can be moved; whenever it rests, the lines of
Python that the page shows are run here, and what they make is compared with the picture, bit for bit. Needs playwright and a
Chromium.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from common import measure
from multibeta import data, pipelines

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SETTLED_MILLISECONDS = 400
LISTEN = """() => {
  window.answers = []
  const picture = document.querySelector('.picture')
  new MutationObserver(() => {
    const shown = picture.querySelectorAll('.shown img')[1]?.src
    if (shown && shown !== window.answers.at(-1)?.[1]) window.answers.push([performance.now(), shown])
  }).observe(picture, {subtree: true, childList: true, attributes: true})
}"""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="scenes32", help="as `multibeta studio` takes it")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each drag")
    parser.add_argument("--repetitions", type=int, default=5, help="drags")
    parser.add_argument("--minutes", type=float, help="of random use, in place of drags")
    parser.add_argument("--seed", type=int, default=0, help="of random use")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if executable is None:
        sys.exit(f"no Chromium is here: one of {', '.join(CHROMIUMS)} is needed")
    command = [sys.executable, "-m", "multibeta", "studio", arguments.model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
            browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            trouble: list[str] = []
            page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
            page.on("request", lambda request: trouble.append(request.url) if is_foreign(request.url, address) else None)
            page.goto(address)
            settled(page)
            facts = {"model": arguments.model, "chromium": browser.version, "load_average": os.getloadavg()[0]}
            if arguments.minutes is None:
                result = facts | {"answers_per_second": dragged(page, arguments.seconds, arguments.repetitions)}
            else:
                result = facts | used(page, server.pid, arguments.minutes, random.Random(arguments.seed))
            result["trouble"] = trouble
            browser.close()
        finally:
            server.terminate()
    print({name: value for name, value in result.items() if name != "memory_mib"})
    measure.record(arguments.results, "studio.jsonl", result)


def is_foreign(asked: str, address: str) -> bool:
    """Whether an address is of another host than that of the studio."""
    return not asked.startswith((address, "data:", "blob:"))


def dragged(page: Page, seconds: float, repetitions: int) -> dict[str, Any]:
    """Answers a second while the first slider, beta, goes to and fro under the mouse."""
    slider, rates = page.locator("input[type=range]").first, []
    for _ in range(repetitions):
        page.evaluate(LISTEN)
        box = box_of(slider)
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 5, middle)
        page.mouse.down()
        began, move = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            move += 1
            page.mouse.move(box["x"] + 5 + abs(move % 160 - 80) / 80 * (box["width"] - 10), middle)
            page.wait_for_timeout(16)
        answers = page.evaluate("window.answers.map(answer => answer[0])")
        page.mouse.up()
        rates.append(1000 * (len(answers) - 1) / (answers[-1] - answers[0]))
        settled(page)
    return {"median": statistics.median(rates), "each": rates, "text": page.inner_text(".said:has(a)")}


def used(page: Page, server: int, minutes: float, chance: random.Random) -> dict[str, Any]:
    """Random use: how much was done and checked, what was wrong, and the memory of the server over time."""
    remember_between_checks()
    do_everything_once(page)
    began, moves, checked = time.perf_counter(), 0, 0
    wrong: list[str] = []
    memory: list[tuple[float, float]] = []
    while (elapsed := time.perf_counter() - began) < 60 * minutes:
        for _ in range(chance.randint(1, 6)):
            move_something(page, chance)
            moves += 1
        settled(page)
        if (difference := compared(page)) is not None:
            wrong.append(difference)
        checked += 1
        if not memory or elapsed - memory[-1][0] > 15:
            memory.append((elapsed, resident_mib(server)))
            print(f"{elapsed:.0f} s: {moves} moves, {checked} checked, {len(wrong)} wrong, {memory[-1][1]:.0f} MiB", flush=True)
    growth = statistics.median(mib for _, mib in memory[-4:]) / statistics.median(mib for _, mib in memory[:4]) - 1
    return {
        "minutes": minutes,
        "moves": moves,
        "checked": checked,
        "wrong": wrong,
        "growth_of_memory": growth,
        "memory_mib": [round(mib, 1) for _, mib in memory],
    }


def do_everything_once(page: Page) -> None:
    """Each sort of picture, in each of its sizes: what is needed for a size is kept from then on."""

    def choose(label: str, number: float) -> None:
        slider = page.get_by_label(f"number input for {label}").filter(visible=True)
        slider.fill(str(number))
        slider.press("Enter")
        settled(page)

    for exact in (True, False):
        page.get_by_label("Exact").set_checked(exact)
        for tab in ("Path", "What a direction means", "New images", "Steer"):
            page.get_by_role("tab", name=tab).click()
            settled(page)
            if tab == "Path":
                for count in (4, 8, 12, 16):
                    choose("Images", count)
                    page.get_by_role("button", name="Draw the whole path").click()
                    settled(page)
            if tab == "New images":
                for count in (4, 8, 12):
                    choose("How many", count)
    choose("Directions are found at", 0.5)


def remember_between_checks() -> None:
    """Load a model and find its directions once in this process, whose lines would do so for each picture."""
    load, find = pipelines.load_pretrained, pipelines.named_directions
    loaded = functools.cache(load)
    found = functools.cache(lambda kind, beta, model, images: find(model, kind, images, beta))
    once: dict[str, data.Dataset] = {}
    for each in pipelines.PIPELINES.values():
        each.from_pretrained = loaded
    pipelines.named_directions = lambda model, kind, images, beta=None: found(
        kind, beta, model, once.setdefault(type(images).__name__, images)
    )


def move_something(page: Page, chance: random.Random) -> None:
    """One thing that a person may do."""
    kind = chance.random()
    if kind < 0.15:
        chance.choice(page.get_by_role("tab").filter(visible=True).all()).click()
    elif kind < 0.25:
        click_button(page, chance)
    elif kind < 0.3:
        buffer = io.BytesIO()
        Image.effect_noise((chance.randint(32, 200), chance.randint(32, 200)), 80).convert("RGB").save(buffer, format="PNG")
        content = buffer.getvalue()[: chance.choice([None, None, 200])]
        page.locator("input[type=file]").first.set_input_files({"name": "noise.png", "mimeType": "image/png", "buffer": content})
    else:
        sliders = page.locator("input[type=range]").filter(visible=True).all()
        slider = chance.choice(sliders)
        slider.scroll_into_view_if_needed()
        box = box_of(slider)
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * chance.random(), middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * chance.random(), middle, steps=chance.randint(1, 12))
        page.mouse.up()
    page.wait_for_timeout(chance.choice([0, 0, 50, 300]))


def click_button(page: Page, chance: random.Random) -> None:
    """One of the buttons that are seen."""
    named = re.compile("^(Another|Reset the directions|Draw the whole path|Steer this one)$")
    if buttons := page.get_by_role("button", name=named).filter(visible=True).all():
        chance.choice(buttons).click()


def box_of(slider: Locator) -> Any:
    box = slider.bounding_box()
    assert box is not None, "it is seen"
    return box


def settled(page: Page, timeout: float = 120.0) -> None:
    """Wait until the full picture of what is set is shown: its line has a file, and nothing changes any more."""
    deadline, before = time.perf_counter() + timeout, None
    while time.perf_counter() < deadline:
        line = page.locator(".said a[download]")
        now = (page.inner_html(".picture"), line.first.get_attribute("href")) if line.count() else None
        if now is not None and now == before:
            return
        before = now
        page.wait_for_timeout(2 * SETTLED_MILLISECONDS)
    raise TimeoutError(f"no picture after {timeout:.0f} s: {page.locator('.said').all_inner_texts()}")


def compared(page: Page) -> str | None:
    """The lines of the picture of the page, if they make another one."""
    held = page.get_attribute(".said a[download$=png]", "href")
    assert held is not None
    with tempfile.TemporaryDirectory() as folder, Image.open(io.BytesIO(base64.b64decode(held.partition(",")[2]))) as picture:
        assert isinstance(picture, Image.Image)
        lines = str(picture.info["Description"])
        if "'noise.png'" in lines:  # the file lay in this process alone
            return None
        here = os.getcwd()
        try:
            os.chdir(folder)
            exec(compile(lines, "lines", "exec"), {})
        finally:
            os.chdir(here)
        (written,) = Path(folder).glob("*.png")
        with Image.open(written) as repeated:
            same = repeated.size == picture.size and repeated.tobytes() == picture.tobytes()
    return None if same else lines


def resident_mib(process: int) -> float:
    """Memory that a process has, in MiB."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
