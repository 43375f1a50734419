"""A folder in which multibeta, its kernels and its C++ sources resolve from a plain checkout, where nothing can be installed.

    eval "$(python bench/link.py /tmp/multibeta-links)"    # then bench/*.py and pytest run as after an installation

Makes FOLDER/multibeta of links into the checkout, and prints the line that puts FOLDER on PYTHONPATH. A second call brings the
links up to date. torch, numpy, safetensors, pillow and tqdm must be there; tyro is needed by the command line alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"kernels": ROOT / "kernels", "_csrc": ROOT / "csrc"}  # as pyproject.toml installs them


def link(folder: Path) -> Path:
    """Link the packages into `folder`/multibeta, drop links that are no longer wanted; returns the absolute `folder`.

    Raises:
        ValueError: `folder` lies in the checkout's own packages, or holds a multibeta that is not made of links.
    """
    folder = folder.resolve()
    if os.pathsep in str(folder):
        raise ValueError(f"{folder} has a {os.pathsep!r} in its name, which PYTHONPATH takes for two folders; name another")
    package = folder / "multibeta"
    if package == ROOT / "multibeta" or ROOT / "multibeta" in folder.parents:
        raise ValueError(f"{folder} holds the checkout's own multibeta; name another folder")
    if package.is_symlink() or (package.exists() and not package.is_dir()):
        raise ValueError(f"{package} is there already and no folder of links; name another folder or remove it")
    targets = {path.name: path for path in (ROOT / "multibeta").iterdir() if path.name != "__pycache__"} | ELSEWHERE
    package.mkdir(parents=True, exist_ok=True)
    present = {path.name: path for path in package.iterdir() if path.name != "__pycache__"}
    if foreign := [name for name, path in present.items() if not path.is_symlink()]:
        raise ValueError(f"{package} holds {foreign[0]}, which is no link; name another folder or remove it")
    for name, path in present.items():
        if name not in targets or path.readlink() != targets[name]:
            path.unlink()
    for name, target in targets.items():
        if not (package / name).is_symlink():
            (package / name).symlink_to(target)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made where it is missing")
    try:
        folder = link(parser.parse_args().folder)
    except (ValueError, OSError) as error:
        print("false")  # which `eval` hands on
        sys.exit(f"link.py: {error}")
    print(f"export PYTHONPATH={shlex.quote(str(folder))}${{PYTHONPATH:+:$PYTHONPATH}}")


if __name__ == "__main__":
    main()
