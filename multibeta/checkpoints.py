"""Checkpoint folders: safetensors for tensors, JSON for the rest, replaced as a whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import inspect
import json
import os
import shutil
import types
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multibeta import distribution
from multibeta.checks import is_finite
from multibeta.files import flush, occupy, remove_abandoned, require_file, require_no_file, write_text
from multibeta.weights import shorten, state_problems

FORMAT = 1
TEMPORARY = ".saving-"
NEXT = ".next"  # a complete checkpoint whose files are not in their places yet
_OWN_KEYS = ("format", "files")


def save_folder(
    folder: str | Path, weights: Mapping[str, Mapping[str, Any]], config: dict[str, Any], texts: dict[str, str] | None = None
) -> None:
    """Write `<name>.safetensors` for each entry of `weights` and `config.json` into `folder`, in place of an older checkpoint.

    The files are written into `folder`/.saving-..., flushed to disk, read back and made to stand by one rename to `folder`/.next,
    where `load_folder` looks first; then each takes its place. So a crash or a full disk leaves the whole checkpoint that was
    there or the whole new one, also where `folder` is a mount point or the folder around it is read-only. Files in `folder` that
    no checkpoint wrote (a README, figures) are kept. Of several processes and threads that save here, one waits for the other.

    Args:
        folder: Where to save; it and its parents are created.
        weights: Name -> state dict of tensors, on any device.
        config: JSON-ready dict; the keys "format" and "files" are ours.
        texts: File name -> text of files to write next to them, such as a README.md; no part of what `load_folder` reads.

    Raises:
        ValueError: Tensors share memory, a value is not a tensor, or `config` cannot be written as JSON.
        OSError: The files could not be written, for example because the disk is full; the old checkpoint is unchanged.
    """
    weights = {name: separate(state, name) for name, state in weights.items()}
    with replacing(folder, config, texts) as place:
        for name, state in weights.items():
            save_file(state, path := place / f"{name}.safetensors")
            verify(path, state)


@contextmanager
def replacing(folder: str | Path, config: dict[str, Any], texts: dict[str, str] | None = None) -> Iterator[Path]:
    """In a `with` block a folder to write `<name>.safetensors` into, which is a checkpoint afterwards as of `save_folder`.

    Raises:
        ValueError, OSError: See `save_folder`; after any other error as well the old checkpoint is unchanged.
    """
    folder = Path(folder).resolve()
    _document(config, ())  # what cannot be written shows before the work
    require_no_file(folder)
    try:
        with occupy(folder, "saving into", wait=True) as held:
            _tidy(folder, held)
            with _written(folder, config, texts or {}) as place:
                yield place
            _settle(folder)
    except (OSError, SafetensorError) as error:
        raise _failure(folder, error) from error


def replace_config(folder: str | Path, config: dict[str, Any]) -> None:
    """Write `config`, as of `save_folder`, in the place of the one that a checkpoint has; its other files are not touched.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: `config` cannot be written as JSON.
    """
    folder = Path(folder).resolve()
    with occupy(folder, "saving into", wait=True) as held:
        _tidy(folder, held)
        files = _read_config(folder, ours=True)["files"]
        write_text(folder / "config.json", _document(config, files))


def settle(folder: str | Path) -> None:
    """Finish a save that was interrupted, and remove what it left, if there is anything of it."""
    folder = Path(folder).resolve()
    if any(folder.glob(f"{TEMPORARY}*")) or (folder / NEXT).exists() or (folder / ".lock").exists():
        with occupy(folder, "saving into", wait=True) as held:
            _tidy(folder, held)


def load_folder(folder: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `save_folder` wrote; after an interrupted save this is the last complete checkpoint.

    Returns:
        weights: Name -> dict of tensors on the CPU.
        config: The saved dict.

    Raises:
        FileNotFoundError: No checkpoint is there, or one of its files is missing.
        ValueError: A file is damaged, or another format wrote it.
    """
    while True:
        place = standing(folder)
        identity = _identity(place)
        try:
            contents = _read(place)
        except (OSError, ValueError):
            if standing(folder) == place and _identity(place) == identity:
                raise
            continue
        if standing(folder) == place and _identity(place) == identity:  # otherwise another was saved there while we read
            return contents


