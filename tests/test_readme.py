"""What README shows works: its Python runs, its commands parse, its presets exist."""

import re
import shlex
from pathlib import Path

import pytest

from multibeta import cli, recipes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in BLOCKS if language == "python"]
LINES = [line.split("#")[0].strip() for language, code in BLOCKS if not language for line in code.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("multibeta ")]


def test_python_blocks_run_one_after_the_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), names)
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


def test_every_preset_is_listed():
    for name in recipes.RECIPES:
        assert f"`{name}`" in README
