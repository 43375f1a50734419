"""Grids of images as PNG, with and without words beside their rows."""

import numpy as np
import pytest
import torch
from PIL import Image

from multibeta import data


def pixels(path):
    return np.array(Image.open(path))


def test_labels_stand_on_a_white_margin_beside_an_unchanged_grid(tmp_path):
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    data.save_grid(images, tmp_path / "plain.png", columns=2)
    data.save_grid(images, tmp_path / "labelled.png", columns=2, labels=["input", "beta 0.3", "moved by +2 deviations"])
    plain, labelled = pixels(tmp_path / "plain.png"), pixels(tmp_path / "labelled.png")
    margin = labelled.shape[1] - plain.shape[1]
    assert np.array_equal(labelled[:, margin:], plain)
    rows = [labelled[64 * row + 2 * row : 64 * (row + 1) + 2 * row, :margin] for row in range(3)]
    for row in rows:
        assert (row < 128).any() and (row[:8] == 255).all() and (row[-8:] == 255).all()  # words, in the middle of the row
        assert (row[:, :4] == 255).all() and (row[:, -4:] == 255).all()
    assert (rows[2] < 128).sum() > (rows[0] < 128).sum()


def test_labels_are_one_for_each_row(tmp_path):
    with pytest.raises(ValueError, match="labels must be one for each of 2 rows, got 3"):
        data.save_grid(torch.zeros(3, 3, 8, 8), tmp_path / "grid.png", columns=2, labels=["a", "b", "c"])
    assert not (tmp_path / "grid.png").exists()