def load_config(folder: str | Path) -> dict[str, Any]:
    """The config of a checkpoint alone, as `load_folder` returns it."""
    return _read_config(standing(folder))


def require_files(folder: str | Path) -> None:
    """`FileNotFoundError`, which names them, where files of weights that the config of a checkpoint lists are not there."""
    place = standing(folder)
    files = [place / f"{name}.safetensors" for name in _read_config(place, ours=True)["files"]]
    if missing := [path.name for path in files if not path.exists()]:
        raise FileNotFoundError(f"{place} lacks {shorten(missing)}: copy the whole folder again, or use another checkpoint")


def exists(folder: str | Path) -> bool:
    """Whether `load_folder` would find a checkpoint."""
    return (standing(folder) / "config.json").exists()


def stored(
    folder: str | Path, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]], *, together: bool = False
) -> dict[str, Tensor]:
    """What `compute` gives, tensors by name: read from `folder` where it was left there under the same key, else left there.

    Of several processes the first computes, the others read.

    Args:
        key: JSON-ready, everything that the result depends on; weights by `digest`.
        together: All processes compute it, sharing the work as `compute` does, and get the same; the first leaves it there.
    """
    key = json.loads(json.dumps(key))

    def there() -> bool:
        return exists(folder) and load_config(folder).get("key") == key

    def leave(computed: dict[str, Tensor]) -> dict[str, Tensor]:
        computed = separate(computed, "result")
        save_folder(folder, {"result": computed}, {"key": key})
        return computed

    def result() -> dict[str, Tensor]:
        return load_folder(folder)[0]["result"] if there() else leave(compute())

    if together and not distribution.by_first(there):
        computed = compute()
        distribution.by_first(lambda: leave(computed) and None)
        return computed
    return distribution.first_goes_before(result)


def digest(state: Mapping[str, Tensor]) -> str:
    """A name for the values of tensors: another for every change of them."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def load_state(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module` after `compare_state`."""
    compare_state(module, state, source)
    module.load_state_dict(state)


