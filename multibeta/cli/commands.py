"""The command line: which commands there are, running one, and what its end says to the shell."""

import argparse
import contextlib
import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from multibeta import caches, distribution, environment, files, processors, recipes
from multibeta.cli.arguments import ended_numbers
from multibeta.cli.averaging import Average
from multibeta.cli.decoder_tuning import TuneDecoder
from multibeta.cli.demo import Demo
from multibeta.cli.directions import Directions
from multibeta.cli.distillation import Distill
from multibeta.cli.doctor import Doctor
from multibeta.cli.measures import Encode, Evaluate, Report
from multibeta.cli.pictures import Edit, Interpolate, Sample, Show
from multibeta.cli.spectrum import Spectrum
from multibeta.cli.studio import Studio
from multibeta.cli.tools import Accelerate, Bench, Cache, Convert, Env
from multibeta.cli.training import reproduce_command, train_command
from multibeta.progress import Lasting, log_above_bars
from multibeta.training import TrainingStopped

logger = logging.getLogger(__name__)

DESCRIPTION = """Generative models whose latent space a person can read and steer.

Start with `multibeta demo`; `multibeta COMMAND --help` explains a command. MODEL is the folder of a run that `train` wrote,
its subfolder model, or the name of a shipped model, such as scenes32. Anywhere, --debug shows the traceback of an error, and
--cache FOLDER says where caches lie, as the variable MULTIBETA_CACHE does. --version prints the version."""

TOGETHER = ("train", "sample", "encode", "evaluate")  # what several processes can do together


def choose_cache(arguments: Sequence[str]) -> list[str]:
    """The arguments without --cache FOLDER, which is put into the environment, for this process and those it starts."""
    kept, left = [], iter(arguments)
    for argument in left:
        name, equals, folder = argument.partition("=")
        if name != "--cache":
            kept.append(argument)
        elif folder := folder if equals else next(left, ""):
            os.environ[caches.CACHE_VARIABLE] = str(files.expanded(folder).absolute())
        else:
            raise ValueError("--cache needs a folder")
    return kept


def training(flags: Sequence[str], command: str) -> Callable:
    """`multibeta train` for these flags: what chooses the preset is read first, because it gives the defaults of the others.

    It is the recipe that a run records where nothing else but --out and --resume says which.
    """
    parser = argparse.ArgumentParser(prog="multibeta train", add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--data.source", "--resolution", "--minutes", "--out", "--device", "--seed"):
        parser.add_argument(name, dest=name)
    for name in ("--dry-run", "--resume"):
        parser.add_argument(name, action="store_true")
    known, others = parser.parse_known_args(flags)
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), others))  # behind a flag they may be its values
    if len(folders) > 1:
        raise ValueError(
            f"train takes one folder or pattern of images, got {len(folders)}, {shlex.join(folders[:2])} first: quote a pattern, "
            "or the shell takes it apart: multibeta train 'shards:photos-{000000..000099}.tar'"
        )
    folder = folders[0] if folders else None
    recipe, source, side, out = (vars(known)[name] for name in ("--recipe", "--data.source", "--resolution", "--out"))
    source = source or folder
    if known.resume and out and not (recipe or source) and (begun := recipes.recorded_recipe(Path(out))):
        logger.info("going on with the recipe that %s records, %s on %s", out, begun.name, begun.data.source)
        return train_command(begun, command)
    side = side or ""
    resolution = int(side) if side.removeprefix("-").isdecimal() else None  # what is no number is refused with the others
    return train_command(recipes.choose(recipe, source, resolution), command, None if recipe else source)


def commands(name: str, flags: Sequence[str], typed: Sequence[str]) -> dict[str, Callable]:
    """Name to dataclass or function, for the command of this name with its flags; `typed` is the whole command line."""
    train = training(flags if name == "train" else [], shlex.join(["multibeta", *typed]))
    models = (
        Distill,
        Average,
        Sample,
        Show,
        Edit,
        Interpolate,
        Directions,
        Encode,
        Evaluate,
        Spectrum,
        Doctor,
        Report,
        Studio,
        Accelerate,
        Convert,
        Bench,
        Cache,
        Env,
    )
    reproduce = reproduce_command(shlex.join(["multibeta", *typed]))
    known = {"demo": Demo, "train": train, "reproduce": reproduce, "tune-decoder": TuneDecoder}
    return known | {each.__name__.lower(): each for each in models}


def run(typed: list[str]) -> int:
    """Run the command of a command line; returns what it says to the shell, 0 unless its help says more."""
    name, *flags = choose_cache([argument for argument in typed if argument != "--debug"]) or ["--help"]
    if name == "--version":
        print(f"multibeta {environment.own_version()}, torch {torch.__version__}")
        return 0
    known = commands(name, flags, typed)
    if (size := distribution.world().size) > 1 and name in known and name not in TOGETHER:
        raise ValueError(f"{name} is for one process, torchrun started {size}; several can {', '.join(TOGETHER)}")
    if name not in known:
        tyro.extras.subcommand_cli_from_dict(known, prog="multibeta", description=DESCRIPTION, args=[name])
        return 0
    flags = [flags[0], "--", *flags[1:]] if name == "bench" and len(flags) > 1 else flags  # they are the script's
    with processors.fitting_threads(), log_above_bars():
        chosen = tyro.cli(known[name], prog=f"multibeta {name}", args=ended_numbers(known[name], flags))
        return (chosen.run() or 0) if chosen is not None else 0  # train is a function, which has run


@contextlib.contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    """What a process that is not the first would say goes nowhere in here, but for errors in the log."""
    level = logger.level
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def logged() -> Iterator[logging.Logger]:
    """The log of the library, which stands on standard error in here unless the process has one of its own, as a notebook may."""
    before, logger = [*logging.root.handlers], logging.getLogger("multibeta")
    logging.basicConfig(format="multibeta: %(message)s")
    logger.setLevel(logging.INFO)
    try:
        yield logger
    finally:
        logging.root.handlers = [each for each in logging.root.handlers if each in before]


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """What standard output says in here is dropped once its reader has gone, as in `multibeta ... | head`; the work goes on."""
    stream = Lasting(sys.stdout, (BrokenPipeError,))
    with contextlib.redirect_stdout(stream):
        try:
            yield
        finally:
            stream.flush()


def leave(stream: Any) -> None:
    """A stream that cannot write what it still holds leads nowhere, so that the interpreter does not fail with it at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # of no stream, and of one that is none of the system
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns what it says, 2 after an error of the user or the machine, 128 and its number after a signal.

    Of several processes that torchrun started the first speaks for all; an error is said by the process that met with it first.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    here = distribution.World()
    try:
        with (
            logged() as log,
            readers_may_leave(),
            distribution.joined() as here,
            contextlib.nullcontext() if here.first else silent(log),
        ):
            return run(typed)
    except KeyboardInterrupt as interrupt:
        if here.first:
            print(f"multibeta: {str(interrupt) or 'interrupted'}", file=Lasting(sys.stderr))
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except (
        ValueError,
        OSError,
        MemoryError,
        ModuleNotFoundError,
        torch.OutOfMemoryError,
        TrainingStopped,
        subprocess.CalledProcessError,
        distribution.OtherProcessFailed,
    ) as error:
        if "--debug" in typed:
            raise
        if not isinstance(error, distribution.OtherProcessFailed):
            who = f"process {here.rank} of {here.size}: " if here.size > 1 else ""
            print(f"multibeta: {who}{error}", file=Lasting(sys.stderr))
        return 2
    finally:
        leave(sys.stdout)
        leave(sys.stderr)
