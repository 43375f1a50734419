"""Weight files that others made: read as tensors, never as code, and compared with a network before use."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

NAMED = tuple(  # classes that checkpoints of Lightning use as keys, next to the weights
    f"pytorch_lightning.callbacks.{name}" for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")
)
LARGEST_HEADER = 2**20  # bytes; the networks here need 60 kB, and a larger header takes seconds to parse


def read_weights(path: str | Path, *, torchscript: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file, by name, on the CPU.

    The content decides, not the name: safetensors, or what `torch.save` wrote in either of its formats, whose pickle may
    build tensors and plain containers only, and mention the classes of `NAMED`, which are not imported. A TorchScript archive
    is a program: unpacking it runs code, so that it is opened only when asked for by name, and only its tensors are taken.

    Args:
        path: The file; `{"state_dict": ...}` is unwrapped.
        torchscript: The file is a TorchScript archive from a source you trust.

    Raises:
        FileNotFoundError: No file is there.
        ValueError: The file is damaged, is of another format, or holds something other than tensors.
    """
    path = Path(path)
    if torchscript:
        return dict(open_script(path).state_dict())
    format_name = file_format(path)
    if format_name == "TorchScript":
        raise ValueError(f"{path} is a TorchScript archive, a program: pass torchscript=True if you trust its source")
    _compare_hash_in_name(path)
    state = _read_safetensors(path) if format_name == "safetensors" else _read_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds {type(state).__name__}, not a dict of tensors: save `module.state_dict()`")
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
        if not isinstance(name, str) or not dense:
            raise ValueError(f"{path} entry {name!r} is {type(value).__name__}, not a dense tensor: save `module.state_dict()`")
    return state


def file_format(path: Path) -> str:
    """What a file is by its content: "safetensors", "torch" or "TorchScript".

    Raises:
        FileNotFoundError: No file is there.
        ValueError: The file is of none of these formats.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: name a weight file that is on this machine, nothing is downloaded")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK"):
        return _archive_format(path)
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"\x80"):
        return "torch"  # a bare pickle: the format of torch before 1.6
    raise ValueError(f"{path} is no weight file, it begins with {start[:16]!r}: safetensors or a file of `torch.save` would do")


def _archive_format(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise _damaged(path, error) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        return "TorchScript"
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError(f"{path} is an archive of {', '.join(names[:3])}, not a file of `torch.save`")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is compressed, which `torch.save` never does: get the original file")
    return "torch"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > LARGEST_HEADER:
        raise ValueError(f"{path} has a header of {header} bytes, more than the {LARGEST_HEADER} that these networks may need")
    try:
        return load_file(path)
    except (safetensors.SafetensorError, RuntimeError) as error:  # the second where it cannot be opened
        raise _damaged(path, error) from error


class Named:
    """Stands for a class of `NAMED`."""


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([(Named, name) for name in NAMED]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _foreign_classes(path) or re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
        noun = "class" if len(foreign) == 1 else "classes"
        holds = f"the {noun} {shorten(foreign)}" if foreign else "more than tensors"
        raise ValueError(
            f"{path} holds {holds}, which could execute code and was not read: where you trust it, open it yourself and save "
            "`module.state_dict()`"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from error


def _foreign_classes(path: Path) -> list[str]:
    """Names of all classes and functions in a file of `torch.save` that are not those of tensors; its older format shows none."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(NAMED))
    except (pickle.UnpicklingError, RuntimeError, ValueError, IndexError, EOFError):
        return []  # not even that can be read


def open_script(path: str | Path) -> torch.jit.ScriptModule:
    """The module of a TorchScript archive, in evaluation mode on the CPU. This may execute code that the archive brings.

    Raises:
        FileNotFoundError: No file is there.
        ValueError: The file is damaged, or no TorchScript archive.
    """
    path = Path(path)
    format_name = file_format(path)
    if format_name != "TorchScript":
        raise ValueError(f"{path} is a {format_name} file, not a TorchScript archive: leave torchscript=False")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated, the files of the field remain
            return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(f"{path} is truncated or damaged ({reason}): copy it again")


def _compare_hash_in_name(path: Path) -> None:
    """Published files carry the start of their sha256, `vgg16-397923af.pth`; another one is worth a warning."""
    promised = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if promised is None:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    begins = digest.hexdigest()[:8]
    if begins != promised[1]:
        warnings.warn(f"{path} is not the published file: its sha256 begins with {begins}, not {promised[1]}", stacklevel=4)


def state_problems(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What keeps `state` from filling a module whose state dict is `wanted`: each problem to the names that have it."""
    return {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in wanted.items()
            if isinstance(state.get(name), Tensor) and state[name].shape != value.shape
        ],
    }


def assign(network: nn.Module, state: dict[str, Tensor], source: str | Path, title: str, fits: str) -> None:
    """Give `network` the tensors of `state` in float32, after comparing every name, shape and value.

    Args:
        network: The module to fill, which may be on the meta device.
        state: Dict of tensors under the names of `network`.
        source: Where they come from, `title`: what `network` is, `fits`: files that would do; for the message.

    Raises:
        ValueError: Names or shapes differ, or values are not finite floats.
    """
    wanted = network.state_dict()
    problems = state_problems(state, wanted)
    described = [f"{len(names)} {problem} ({shorten(sorted(names))})" for problem, names in problems.items() if names]
    if described:
        raise ValueError(f"{source} does not fit {title}{_guess(state, title)}: {', '.join(described)}. What fits: {fits}")
    for name, value in state.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{source} entry {name} is not finite floating point: get the original file")
    network.load_state_dict({name: value.float() for name, value in state.items()}, strict=False, assign=True)


def _guess(state: dict[str, Tensor], title: str) -> str:
    """What a file that does not fit `title` looks like, for the message."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    families = (
        ("torchvision's inception_v3, which has other weights and other pools", any("AuxLogits" in name for name in shapes)),
        ("the FID Inception", "Conv2d_1a_3x3.conv.weight" in shapes),
        ("VGG16 with batch normalisation", "features.1.running_mean" in shapes),
        ("VGG19", shapes.get("features.34.weight") == (512, 512, 3, 3)),
        ("VGG16", shapes.get("features.28.weight") == (512, 512, 3, 3)),
        ("AlexNet", shapes.get("features.0.weight") == (64, 3, 11, 11)),
        ("a ResNet", "layer1.0.conv1.weight" in shapes),
        ("LPIPS heads", any(re.match(r"lins?\.?\d\.model", name) for name in shapes)),
    )
    return next((f", it looks like {family}" for family, matches in families if matches and family not in title), "")


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """First 16 digits of a sha256 over names, shapes and float32 values: the same in whichever file they are stored."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()[:16]


def shorten(values: Sequence[object], most: int = 3) -> str:
    """The first of many values as text, and how many more there are."""
    return ", ".join(map(str, values[:most])) + (f" and {len(values) - most} more" if len(values) > most else "")