def compare_state(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Compare every name and shape of `state` with those of `module`, which may lie on the meta device.

    Args:
        module: The `nn.Module` to fill.
        state: Dict of tensors.
        source: Where `state` comes from, for the message.

    Raises:
        ValueError: Names or shapes differ: the checkpoint belongs to another recipe.
    """
    reasons = state_problems(state, module.state_dict())
    problems = [f"{len(names)} {reason}: {shorten(names)}" for reason, names in reasons.items() if names]
    if problems:
        raise ValueError(f"{source} is a checkpoint of another recipe; " + "; ".join(problems))


@contextmanager
def naming(folder: str | Path, what: str, file: str = "config.json") -> Iterator[None]:
    """In a `with` block that builds `what` from the contents of a file, whatever fails is a `ValueError` that names the file.

    Any but those of memory and disk: what a damaged or foreign file says may break anywhere.
    """
    path = Path(folder) / file
    try:
        yield
    except (MemoryError, OSError):
        raise
    except Exception as error:
        told = isinstance(error, ValueError)
        if told and str(error).startswith(str(path.parent)):  # it names a file of the folder already
            raise
        reason = error if told else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} does not describe {what}: {reason}") from error


def require_entries(
    folder: str | Path,
    weights: Mapping[str, Any],
    config: dict[str, Any],
    files: Iterable[str],
    entries: dict[str, type | tuple[type, ...]],
) -> None:
    """`ValueError`, which names config.json, unless what `load_folder` read has these files, and entries of these types.

    Args:
        files: Names of state dicts that must be among `weights`.
        entries: Name to type, or tuple of types, of what must be in `config`.
    """
    wrong = [f"it names no file of {name}" for name in files if name not in weights]
    for name, wanted in entries.items():
        if name not in config:
            wrong.append(f"{name} is missing")
        elif not isinstance(config[name], wanted) or isinstance(config[name], bool):
            wrong.append(f"{name} must not be {_short(config[name])}")
    if wrong:
        raise ValueError(f"{Path(folder) / 'config.json'} is damaged or of another kind: {'; '.join(wrong)}")


def typed(target: type, values: Any) -> dict[str, Any]:
    """Arguments of a dataclass or another class from JSON: lists as tuples, each of the type that `target` annotates.

    Raises:
        ValueError: An argument is unknown, missing or of another type.
    """
    named = target.__name__
    if not isinstance(values, dict):
        raise ValueError(f"the fields of {named} must be given by name, got {_short(values)}")
    hints = typing.get_type_hints(target if dataclasses.is_dataclass(target) else target.__init__)
    values = {name: _as_tuple(value) for name, value in values.items()}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{named} has no field {name}; it has {', '.join(sorted(hints))}")
        if not _is_of(value, hints[name]):
            wanted = getattr(hints[name], "__name__", hints[name]) if isinstance(hints[name], type) else hints[name]
            raise ValueError(f"{name} of {named} must be of type {wanted}, got {_short(value)}")
    parameters = inspect.signature(target).parameters
    if needed := [name for name, given in parameters.items() if given.default is given.empty and name not in values]:
        raise ValueError(f"{named} needs {', '.join(needed)}, which {'are' if len(needed) > 1 else 'is'} missing")
    return values


def _as_tuple(value: Any) -> Any:
    """Lists, and lists in them, as tuples."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type; an integer serves as a float."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(item, arguments[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return is_finite(value)
    return not isinstance(hint, type) or isinstance(value, hint)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def flatten(states: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Two-level optimiser state, parameter -> slot -> tensor, as one dict with keys `parameter/slot`."""
    return {f"{parameter}/{slot}": value for parameter, state in states.items() for slot, value in state.items()}


def unflatten(tensors: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The inverse of `flatten`."""
    states = {}
    for key, value in tensors.items():
        parameter, slot = key.rsplit("/", 1)
        states.setdefault(parameter, {})[slot] = value
    return states


def separate(state: Mapping[str, Any], name: str = "state") -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with memory of its own, as safetensors stores them.

    Raises:
        ValueError: A value is not a tensor, or two names share one tensor.
    """
    owners, result = {}, {}
    for key, value in state.items():
        if not hasattr(value, "untyped_storage"):
            raise ValueError(f"{name} entry {key!r} is {type(value).__name__}, only tensors can be saved")
        place = (value.device, value.data_ptr())
        if value.numel() and owners.setdefault(place, key) != key:
            raise ValueError(
                f"{name} entries {owners[place]!r} and {key!r} share memory: save one and tie it again after loading"
            )
        value = value.detach().cpu().contiguous()
        result[key] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
    return result


def _document(config: dict[str, Any], weights: Iterable[str]) -> str:
    clash = [key for key in _OWN_KEYS if key in config]
    if clash:
        raise ValueError(f"config must not hold {', '.join(clash)}: the checkpoint writes them itself")
    try:
        return json.dumps({"format": FORMAT, "files": sorted(weights), **config}, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"config cannot be written as JSON: {error}") from error


def verify(path: Path, state: Mapping[str, Tensor]) -> None:
    """`OSError` unless a file that was written holds these bytes, read from the disk where the system can be told to."""
    flush(path)
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with safe_open(path, "pt") as file:
        for name, value in state.items():
            read = file.get_tensor(name)
            if not torch.equal(read.flatten().view(torch.uint8), value.flatten().view(torch.uint8)):
                raise OSError(errno.EIO, f"{path.name} reads back otherwise than it was written: the disk may be failing")


@contextmanager
def _written(folder: Path, config: dict[str, Any], texts: dict[str, str]) -> Iterator[Path]:
    """A folder to write the files of a checkpoint into: after the `with` block it is `folder`/.next, whole, and stands."""
    temporary = folder / _temporary_name()
    temporary.mkdir()
    try:
        yield temporary
        tensors = sorted(temporary.glob("*.safetensors"))
        for name, text in {**texts, "config.json": _document(config, [path.stem for path in tensors])}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        for path in tensors:
            shutil.copymode(temporary / "config.json", path)  # safetensors lets only the owner read
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        os.rename(temporary, folder / NEXT)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(folder)


def _tidy(folder: Path, held: bool) -> None:
    """Settle what killed processes left, and remove the rest of it where the lock is `held`."""
    if held:
        remove_abandoned(folder, f"{TEMPORARY}*", younger=True)
    _settle(folder)


def _settle(folder: Path) -> None:
    """Put the files of `folder`/.next into their places, if there are any."""
    standing = folder / NEXT
    if not standing.exists():
        return
    names = [path.name for path in standing.iterdir()]
    for name in sorted(names, key=lambda name: name == "config.json"):  # which says what else belongs to the checkpoint, last
        if name == "config.json":
            for obsolete in {f"{name}.safetensors" for name in _listed(folder)} - set(names):
                (folder / obsolete).unlink(missing_ok=True)
        _publish(standing / name, folder / name)
    flush(folder)
    finished = folder / _temporary_name()
    os.rename(standing, finished)
    shutil.rmtree(finished)


def _temporary_name() -> str:
    return f"{TEMPORARY}{uuid.uuid4().hex[:12]}"


def _publish(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` in one step, or a copy where the file system has no links."""
    if target.exists() and os.path.samefile(source, target):
        return
    part = target.with_name(_temporary_name())
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copy(source, part)
            flush(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def standing(folder: str | Path) -> Path:
    """Where the checkpoint of `folder` lies: a save that was interrupted after its files were complete left them in .next."""
    folder = Path(folder).resolve()
    return folder / NEXT if (folder / NEXT / "config.json").exists() else folder


def _read(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    config = _read_config(folder, ours=True)
    weights = {name: _load_tensors(folder / f"{name}.safetensors") for name in config["files"]}
    return weights, {key: value for key, value in config.items() if key not in _OWN_KEYS}


def _read_config(folder: Path, *, ours: bool = False) -> dict[str, Any]:
    """`config.json`, checked; with `ours` also the keys that no caller saved."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint: config.json is missing")
    try:
        config = json.loads(require_file(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or use another checkpoint") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (it holds {_short(config)}): copy it again, or use another checkpoint")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} has format {_short(config.get('format'))}, this version of multibeta reads format {FORMAT}")
    if not _are_names(config.get("files")):
        named = _short(config.get("files"))
        raise ValueError(f"{path} is damaged (its files are {named}): copy it again, or use another checkpoint")
    return {key: value for key, value in config.items() if ours or key not in _OWN_KEYS}


def _are_names(files: object) -> bool:
    """Whether the files of a config are what `save_folder` writes: a list of names, which lead to no other folder."""
    return isinstance(files, list) and all(isinstance(name, str) and name and Path(name).name == name for name in files)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    reason: Exception | None = None
    try:
        return load_file(require_file(path))
    except FileNotFoundError:
        missing = True
    except (SafetensorError, RuntimeError) as error:  # which is what safetensors raises for a file that is not there either
        missing, reason = not path.exists(), error
    if missing:
        raise FileNotFoundError(f"{path} is missing: copy the whole folder again, or use another checkpoint")
    raise ValueError(f"{path} is truncated or damaged ({reason}): copy it again, or use another checkpoint") from reason


def _listed(folder: Path) -> list[str]:
    try:
        files = json.loads((folder / "config.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return files if _are_names(files) else []


def _failure(folder: Path, error: Exception) -> OSError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    reason = "the disk is full" if full else str(error)
    state = "the checkpoint that was there is unchanged" if exists(folder) else "no checkpoint was written"
    if (folder / NEXT).exists():
        state = (
            f"the new checkpoint is complete in {folder / NEXT}, from where it is loaded, and the next save puts it in its place"
        )
    return OSError(errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO, f"{reason}; {state}", str(folder))


def _identity(place: Path) -> tuple[int, int] | None:
    """What changes when another checkpoint stands in a place."""
    try:
        status = (place / "config.json").stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
