"""The page of the studio in a real browser: what moves it, what it shows, what it refuses, and that it asks nobody else."""

import base64
import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.request

import pytest
import torch
from PIL import Image

from browser import WIDTHS, visited
from multibeta import data
from multibeta.studio import origins
from multibeta.studio.desk import Desk

pytest.importorskip("gradio", reason='needs Gradio (pip install "multibeta[studio]")')
from gradio import processing_utils

from multibeta.studio import page as studio_page
from multibeta.studio.server import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def desks(model, refiner, tmp_path_factory):
    """A desk for each system, on a folder of noisy images."""
    folder, made = tmp_path_factory.mktemp("studio"), {}
    (folder / "photos").mkdir()
    for index in range(12):
        pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(folder / "photos" / f"{index:02}.png")
    dataset = data.open_dataset(str(folder / "photos"), 16)
    for name, each in (("spectrum", model), ("refiner", refiner)):
        each.save_pretrained(folder / name)
        loaded = type(each).from_pretrained(folder / name)
        made[str(folder / name)] = Desk(str(folder / name), loaded, dataset, str(folder / "photos"), num_images=10)
    return made


@pytest.fixture(scope="module")
def studio(desks):
    """The address of a studio of both systems."""
    patched = pytest.MonkeyPatch()
    patched.setattr(studio_page, "PAUSE_SECONDS", 0.1)
    patched.setattr(studio_page, "SLIDERS", 8)  # fewer than there are principal directions
    with running(desks) as address:
        yield address.rstrip("/")
    patched.undo()


def settled(page, timeout=20_000):
    """Wait until the full picture of what is set now is shown: the line has its file, and stays."""
    deadline = time.monotonic() + timeout / 1000
    before = None
    while time.monotonic() < deadline:
        now = page.locator(".said a").count() and page.inner_html(".picture") + page.inner_text(".said:has(a)")
        if now and now == before:
            return
        before = now
        page.wait_for_timeout(350)
    raise AssertionError(f"no picture after {timeout} ms: {page.locator('.said').all_inner_texts()}")


def opened(browser, address, **options):
    return visited(browser, address, **options)


def picture_of(page):
    """The PNG file that can be downloaded."""
    return base64.b64decode(page.get_attribute(".said a[download$=png]", "href").partition(",")[2])


def check_picture(page, folder, monkeypatch):
    """The picture of the page is the one that the lines in its header make."""
    (folder / "downloaded.png").write_bytes(picture_of(page))
    with Image.open(folder / "downloaded.png") as downloaded:
        lines = downloaded.text["Description"]
        (folder / "run").mkdir(exist_ok=True)
        monkeypatch.chdir(folder / "run")
        exec(compile(lines, "lines", "exec"), {})
        (written,) = (folder / "run").glob("*.png")
        with Image.open(written) as repeated:
            assert repeated.tobytes() == downloaded.tobytes()
        written.unlink()
    return lines


def sliders(page):
    return [slider for slider in page.locator("input[type=range]").all() if slider.is_visible()]


