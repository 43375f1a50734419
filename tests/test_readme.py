"""What README shows works: its Python runs, its commands parse, its presets exist."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from multibeta import recipes
from multibeta.pipelines import DiffusionVAE

pytest.importorskip("tyro")
from multibeta import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = list(re.finditer(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", README, re.DOTALL | re.MULTILINE))
PYTHON = [block for block in BLOCKS if block["language"] == "python"]
LINES = [line.split("#")[0].strip() for block in BLOCKS if not block["language"] for line in block["code"].splitlines()]
COMMANDS = [line for line in LINES if line.startswith("multibeta ")]


def needs(code, package):
    """Whether `code` imports `package`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    return any(name.split(".")[0] == package for name in imported)


def test_python_blocks_run_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    DiffusionVAE(*recipes.build(recipes.find("diffusion-vae-scenes32"))).save_pretrained("runs/sketches/model")  # untrained
    names = {}
    for block in PYTHON:
        if needs(block["code"], "diffusers") and importlib.util.find_spec("diffusers") is None:
            continue  # it comes with the extra `peers`
        lines_before = README.count("\n", 0, block.start("code"))
        exec(compile("\n" * lines_before + block["code"], "README.md", "exec"), names)  # errors name the line of the README
    assert names["sharp"].shape == names["images"].shape
    assert names["between"].shape == (4, 3, 3, 32, 32)
    assert len(names["pictures"]) == 8
    assert 0 <= names["gap"]["mig"] <= 1 and len(names["difference"]["areas"]) == len(names["scenes"].attribute_names)


@pytest.mark.parametrize("line", [line for line in COMMANDS if "scenes" in line and line.split()[1] not in ("train", "report")])
def test_commands_run(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)[1:]) == 0
    out = shlex.split(line)[shlex.split(line).index("--out") + 1]
    assert (tmp_path / out).stat().st_size > 0


def test_train_commands_resolve(capsys):
    line = next(line for line in COMMANDS if line.endswith("--out runs/scenes32"))
    assert cli.main([*shlex.split(line)[1:], "--dry-run"]) == 0
    assert '"name": "scenes32"' in capsys.readouterr().out


def test_every_block_is_python_or_of_the_shell():
    assert {block["language"] for block in BLOCKS} <= {"", "python"} and README.count("```") == 2 * len(BLOCKS)


def test_every_preset_is_listed():
    for name in recipes.RECIPES:
        assert f"`{name}`" in README
