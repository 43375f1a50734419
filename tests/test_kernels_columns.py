"""The layout of a sampler's tables: written and read by name, and the same in C++."""

import re
from pathlib import Path

import pytest
import torch

from multibeta.kernels.columns import GuidanceRow, OneHeadRow, SamplerRow, TwoHeadRow, head_row, pack, with_next_input

SOURCE = Path(__file__).parents[1] / "csrc" / "sampler_update.cpp"


def test_a_table_is_read_by_the_names_it_was_written_by():
    sigma = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    row = SamplerRow(latent=1, noise_prediction=-sigma, delta=2, fresh_noise=sigma / 2)
    table = pack(row, (3,))
    assert table.shape == (3, 7) and table.dtype == torch.float64
    read = SamplerRow(*table.unbind(-1))
    assert torch.equal(read.noise_prediction, -sigma) and torch.equal(read.fresh_noise, sigma / 2)
    assert (read.latent == 1).all() and not read.previous_noise_prediction.any() and not read.previous_delta.any()
    assert not read.offset.any()


@pytest.mark.parametrize("row", [TwoHeadRow, OneHeadRow])
def test_heads_are_told_apart_by_their_columns(row):
    table = torch.randn(4, 3, len(row._fields))
    assert type(head_row(table)) is row and torch.equal(torch.stack(head_row(table), dim=-1), table)


@pytest.mark.parametrize("row", [TwoHeadRow, OneHeadRow])
def test_each_step_writes_the_input_of_the_next(row):
    table = torch.randn(4, 3, len(row._fields))
    now, shifted = head_row(table), head_row(with_next_input(table))
    for name, column, moved in zip(row._fields, now, shifted, strict=True):
        assert torch.equal(moved, column.roll(-1, dims=0) if name.startswith("input_") else column), name


def test_both_heads_share_their_columns():
    own = {"delta_from_second": "delta_from_condition", "delta_offset": "delta_limit"}
    assert tuple(own.get(name, name) for name in TwoHeadRow._fields) == OneHeadRow._fields[: len(TwoHeadRow._fields)]
    assert GuidanceRow._fields == ("weight", "latent_from_condition")


def test_the_c_plus_plus_enums_are_the_same_columns():
    enums = re.findall(r"enum (\w+Row) \{(.*?)\};", SOURCE.read_text(encoding="utf-8"), re.DOTALL)
    columns: dict[str, int] = {}
    for name, body in enums:
        value = -1
        for entry in re.sub(r"//[^\n]*", "", body).replace("\n", " ").split(","):
            constant, _, given = (part.strip() for part in entry.partition("="))
            value = columns[given] if given else value + 1
            columns[constant] = value
        assert name in ("SamplerRow", "TwoHeadRow", "OneHeadRow")
    for row in (SamplerRow, TwoHeadRow, OneHeadRow):
        for index, field in enumerate(row._fields):
            constant = "k" + "".join(word.capitalize() for word in field.split("_"))
            assert columns[constant] == index, constant
        assert columns[f"k{row.__name__.removesuffix('Row')}Columns"] == len(row._fields)
