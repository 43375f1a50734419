"""What pages are made of: numbers as text, curves from records, files that are whole or not there."""

import json

import pytest

from multibeta.page import Curves, document, number, signed, training_section


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
