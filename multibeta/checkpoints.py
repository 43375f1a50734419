"""Checkpoint folders: safetensors for tensors, JSON for the rest, replaced as a whole or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from multibeta.metrics.weights import shorten

FORMAT = 1
_OWN_KEYS = ("format", "files")


def save_folder(folder, weights, config, texts=None):
    """Write `<name>.safetensors` for each entry of `weights` and `config.json`, replacing `folder` as a whole.

    The files are written into a sibling folder, flushed to disk and swapped in by rename, so a crash or a full disk
    leaves the checkpoint that was there. Files in `folder` that no checkpoint wrote (a README, figures) are kept.

    Args:
        folder: Where to save; its parents are created.
        weights: Name -> state dict of tensors, on any device.
        config: JSON-ready dict; the keys "format" and "files" are ours.
        texts: File name -> text of files to write beside them, such as a README.md; no part of what `load_folder` reads.

    Raises:
        ValueError: Tensors share memory, a value is not a tensor, or `config` cannot be written as JSON.
        OSError: The files could not be written, for example because the disk is full; the old checkpoint is unchanged.
    """
    folder = Path(folder).resolve()
    if folder == Path.cwd():
        raise ValueError(f"{folder} is the current folder and cannot be replaced: name a folder inside it")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another folder for the checkpoint")
    weights = {name: separate(state, name) for name, state in weights.items()}
    document = _document(config, weights)
    temporary = _sibling(folder, "saving")
    try:
        _settle(folder)
        _write(temporary, weights, {**(texts or {}), "config.json": document})
        _swap(folder, temporary)
    except (OSError, SafetensorError) as error:
        raise _failure(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _settle(folder)


def load_folder(folder):
    """Read what `save_folder` wrote; after an interrupted save this is the last complete checkpoint.

    Returns:
        weights: Name -> dict of tensors on the CPU.
        config: The saved dict.

    Raises:
        FileNotFoundError: No checkpoint is there, or one of its files is missing.
        ValueError: A file is damaged, or another format wrote it.
    """
    while True:
        place = _standing(folder)
        identity = _identity(place)
        try:
            found = _read(place)
        except (OSError, ValueError):
            if _identity(place) == identity:
                raise
            continue
        if _identity(place) == identity:  # otherwise a training run replaced the folder while we read
            return found


def exists(folder):
    """Whether `load_folder` would find a checkpoint."""
    return (_standing(folder) / "config.json").exists()


def load_state(module, state, source):
    """Load `state` into `module` after comparing every name and shape.

    Args:
        module: The `nn.Module` to fill.
        state: Dict of tensors.
        source: Where `state` comes from, for the message.

    Raises:
        ValueError: Names or shapes differ: the checkpoint belongs to another recipe.
    """
    wanted = module.state_dict()
    common = wanted.keys() & state.keys()
    reasons = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
            for name in wanted
            if name in common and state[name].shape != wanted[name].shape
        ],
    }
    problems = [f"{len(names)} {reason}: {shorten(names)}" for reason, names in reasons.items() if names]
    if problems:
        raise ValueError(f"{source} is a checkpoint of another recipe; " + "; ".join(problems))
    module.load_state_dict(state)


def flatten(states):
    """Two-level optimiser state, parameter -> slot -> tensor, as one dict with keys `parameter/slot`."""
    return {f"{parameter}/{slot}": value for parameter, state in states.items() for slot, value in state.items()}


def unflatten(tensors):
    """The inverse of `flatten`."""
    states = {}
    for key, value in tensors.items():
        parameter, slot = key.rsplit("/", 1)
        states.setdefault(parameter, {})[slot] = value
    return states


def separate(state, name="state"):
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


def _document(config, weights):
    clash = [key for key in _OWN_KEYS if key in config]
    if clash:
        raise ValueError(f"config must not hold {', '.join(clash)}: the checkpoint writes them itself")
    try:
        return json.dumps({"format": FORMAT, "files": sorted(weights), **config}, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"config cannot be written as JSON: {error}") from error


def _write(folder, weights, texts):
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # what a killed save left behind
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name, state in weights.items():
        save_file(state, folder / f"{name}.safetensors")
        shutil.copymode(folder / "config.json", folder / f"{name}.safetensors")  # safetensors lets only the owner read
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _swap(folder, temporary):
    """Two renames; between them the checkpoint is the `.previous` sibling, where `load_folder` looks too."""
    previous = _sibling(folder, "previous")
    if folder.exists():
        os.rename(folder, previous)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if previous.exists():
            os.rename(previous, folder)
        raise
    _flush(folder.parent)


def _settle(folder):
    """Finish a swap: put back the only checkpoint there is, or carry over foreign files and drop the old one."""
    previous = _sibling(folder, "previous")
    if not previous.exists():
        return
    if not folder.exists():
        os.rename(previous, folder)
        return
    own = {"config.json", *(f"{name}.safetensors" for name in _listed(previous))}
    for entry in list(previous.iterdir()):
        if entry.name not in own and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)
    shutil.rmtree(previous)


def _standing(folder):
    folder = Path(folder).resolve()
    previous = _sibling(folder, "previous")
    return previous if not folder.exists() and previous.exists() else folder


def _read(folder):
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint: config.json is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or use another checkpoint") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this version of multibeta reads format {FORMAT}")
    weights = {name: _load_tensors(folder / f"{name}.safetensors") for name in config["files"]}
    return weights, {key: value for key, value in config.items() if key not in _OWN_KEYS}


def _load_tensors(path):
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder again, or use another checkpoint")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): copy it again, or use another checkpoint") from error


def _listed(folder):
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _failure(folder, error):
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    reason = "the disk is full" if full else str(error)
    state = "the checkpoint that was there is unchanged" if exists(folder) else "no checkpoint was written"
    return OSError(errno.ENOSPC if full else getattr(error, "errno", None) or errno.EIO, f"{reason}; {state}", str(folder))


def _sibling(folder, role):
    return folder.with_name(f".{folder.name}.{role}")


def _identity(folder):
    return folder.stat().st_ino if folder.exists() else None


def _flush(path):
    """Wait until `path` is on disk; Windows cannot flush a folder."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