def drag(page, slider, share):
    """Move a slider with the mouse to a share of its way."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    for step in range(1, 5):
        page.mouse.move(box["x"] + box["width"] * (0.5 + (share - 0.5) * step / 4), y)
    page.mouse.up()


@pytest.mark.parametrize("path", ["", "/refiner"])
def test_every_slider_of_every_tab_moves_the_picture(chromium, studio, path, tmp_path, monkeypatch):
    with opened(chromium, studio + path) as visit:
        page = visit.page
        settled(page)
        for tab in ("Steer", "Path", "What a direction means", "New images"):
            page.get_by_role("tab", name=tab).click()
            settled(page)
            if tab == "Path":
                page.get_by_role("button", name="Draw the whole path").click()
                settled(page)
                assert page.locator(".shown img").count() == 16 and page.locator(".said a[download$=gif]").count() == 1
            for number, slider in enumerate(sliders(page)):
                before = slider.input_value()
                low, high = (float(slider.get_attribute(end)) for end in ("min", "max"))
                drag(page, slider, 0.3 if float(before) > (low + high) / 2 else 0.8)
                slider.press("ArrowRight")
                assert slider.input_value() != before, (tab, number)
                if any(word in slider.get_attribute("aria-label") for word in ("There are", "Directions are")):
                    settled(page)  # others become those of other directions, at 0
            if tab == "Steer":
                drag(page, page.get_by_label("range slider for").filter(visible=True).nth(-3), 0.8)
            settled(page)
            lines = check_picture(page, tmp_path, monkeypatch)
            assert all(page.locator(".shown img").nth(index).get_attribute("alt") for index in range(2)), tab
            assert {"Steer": "directions[", "Path": "model.interpolate(", "New images": "model.generate("}.get(
                tab, "strengths"
            ) in lines
        assert visit.errors == [] and visit.foreign_requests == []


def test_exact_edits_noise_paths_and_new_images_that_are_steered(chromium, studio, tmp_path, monkeypatch):
    with opened(chromium, studio) as visit:
        page = visit.page
        settled(page)
        page.get_by_role("button", name="How it is denoised").click()
        page.get_by_label("Exact").check()
        page.wait_for_timeout(300)
        settled(page)
        assert "model.invert(" in check_picture(page, tmp_path, monkeypatch)
        page.get_by_role("tab", name="New images").click()
        settled(page)
        page.get_by_label("Number of an image").fill("3")
        page.get_by_role("button", name="Steer this one").click()
        page.wait_for_timeout(500)
        settled(page)
        assert "model.generate(8, sampler='ode2'" in check_picture(page, tmp_path, monkeypatch)
        page.get_by_role("button", name="Another").first.click()
        page.wait_for_timeout(500)
        settled(page)
        assert "dataset.images([" in check_picture(page, tmp_path, monkeypatch)
        assert visit.errors == []
    with opened(chromium, studio + "/refiner") as visit:
        page = visit.page
        page.get_by_role("tab", name="Path").click()
        page.get_by_label("two noises at one latent").check()
        page.wait_for_timeout(500)
        settled(page)
        assert "interpolate_noise" in check_picture(page, tmp_path, monkeypatch)
        page.get_by_role("button", name="Draw the whole path").click()
        page.wait_for_timeout(500)
        settled(page)
        assert page.locator(".shown img").count() == 8
        assert visit.errors == []


def test_sliders_of_directions_are_reset_and_named_anew(chromium, studio):
    with opened(chromium, studio) as visit:
        page = visit.page
        settled(page)
        name = page.get_by_label("number input for 0 ·").first
        name.wait_for()
        drag(page, page.get_by_label("range slider for 0 ·").first, 0.9)
        settled(page)
        page.get_by_role("button", name="Reset the directions").click()
        page.wait_for_timeout(500)
        assert page.get_by_label("range slider for 0 ·").first.input_value() == "0"
        drag(page, page.get_by_label("range slider for There are").first, 0.99)
        page.get_by_label("range slider for 8 ·").first.wait_for()
        assert page.get_by_label("range slider for 0 ·").count() == 0
        assert visit.errors == []


def test_files_are_taken_or_refused_with_a_reason(chromium, studio, desks, tmp_path, monkeypatch):
    good = Image.new("RGB", (40, 30), "orange")
    good.save(tmp_path / "good <b>.jpg")
    (tmp_path / "text.png").write_text("no image")
    good.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "long.png").write_bytes(bytes(origins.MOST_BYTES + 1))
    good.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])
    with opened(chromium, studio) as visit:
        page = visit.page
        settled(page)

        def drop(name):
            page.locator("input[type=file]").first.set_input_files(tmp_path / name)
            page.wait_for_timeout(600)

        for name, said in (("text.png", "cannot be read"), ("half.png", "cannot be read"), ("huge.png", "9000 x 9000 pixels")):
            drop(name)
            page.get_by_text(re.compile(f"{name}.*{said}")).wait_for()
        for name in ("moving.gif", "good <b>.jpg"):
            drop(name)
            page.get_by_text(f"{name}, as the model sees it").wait_for()
            settled(page)
            assert page.locator(".shown figcaption").first.inner_text() == name
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "good <b>.jpg").write_bytes((tmp_path / "good <b>.jpg").read_bytes())
        check_picture(page, tmp_path, monkeypatch)
        assert visit.errors == []
        drop("long.png")
        page.get_by_text(re.compile("maximum allowed size|exceeds", re.IGNORECASE)).first.wait_for()
        settled(page)
        assert visit.foreign_requests == []


def test_numbers_that_are_none_are_refused_with_a_reason(chromium, studio, capfd):
    with opened(chromium, studio) as visit:
        page = visit.page
        settled(page)
        drag(page, page.get_by_label("range slider for There are").first, 0.99)
        page.get_by_label("number input for 8 ·").first.wait_for()
        fields = {
            "number input for β: the": "beta must",
            "Image, 0": "the image must|images 0 to 11",
            "8 ·": "strength (must|of)",
        }
        for label, said in fields.items():
            field = page.get_by_label(label).first
            before = field.input_value()
            for wrong in ("", "99999"):
                field.fill(wrong)
                page.get_by_text(re.compile(f"({said}).*(None|99999)")).first.wait_for()
            field.fill(before)
            settled(page)
        slider = page.get_by_label("range slider for Directions are found")
        drag(page, slider, 1.0)
        page.get_by_text("directions need images whose latents differ").first.wait_for()
        assert visit.errors == []
    assert "Traceback" not in capfd.readouterr().err


def test_models_are_changed_by_their_names(chromium, studio):
    with opened(chromium, studio) as visit:
        page = visit.page
        settled(page)
        page.get_by_role("link", name="refiner").click()
        page.wait_for_url("**/refiner")
        settled(page)
        assert "the sketch" in page.locator(".shown figcaption").all_inner_texts()
        page.get_by_role("link", name="spectrum").click()
        page.get_by_text("decoded at beta").first.wait_for()
        assert visit.errors == [] and visit.foreign_requests == []


def test_it_fits_narrow_and_wide_windows_light_and_dark(chromium, studio):
    for width, scheme in zip(WIDTHS, ("dark", "light", "dark"), strict=True):
        with opened(chromium, studio, width=width, color_scheme=scheme) as visit:
            settled(visit.page)
            assert visit.overflow <= 0 and visit.errors == []
            color = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", color)[:3])) < 200) == (scheme == "dark")


def test_a_page_outlives_its_server(chromium, desks):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first = dict(list(desks.items())[:1])
    with running(first, port=port) as address:
        page = chromium.new_page()
        page.goto(address)
        settled(page)
    drag(page, sliders(page)[0], 0.2)
    page.get_by_text("Connection to the server was lost").first.wait_for()
    page.wait_for_timeout(1000)
    with page.expect_navigation(timeout=30_000), running(first, port=port):
        page.wait_for_event("load", timeout=30_000)
        settled(page)
        sliders(page)[0].press("Home")
        page.get_by_text("decoded at beta 0", exact=True).wait_for()
    page.close()


def fetch(address, **headers):
    """Status and text of an answer."""
    request = urllib.request.Request(address, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_other_hosts_and_sites_and_other_files_are_refused(studio, tmp_path):
    assert fetch(studio)[0] == 200
    assert fetch(studio, Host="evil.example")[0] == 403
    assert fetch(studio, Origin="http://evil.example")[0] == 403
    (tmp_path / "secret.txt").write_text("secret")
    for path in (f"file={tmp_path / 'secret.txt'}", "file=/etc/passwd", "file=../../../etc/passwd", "proxy=http://example.com"):
        status, text = fetch(f"{studio}/gradio_api/{path}")
        assert status in (403, 404) and "secret" not in text.replace("secret.txt", "") and "root:" not in text
    upload = json.dumps(
        {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": 3, "session_hash": "x"}
    )
    request = urllib.request.Request(f"{studio}/gradio_api/run/predict", upload.encode(), {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)


def test_no_address_that_a_page_names_is_fetched(studio, monkeypatch):
    fetched = []

    async def fetch_it(address, **options):
        fetched.append(address)
        return ""

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch_it)
    functions = json.loads(fetch(f"{studio}/config")[1])["dependencies"]
    forged = {"path": "http://evil.example/x.png", "meta": {"_type": "gradio.FileData"}}
    for function in (each for each in functions if each["inputs"] and not each["queue"]):
        asked = {"data": [forged] * len(function["inputs"]), "fn_index": function["id"], "session_hash": "x"}
        request = urllib.request.Request(f"{studio}/gradio_api/run/predict", json.dumps(asked).encode())
        request.add_header("content-type", "application/json")
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(request).close()
    assert fetched == []


@pytest.mark.parametrize("host", ["127.3.4.5", "::1"])
def test_it_answers_at_the_address_where_it_listens(desks, host):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        pytest.skip(f"this machine has no {host}: {error}")
    with running(dict(list(desks.items())[:1]), host=host) as address:
        assert fetch(address)[0] == 200
