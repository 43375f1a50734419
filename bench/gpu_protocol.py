"""Everything to measure on a GPU, in commands of ten minutes: the cheap and decisive first, nothing lost that was measured.

    python bench/gpu_protocol.py --results runs/gpu                             # the first stages, table, verdicts
    python bench/gpu_protocol.py --results runs/gpu --stages details autotuned  # the others, or some of them
    python bench/gpu_protocol.py --results runs/gpu --verdicts                  # of what is there, as after a kill
    python bench/gpu_protocol.py --plan                                         # the command for a bare machine

Each stage is a process with a time limit, interrupted and then killed beyond it, and each result is appended at once to
gpu_protocol.jsonl in the folder --results, by default runs/gpu, where kernel_sums.csv lies too. A measurement that raises is
recorded and the next goes on; so is a package to compare with that is not installed, with the way to bring it. A kernel that
disagrees with the float64 reference is not timed. Clocks and power are read, never set. Precision is torch's default, which
lets float32 convolutions use TF32, but for the drift, and is stated with every stage; cuDNN searches for its algorithms, for
all arms alike.

    python bench/gpu_protocol.py --device cpu --small

runs the first stages on tiny sizes, which proves the script and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

from common import measure
from common.stages import Run, newest, run_stage, run_stages, table
from multibeta import distribution
from protocol.plan import FIRST, STAGES
from protocol.verdicts import verdicts

FOLDER, FILE = Path("runs") / "gpu", "gpu_protocol.jsonl"
BUDGET_S = 560.0  # of the ten minutes of a command; the rest is for the first import and the table
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "MULTIBETA_CACHE": "multibeta"}


def plan(arguments: argparse.Namespace) -> str:
    """The command for a bare machine, and the seconds that each stage is given."""
    results = shlex.quote(str(arguments.results)) if arguments.results != FOLDER else '"${OUT:-runs/gpu}"'
    cache = f" --cache {shlex.quote(str(arguments.cache))}" if arguments.cache else ""
    only = f" --stages {' '.join(arguments.stages)}" if arguments.stages != FIRST else ""
    lines = [f"{name:12s} {STAGES[name].seconds:4.0f} s" for name in arguments.stages]
    total = sum(STAGES[name].seconds for name in arguments.stages)
    lines.append(f"{'together':12s} {total:4.0f} s of {arguments.budget_s:.0f}; what is left goes to the stage that needs it")
    if not arguments.cache:
        lines.append("kernels are compiled on the way, which compile_ahead.py FOLDER, carried along, and --cache FOLDER spare")
    run = f"python3 -u bench/gpu_protocol.py --results {results}{cache}{only} --budget-s {arguments.budget_s:.0f}"
    return "\n".join([*lines, "", f'eval "$(python3 bench/link.py /tmp/multibeta-links)" && {run}'])


def use_cache(folder: Path) -> None:
    """Let what is compiled be kept in `folder`; Triton reads what it kept there, perhaps in another place."""
    for variable, name in CACHES.items():
        os.environ[variable] = str((folder / name).resolve())
    for path in (folder / "triton").glob("*/__grp__*.json"):  # it lists its files by where they were
        children = json.loads(path.read_text())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.resolve().parent / name) for name in children}}))


def run_one(arguments: argparse.Namespace) -> int:
    """One stage, here; 130 if it was interrupted."""
    torch.backends.cudnn.benchmark = True
    device = torch.device(arguments.device)
    run = Run(arguments.results, FILE, device, arguments.stage, arguments.until, arguments.small)
    return 0 if run_stage(run, STAGES[arguments.stage]) else 130


def main() -> int:
    parser = measure.parser(__doc__)
    parser.set_defaults(results=FOLDER)  # stages are processes, which hand over in files
    parser.add_argument("--stages", nargs="+", choices=tuple(STAGES), default=FIRST, metavar="NAME")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that all stages may take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=distribution.local_device().type)
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was compiled, here or by compile_ahead.py")
    parser.add_argument("--plan", action="store_true", help="print the command for a bare machine, and the seconds of each stage")
    parser.add_argument("--verdicts", action="store_true", help="print table and verdicts of what --results holds")
    parser.add_argument("--stage", choices=tuple(STAGES), help="this one, in this process, without a limit")
    parser.add_argument("--until", type=float, default=float("inf"), help="time.monotonic() at which --stage starts nothing more")
    arguments = parser.parse_args()
    if arguments.plan:
        print(plan(arguments))
        return 0
    if arguments.device == "cpu" and not (arguments.small or arguments.verdicts):
        parser.error("no CUDA device is seen, or --device cpu was given: on the CPU only --small runs, which tries the script")
    if not arguments.budget_s > 0:
        parser.error(f"--budget-s must be positive, got {arguments.budget_s}")
    try:
        arguments.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results must be a folder: {error}")
    if arguments.cache:
        use_cache(arguments.cache)
    if arguments.stage:
        return run_one(arguments)
    code = 0
    try:
        if not arguments.verdicts:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` sends it
            supervise_all(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", flush=True)
        code = 130  # as of a command that Ctrl-C ended
    finally:
        lines = measure.read(arguments.results, FILE)
        print(table(newest(lines)))
        print("\n".join(verdicts(lines)))
    return code


def supervise_all(arguments: argparse.Namespace) -> None:
    """Every stage that was asked for, each in a process of its own."""
    if arguments.small:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny work waits longer for a second thread than it takes
    flags = ["--results", str(arguments.results), "--device", arguments.device, *(["--small"] if arguments.small else [])]
    command = [sys.executable, "-u", str(Path(__file__).resolve()), *flags]

    def note(stage: str, ended: str) -> None:
        print(f"  {stage}: {ended}", flush=True)
        measure.append(arguments.results, FILE, {"stage": stage, "ended": ended})

    run_stages(STAGES, arguments.stages, command, arguments.budget_s, note)


if __name__ == "__main__":
    sys.exit(main())
