"""The benchmarks compare like with like, refuse wrong kernels, and run from end to end on the smallest sizes."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from multibeta import ops, recipes

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Imports a benchmark by name; its results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # the benchmarks switch it on
    return importlib.import_module


@pytest.fixture
def run_main(bench, monkeypatch, tmp_path):
    """Runs a benchmark as the command line does; returns the lines of its record."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", *arguments])
        bench(name).main()
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    return run


def test_summary_is_the_median_and_the_spread(bench):
    assert bench("measure").summary([float(n) for n in range(11)][::-1]) == {
        "median_ms": 5.0,
        "p10_ms": 1.0,
        "p90_ms": 9.0,
        "repetitions": 11,
    }


def test_arms_take_turns(bench):
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench("measure").interleaved(arms, CPU, repetitions=3, warmup=0)
    assert "".join(calls) == "ababab"
    assert all(row["repetitions"] == 3 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in times.values())


def test_an_arm_that_raises_does_not_cost_the_others(bench):
    def fail():
        raise RuntimeError("no such engine\nat line 7")

    times = bench("measure").kernel_times({"broken": fail, "sound": lambda: None}, CPU, repetitions=2)
    assert times["broken"] == {"error": "RuntimeError: no such engine"}
    assert times["sound"]["repetitions"] == 2


def test_a_record_names_command_versions_and_machine(bench, tmp_path):
    measure = bench("measure")
    for value in (1, 2):
        measure.record("some.jsonl", {"value": value})
    first, second = (json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines())
    assert first["command"] and first["versions"]["torch"] and first["machine"]["threads"]
    assert (first["value"], second["value"]) == (1, 2)


def test_the_layers_make_up_the_network(bench):
    layers, peers = bench("layers"), bench("peers")
    recipe = recipes.find("celebahq256")
    found = layers.unet_layers(recipe)
    parts = (layers.Conv, layers.Linear, layers.Attention)
    assert sum(layer.flop * n for layer, n in found.items() if isinstance(layer, parts)) == peers.unet_flops(recipe.diffusion)
    assert sum(n for layer, n in found.items() if isinstance(layer, layers.Norm)) == 51
    assert {(up.channels, up.height) for up in found if isinstance(up, layers.Doubling)} == {(1280, 8), (768, 16)}


