"""A plugin of pytest that appends the outcome of each test to the record named by $PARITY_LOG, the moment it is known."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import measure


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what was called, and what did not come so far."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    line = {"stage": "parity", "test": report.nodeid.rpartition("/")[2], "outcome": report.outcome}
    if report.failed:
        line["error"] = report.longreprtext[-600:]
    path = Path(os.environ["PARITY_LOG"])
    measure.append(path.parent, path.name, line)
