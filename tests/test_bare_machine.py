"""A plain checkout on a machine without a package index is linked, imports without tyro, leaves `kernels` to its owner."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = ROOT / "bench" / "link.py"
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "diffusers", "xformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run(*command, path=(), cwd=ROOT / "tests"):
    """The finished process of a Python command with these folders first on PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, os.environ.get("PYTHONPATH", ""))))}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def link(folder):
    finished = run(LINK, folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_links_are_made_once_and_follow_the_checkout(tmp_path):
    folder = tmp_path / "some links"
    printed = link(folder)
    assert printed == link(folder) == f"export PYTHONPATH='{folder}'${{PYTHONPATH:+:$PYTHONPATH}}\n"
    package = folder / "multibeta"
    (package / "gone.py").symlink_to(ROOT / "gone.py")  # a module that the checkout had once
    (package / "seeds.py").unlink()
    link(folder)
    assert {path.name for path in package.iterdir()} >= {"__init__.py", "seeds.py", "kernels", "_csrc", "pretrained"}
    assert not (package / "gone.py").is_symlink() and (package / "_csrc").resolve() == ROOT / "csrc"


@pytest.mark.parametrize(
    ("folder", "reason"),
    [(ROOT, "the checkout's own multibeta"), (ROOT / "multibeta" / "links", "the checkout's own multibeta")],
    ids=["root", "inside"],
)
def test_links_do_not_enter_the_package(folder, reason):
    finished = run(LINK, folder)
    assert finished.returncode == 1 and reason in finished.stderr
    assert finished.stdout == "false\n"  # `eval` of nothing succeeds


def test_links_overwrite_nothing(tmp_path):
    (tmp_path / "multibeta").mkdir()
    (tmp_path / "multibeta" / "mine.py").touch()
    assert "mine.py, which is no link" in run(LINK, tmp_path).stderr
    (tmp_path / "file").touch()
    assert "link.py: " in run(LINK, tmp_path / "file").stderr
    assert "PYTHONPATH takes for two folders" in run(LINK, tmp_path / "one:two").stderr


def test_all_but_the_command_line_does_without_tyro_and_the_peers(tmp_path):
    link(tmp_path)
    modules = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "multibeta").rglob("*.py"))
    modules = [name.removesuffix(".__init__") for name in modules if name.split(".")[1] not in ("cli", "__main__")]
    bench = ROOT / "bench"
    benches = sorted(".".join(path.relative_to(bench).with_suffix("").parts) for path in bench.rglob("*.py"))
    if importlib.util.find_spec("triton") is None:
        of_triton = ("aot", "compile_ahead", "launch_cost", "common.compilation", "common.noise")
        benches = [name for name in benches if name not in of_triton]
    code = WITHOUT + (
        f"import importlib\nsys.path.insert(0, {str(ROOT / 'bench')!r})\n"
        f"for name in {[*modules, 'multibeta.kernels', 'multibeta._csrc', 'multibeta.kernels.cpp', *benches]}:\n"
        "    importlib.import_module(name)\n"
        "print(sys.modules['multibeta.kernels.cpp'].__file__)"
    )
    finished = run("-c", code, path=[tmp_path])
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert finished.stdout.strip() == str(tmp_path / "multibeta" / "kernels" / "cpp.py")


def imported(path):
    """The first words of all names that a module imports where it is read, outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) not in inside and isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif id(node) not in inside and isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_tyro_is_imported_by_the_command_line_alone():
    folders = [ROOT / name for name in ("multibeta", "kernels", "csrc", "bench")]
    importing = [path for folder in folders for path in folder.rglob("*.py") if "tyro" in imported(path)]
    assert importing and all("cli" in path.relative_to(ROOT / "multibeta").parts for path in importing)


KERNELS = """
import importlib.util, kernels
assert importlib.util.find_spec("kernels") is not None  # what transformers asks first
print(getattr(kernels, "__version__", "N/A"), kernels.__file__, [name for name in dir(kernels) if name == "get_kernel"])
"""


def test_as_kernels_the_folder_stands_empty():
    finished = run("-c", KERNELS + "import kernels.cpp", path=[ROOT])
    assert finished.stdout == "N/A None []\n"
    assert "No module named 'kernels.cpp'" in finished.stderr


def test_as_kernels_the_folder_gives_way_to_the_package_of_that_name(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.hub import get_kernel\n__version__ = '0.18'\n")
    (package / "hub.py").write_text("def get_kernel(): pass\n")
    finished = run("-c", KERNELS, path=[ROOT, tmp_path])
    assert finished.stdout == f"0.18 {package / '__init__.py'} ['get_kernel']\n", finished.stderr


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "diffusers")), reason="needs transformers, diffusers"
)
def test_diffusers_imports_beside_the_checkout():
    finished = run("-c", "from diffusers import UNet2DModel; import sys; print('kernels' in sys.modules)", path=[ROOT])
    assert finished.returncode == 0, finished.stderr[-2000:]