@pytest.mark.parametrize("name", ["celebahq256", "celeba64", "scenes32"])
def test_the_peer_in_diffusers_is_the_same_network(bench, name):
    pytest.importorskip("diffusers")
    peers, config = bench("peers"), recipes.find(name).diffusion
    theirs = peers.diffusers_unet(config, "meta")
    with torch.device("meta"):
        ours = peers.NonlinearDiffusion(config).unet
        latent = torch.zeros(1, config.latent_channels, config.latent_resolution, config.latent_resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert theirs(latent, torch.zeros(1)).sample.shape == (1, 2 * config.latent_channels, *latent.shape[2:])
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert counter.get_total_flops() == peers.unet_flops(config)


def test_a_captured_network_sees_every_input(bench, monkeypatch):
    peers = bench("peers")
    monkeypatch.setattr(bench("measure"), "capturable", lambda function: True)
    monkeypatch.setattr(peers, "capture_cuda_graph", lambda step, pool: step)
    captured = peers.Captured(lambda latent, times: latent * times)
    assert [float(captured(torch.tensor(x), torch.tensor(2.0))) for x in (3.0, 5.0)] == [6, 10]


@pytest.mark.parametrize("op", ops.all_ops(), ids=lambda op: op.name)
def test_the_reference_agrees_with_itself_on_every_case(bench, op):
    agreement, layers = bench("agreement"), bench("layers")
    found = [layers.Norm(8, 4, 4, 2, "silu", True), layers.Attention(5, 2, 8)]
    for case in agreement.cases(op, found, CPU):
        if "sampler" in op.name and "float32" not in case.label:
            continue  # the reference rounds products of a bfloat16 output; kernels do not
        assert agreement.disagreement(op, op.reference, case.args, case.kwargs, gradients=case.gradients) is None, case.label
        assert agreement.batch_free(op, op.reference, case.args, case.kwargs), case.label


def test_wrong_kernels_are_refused(bench):
    agreement, op = bench("agreement"), ops.find("group_norm_act")
    args, kwargs = bench("op_speed").norm_call((2, 8, 4, 4), 2, CPU, torch.float32, shifted=True, gradients=True)

    def scaled(*args, **kwargs):
        return 1.001 * op.reference(*args, **kwargs)

    def unwritten(*args, **kwargs):
        return torch.full_like(args[0], float("nan"))

    def detached(x, *args, **kwargs):
        return op.reference(x, *args, **kwargs) + 0.1 * (x - x.detach())

    assert "1.0e-03" in agreement.disagreement(op, scaled, args, kwargs)
    assert "inf" in agreement.disagreement(op, unwritten, args, kwargs)
    assert agreement.disagreement(op, detached, args, kwargs) is None  # the value is right
    assert agreement.disagreement(op, detached, args, kwargs, gradients=True)  # its gradient is not


def test_kernels_that_mix_samples_are_found(bench):
    agreement, op = bench("agreement"), ops.find("group_norm_act")
    args, kwargs = bench("op_speed").norm_call((3, 8, 4, 4), 2, CPU, torch.float32)
    assert not agreement.batch_free(op, lambda x, *rest, **options: x - x.mean(), args, kwargs)


def test_the_noise_of_the_cpu_is_its_own(bench):
    assert bench("agreement").noise(CPU) == {"same_words": True, "largest_difference": 0.0}


def test_sample_throughput_runs(run_main):
    arms = ("reference-fp32", "reference-bf16", "multibeta-fp32")
    options = ("--batch", "1", "--repetitions", "1", "--evaluations", "1", "--check-steps", "2", "--steps", "2")
    (line,) = run_main("sample_throughput", "--preset", "scenes32", "--device", "cpu", "--arms", *arms, *options)
    assert [row["arm"] for row in line["arms"]] == list(arms)
    assert all(row["median_ms"] > 0 and row["whole_seconds"]["2"] > 0 and row["build_seconds"] > 0 for row in line["arms"])
    assert line["relative_error"]["multibeta-fp32"] < 1e-5 < line["relative_error"]["reference-bf16"] < 0.1


def test_an_arm_that_needs_cuda_says_so(run_main):
    pytest.importorskip("diffusers")
    options = ("--batch", "1", "--repetitions", "1", "--check-steps", "0")
    (line,) = run_main("sample_throughput", "--preset", "scenes32", "--device", "cpu", "--arms", "diffusers-graph", *options)
    assert line["arms"] == [] and "needs CUDA" in line["failed"]["diffusers-graph"]


@pytest.mark.parametrize(("model", "size"), [("unet", "16"), ("decoder", "2"), ("encoder", "16")])
def test_acceleration_runs(run_main, model, size):
    pytest.importorskip("diffusers")
    arms = ("fp32", "accelerate-fp32")
    (line,) = run_main("acceleration", "--model", model, "--small", "--size", size, "--arms", *arms, "--repetitions", "1")
    assert not line["failed"] and all(line["arms"][arm]["cpu_ms"] > 0 for arm in arms)
    assert line["relative_error"]["accelerate-fp32"] < 1e-4


def test_op_speed_runs(run_main):
    lines = run_main("op_speed", "--device", "cpu", "--dtypes", "float32", "--no-compile", "--repetitions", "1")
    assert {line["op"] for line in lines} == {op.name for op in ops.all_ops()}
    assert all(line["arms"]["reference"]["median_ms"] > 0 for line in lines)


def test_train_throughput_runs_both_stages(run_main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arms = ("reference-fp32", "fused-bf16")
    options = ("--batch", "2", "--repetitions", "1", "--device", "cpu", "--arms", *arms)
    lines = run_main("train_throughput", "--recipe", "scenes32", *options)
    assert [line["stage"] for line in lines] == [1, 2]
    assert all(set(line["arms"]) == set(arms) and not line["failed"] for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["train_throughput.jsonl"]  # no checkpoint


def stage_lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "gpu_protocol.jsonl").read_text().splitlines()]


def test_stages_are_skipped_recorded_and_stopped(bench, tmp_path, capsys):
    staged, done = bench("staged"), []

    def fails(run):
        raise ValueError("not on this device")

    def slow(run):
        for item in run.within(range(100)):
            done.append(item)
            time.sleep(0.02)

    def last(run):
        run.record(answer=42)

    stages = dict(enumerate(staged.Stage(*stage) for stage in ((fails, 1), (slow, 0.1), (last, 1e6), (last, 0))))
    run = staged.Run("gpu_protocol.jsonl", CPU, budget_s=10, small=False)
    staged.run_stages(run, stages, [0, 2, 3])
    lines = stage_lines(tmp_path)
    assert any(line.get("error") == "ValueError: not on this device" and line["at"].startswith("test_bench.py") for line in lines)
    assert any("skipped" in line for line in lines)
    assert [line["answer"] for line in lines if "answer" in line] == [42]
    assert "skipped, it takes about 1000000 s" in capsys.readouterr().out

    run.end = time.perf_counter() + 0.2
    staged.run_stages(run, stages, [1])
    assert 1 < len(done) < 50
    assert f"after {len(done)} measurements" in next(line["stopped"] for line in stage_lines(tmp_path) if "stopped" in line)


def test_a_kernel_that_failed_is_not_timed(bench, monkeypatch):
    staged, op = bench("staged"), ops.find("group_norm_act")
    wrong = ops.Kernel("cpp", lambda x, *rest, **options: torch.zeros_like(x), lambda *args, **kwargs: None, name="wrong")
    sound = ops.Kernel("cpp", op.reference, lambda *args, **kwargs: None, name="sound")
    monkeypatch.setattr(op, "kernels", [wrong, sound])
    run = staged.Run("some.jsonl", CPU, budget_s=10, small=True)
    call = bench("op_speed").norm_call((2, 8, 4, 4), 2, CPU, torch.float32)
    able, unable = run.checked(op, *call)
    assert set(able) == {"reference", "sound"} and "relative error" in unable["wrong"]

    bench("gpu_protocol").check_kernel(run, op, wrong, [bench("agreement").Case("some call", *call)])
    assert run.failed == {("group_norm_act", "wrong")}
    bench("gpu_protocol").check_kernel(run, op, sound, [])  # as when the time of the stage is spent
    assert run.failed == {("group_norm_act", "wrong")}


def test_the_protocol_runs_its_cheap_stages(run_main, capsys):
    lines = run_main("gpu_protocol", "--device", "cpu", "--small", "--stages", "0", "3", "4", "8", "10", "--budget-s", "60")
    assert not [line for line in lines if "error" in line and "needs CUDA" not in line["error"]]
    assert {line["stage"] for line in lines} == {"environment_facts", "convolutions", "attention", "vae_decoder", "fp8"}
    assert any("plain" in line.get("arms", {}) for line in lines)
    printed = capsys.readouterr().out
    assert "all convolutions B2" in printed and "% of" not in printed


def test_verdicts_follow_the_numbers(bench):
    staged, protocol = bench("staged"), bench("gpu_protocol")
    run = staged.Run("some.jsonl", CPU, budget_s=10, small=True)
    run.row("all convolutions B64", "best", 10.0, 500.0, "TF/s", 1000.0)
    run.row("norm 256 32x32 silu B64", "triton", 0.1, 900.0, "GB/s", 1000.0)
    run.row("U-Net step B64", "multibeta", 10.0, 1.0, "TF/s", None)
    run.row("U-Net step B64", "diffusers-graph", 10.2, 1.0, "TF/s", None)
    convolutions, norm, step = protocol.verdicts(run)
    assert "convolutions first" in convolutions and "good enough" in norm and "1.02x" in step and "no speed to claim" in step
