"""What the pages show works: their Python runs, their commands and flags exist, their links and names resolve."""

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import io
import pkgutil
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multibeta
from multibeta import recipes
from multibeta.data import scenes
from multibeta.pipelines import DiffusionVAE

pytest.importorskip("tyro")
from multibeta import cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "bench/RESULTS.md", "multibeta/README.md", "multibeta/interop/README.md", "multibeta/data/README.md")
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {page: list(BLOCK.finditer(text)) for page, text in TEXTS.items()}
RUN = ("edit", "interpolate", "encode", "directions", "convert")  # commands that finish in seconds on the shipped model


def shell_lines(page):
    """The commands of the shell blocks of a page, without comments."""
    lines = [line for block in BLOCKS[page] if not block["language"] for line in block["code"].splitlines()]
    return [line.split("#")[0].strip() for line in lines]


def spans(page):
    """What stands between backticks in the text of a page, outside its blocks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", TEXTS[page]))]


SPANS = {page: spans(page) for page in PAGES}
EVERYTHING = [text for page in PAGES for text in (*shell_lines(page), *SPANS[page])]
COMMANDS = sorted({text for text in EVERYTHING if re.match(r"multibeta [a-z]", text)})
SCRIPTS = sorted({text for text in EVERYTHING if re.match(r"(eval \"\$\()?python bench/", text)})


def flags(text):
    """The long options in a command line, without their values."""
    return re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", text)


@functools.cache
def help_of(*words):
    """What `multibeta WORDS --help` prints, wide enough that no flag is broken."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "400")
        with contextlib.suppress(SystemExit):
            cli.main([*words, "--help"])
    return printed.getvalue()


def knows(text, flag):
    """Whether a help text or the source of a script names `flag`, not only a longer one."""
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w.-]*\w)", text) is not None


def needs(code, package):
    """Whether `code` imports `package`."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = [getattr(node, "module", None) or node.names[0].name for node in nodes]
    return any(name.split(".")[0] == package for name in imported)


light_maps = functools.cache(scenes.light_maps)


@pytest.fixture(autouse=True)
def scenes_are_rendered_once(monkeypatch):
    monkeypatch.setattr(scenes, "light_maps", light_maps)


@pytest.fixture
def workplace(monkeypatch, tmp_path):
    """The current folder: photographs in photos, an untrained model in runs/refiner, and recipes that train in two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MULTIBETA_CACHE", str(tmp_path / "caches"))
    (tmp_path / "photos").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 40, 48, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    DiffusionVAE(*recipes.build(recipes.find("diffusion-vae-scenes32"))).save_pretrained("runs/refiner/model")
    run, trainings = recipes.run, ("vae_training", "diffusion_training")

    def short_run(recipe, folder, **options):
        two = {name: dataclasses.replace(getattr(recipe, name), steps=2, batch_size=4) for name in trainings}
        return run(dataclasses.replace(recipe, **two), folder, progress=False, **options)

    def short_train(source, minutes):
        two = {name: {"steps": 2, "batch_size": 4} for name in trainings}
        return train(source, progress=False, **two)

    train = multibeta.train
    monkeypatch.setattr(recipes, "run", short_run)
    monkeypatch.setattr(multibeta, "train", short_train)
    return tmp_path


def run_python(page):
    """Run the Python blocks of a page one after the other; returns the names they leave."""
    names = {}
    for block in BLOCKS[page]:
        if block["language"] != "python":
            continue
        if any(needs(block["code"], peer) and importlib.util.find_spec(peer) is None for peer in ("accelerate", "diffusers")):
            continue  # they come with the extra `peers`
        lines_before = TEXTS[page].count("\n", 0, block.start("code"))
        exec(compile("\n" * lines_before + block["code"], page, "exec"), names)  # errors name the line of the page
    return names


def test_the_front_page_runs(workplace):
    names = run_python("README.md")
    assert names["sharp"].shape == names["images"].shape == (8, 3, 32, 32)
    assert names["between"].shape == (1, 8, 3, 32, 32)
    assert names["codes"].shape[0] == 8
    assert names["refined"].shape == (8, 3, 32, 32)
    made, shown = (np.asarray(Image.open(path), dtype=float) for path in ("steer.png", ROOT / "bench/results/steer.png"))
    assert np.abs(made - shown).mean() < 4  # of 255: precisions and backends differ in the last places of latents


