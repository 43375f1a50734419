"""The GPU protocol loses nothing that it measured, keeps its times, and runs from end to end on the smallest sizes."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from multibeta import ops

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SOON = 10.0


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    for name in ("benchmark", "allow_tf32"):  # which the benchmarks set
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
    return importlib.import_module


@pytest.fixture
def run(bench, tmp_path):
    """A stage's run for seconds on the CPU."""
    return bench("common.stages").Run(tmp_path, "some.jsonl", CPU, "some stage", time.monotonic() + SOON, True)


def protocol(*flags, **options):
    command = [sys.executable, "-u", str(ROOT / "bench" / "gpu_protocol.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT / "tests", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(condition, seconds=60.0):
    """What `condition()` returns once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to pass")


def test_a_measurement_that_raises_does_not_cost_the_others(bench, run):
    def fails(run):
        raise ValueError("not on this device")

    def works(run):
        run.record(answer=42)

    module = bench("common.stages")
    assert module.run_stage(run, module.Stage((fails, works), 1))
    lines = run.lines()
    assert lines[0]["precision"] and lines[0]["versions"]["torch"] and lines[0]["device"] == "cpu"
    failed = next(line for line in lines if "error" in line)
    assert failed["error"] == "ValueError: not on this device" and failed["at"].startswith("test_gpu_protocol.py")
    assert [line["answer"] for line in lines if "answer" in line] == [42]
    assert lines[-1]["seconds"] >= 0 and all(line["stage"] == "some stage" for line in lines)


def test_a_torn_line_costs_no_other(bench, run):
    run.record(answer=1)
    path = run.folder / run.file
    path.write_bytes(path.read_bytes() + b'{"run": "torn by a full di')
    assert [line["answer"] for line in run.lines()] == [1]
    run.record(answer=2)
    assert [line["answer"] for line in run.lines()] == [1, 2]


def test_flags_that_cannot_be_are_refused_first(bench, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    for flags, message in (
        (("--results", str(tmp_path / "file")), "--results must be a folder"),
        (("--budget-s", "nan"), "--budget-s must be positive, got nan"),
    ):
        monkeypatch.setattr(sys, "argv", ["gpu_protocol.py", "--small", *flags])
        with pytest.raises(SystemExit):
            bench("gpu_protocol").main()
        assert message in capsys.readouterr().err


def test_an_interrupt_ends_the_stage(bench, run):
    def interrupted(run):
        run.record(answer=42)
        raise KeyboardInterrupt

    module = bench("common.stages")
    assert not module.run_stage(run, module.Stage((interrupted, lambda run: run.record(answer=43)), 1))
    assert [line["answer"] for line in run.lines() if "answer" in line] == [42]
    assert run.lines()[-2]["interrupted"] == "interrupted"


def test_a_stage_stops_between_two_measurements(run):
    run.deadline, done = time.monotonic() + 0.2, []
    for item in run.within(range(100)):
        done.append(item)
        time.sleep(0.02)
    assert 1 < len(done) < 50
    assert f"after {len(done)} measurements" in run.lines()[-1]["stopped"]


def test_a_stage_beyond_its_limit_is_interrupted_then_killed(bench):
    supervise, code = bench("common.stages").supervise, "import signal, time\n{}\ntime.sleep(60)"
    assert supervise([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    start = time.monotonic()
    polite, stubborn = code.format(""), code.format("signal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert supervise([sys.executable, "-c", polite], 1, 30) == -signal.SIGINT
    assert supervise([sys.executable, "-c", stubborn], 1, 0.2) == -signal.SIGKILL
    assert time.monotonic() - start < 20


def test_what_a_stage_started_goes_with_it(bench, tmp_path):
    file = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])\nimport pathlib, time\n"
    code += f"while not pathlib.Path({str(file)!r}).exists(): time.sleep(0.01)"
    assert bench("common.stages").supervise([sys.executable, "-c", code], 60) == 0
    wait_for(lambda: file.read_text() and not alive(int(file.read_text())))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_later_stages_keep_their_time_and_the_rest_is_passed_on(bench, monkeypatch):
    module, limits, notes = bench("common.stages"), {}, []
    stages = {name: module.Stage((), seconds) for name, seconds in {"first": 10, "second": 20, "third": 30}.items()}

    def supervise(command, limit_s):
        limits[command[command.index("--stage") + 1]] = round(limit_s)
        return -signal.SIGKILL if "second" in command else 0

    monkeypatch.setattr(module, "supervise", supervise)
    module.run_stages(stages, list(stages), ["python"], 70 + module.GRACE_S, lambda *note: notes.append(note))
    assert limits == {"first": 20, "second": 40, "third": 70}  # none took any time here
    assert notes == [("second", "ended by signal SIGKILL after 0 s")]
    limits.clear()
    module.run_stages(stages, list(stages), ["python"], 25 + module.GRACE_S, lambda *note: None)
    assert limits == {"first": 10, "second": 20, "third": 25}
    module.run_stages(stages, ["first"], ["python"], 0, lambda *note: notes.append(note))
    assert notes[-1] == ("first", "skipped: 0 s are left")


KILL_EACH = """
import os, signal, sys, time
from pathlib import Path
import torch
import gpu_protocol
from common import measure

folder, number = Path(sys.argv[1]), getattr(signal, sys.argv[2])
for name in sys.argv[3:]:
    sys.argv[1:] = ["--stage", name, "--device", "cpu", "--small", "--results", str(folder / name)]
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        slow, append = 0.05, measure.append
        def slowly(*args):
            append(*args)
            time.sleep(slow)  # so that there is a middle to be killed in
        measure.append = slowly
        os._exit(gpu_protocol.main())
    while len(measure.read(folder / name, gpu_protocol.FILE)) < 2:
        time.sleep(0.01)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"{name} ended by itself"
    os.kill(child, number)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_a_kill_in_the_middle_of_any_stage_loses_nothing(tmp_path, number):
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        stages = [name for name in importlib.import_module("gpu_protocol").STAGES if name != "parity"]
    finally:
        sys.path.pop(0)
    stages += ["parity"] if importlib.util.find_spec("triton") else []
    code, path = f"import sys; sys.path.insert(0, {str(ROOT / 'bench')!r})\n{KILL_EACH}", ROOT / "tests"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, number, *stages], cwd=path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    codes = re.findall(r"^(\w+) (-?\d+)$", done.stdout, re.MULTILINE)
    assert codes == [(name, "130" if number == "SIGINT" else "-9") for name in stages]
    for name in stages:
        lines = [json.loads(line) for line in (tmp_path / name / "gpu_protocol.jsonl").read_text().splitlines()]
        assert len(lines) >= 2 and lines[0]["precision"], name
        assert any("interrupted" in line for line in lines) == (number == "SIGINT"), name


def test_an_interrupted_protocol_still_gives_its_table(tmp_path):
    running = protocol("--device", "cpu", "--small", "--stages", "ceilings", "norms", "--results", tmp_path)
    record = tmp_path / "gpu_protocol.jsonl"
    wait_for(lambda: record.exists() and '"stage": "norms", "what"' in record.read_text())
    running.send_signal(signal.SIGTERM)
    printed = running.communicate(timeout=60)[0]
    assert "product of 64^3 B1" in printed
    assert "norm 16" in printed or "pair 16" in printed


def test_the_protocol_runs_all_that_needs_no_compiler(bench, tmp_path, monkeypatch):
    names = [name for name in bench("gpu_protocol").STAGES if name not in ("parity", "compiled")]
    for name in names:
        flags = ["--stage", name, "--device", "cpu", "--small", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu_protocol.py", *flags])
        assert bench("gpu_protocol").main() == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu_protocol.jsonl").read_text().splitlines()]
    allowed = ("needs CUDA", "diffusers")
    assert not [line for line in lines if "error" in line and not any(word in line["error"] for word in allowed)]
    assert list(dict.fromkeys(line["stage"] for line in lines)) == names
    printed = protocol("--verdicts", "--results", tmp_path).communicate(timeout=60)[0]
    for what in ("U-Net step B1", "norm 16 4x4 silu B2", "pair 16+16 4x4 silu B2", "VAE decoder B2", "all convolutions B2"):
        assert what in printed
    assert "drift of 3 steps B2, multibeta: " in printed and "tiny sizes" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_protocol.jsonl", "kernel_sums.csv"]


def test_a_package_that_is_not_there_is_recorded_with_how_to_bring_it(bench, run, monkeypatch):
    measure = bench("common.measure")
    versions = measure.environment.versions()
    monkeypatch.setattr(measure.environment, "versions", lambda: {**versions, "diffusers": None})
    monkeypatch.setitem(sys.modules, "diffusers", None)
    bench("protocol.models").time_steps(run, ("reference-fp32", "diffusers-bf16"), (1,))
    lines = {line["arm"]: line for line in run.lines()}
    assert "diffusers" in lines["diffusers-bf16"]["error"]
    assert "pip download" in lines["diffusers-bf16"]["missing_peers"]["diffusers"]
    assert lines["reference-fp32"]["what"] == "U-Net step B1" and lines["reference-fp32"]["median_ms"] > 0


def test_a_kernel_that_failed_is_not_timed(bench, run, monkeypatch):
    op = ops.find("group_norm_act")
    wrong = ops.Kernel("cpp", lambda x, *rest, **options: torch.zeros_like(x), lambda *args, **kwargs: None, name="wrong")
    sound = ops.Kernel("cpp", op.reference, lambda *args, **kwargs: None, name="sound")
    monkeypatch.setattr(op, "kernels", [wrong, sound])
    call = bench("common.calls").norm_call((2, 8, 4, 4), 2, CPU, torch.float32)
    able, unable = run.checked(op, *call)
    assert set(able) == {"reference", "sound"} and "relative error" in unable["wrong"]

    check = bench("protocol.correctness").check_kernel
    for kernel in (wrong, sound):
        check(run, op, kernel, [bench("common.agreement").Case("some call", *call)])
    assert [(line["kernel"], line["fault"] is None) for line in run.lines()] == [("wrong", False), ("sound", True)]
    assert any("1 faults" in line or "faults" in line for line in bench("gpu_protocol").verdicts(run.lines()))


def test_verdicts_follow_the_numbers(bench):
    def row(what, arm, ms, rate, unit="TF/s", stage="step", **facts):
        return {"what": what, "arm": arm, "median_ms": ms, "rate": rate, "unit": unit, "stage": stage, **facts}

    def begin(stage):
        return {"stage": stage, "versions": {}, "device": "cuda", "small": False}

    lines = [
        begin("step"),
        row("U-Net step B64", "reference-bf16", 1.0, 1.0),  # of an earlier run in this folder
        begin("ceilings"),
        {"stage": "ceilings", "gemm_tflops": 1000.0},
        {"stage": "ceilings", "copy_gb_s": 1000.0},
        {"stage": "ceilings", "seconds": 1.0},
        begin("step"),
        row("all convolutions B64", "best", 10.0, 500.0),
        row("norm 256 32x32 silu B64", "triton", 0.1, 1900.0, "GB/s", cold_rate=900.0),
        row("U-Net step B64", "multibeta", 99.0, 1.0),  # measured again later
        row("U-Net step B64", "multibeta", 10.0, 1.0),
        row("U-Net step B64", "multibeta", 20.0, 1.0, stage="compiled"),
        row("U-Net step B64", "diffusers-compile", 20.4, 1.0, stage="compiled"),
        {"stage": "drift", "what": "drift", "error": "RuntimeError: out of memory", "at": "gpu_protocol.py:7"},
        {"stage": "parity", "test": "a", "outcome": "passed"},
        {"stage": "correctness", "noise": {"same_words": False}},
        {"stage": "norms", "ended": "ended by signal SIGKILL after 40 s"},
    ]
    printed = list(bench("gpu_protocol").verdicts(lines))
    stages = dict(line.split(": ", 1) for line in printed[: len(bench("gpu_protocol").STAGES)])
    assert stages["ceilings"] == "done" and stages["decoder"] == "did not run" and stages["step"] == "ended in the middle"
    assert stages["norms"] == "ended by signal SIGKILL after 40 s"
    assert stages["drift"] == "drift raised RuntimeError: out of memory"
    parity, correctness, noise, convolutions, norm, step = printed[len(stages) :]
    assert parity == "parity on the device: 1 passed" and correctness == "correctness: NOT TESTED"
    assert "is NOT that of the CPU" in noise and "convolutions first" in convolutions
    assert "reaches 90%" in norm and "good enough" in norm
    assert step == "U-Net step B64: 1.02x over diffusers-compile: no speed to claim"  # within one stage
    text = bench("common.stages").table(bench("common.stages").newest(lines))
    assert "99.0" not in text and text.splitlines()[-1].startswith("all convolutions B64")  # the first stages last
    small = list(bench("gpu_protocol").verdicts([{**begin("step"), "small": True}, *lines[-6:]]))
    assert small[-1] == "tiny sizes: the protocol works; its times and rates mean nothing"


def test_without_a_gpu_only_the_small_protocol_runs(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_protocol.py", "--device", "cpu"])
    with pytest.raises(SystemExit):
        bench("gpu_protocol").main()
    assert "on the CPU only --small runs" in capsys.readouterr().err


def test_the_plan_fits_ten_minutes(tmp_path):
    printed = protocol("--plan").communicate(timeout=60)[0].splitlines()
    *stages, together, hint, _, command = printed
    seconds = [int(line.split()[1]) for line in stages]
    assert (
        command.startswith('eval "$(python3 bench/link.py ') and '--results "${OUT:-runs/gpu}"' in command and len(command) < 2000
    )
    assert together.split()[:5] == ["together", str(sum(seconds)), "s", "of", "560;"] and sum(seconds) + 10 < 560
    assert [line.split()[0] for line in stages[:3]] == ["facts", "parity", "ceilings"] and "compile_ahead.py" in hint
    carried = protocol("--plan", "--cache", "a folder", "--stages", "norms").communicate(timeout=60)[0].splitlines()
    assert carried[-1].endswith("--cache 'a folder' --stages norms --budget-s 560") and len(carried) == 4


def test_a_cache_made_elsewhere_is_read(bench, tmp_path, monkeypatch):
    for variable in bench("gpu_protocol").CACHES:
        monkeypatch.setenv(variable, "")
    group = tmp_path / "triton" / "KEY" / "__grp__kernel.json"
    group.parent.mkdir(parents=True)
    group.write_text(json.dumps({"child_paths": {"kernel.cubin": "/where/it/was/KEY/kernel.cubin"}}))
    bench("gpu_protocol").use_cache(tmp_path)
    assert json.loads(group.read_text()) == {"child_paths": {"kernel.cubin": str(group.parent / "kernel.cubin")}}
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


FILL = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import compile_ahead, gpu_protocol, itertools, torch
from common.calls import norm_call
from multibeta.kernels import group_norm_act
gpu_protocol.use_cache(Path(sys.argv[2]))
args, kwargs = norm_call((2, 64, 8, 8), 8, torch.device("cpu"), torch.bfloat16)
print(*compile_ahead.fill(Path(sys.argv[2]), [(group_norm_act.group_norm_act, args, kwargs, False)]))
print(*compile_ahead.fill(Path(sys.argv[2]), itertools.islice(compile_ahead.protocol_calls(), 2)))
"""


def test_kernels_compiled_ahead_are_read_where_they_are_carried(tmp_path):
    pytest.importorskip("triton")
    made, carried = tmp_path / "made", tmp_path / "carried"

    def fill(folder):
        command = [sys.executable, "-c", FILL, str(ROOT / "bench"), str(folder)]
        finished = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
        (one, _), (more, refused) = (
            map(int, line.split()) for line in finished.stdout.splitlines()
        )  # what lies there after each
        assert 1 <= one <= more and more > 1 and not refused, finished.stderr[-2000:]
        return [(path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.cubin")]

    compiled = fill(made)
    made.rename(carried)
    assert fill(carried) == compiled  # not compiled anew
