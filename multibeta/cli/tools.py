"""Commands around models: other people's weights, benchmarks, caches, the machine."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from tyro.conf import Positional, arg

from multibeta import acceleration, caches, environment, interop
from multibeta.cli.arguments import Device, Switch, available, require_at_least
from multibeta.pipelines import load_pretrained

if TYPE_CHECKING:  # what there is to choose from is known when it runs
    Format = str
else:
    Format = Literal[interop.FORMATS]


@dataclass(frozen=True, kw_only=True)
class Accelerate:
    """What `multibeta.accelerate` makes of a diffusers model: each block's path, error and milliseconds, on its own weights."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]  # Where diffusers saved the model: config.json and weights.
    variant: str | None = None  # Of its weights, such as fp16; by default those without one, or the only ones there are.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of weights and arithmetic.
    batch: int = 1  # Samples of the random input.
    size: int | None = None  # Its height and width; by default that of the model's configuration.
    repetitions: int = 3  # Timed calls of each block.
    device: Device = "auto"  # Where to compute: auto is the GPU, where torch sees one.

    def run(self) -> None:
        require_at_least(1, batch=self.batch, size=self.size, repetitions=self.repetitions)
        model = acceleration.load(self.folder, getattr(torch, self.dtype), self.variant).to(available(self.device))
        inputs = acceleration.random_inputs(model, batch=self.batch, size=self.size)
        print(acceleration.table(acceleration.check(model, repetitions=self.repetitions, **inputs)))


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Weights of diffusers or latent-diffusion as networks of multibeta, and back, with what became what.

    Example: multibeta convert scenes32 --to diffusers --out converted --beta 0
    """

    source: Annotated[Positional[str], arg(metavar="SOURCE")]  # Folder of diffusers, weights of latent-diffusion, or a MODEL.
    to: Format  # multibeta and diffusers are folders, ldm is one .safetensors file.
    out: Path  # Folder or file.
    parts: tuple[Literal["unet", "vae"], ...] = ("unet", "vae")  # What to take of what there is.
    beta: float | None = None  # Of a MODEL: where to freeze its VAE.
    head_channels: int | None = None  # Of attention in a U-Net of latent-diffusion, whose weights do not show it.
    num_heads: int | None = None  # In place of --head-channels.
    resolution: int | None = None  # Of the input; by default what the config says or the depth suggests. Outputs do not change.
    latent: Literal["published", "decoder"] = "published"  # decoder: post_quant_conv goes into the encoder, where it is exact.
    mean_only: Switch = False  # The encoder returns the mean, as that of a multi-beta VAE, not mean and log variance.
    ema: Switch = False  # Averaged weights of a checkpoint of latent-diffusion.
    variant: str | None = None  # Of weights of diffusers, such as fp16; by default those without one, or the only ones there are.
    verbose: Switch = False  # Show every tensor.

    def run(self) -> None:
        if interop.is_ours(self.source):
            networks = interop.model_networks(load_pretrained(self.source), self.beta, self.parts)
        elif self.beta is not None:
            raise ValueError(f"--beta freezes a model of multibeta, {self.source} is none")
        else:
            names = "parts head_channels num_heads resolution latent mean_only ema variant"
            networks = interop.read_networks(self.source, **{name: getattr(self, name) for name in names.split()})
        for name, report in interop.write_networks(networks, self.to, self.out).items():
            print(f"{name}: {report.summary()}" + (f"\n{report}\n" if self.verbose else ""))
        print(f"{self.out}: {', '.join(networks.modules)}")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A benchmark of the checkout that multibeta is installed from: NAME and its flags, as python bench/NAME.py takes them."""

    name: Annotated[Positional[str], arg(metavar="NAME")]  # One of bench/, such as sample_throughput.
    flags: Annotated[Positional[tuple[str, ...]], arg(metavar="FLAGS")] = ()  # What the benchmark takes: see NAME --help.

    def run(self) -> None:
        folder = Path(__file__).resolve().parents[2] / "bench"
        known = sorted(path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
        if not known:
            raise FileNotFoundError(f"there is no {folder}: benchmarks come with a checkout, installed by pip install -e")
        if self.name not in known:
            raise ValueError(f"no benchmark called {self.name!r}; there are {', '.join(known)}")
        subprocess.run([sys.executable, str(folder / f"{self.name}.py"), *self.flags], check=True)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What the library derived from your data and keeps for later: decoded images, compiled kernels, fits of DCI."""

    action: Positional[Literal["show", "clear"]] = "show"  # clear removes all of it; what is needed is made again.

    def run(self) -> None:
        if self.action == "clear":
            count, size = caches.clear_caches()
            print(f"removed {count} files, {size / 2**20:.1f} MiB")
        print("\n".join(environment.aligned(environment.caches())))


@dataclass(frozen=True, kw_only=True)
class Env:
    """Show versions, the machine, the caches, and each fast path: on, or off with the reason, found by calling it."""

    def run(self) -> None:
        print(environment.describe())
