"""The benchmarks compare like with like, refuse wrong kernels, and run from end to end on the smallest sizes."""

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import multibeta
from multibeta import evaluation, ops, recipes
from multibeta.flow_map import FlowMap

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Imports a benchmark by name; its results go to a temporary folder."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    monkeypatch.setattr(importlib.import_module("common.measure"), "RESULTS", tmp_path)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))  # which launch_cost sets
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # the benchmarks switch it on
    return importlib.import_module


@pytest.fixture
def run_main(bench, monkeypatch, tmp_path):
    """Runs a benchmark as the command line does; returns the lines of its record."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", "--record", *arguments])
        bench(name).main()
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    return run


def test_summary_is_the_median_and_the_spread(bench):
    assert bench("common.measure").summary([float(n) for n in range(11)][::-1]) == {
        "median_ms": 5.0,
        "p10_ms": 1.0,
        "p90_ms": 9.0,
        "repetitions": 11,
    }


def test_arms_take_turns(bench):
    calls = []
    arms = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = bench("common.measure").interleaved(arms, CPU, repetitions=3, warmup=0)
    assert "".join(calls) == "ababab"
    assert all(row["repetitions"] == 3 and row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in times.values())


def test_an_arm_that_raises_does_not_cost_the_others(bench):
    def fail():
        raise RuntimeError("no such engine\nat line 7")

    times = bench("common.measure").kernel_times({"broken": fail, "sound": lambda: None}, CPU, repetitions=2)
    assert times["broken"] == {"error": "RuntimeError: no such engine"}
    assert times["sound"]["repetitions"] == 2


def test_a_record_names_command_versions_and_machine(bench, tmp_path):
    measure = bench("common.measure")
    for value in (1, 2):
        measure.record(tmp_path, "some.jsonl", {"value": value})
    first, second = (json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines())
    assert first["command"] and first["versions"]["torch"] and first["machine"]["threads"]
    assert (first["value"], second["value"]) == (1, 2)


@pytest.mark.parametrize("new_names", [False, True])
def test_a_record_states_the_precision_that_is_set(bench, new_names):
    code = "torch.backends.cudnn.conv.fp32_precision = 'ieee'" if new_names else "torch.backends.cudnn.allow_tf32 = False"
    imports = "import torch, json\nfrom common import measure"
    script = f"{imports}\n{code}\ntorch.backends.cudnn.benchmark = True\nprint(json.dumps(measure.precision()))"
    command, folder = [sys.executable, "-c", script], Path(__file__).parents[1] / "bench"  # torch keeps the new names for good
    result = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)
    assert result["float32_convolution"] in ("ieee", "none") and result["float32_matmul"] == "none"
    assert result["cudnn_benchmark"] and not result["cudnn_deterministic"]


def test_missing_packages_are_told_with_how_to_bring_them(bench, monkeypatch, capsys):
    measure, versions = bench("common.measure"), bench("common.measure").environment.versions()
    monkeypatch.setattr(measure.environment, "versions", lambda: {**versions, "diffusers": None, "xformers": None})
    measure.tell_missing_packages()
    diffusers, xformers = capsys.readouterr().out.splitlines()
    assert "pip install diffusers" in diffusers and "--no-index" in diffusers and "importlib_metadata" in diffusers
    assert xformers.startswith("xformers is not installed")
    assert set(measure.provenance()["missing_peers"]) == {"diffusers", "xformers"}


def test_an_arm_of_a_missing_package_is_a_reason(run_main, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (line,) = run_main("acceleration", "--small", "--arms", "fp32", "--repetitions", "1", "--size", "16")
    assert line["arms"] == {} and "diffusers" in line["failed"]["fp32"]


QUICK = ("--device", "cpu", "--dtypes", "float32", "--no-compile", "--repetitions", "1", "--ops", "sampler_step")
MAINS = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "bench").glob("*.py")
    if "measure.parser(" in path.read_text(encoding="utf-8")
)


def test_results_go_where_they_are_asked_for(bench, monkeypatch, tmp_path, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench/op_speed.py", *QUICK, *arguments])
        bench("op_speed").main()
        assert "sampler_step" in capsys.readouterr().out
        return sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl"))

    assert run() == []  # the results of the repository, which lie in tmp_path here, stay as they are
    assert run("--results", str(tmp_path / "else" / "where")) == ["else/where/op_speed.jsonl"]
    assert run("--record") == ["else/where/op_speed.jsonl", "op_speed.jsonl"]
    with pytest.raises(SystemExit):
        run("--record", "--results", str(tmp_path))


@pytest.mark.parametrize("name", MAINS)
def test_no_benchmark_writes_to_the_results_of_the_repository_unless_asked(bench, monkeypatch, tmp_path, name):
    """What each reads from a command line without --record, where `bench` puts the results of the repository."""
    for package in {"aot": ["triton"], "launch_cost": ["triton"]}.get(name, []):
        pytest.importorskip(package)
    module, measure, seen = bench(name), bench("common.measure"), {}

    class Stop(Exception):
        pass

    def remember(parser, *_):
        for action in parser._actions:  # what a benchmark asks for besides
            if not action.option_strings:
                action.nargs = "?"
        plain, recorded = (parse(parser, flags).results for flags in ([], ["--record"]))
        seen.update(plain=plain, recorded=recorded)
        raise Stop

    parse = measure.argparse.ArgumentParser.parse_args
    monkeypatch.setattr(measure.argparse.ArgumentParser, "parse_args", remember)
    with pytest.raises(Stop):
        module.main()
    assert seen["recorded"] == tmp_path and (seen["plain"] is None or tmp_path not in (seen["plain"], *seen["plain"].parents))


def test_only_one_place_knows_the_results_of_the_repository():
    for path in (Path(__file__).parents[1] / "bench").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert path.stem == "measure" or not ("RESULTS" in source or '"results"' in source), path


@pytest.mark.parametrize("name", MAINS)
def test_every_benchmark_takes_a_folder_of_results(bench, monkeypatch, capsys, name):
    if name in ("aot", "launch_cost"):
        pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", [f"bench/{name}.py", "--help"])
    with pytest.raises(SystemExit):
        bench(name).main()
    shown = capsys.readouterr().out
    assert "--results" in shown and "--record" in shown


def test_a_torn_line_is_left_out(bench, tmp_path):
    measure = bench("common.measure")
    measure.append(tmp_path, "some.jsonl", {"value": 1})
    with (tmp_path / "some.jsonl").open("a") as file:
        file.write('{"value": 2')
    assert measure.read(tmp_path, "some.jsonl") == [{"value": 1}]
    assert measure.read(tmp_path, "none.jsonl") == []


def test_uncaptured_arms_say_so(bench, monkeypatch):
    """The path of CUDA with a recorder in the place of graphs: each is replayed once before anything is counted."""
    measure, replays, counted = bench("common.measure"), [], []
    monkeypatch.setattr(measure, "capturable", lambda function: function.__name__ == "graph")
    monkeypatch.setattr(measure, "capture_cuda_graph", lambda loop, pool: lambda: (replays.append(loop), loop()))
    monkeypatch.setattr(measure, "event_ms", lambda function: (counted.append(len(replays)), function(), 0.25)[-1])
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.zeros(1))
    arms = {"captured": lambda: None, "host": lambda: None}
    arms["captured"].__name__ = "graph"
    times = measure.kernel_times(arms, torch.device("cuda"), repetitions=2)
    assert (times["captured"]["captured"], times["host"]["captured"]) == (True, False)
    assert counted[0] == 1 and times["captured"]["median_ms"] == 0.25 / 4 and times["captured"]["cold_ms"] == 0.25


def test_the_layers_make_up_the_network(bench):
    layers, networks = bench("common.layers"), bench("common.networks")
    recipe = recipes.find("celebahq256")
    counts = layers.unet_layers(recipe)
    parts = (layers.Conv, layers.Linear, layers.Attention)
    assert sum(layer.flop * n for layer, n in counts.items() if isinstance(layer, parts)) == networks.unet_flops(recipe.diffusion)
    assert sum(n for layer, n in counts.items() if isinstance(layer, layers.Norm)) == 51
    assert {(up.channels, up.height) for up in counts if isinstance(up, layers.Doubling)} == {(1280, 8), (768, 16)}
    pairs = {layer: n for layer, n in counts.items() if isinstance(layer, layers.Pair)}
    assert sum(pairs.values()) == 9 and all(str(pair).startswith("pair ") for pair in pairs)  # a skip connection each


@pytest.mark.parametrize("name", ["celebahq256", "celeba64", "scenes32"])
def test_the_unet_of_diffusers_is_the_same_network(bench, name):
    pytest.importorskip("diffusers")
    networks, config = bench("common.networks"), recipes.find(name).diffusion
    theirs = networks.diffusers_unet(config, "meta")
    with torch.device("meta"):
        ours = networks.NonlinearDiffusion(config).unet
        latent = torch.zeros(1, config.latent_channels, config.latent_resolution, config.latent_resolution)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            assert theirs(latent, torch.zeros(1)).sample.shape == (1, 2 * config.latent_channels, *latent.shape[2:])
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    assert counter.get_total_flops() == networks.unet_flops(config)


def test_a_captured_network_sees_every_input(bench, monkeypatch):
    networks = bench("common.networks")
    monkeypatch.setattr(bench("common.measure"), "capturable", lambda function: True)
    monkeypatch.setattr(networks, "capture_cuda_graph", lambda step, pool: step)
    captured = networks.Captured(lambda latent, times: latent * times)
    assert [float(captured(torch.tensor(x), torch.tensor(2.0))) for x in (3.0, 5.0)] == [6, 10]
    assert captured(torch.ones(4), torch.ones(4)).shape == (4,)  # another batch is another graph
    assert float(captured(torch.tensor(7.0), torch.tensor(2.0))) == 14


def test_calls_that_overwrite_a_latent_have_one_each(bench):
    """Timing a call walks its latent on and on, to infinity perhaps."""
    calls = bench("common.calls")
    made = list(calls.sampler_calls("sampler_step", (1, 4, 2, 2), torch.device("cpu"), torch.float32))
    assert len({args[0].data_ptr() for _, args, _ in made}) == len(made) == 4


@pytest.mark.parametrize("op", ops.all_ops(), ids=lambda op: op.name)
def test_the_reference_agrees_with_itself_on_every_case(bench, op):
    agreement, layers = bench("common.agreement"), bench("common.layers")
    some = [layers.Norm(8, 4, 4, 2, "silu", True), layers.Pair(8, 4, 4, 4, 3, "silu"), layers.Attention(5, 2, 8)]
    for case in agreement.cases(op, some, CPU):
        if "sampler" in op.name and "float32" not in case.label:
            continue  # the reference rounds products of a bfloat16 output; kernels do not
        assert agreement.disagreement(op, op.reference, case.args, case.kwargs, gradients=case.gradients) is None, case.label
        assert agreement.batch_free(op, op.reference, case.args, case.kwargs), case.label


def test_wrong_kernels_are_refused(bench):
    agreement, op = bench("common.agreement"), ops.find("group_norm_act")
    args, kwargs = bench("common.calls").norm_call((2, 8, 4, 4), 2, CPU, torch.float32, shifted=True, gradients=True)

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
    agreement, op = bench("common.agreement"), ops.find("group_norm_act")
    args, kwargs = bench("common.calls").norm_call((3, 8, 4, 4), 2, CPU, torch.float32)
    assert not agreement.batch_free(op, lambda x, *rest, **options: x - x.mean(), args, kwargs)


def test_the_noise_of_triton_is_compared_with_the_words_of_the_cpu():
    pytest.importorskip("triton")
    code = "import json, torch; from common import agreement; print(json.dumps(agreement.noise(torch.device('cpu'))))"
    folder, environment = Path(__file__).parents[1] / "bench", os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    result = json.loads(run.stdout)
    assert result["same_words"] and result["largest_difference"] < 1e-6


def test_sample_throughput_runs(run_main):
    arms = ("reference-fp32", "reference-bf16", "multibeta-fp32")
    options = ("--batch", "1", "--repetitions", "1", "--evaluations", "1", "--check-steps", "2", "--steps", "2")
    (line,) = run_main("sample_throughput", "--preset", "scenes32", "--device", "cpu", "--arms", *arms, *options)
    assert [row["arm"] for row in line["arms"]] == list(arms)
    assert all(row["median_ms"] > 0 and row["whole_seconds"]["2"] > 0 and row["build_seconds"] > 0 for row in line["arms"])
    assert line["relative_error"]["multibeta-fp32"] < 1e-5 < line["relative_error"]["reference-bf16"] < 0.1


def test_few_steps_of_a_flow_map_are_timed_beside_many(run_main, tmp_path, monkeypatch):
    model = multibeta.DenoisingMultiBetaVAE.from_pretrained("scenes32")
    model.flow_map = FlowMap.of(model.diffusion.unet, model.diffusion.config, model.num_steps, span_channels=8)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "sample_throughput.jsonl").write_text("")  # where other runs are recorded
    monkeypatch.setattr(importlib.import_module("common.few_steps"), "LONG", 25)
    options = ("--batch", "2", "--repetitions", "1", "--device", "cpu")
    run_main("sample_throughput", "--few-step", str(tmp_path / "model"), *options)
    (line,) = (json.loads(line) for line in (tmp_path / "few_steps.jsonl").read_text().splitlines())
    arms = {row["arm"]: row for row in line["arms"]}
    assert {"map 1", "map 4", "map_noise 4", "ode2 20", "ancestral 25"} <= arms.keys()
    assert all(row["images_per_second"] > 0 and row["frechet"] is None for row in arms.values())
    assert ("diffusers DPM-Solver++(2M) 20" in arms) == (importlib.util.find_spec("diffusers") is not None)


def test_an_arm_that_needs_cuda_says_so(run_main):
    pytest.importorskip("diffusers")
    options = ("--batch", "1", "--repetitions", "1", "--check-steps", "0")
    (line,) = run_main("sample_throughput", "--preset", "scenes32", "--device", "cpu", "--arms", "diffusers-autotune", *options)
    assert line["arms"] == [] and "needs CUDA" in line["failed"]["diffusers-autotune"]


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


def test_distances_of_samplers_are_compared_seed_by_seed(bench):
    """Noise that moves all samplers alike moves no ratio; images that are only decoded are no walk."""

    def row(latents, sampler, steps, seed, frechet):
        return {"latents": latents, "sampler": sampler, "steps": steps, "seed": seed, "frechet": frechet}

    rows = [{"latents": "prior", "sampler": None, "steps": None, "frechet": 9.0}]
    for seed, noise in enumerate((1.0, 2.0, 4.0)):
        rows += [row("prior", "ode2", 20, seed, noise), row("prior", "map", 1, seed, 1.5 * noise)]
    rows += [row("mixture", "map", 1, 0, 3.0)]
    teacher, flow_map, alone = bench("sampler_quality").summary(rows)
    assert (teacher["sampler"], teacher["ratio"], teacher["ratio_deviation"]) == ("ode2", 1.0, 0.0)
    assert (flow_map["steps"], flow_map["ratio"], flow_map["ratio_deviation"]) == (1, 1.5, 0.0)
    assert flow_map["frechet"] == 3.5 and flow_map["frechet_deviation"] == pytest.approx(5.25**0.5)
    assert (alone["latents"], alone["ratio"], alone["frechet_deviation"]) == ("mixture", 1.0, None)


def test_a_tuned_decoder_is_measured_beside_the_one_before(run_main, model, photos, tmp_path):
    model.save_pretrained(tmp_path / "model")
    small = ("--discriminator-layers", "1", "--discriminator-channels", "4", "--batch-size", "4", "--learning-rate", "0.01")
    options = ("--data", str(photos), "--out", str(tmp_path / "out"), "--steps", "2", "--betas", "0.5", *small)
    before, after = run_main("decoder_tuning", str(tmp_path / "model"), *options)
    assert before["options"] == {} and after["options"]["steps"] == 2 and after["seed"] == 0
    assert before["decoded"].keys() == after["decoded"].keys() == {"0", "0.5"}
    assert before["decoded"]["0"]["mse"] != after["decoded"]["0"]["mse"]
    assert len(after["new"]) == 2 and (tmp_path / "out" / "seed-0.png").stat().st_size > 0


def test_two_ways_to_edit_are_measured_beside_each_other(run_main, bench, monkeypatch, model, tmp_path, capsys):
    recipe = recipes.find("scenes32-small")
    small = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, num_train=40, num_test=10))
    small = dataclasses.replace(small, vae=model.vae.config, diffusion=model.diffusion.config)
    monkeypatch.setitem(model.info, "recipe", recipes.to_dict(small))
    model.save_pretrained(tmp_path / "model")
    learned = lambda *sets, device: evaluation.classifier_features(*sets, steps=1, progress=False)  # noqa: E731
    monkeypatch.setattr(bench("editing"), "classifier_features", learned)
    options = ("--betas", "0.5", "--num-images", "4", "--num-directions", "1", "--strengths", "1", "--steps", "2")
    (line,) = run_main("editing", str(tmp_path / "model"), *options)
    assert [(row["way"], row["strength"]) for row in line["rows"]] == [
        (way, strength) for way in ("encoded", "inverted") for strength in (0, 1)
    ]
    assert "| 0.5 | inverted | 1 |" in capsys.readouterr().out


def test_the_loading_of_images_is_measured(run_main, tmp_path, capsys):
    folder = tmp_path / "images"
    (line,) = run_main(
        "data_loading", "--kinds", "shards", "--count", "200", "--batch", "32", "--folder", str(folder), "--workers", "0", "2"
    )
    row = line["shards"]
    assert (
        not folder.exists()
        and row["count"] == 200
        and {row[name]["images"] for name in ("list", "listed", "epoch, 2 workers")} == {200}
    )
    assert row["epoch"]["images_per_second"] > 0 and row["epoch"]["peak_mib"] >= row["epoch"]["imported_mib"] > 0
    assert "shards epoch TarShards" in capsys.readouterr().out


def test_a_preset_trains_at_toy_length(run_main):
    (line,) = run_main("toy_length", "--recipe", "scenes32-small", "--steps", "1")
    assert line["recipe"] == "scenes32-small" and line["image"] == [1, 3, 32, 32]
    assert line["parameters"] == [1_013_622, 2_505_428] and line["peak_gib"] >= line["vae_peak_gib"] > 0