def test_the_library_from_inside_runs(workplace):
    names = run_python("multibeta/README.md")
    assert 0 <= names["gap"]["mig"] <= 1 and len(names["difference"]["areas"]) == len(names["scenes"].attribute_names)
    assert names["larger"].shape == names["refined"].shape == (8, 3, 32, 32)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("README.md", "multibeta/README.md")])
def test_other_pages_run(page, workplace):
    run_python(page)


@pytest.mark.parametrize(
    "line", [line for page in PAGES for line in shell_lines(page) if re.match(rf"multibeta ({'|'.join(RUN)}) scenes32 ", line)]
)
def test_commands_run(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)[1:]) == 0
    out = shlex.split(line)[shlex.split(line).index("--out") + 1]
    assert (tmp_path / out).stat().st_size > 0


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"multibeta train .*--out runs", line)])
def test_train_commands_resolve(line, workplace, capsys):
    recipe = re.search(r"--recipe (\S+)", line)[1]
    assert cli.main([*shlex.split(line)[1:], "--dry-run"]) == 0
    assert f'"name": "{recipe}"' in capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_flags_exist(line):
    _, command, *words = line.split()
    second = command == "train" and any(word.startswith("diffusion-vae-") for word in words)
    shown = help_of(command, *(["--recipe", "diffusion-vae-scenes32"] if second else []))
    if command != "COMMAND":
        assert f"usage: multibeta {command}" in shown
    for flag in flags(line):
        assert flag == "--help" or knows(shown + help_of(), flag), f"multibeta {command} has no {flag}"


@pytest.mark.parametrize("line", SCRIPTS)
def test_scripts_and_their_flags_exist(line):
    script = ROOT / re.search(r"bench/\w+\.py", line)[0]
    shared = [path for path in (ROOT / "bench").rglob("*.py") if "__main__" not in path.read_text(encoding="utf-8")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (script, *shared))
    for flag in flags(line):
        assert knows(sources, flag), f"{script.name} has no {flag}"


def test_flags_in_the_text_exist():
    helps = [help_of(line.split()[1]) for line in COMMANDS] + [help_of("train", "--recipe", "diffusion-vae-scenes32"), help_of()]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "bench").rglob("*.py")]
    for span in (span for page in PAGES for span in SPANS[page] if span.startswith("--")):
        for flag in flags(span):
            assert any(knows(text, flag) for text in (*helps, *sources)), f"nothing has {flag}"


def test_files_and_targets_in_the_text_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in EVERYTHING:
        for path in re.findall(r"(?<![\w/.])(?:tests|bench)/[\w/.]+\.\w+", text):
            assert (ROOT / path).exists(), path
        if target := re.fullmatch(r"make ([\w-]+)", text):
            assert f"\n{target[1]}:" in makefile, text
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", "".join(TEXTS.values())):
        assert f"def {name}(" in tests, name


def test_dotted_names_in_the_text_resolve():
    names = [match[0] for text in EVERYTHING if (match := re.match(r"multibeta(\.\w+)+", text))]
    assert len(names) > 60
    for name in names:
        assert pkgutil.resolve_name(name) is not None


def anchors(text):
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", TEXTS[page])):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_python_or_of_the_shell(page):
    assert {block["language"] for block in BLOCKS[page]} <= {"", "python"}
    assert TEXTS[page].count("```") == 2 * len(BLOCKS[page])


@pytest.mark.parametrize("page", ["README.md", "bench/RESULTS.md"])
def test_every_preset_is_listed(page):
    for name in recipes.RECIPES:
        assert f"`{name}`" in TEXTS[page]


def test_the_front_page_is_short_and_shows_pictures():
    assert len(TEXTS["README.md"].splitlines()) <= 200
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", TEXTS["README.md"])
    assert len(pictures) >= 2
    assert all((ROOT / picture).stat().st_size < 300_000 for picture in pictures)
