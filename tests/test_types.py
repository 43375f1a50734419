"""Types hold: pyright finds nothing in what is installed, nor in what a user writes with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

USER = '''
import torch
from PIL import Image
from torch import Tensor

import multibeta
from multibeta import data, evaluation, metrics, recipes, training


class Noise:
    """A dataset of somebody's own."""

    resolution, channels = 32, 3

    def __len__(self) -> int:
        return 100

    def images(self, indices: data.Indices) -> Tensor:
        return torch.randint(256, (len(indices), 3, 32, 32), dtype=torch.uint8)


class Brightness:
    """An objective of somebody's own."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def __call__(self, batch: training.Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss = self.module(batch.images.flatten(1)).square().mean()
        return loss, {"brightness": batch.images.mean()}


options = training.TrainingOptions(steps=10, batch_size=4)
weights: dict[str, Tensor] = training.train(Brightness(torch.nn.Linear(3072, 1)), Noise(), options, "runs/brightness")

trained = recipes.run(recipes.find("scenes32"), "runs/scenes32", device="cuda")
recipes.run(recipes.find("scenes32"), "runs/noise", dataset=Noise())
recipes.run(recipes.find("scenes32"), "runs/pictures", dataset=[(Image.new("RGB", (32, 32)), "label")] * 100)
trained.save_pretrained("runs/copy")

model = multibeta.DenoisingMultiBetaVAE.from_pretrained("scenes32", device="cpu", dtype=torch.float32)
scenes = data.open_dataset("scenes", 32)
images = data.to_float(scenes.images(range(8)))
with multibeta.backend("reference"):
    latents: Tensor = model.encode(images, 0.5)
    restored: Tensor = model.decode(model.denoise(latents, 0.5, sampler="ode2", steps=20))
model.encode(data.load_images(["photo.jpg", Image.new("RGB", (64, 64))], 32), 0.5)
model.manipulate(Image.new("RGB", (64, 64)), latents[0], 1.0, 0.5)
loader = torch.utils.data.DataLoader(data.MapDataset(images, 32), batch_size=2)
directions = model.principal_directions(images, 0.5).directions
edited: Tensor = model.manipulate(images, directions[0], 2.0, 0.5)
between: Tensor = model.interpolate(images[:4], images[4:], [0.0, 0.5, 1.0], 0.5)
pictures = model.generate(16, sampler="ode2", steps=20, seed=0, output_type="pil")
if data.knows_factors(scenes):
    print(scenes.factor_names, metrics.mig(lambda x: model.encode(x, 0.5), scenes, num_images=1000)["mig"])
measured = evaluation.evaluate(model, scenes, num_images=1000)
distance: float = metrics.frechet_distance(images.flatten(1), restored.flatten(1))
print(sorted(weights), edited.shape, between.shape, len(pictures), measured["rows"], distance)
'''


def install(folder):
    """What a wheel puts into `folder`, as pyproject.toml says."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in tool["packages"]:
        source = ROOT / tool["package-dir"].get(package, package.replace(".", "/"))
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        wanted = ["*.py", *(pattern for pattern in tool["package-data"].get(package, ()) if not pattern.startswith("pretrained"))]
        for path in {path for pattern in wanted for path in source.glob(pattern)}:
            shutil.copy(path, target)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What the checker says of the installed package and of a user's script: file to messages."""
    pytest.importorskip("basedpyright")
    folder = tmp_path_factory.mktemp("types")
    install(folder / "site")
    (folder / "user.py").write_text(USER, encoding="utf-8")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["basedpyright"]
    settings["include"] = ["user.py", "site"]
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--project", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    found = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    said = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": found}, capture_output=True, text=True)
    report = json.loads(said.stdout)
    errors = {}
    for entry in report["generalDiagnostics"]:
        if entry["severity"] == "error":
            place = Path(entry["file"]).resolve().relative_to(folder.resolve()).as_posix()
            errors.setdefault(place, []).append(f"line {entry['range']['start']['line'] + 1}: {entry['message']}")
    return errors


def test_what_is_installed_is_typed(errors):
    assert {place: messages for place, messages in errors.items() if place != "user.py"} == {}


def test_what_a_user_writes_is_typed(errors):
    assert errors.get("user.py", []) == []


def test_installations_say_that_they_are_typed(tmp_path):
    install(tmp_path)
    assert (tmp_path / "multibeta" / "py.typed").exists()
