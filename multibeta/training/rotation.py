"""Earlier checkpoints of a training, kept next to its last."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from multibeta import checkpoints, files

EARLIER = "earlier"  # folder next to that of the last checkpoint; in it one for each, named after its step


def earlier(checkpoint: Path) -> list[Path]:
    """The kept checkpoints before that in `checkpoint`, the newest first."""
    return sorted((place for place in checkpoint.with_name(EARLIER).glob("[0-9]*") if checkpoints.exists(place)), reverse=True)


def keep(checkpoint: Path, number: int, damaged: Sequence[Path] = ()) -> None:
    """Keep the checkpoint that is about to be replaced, and of all that were kept the newest `number`; none that is `damaged`.

    It takes no room but that of the files, which are linked where the file system can.
    """
    kept = checkpoint.with_name(EARLIER)
    if number and checkpoint not in damaged and checkpoints.exists(checkpoint):
        checkpoints.settle(checkpoint)
        target = kept / f"{checkpoints.load_config(checkpoint)['step']:08d}"
        kept.mkdir(exist_ok=True)
        temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.part")
        shutil.copytree(checkpoint, temporary, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
        if target.exists():  # from before a resumed training made these steps again
            shutil.rmtree(target)
        os.rename(temporary, target)
    files.remove_abandoned(kept, ".*.part", younger=True)
    for place in {*earlier(checkpoint)[number:], *damaged} - {checkpoint}:
        shutil.rmtree(place)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
