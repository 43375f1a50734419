"""What a training writes down while it runs: a line of numbers now and then."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from multibeta import distribution, files

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of the training in a folder, none without them; the last may still be being written, and is then left out.

    Raises:
        ValueError: A line is no record: JSON, with the step and other numbers or null.
    """
    path = folder / METRICS
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [_record(line) for line in lines if line.endswith("}")]
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{path} holds a line that is no record of a training: {error}") from None


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError(f"{line[:80]} is nested without end") from None
    step, values = (record.get("step"), record.values()) if isinstance(record, dict) else (None, ())
    if not isinstance(step, int) or not all(value is None or isinstance(value, int | float) for value in values):
        raise ValueError(f"{line[:80]} has no step, or what is no number")
    return record


class MetricsLog:
    """`metrics.jsonl`, one JSON object a line, and events where TensorBoard is installed; by the first of several processes."""

    def __init__(self, folder: Path, step: int, *, validated: bool = True):
        self.path = folder / METRICS
        self.board: Any = None
        self.writes = distribution.world().first
        if not self.writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.keep_until(step, validated)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder, purge_step=step + 1)

    def keep_until(self, step: int, validated: bool) -> None:
        """Drop the lines of steps that will be run again, a last line cut short by a crash, and with a warning what is no record.

        Unless this step is `validated` for good, what was measured of it on held-out images goes too.
        """
        if not self.path.exists():
            return
        *whole, last = self.path.read_bytes().split(b"\n")
        kept, odd = [], 0
        for line in (*whole, last):
            try:
                record = _record(line.decode())
            except ValueError:  # also of bytes that are no UTF-8
                odd += line is not last
                continue
            again = record["step"] == step and not validated and any(name.startswith("validation/") for name in record)
            if record["step"] <= step and not again:
                kept.append(line + b"\n")
        if odd:
            logger.warning("%s held %d lines that are no record of a training: they are dropped", self.path, odd)
        files.write_atomically(self.path, lambda file: file.write(b"".join(kept)))

    def write(self, record: dict[str, float]) -> None:
        """Add a record, "step" and scalars, where there are any; what is not finite is null in the file."""
        if not record or not self.writes:
            return
        strict = {name: value if math.isfinite(value) else None for name, value in record.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(strict) + "\n")
        if self.board is not None:
            for name in record.keys() - {"step"}:
                self.board.add_scalar(name, record[name], record["step"])

    def close(self) -> None:
        """Finish the events."""
        if self.board is not None:
            self.board.close()
