"""Rows of an experiment, summed up over seeds."""

import pytest

from multibeta.reproduce.summary import mean_and_deviation, summarise


class TestSummary:
    def test_mean_and_deviation_over_seeds(self):
        rows = [{"name": name, "seed": seed, "mig": value} for name, seed, value in (("a", 0, 1.0), ("b", 0, 5.0), ("a", 1, 3.0))]
        first, second = summarise(rows, ("name",), ("mig",))
        assert first["mig"] == {"mean": 2.0, "std": pytest.approx(2**0.5)} and first["seeds"] == 2
        assert second["mig"] == {"mean": 5.0, "std": 0.0}

    def test_a_single_value_has_no_deviation(self):
        assert mean_and_deviation([0.5]) == {"mean": 0.5, "std": 0.0}
