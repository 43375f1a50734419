"""The house stands on its floors: imports point downwards, packages are complete, every equation has its home."""

import ast
import graphlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

FLOORS = (
    {"files", "distribution", "draws", "seeds", "checks", "processors", "progress"},
    {"caches", "numbered_files"},
    {"kernels", "_csrc", "data", "weights"},
    {"metrics", "ops", "checkpoints", "saving", "markup"},
    {"basis", "blocks", "schedules", "spans", "variational"},
    {"networks"},
    {"inference", "training"},
    {"multibeta_vae", "nonlinear_diffusion", "gaussian_diffusion", "sampling", "diffusion_vae", "flow_map"}
    | {"latents", "baselines", "disco"},
    {"pipelines", "interop", "adversarial"},
    {"acceleration", "recipes", "environment"},
    {"evaluation"},
    {"report", "doctor", "studio"},
    {"reproduce"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def module_files():
    """Every module but `multibeta/__init__.py`, which gathers the public names of all floors, by its dotted name."""
    files = {}
    for package, folder in (("multibeta", "multibeta"), ("multibeta.kernels", "kernels"), ("multibeta._csrc", "csrc")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join((package, *parts)).removesuffix(".__init__")] = path
    del files["multibeta"]
    return files


MODULES = module_files()


def unit(module):
    """The part of multibeta that a dotted name belongs to: `data` for `multibeta.data.images`."""
    return module.split(".")[1]


def imports(module):
    """Dotted names that a module imports, anywhere in its code."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{source}.{alias.name}" for alias in node.names} if source == "multibeta" else {source}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_from_lower_floors_only(module):
    assert unit(module) in FLOOR_OF, f"{module} stands on no floor: give it one here and in multibeta/README.md"
    for name in imports(module):
        if name.split(".")[0] != "multibeta" or (name != "multibeta" and unit(name) == unit(module)):
            continue
        assert name != "multibeta" and unit(name) in FLOOR_OF, f"{module} imports {name}: import the module that defines it"
        assert FLOOR_OF[unit(name)] < FLOOR_OF[unit(module)], f"{module} imports {name}, which is on no lower floor"


def imported_modules(module):
    """Modules of multibeta whose code has run when `module` is imported: what it imports but for types alone."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    names, nodes = set(), [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            members = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else source for name in members}
        nodes += ast.iter_child_nodes(node)
    return {name for name in names if name in MODULES and name != module}


def test_no_module_imports_itself_through_others():
    try:
        graphlib.TopologicalSorter({module: imported_modules(module) for module in MODULES}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_module_is_too_long_to_read():
    lengths = {module: path.read_text(encoding="utf-8").count("\n") for module, path in MODULES.items()}
    long = [module for module, lines in lengths.items() if lines > 500 and unit(module) not in ("kernels", "_csrc")]
    assert not long, "a kernel may be as long as its algorithm, a module has at most 500 lines"


@pytest.mark.parametrize("module", [name for name in MODULES if unit(name) == "kernels"])
def test_kernels_import_torch_triton_and_xformers_only(module):
    foreign = {name.split(".")[0] for name in imports(module)} - set(sys.stdlib_module_names)
    own = {name for name in imports(module) if name.startswith("multibeta")}
    assert foreign - {"multibeta"} <= {"torch", "triton", "xformers"}
    assert all(unit(name) in ("kernels", "_csrc", *(["files", "caches"] if module.endswith(".build") else [])) for name in own)


def test_every_folder_of_modules_is_packaged():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inside = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "multibeta").rglob("__init__.py")}
    folders = {name.replace("/", "."): name for name in inside} | {"multibeta.kernels": "kernels", "multibeta._csrc": "csrc"}
    assert sorted(tool["packages"]) == sorted(folders)
    for package, folder in tool["package-dir"].items():
        assert folders[package] == folder


def test_importing_multibeta_brings_only_what_it_always_needs():
    code = (
        "import sys, torch; torch_brought = set(sys.modules); import multibeta; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - torch_brought}))"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    brought = set(output.stdout.split())
    assert "multibeta" in brought
    assert not brought & {"matplotlib", "sklearn", "scipy", "tyro", "triton"}


INSIDE = (ROOT / "multibeta" / "README.md").read_text(encoding="utf-8")


def section(title):
    """The text under a heading of multibeta/README.md."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", INSIDE, re.MULTILINE | re.DOTALL)
    assert found, f"multibeta/README.md needs a section {title!r}"
    return found[1]


def test_the_page_shows_the_floors():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", section("Floors"), re.MULTILINE)
    shown = [set(re.findall(r"`(\w+)`", units)) for _, units in rows]
    assert shown == list(FLOORS) and [int(floor) for floor, _ in rows] == list(range(len(FLOORS)))


def test_the_page_shows_every_room():
    shown = re.findall(r"^  (\w+)(?:\.py|/)  ", section("Rooms"), re.MULTILINE)
    here = {path.stem for path in (ROOT / "multibeta").glob("*.py")} | {
        path.parent.name for path in (ROOT / "multibeta").glob("*/__init__.py")
    }
    assert sorted(shown) == sorted(here - {"__init__", "__main__"})


def test_the_page_says_where_to_find_things():
    rows = re.findall(r"^\| ([^|`]+) \| (`.*`) \|$", section("Where do I find ..."), re.MULTILINE)
    names = [name for _, answer in rows for name in re.findall(r"`([\w.]+)`", answer)]
    assert len(rows) >= 25 and len(names) == len(set(names))
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, f"{name} needs a docstring"


def equation_index():
    """Rows of the table "Where each equation lives": (tag, dotted name)."""
    table = section("Where each equation lives")
    return re.findall(r"^\| *((?:MultiBeta|DiffusionVAE) [^|]*?) *\| *`([\w.]+)` *\|", table, re.MULTILINE)


def test_every_equation_of_the_index_is_where_the_page_says():
    rows = equation_index()
    assert rows
    for tag, name in rows:
        docstring = " ".join((pkgutil.resolve_name(name).__doc__ or "").split())  # a tag may wrap
        assert re.search(re.escape(tag) + r"(?!\d)", docstring), f"the docstring of {name} does not carry {tag}"


def test_every_equation_has_one_home():
    tags = [tag for tag, _ in equation_index()]
    assert len(tags) == len(set(tags))
