"""What pages are made of: numbers as text, curves from records, files that are whole or not there."""

import json
import os
import subprocess
import sys

import pytest

from browser import visited
from multibeta.markup import signed
from multibeta.report.page import Curves, document, drawn, number, table, training_section


@pytest.mark.parametrize(
    "value, digits, expected",
    [(0.97, 3, "0.970"), (12.34, 2, "12"), (1234.5, 3, "1,234"), (0, 3, "0"), (-0.5, 2, "−0.50"), (None, 3, "–")],
)
def test_numbers_keep_their_digits(value, digits, expected):
    assert number(value, digits) == expected


def test_signs_are_typographic():
    assert [signed(value) for value in (-2, 0, 1.5)] == ["−2", "0", "+1.5"]


def test_a_document_shows_names_as_text_and_leaves_empty_sections_out():
    page = document(
        "A & B", "<name>", "<p>lead</p>", "<p>introduction</p>", ["<section>one</section>", "", "<section>two</section>"]
    )
    assert "<h1>A &amp; B</h1>" in page and "<name>" not in page and "&lt;name&gt;" in page
    assert "<section>one</section>\n<section>two</section>" in page


def test_wide_tables_fit_into_a_window_and_onto_paper(chromium, tmp_path):
    header = ["β", *["sharpness,<br>direct", "denoised", "mean", "gain"] * 2, "squared error,<br>direct", "denoised", "mean"]
    row = ["0.1", *["0.0389", "0.0423", "0.0369", "0.992 ×"] * 2, "0.000419", "0.000416", "0.000383"]
    page = tmp_path / "page.html"
    page.write_text(document("Tables", "one", "", "", [table(header, [row], "A table.")]), encoding="utf-8")
    for width, media in ((1000, "screen"), (718, "print")):  # A4 less 1 cm all around
        with visited(chromium, page.as_uri(), width) as visit:
            visit.page.emulate_media(media=media)
            assert visit.page.locator(".scroll").evaluate("element => element.scrollWidth - element.clientWidth") == 0


def test_curves_come_from_the_records_that_hold_all_their_keys(tmp_path):
    (tmp_path / "vae").mkdir()
    records = [
        {"step": 1, "kl": 2.0, "capacity": 1.0},
        {"step": 1, "validation/loss": 1.0},
        {"step": 2, "kl": 3.0, "capacity": None},
    ]
    lines = [json.dumps(record) for record in records] + ['{"step": 3, "kl": 4.0, "capa']  # still being written
    (tmp_path / "vae" / "metrics.jsonl").write_text("\n".join(lines))
    curves = Curves("vae", "KL", {"kl": "KL", "capacity": "capacity"}), Curves("diffusion", "noise", {"noise_error": ""})
    assert curves[0].records(tmp_path) == records[:1] and curves[1].records(tmp_path) == []
    shown = training_section(tmp_path, curves, "A caption.")
    assert shown.count("<img") == 1 and "A caption." in shown
    for folder in (None, tmp_path / "nowhere"):
        assert "No records of the training" in training_section(folder, curves, "A caption.")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://nowhere.at_all", "TkAgg", "nonsense"])
def test_pictures_need_no_backend(backend):
    """A notebook hands MPLBACKEND to the commands that it runs, whether or not these could use it."""
    code = (
        "import os; from multibeta.report.page import drawn\n"
        "sizes = [len(drawn(lambda axes: axes[0].plot([1, 2]), file_format=file_format)) for file_format in ('svg', 'png')]\n"
        "print(min(sizes) > 1000, os.environ['MPLBACKEND'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"MPLBACKEND": backend}
    run = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["True", backend], run.stderr


def test_pictures_neither_use_nor_change_what_the_process_draws_with():
    import matplotlib
    from matplotlib import pyplot

    def draw(axes):
        axes[0].plot([1, 3, 2])
        axes[1].set(title="a title", xlabel="β")

    plain = [drawn(draw, file_format=file_format) for file_format in ("svg", "png")]
    before = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    dark = {"figure.facecolor": "black", "axes.facecolor": "black", "font.size": 30, "savefig.dpi": 20, "svg.fonttype": "none"}
    with matplotlib.rc_context(dark):
        own = pyplot.figure()
        settings = dict(matplotlib.rcParams)
        assert [drawn(draw, file_format=file_format) for file_format in ("svg", "png")] == plain
        assert dict(matplotlib.rcParams) == settings
        assert pyplot.get_fignums() == [own.number] and pyplot.gcf() is own and matplotlib.get_backend() == "agg"
        pyplot.close(own)
    pyplot.switch_backend(before)
