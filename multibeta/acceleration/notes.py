"""What served the calls of accelerated blocks, noted while someone listens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from multibeta import ops

_notes: list[str] | None = None


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what serves the calls of a `with` block."""
    global _notes
    previous, _notes = _notes, []
    try:
        yield _notes
    finally:
        _notes = previous


def note(text: str) -> None:
    """Tell the listener, once."""
    if _notes is not None and text not in _notes:
        _notes.append(text)


def note_op(name: str, *args, **kwargs) -> None:
    """Note which backend serves a call of an op; where it is none but the reference, why."""
    if _notes is not None:
        served = ops.explain(name, *args, **kwargs)
        note(served if served.startswith(f"{name}: reference") else served.partition(" (")[0])
