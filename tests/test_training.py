import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from multibeta import checkpoints, draws, training
from multibeta.training import TrainingInterrupted, TrainingOptions, TrainingStopped, train
from multibeta.training import run as training_run
from multibeta.training.metrics_log import MetricsLog


class Noise:
    """Random images, kept in memory."""

    resolution, channels = 4, 3

    def __init__(self, size=25, seed=0):
        self.pixels = torch.randint(0, 256, (size, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).byte()

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[indices]


class Denoise:
    """A small network with all kinds of randomness and buffers; `at` maps a step to something that happens there."""

    def __init__(self, at=None):
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2), nn.Conv2d(4, 3, 3, padding=1)
        )
        self.at, self.seen = at or {}, []

    def __call__(self, batch, generator):
        if self.module.training:
            self.seen.append(batch)
            self.at.get(batch.step, lambda: None)()
        noise = torch.randn(batch.images.shape, generator=generator)
        loss = (self.module(batch.images + noise) - batch.images).square().mean()
        return loss, {"psnr": -10 * loss.detach().log10(), "noise": float(noise.mean())}


class Mean:
    """Learn the mean image: a loss whose gradient is known."""

    def __init__(self, scale=1.0):
        self.module = nn.Module()
        self.module.mean = nn.Parameter(torch.zeros(3, 4, 4))
        self.scale, self.means, self.losses = scale, [], []

    def __call__(self, batch, generator):
        loss = self.scale * (batch.images - self.module.mean).square().mean()
        self.means.append(self.module.mean.detach().clone())
        self.losses.append(loss.item())
        return loss, {"twice": 2 * loss.detach(), "undefined": math.nan}


def options(steps=12, **changes):
    small = {"batch_size": 8, "warmup_steps": 3, "checkpoint_every": 5, "log_every": 4, "validate_every": 6}
    return TrainingOptions(steps, **{**small, **changes})


def run(folder, objective=None, dataset=None, chosen=None, **keywords):
    return train(objective or Denoise(), dataset or Noise(), chosen or options(), folder, progress=False, **keywords)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def killed(folder, step, part="objective"):
    """Train in another process that is killed without warning at `step`, or inside the save of a checkpoint there."""
    code = f"import runpy; runpy.run_path({__file__!r})['live_until']({str(folder)!r}, {step}, {part!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment).returncode == -signal.SIGKILL


def live_until(folder, step, part):
    torch.set_num_threads(1)
    if part == "save":
        save = checkpoints.save_folder

        def dying_save(folder, weights, config):
            if config["step"] == step:
                checkpoints.save_file = lambda state, path: (Path(path).write_bytes(b"half"), die())
            save(folder, weights, config)

        checkpoints.save_folder = dying_save
    run(Path(folder), Denoise({step: die} if part == "objective" else {}))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder), folder


@pytest.mark.parametrize("step, part, saved", [(8, "objective", 5), (10, "save", 5)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, uninterrupted, step, part, saved):
    assert killed(tmp_path, step, part)
    assert checkpoints.load_folder(tmp_path / "checkpoint")[1]["step"] == saved
    averaged, folder = uninterrupted
    assert same(run(tmp_path, resume=True), averaged)
    weights, config = checkpoints.load_folder(tmp_path / "checkpoint")
    expected, expected_config = checkpoints.load_folder(folder / "checkpoint")
    assert config["step"] == expected_config["step"] == 12
    for name in ("module", "ema", "optimizer"):
        assert same(weights[name], expected[name])
    assert [line["step"] for line in lines(tmp_path)] == [line["step"] for line in lines(folder)]
    assert lines(tmp_path)[-1]["loss"] == lines(folder)[-1]["loss"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_module_leaves_and_takes_plain_checkpoints(tmp_path, uninterrupted, whole):
    def compiled(at=None):
        objective = Denoise(at)
        if whole:
            objective.module = torch.compile(objective.module, backend="eager")
        else:
            objective.module[0] = torch.compile(objective.module[0], backend="eager")
        return objective

    averaged, _ = uninterrupted
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, compiled({6: lambda: signal.raise_signal(signal.SIGTERM)}))
    weights, _ = checkpoints.load_folder(tmp_path / "checkpoint")
    assert weights["ema"].keys() == averaged.keys()
    resumed = run(tmp_path, compiled(), resume=True)
    assert resumed.keys() == averaged.keys()
    for name, value in averaged.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-2, atol=1e-2)  # another order of bfloat16 sums may be compiled


def test_weights_in_another_memory_format_resume_bit_for_bit(tmp_path):
    """The fused update goes through weights and what the optimiser keeps of them as they lie, and files hold them contiguous."""

    def channels_last(at=None):
        objective = Denoise(at)
        objective.module.to(memory_format=torch.channels_last)
        return objective

    averaged = run(tmp_path / "whole", channels_last())
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", channels_last({6: lambda: signal.raise_signal(signal.SIGTERM)}))
    assert same(run(tmp_path / "parts", channels_last(), resume=True), averaged)


def test_a_run_is_not_resumed_on_other_images(tmp_path):
    images = Noise()
    images.fingerprint = "a"
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, Denoise({6: lambda: signal.raise_signal(signal.SIGTERM)}), images)
    images.fingerprint = "b"
    with pytest.raises(ValueError, match="was trained on other images: files were changed, added, removed or renamed"):
        run(tmp_path, dataset=images, resume=True)
    images.fingerprint = "a"
    run(tmp_path, dataset=images, resume=True)


def test_a_finished_run_resumes_to_its_result(uninterrupted):
    averaged, folder = uninterrupted
    objective = Denoise()
    before = lines(folder)
    assert same(run(folder, objective, resume=True), averaged)
    assert not objective.seen and lines(folder) == before


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, uninterrupted):
    handler = signal.getsignal(signal.SIGINT)
    objective = Denoise({6: lambda: signal.raise_signal(signal.SIGINT)})
    with pytest.raises(TrainingInterrupted, match=r"stopped after step 7 of 12.*--resume"):
        run(tmp_path, objective)
    assert issubclass(TrainingInterrupted, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints.load_folder(tmp_path / "checkpoint")[1]["step"] == 7
    assert same(run(tmp_path, resume=True), uninterrupted[0])


@pytest.mark.parametrize("closed", [False, True])
def test_the_words_of_a_signal_go_to_standard_error_alone(tmp_path, monkeypatch, closed):
    """Not to what may have the descriptor that it usually has; the step is saved where there is none."""
    with open(tmp_path / "said", "w+") as said, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None if closed else said)
        patch.setattr(os, "write", lambda descriptor, text: said.write(f"{descriptor == said.fileno()} {text.decode()}"))
        with pytest.raises(TrainingInterrupted, match="stopped after step 7"):
            run(tmp_path / "run", Denoise({6: lambda: signal.raise_signal(signal.SIGINT)}))
        said.seek(0)
        assert said.read().startswith("" if closed else "True \nfinishing this step") and (said.tell() == 0) == closed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"])
def test_what_schedulers_send_before_they_kill_saves(tmp_path, uninterrupted, name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    twice = lambda: [signal.raise_signal(number) for _ in range(2)]  # noqa: E731, to the process and to its group
    with pytest.raises(TrainingInterrupted, match=r"stopped after step 7 of 12.*--resume") as caught:
        run(tmp_path, Denoise({6: twice}))
    assert caught.value.signal == number and signal.getsignal(number) == before
    assert same(run(tmp_path, resume=True), uninterrupted[0])


def test_signals_that_a_program_handles_or_ignores_are_left_to_it(tmp_path, uninterrupted):
    came, before = [], signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send = lambda: [signal.raise_signal(number) for number in (signal.SIGTERM, signal.SIGHUP)]  # noqa: E731
        assert same(run(tmp_path, Denoise({6: send})), uninterrupted[0])
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    assert came == [1]


@pytest.mark.parametrize("where", ["thread", "process"])
def test_a_second_training_in_one_folder_is_told_who_is_there(tmp_path, uninterrupted, where):
    other = Denoise()

    def second():
        if where == "thread":
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(run, tmp_path, other, resume=True).result()
        code = f"import pathlib, runpy; runpy.run_path({__file__!r})['run'](pathlib.Path({str(tmp_path)!r}), resume=True)"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command, folder = [sys.executable, "-c", code], Path(__file__).parent
        raise FileExistsError(subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment).stderr)

    def meanwhile():
        with pytest.raises(FileExistsError, match=rf"is in use: process {os.getpid()} on .* is training in it"):
            second()

    assert same(run(tmp_path, Denoise({7: meanwhile})), uninterrupted[0])
    assert not (tmp_path / ".lock").exists()


def test_the_lock_of_a_killed_training_is_free(tmp_path, uninterrupted):
    assert killed(tmp_path, 8)
    assert (tmp_path / ".lock").exists()
    assert same(run(tmp_path, resume=True), uninterrupted[0])
    assert not (tmp_path / ".lock").exists()


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path, Denoise({7: twice}))
    assert not isinstance(caught.value, TrainingInterrupted)
    assert checkpoints.load_folder(tmp_path / "checkpoint")[1]["step"] == 5


def test_training_runs_outside_the_main_thread(tmp_path, uninterrupted):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert same(results[0], uninterrupted[0])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, where):
    objective, before = Denoise(), {}
    whole = objective.__call__

    class Breaking:
        module = objective.module

        def __call__(self, batch, generator):
            loss, scalars = whole(batch, generator)
            if batch.step == 7:
                before.update({name: value.clone() for name, value in self.module.named_parameters()})
                # the square root of zero: a finite loss with an infinite slope
                loss = loss * math.nan if where == "loss" else loss + (self.module[0].weight * 0).abs().sum().sqrt()
            return loss, scalars

    with pytest.raises(TrainingStopped) as caught:
        run(tmp_path, Breaking())
    indices = ", ".join(map(str, training.batch_indices(7, 25, 8, 0).tolist()))
    assert "at step 7 are not finite; the weights were not updated" in str(caught.value)
    assert f"Batch indices: {indices}." in str(caught.value)
    assert f"{tmp_path / 'checkpoint'}, at step 5" in str(caught.value)
    assert same(dict(objective.module.named_parameters()), before)
    assert checkpoints.load_folder(tmp_path / "checkpoint")[1]["step"] == 5


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_try(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(MemoryError, match=r"batch_size=8, 8 images.*try accumulate=2 .*or batch_size=4") as caught:
        run(tmp_path, Denoise({2: fail}))
    assert "No checkpoint had been saved yet" in str(caught.value)
    assert caught.value.__cause__ is error


def test_other_errors_pass_unchanged(tmp_path):
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        run(tmp_path, Denoise({2: fail}))


def test_out_of_memory_advice_can_be_followed(tmp_path):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError, match=r"at step 7 .* at step 5"):
        run(tmp_path, Denoise({7: fail}), context={"recipe": {"accumulate": 1}})
    chosen = options(accumulate=2, log_every=1, validate_every=2, checkpoint_every=3)
    run(tmp_path, resume=True, chosen=chosen, context={"recipe": {"accumulate": 2}})
    assert lines(tmp_path)[-1]["step"] == 12


@pytest.mark.parametrize("pieces", [2, 3, 8])  # equal halves, unequal pieces, single images
def test_accumulated_pieces_equal_the_whole_batch(tmp_path, pieces):
    def averaged(folder, pieces):
        objective = Mean()
        objective.module.double()  # Adam would turn float32's rounding of a vanishing gradient into a visible step
        return run(folder, objective, chosen=options(precision="fp32", accumulate=pieces))

    torch.testing.assert_close(averaged(tmp_path / "parts", pieces), averaged(tmp_path / "whole", 1))
    for parts, whole in zip(lines(tmp_path / "parts"), lines(tmp_path / "whole"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"])
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"])


def test_the_average_follows_its_formula(tmp_path):
    objective = Mean()
    averaged = run(tmp_path, objective, chosen=options(steps=40, ema_decay=0.5, learning_rate=0.1))
    weights = [*objective.means[1:], objective.module.mean.detach()]
    expected = objective.means[0]
    for n, value in enumerate(weights):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(averaged["mean"], expected)
    assert not torch.equal(averaged["mean"], weights[-1])


def test_without_averaging_the_result_is_the_weights(tmp_path):
    objective = Denoise()
    assert same(run(tmp_path, objective, chosen=options(ema_decay=0)), objective.module.state_dict())


def test_learning_rate_warms_up_then_decays_to_its_fraction():
    chosen = options(100, learning_rate=2.0, warmup_steps=10, final_learning_rate=0.1)
    rates = [training.learning_rate_at(step, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[54] == pytest.approx(2.0 * 0.55)  # half-way between warm-up and end
    assert rates[99] == pytest.approx(0.2)
    assert rates[9:] == sorted(rates[9:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 200])  # none, and longer than the training
def test_a_constant_learning_rate_stays_constant_after_warm_up(warmup):
    chosen = options(100, learning_rate=2.0, warmup_steps=warmup, final_learning_rate=1.0)
    rates = [training.learning_rate_at(step, chosen) for step in range(100)]
    assert rates == pytest.approx([2.0 * min(1, (step + 1) / max(1, warmup)) for step in range(100)])


def test_groups_scale_the_learning_rate(tmp_path):
    objective = Denoise()
    first, last = objective.module[0], objective.module[3]
    before = first.weight.detach().clone(), last.weight.detach().clone()
    objective.parameter_groups = lambda: [
        {"params": first.parameters(), "learning_rate_scale": 0.0},
        {"params": last.parameters()},
    ]
    run(tmp_path, objective)
    assert torch.equal(first.weight, before[0]) and not torch.equal(last.weight, before[1])


def test_groups_outside_the_module_are_refused(tmp_path):
    objective = Denoise()
    objective.parameter_groups = lambda: [{"params": nn.Linear(1, 1).parameters()}]
    with pytest.raises(ValueError, match=r"outside objective\.module"):
        run(tmp_path, objective)


@pytest.mark.parametrize("size, batch", [(24, 8), (25, 8), (9, 8), (8, 8)])  # whole, ragged, barely, one batch
def test_every_epoch_holds_every_image_once(size, batch):
    stream = torch.cat([training.batch_indices(step, size, batch, 0) for step in range(3 * size)])
    epochs = stream.reshape(-1, size)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(size).expand(len(epochs), -1))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(stream[:size], training.batch_indices(0, size, size, 1))


def test_the_objective_sees_the_images_of_its_indices(tmp_path):
    objective, dataset = Denoise(), Noise()
    run(tmp_path, objective, dataset)
    for step, batch in enumerate(objective.seen):
        assert batch.step == step and batch.progress == step / 12
        assert torch.equal(batch.indices, training.batch_indices(step, 25, 8, 0))
        assert torch.equal(batch.images, dataset.images(batch.indices).float() / 127.5 - 1)


def test_seeds_are_integers_of_which_64_bits_count():
    assert options(seed=2**64 + 3) == options(seed=np.int32(3)) == options(seed=3)
    for seed in (1.5, None, True):
        with pytest.raises(ValueError, match="a seed must be an integer"):
            options(seed=seed)


def test_the_seed_changes_the_run(tmp_path, uninterrupted):
    assert not same(run(tmp_path, chosen=options(seed=1)), uninterrupted[0])


def test_random_numbers_of_the_caller_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    objective = Denoise()
    torch.manual_seed(3)
    run(tmp_path, objective)
    assert torch.equal(torch.rand(2), expected)


def test_a_dataset_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size=8 is more than the 7 images"):
        run(tmp_path, dataset=Noise(7))


def test_an_existing_checkpoint_is_not_overwritten(uninterrupted):
    with pytest.raises(FileExistsError, match=r"--resume .* or choose another folder"):
        run(uninterrupted[1])


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path, uninterrupted, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 1.0}\n{"step": 8, "lo')  # died before it could save
    assert same(run(tmp_path, resume=True), uninterrupted[0])
    assert "starting from the beginning" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 12]


def test_a_damaged_checkpoint_is_named(tmp_path):
    folder = tmp_path / "checkpoint"
    run(tmp_path)
    weights, config = checkpoints.load_folder(folder)
    step = {key: value for key, value in config.items() if key != "step"}
    for files, entries in ((weights, step), (weights, config | {"step": "3"}), ({"module": weights["module"]}, config)):
        checkpoints.save_folder(folder, files, entries)
        with pytest.raises(ValueError, match=r"config\.json is damaged or of another kind: (step|it names no file of ema)"):
            run(tmp_path, resume=True)


def test_resuming_another_recipe_lists_what_differs(tmp_path):
    run(tmp_path, context={"recipe": {"name": "a", "width": 8}})
    with pytest.raises(ValueError) as caught:
        run(tmp_path, resume=True, chosen=options(weight_decay=0.5), context={"recipe": {"name": "a", "width": 16}})
    assert str(caught.value).endswith(
        "was trained differently: context.recipe.width was 8, now 16; options.weight_decay was 0.0, now 0.5"
    )
    with pytest.raises(ValueError, match="dataset_size was 25, now 26"):
        run(tmp_path, dataset=Noise(26), resume=True, context={"recipe": {"name": "a", "width": 8}})


def test_resuming_another_network_lists_its_names(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"another recipe; 1 missing: mean; 9 unexpected"):
        run(tmp_path, Mean(), resume=True)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, uninterrupted):
    save_file, calls = checkpoints.save_file, []

    def full_at_the_second_save(state, path):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(state, path)

    monkeypatch.setattr(checkpoints, "save_file", full_at_the_second_save)
    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "metrics.jsonl"]
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert same(run(tmp_path, resume=True), uninterrupted[0])


def test_tied_weights_are_refused_before_training(tmp_path):
    objective = Denoise()
    objective.module.append(objective.module[0])
    with pytest.raises(ValueError, match="share memory"):
        run(tmp_path, objective)
    assert not objective.seen


ODD_LINES = [
    b'{"loss": 1}',
    b"5",
    b"[]",
    b'{"step": null}',
    b'{"step": "x"}',
    b'{"step": 2, "loss": []}',
    b"\xff\xfe",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_a_line_that_is_no_record_is_dropped_with_a_word(tmp_path, caplog, line):
    sound = b'{"step": 2, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(line + b"\n" + sound + line + b'\n{"step": 3, "loss": 1.0}\n{"step": 2, "lo')
    MetricsLog(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == sound
    assert [record.getMessage() for record in caplog.records if "metrics.jsonl" in record.getMessage()] == [
        f"{tmp_path / 'metrics.jsonl'} held 2 lines that are no record of a training: they are dropped"
    ]


def test_metrics_are_means_over_each_interval(tmp_path):
    objective = Mean()
    run(tmp_path, objective, chosen=options(10))
    records = lines(tmp_path)
    assert [record["step"] for record in records] == [4, 8, 10]
    for record, (start, end) in zip(records, [(0, 4), (4, 8), (8, 10)], strict=True):
        assert record["loss"] == pytest.approx(sum(objective.losses[start:end]) / (end - start))
        assert record["twice"] == pytest.approx(2 * record["loss"])
        assert record["undefined"] is None  # strict JSON
        assert record["grad_norm"] > 0 and record["images_per_second"] > 0 and record["seconds"] > 0
        assert record["cpu_seconds_per_step"] > 0
    assert records[-1]["learning_rate"] == pytest.approx(1e-3 * 0.05)


def test_the_share_of_the_time_that_went_by_until_images_were_there_is_logged(tmp_path, monkeypatch):
    now = {"seconds": 0.0}
    monkeypatch.setattr(training_run.time, "perf_counter", lambda: now["seconds"])

    class Slow(Noise):
        def images(self, indices):
            now["seconds"] += 3.0
            return super().images(indices)

    def compute():
        now["seconds"] += 1.0

    run(tmp_path, Denoise(dict.fromkeys(range(100), compute)), Slow(), options(steps=8, log_every=8, ema_decay=0.0))
    assert lines(tmp_path)[0]["data_seconds_share"] == pytest.approx(3 / 4)


class InThreads(Noise):
    """Images of which each batch waits for the next to be asked for, in a thread of its own; one in `broken` cannot be read."""

    def __init__(self, workers=0, broken=()):
        super().__init__()
        self.together, self.names, self.broken = threading.Barrier(workers) if workers else None, set(), broken

    def images(self, indices):
        if self.together and threading.current_thread() is not threading.main_thread():
            self.together.wait(timeout=30)
        self.names.add(threading.current_thread().name)
        if set(indices.tolist()) & set(self.broken):
            raise OSError("the disk is gone")
        return super().images(indices)


def test_workers_read_coming_steps_at_once_and_change_nothing(tmp_path, uninterrupted):
    dataset = InThreads(workers=2)  # its barrier would break if they took turns
    chosen = options(steps=13, num_workers=2)  # an even number of steps is read ahead
    averaged = run(tmp_path / "read", Denoise(), dataset, chosen)
    assert same(averaged, run(tmp_path / "plain", Denoise(), chosen=options(steps=13)))
    assert len([name for name in dataset.names if name.startswith("images")]) == 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]
    dataset = InThreads(workers=2)
    run(tmp_path / "read", Denoise(), dataset, options(steps=13, num_workers=2), resume=True)
    assert not dataset.names  # nothing was left to read
    run(tmp_path / "plain", Denoise(), chosen=options(steps=15, num_workers=4), resume=True)  # how it reads may change


def test_a_read_that_hangs_holds_up_no_error(tmp_path):
    hung = threading.Event()

    class Hanging(Noise):
        def images(self, indices):
            if threading.current_thread() is not threading.main_thread():
                hung.wait()
            return super().images(indices)

    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, Denoise({0: fail}), Hanging(), options(num_workers=2))
    hung.set()


def test_a_training_may_be_run_where_gradients_are_off(tmp_path, uninterrupted):
    with torch.no_grad():
        assert same(run(tmp_path), uninterrupted[0])


def test_a_training_that_stopped_goes_on_with_what_lets_it_go_on(tmp_path, caplog):
    class Bad(Denoise):
        """A loss that is not finite, at one step."""

        def __call__(self, batch, generator):
            loss, scalars = super().__call__(batch, generator)
            return loss * (math.nan if batch.step == 7 and self.module.training else 1), scalars

    with pytest.raises(TrainingStopped, match="spike_factor usually helps: --resume takes another"):
        run(tmp_path, Bad())
    with pytest.raises(TrainingStopped, match="at step 7"):
        run(tmp_path, Bad(), resume=True)
    run(tmp_path, Bad(), chosen=options(spike_factor=10.0, learning_rate=1e-4), resume=True)
    assert lines(tmp_path)[-1]["step"] == 12
    assert "it goes on with learning_rate 0.0001, before 0.001" in caplog.text
    assert "it goes on with spike_factor 10.0, before 0.0" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_another_kind_than_promised_are_refused(tmp_path, workers):
    """Of training and of validation, before the first step and after it."""

    class Floats(Noise):
        def images(self, indices):
            return super().images(indices) / 255

    words = r"images\(indices\) of Floats must give a Tensor of uint8 and shape \(\d+, 3, 4, 4\) .*, got a Tensor of float32"
    for given in ({"dataset": Floats()}, {"validation": Floats()}):
        with pytest.raises(TypeError, match=words):
            run(tmp_path / next(iter(given)), chosen=options(num_workers=workers), **given)


def test_what_a_worker_cannot_read_is_raised_where_it_is_needed(tmp_path):
    objective = Denoise()
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, objective, InThreads(broken=range(25)), options(num_workers=3))
    assert len(objective.seen) == 0
    order = training.batch_indices(3, 25, 8, 0)  # those of the fourth step, of which one is in no step before
    before = torch.cat([training.batch_indices(step, 25, 8, 0) for step in range(3)])
    broken = [index for index in order.tolist() if index not in before.tolist()]
    objective = Denoise()
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path / "later", objective, InThreads(broken=broken), options(num_workers=3))
    assert [batch.step for batch in objective.seen] == [0, 1, 2]  # those before were learned from
    with pytest.raises(ValueError, match="num_workers must be at most 256, got 1000"):
        options(num_workers=1000)


def test_trainings_of_two_threads_take_turns_and_learn_what_each_learns_alone(tmp_path, caplog):
    begun, alone = threading.Event(), [run(tmp_path / f"alone{seed}", chosen=options(seed=seed)) for seed in (0, 1)]
    objectives = [Denoise({0: begun.set, 5: lambda: time.sleep(0.5)}), Denoise()]  # dropout draws from the global generator
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, tmp_path / "first", objectives[0], chosen=options(seed=0))
        begun.wait(timeout=30)
        second = pool.submit(run, tmp_path / "second", objectives[1], chosen=options(seed=1))
        assert same(first.result(), alone[0])
        assert same(second.result(), alone[1])
    assert "waits for that of another thread" in caplog.text


def test_clipping_bounds_the_update_but_reports_the_norm(tmp_path):
    plain = run(tmp_path / "plain", Mean(), chosen=options(clip_norm=0, precision="fp32"))
    scaled = run(tmp_path / "scaled", Mean(1000.0), chosen=options(clip_norm=1e-9, precision="fp32"))
    assert lines(tmp_path / "scaled")[0]["grad_norm"] > 100 * lines(tmp_path / "plain")[0]["grad_norm"]
    assert scaled["mean"].abs().max() < plain["mean"].abs().max()  # so small that Adam's epsilon shows


def test_validation_sees_the_averaged_weights(tmp_path, uninterrupted):
    objective, calls = Denoise(), []

    def on_validate(step, module):
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        calls.append((step, module.training, torch.is_grad_enabled(), weights))
        return {"score": torch.tensor(2.0)}

    last = options(keep_best=False)
    averaged = run(tmp_path, objective, chosen=last, validation=Noise(200, seed=1), on_validate=on_validate)
    assert [call[:3] for call in calls] == [(6, False, False), (12, False, False)]
    assert same(calls[-1][3], averaged)
    assert same(averaged, uninterrupted[0])  # looking changes nothing
    assert objective.module.training
    records = [record for record in lines(tmp_path) if "validation/loss" in record]
    assert [record["step"] for record in records] == [6, 12]
    assert records[0]["validation/score"] == 2.0


def test_validation_loss_is_the_mean_over_its_images(tmp_path):
    held_out = Noise(60, seed=1)  # fewer than eight batches, so that all are used
    averaged = run(tmp_path, Mean(), validation=held_out, chosen=options(learning_rate=0.1))
    expected = (held_out.images(slice(None)).float() / 127.5 - 1 - averaged["mean"]).square().mean()
    assert lines(tmp_path)[-1]["validation/loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_weights_return_when_validation_fails(tmp_path):
    objective = Denoise()

    def on_validate(step, module):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, objective, on_validate=on_validate, chosen=options(checkpoint_every=6))
    kept = checkpoints.load_folder(tmp_path / "checkpoint")[0]["module"]
    assert same(objective.module.state_dict(), kept)


def test_check_may_stop_before_the_checkpoint(tmp_path):
    objective, steps = Denoise(), []

    def check(step):
        steps.append(step)
        if step == 8:
            raise TrainingStopped("the posterior has collapsed")

    objective.check = check
    with pytest.raises(TrainingStopped, match="collapsed"):
        run(tmp_path, objective, chosen=options(checkpoint_every=4))
    assert steps == [4, 8]
    assert [line["step"] for line in lines(tmp_path)] == [4, 8]
    assert checkpoints.load_folder(tmp_path / "checkpoint")[1]["step"] == 4


def stopped_after(step):
    """An objective whose training is told to stop while it makes this step."""
    return Denoise({step - 1: lambda: signal.raise_signal(signal.SIGTERM)})


def test_a_finished_run_goes_on_with_more_steps(tmp_path, caplog):
    caplog.set_level("INFO")
    run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    objective, longer = Denoise(), options(20)
    averaged = run(tmp_path / "whole", objective, chosen=longer, resume=True)
    assert "it was to end at step 12: the learning rate goes on as in a training of 20 steps" in caplog.text
    assert [batch.step for batch in objective.seen] == list(range(12, 20)) and objective.seen[0].progress == 12 / 20
    rates = {line["step"]: line["learning_rate"] for line in lines(tmp_path / "whole")}
    assert rates[12] == pytest.approx(training.learning_rate_at(11, options(12)))
    assert rates[16] == pytest.approx(training.learning_rate_at(15, longer))
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", stopped_after(17), chosen=longer, resume=True)
    assert same(run(tmp_path / "parts", chosen=longer, resume=True), averaged)


def test_steps_that_were_done_are_not_taken_back(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, stopped_after(7))
    with pytest.raises(ValueError, match="has 7 finished steps, more than the 6 that are asked for: steps=7 ends there"):
        run(tmp_path, chosen=options(6), resume=True)
    objective = Denoise()
    run(tmp_path, objective, chosen=options(9), resume=True)
    assert [batch.step for batch in objective.seen] == [7, 8]


def test_steps_of_what_a_training_builds_on_may_not_change(tmp_path):
    def recipe(first, second):
        return {"vae_training": {"steps": first}, "diffusion_training": {"steps": second}}

    run(tmp_path, context=recipe(5, 12))
    run(tmp_path, chosen=options(13), context=recipe(5, 13), resume=True)
    with pytest.raises(ValueError, match=r"context\.vae_training\.steps was 5, now 6$"):
        run(tmp_path, chosen=options(13), context=recipe(6, 13), resume=True)


def test_options_newer_than_a_checkpoint_do_not_stop_it(tmp_path, uninterrupted):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, stopped_after(7), context={"data": {"source": "a"}, "vae_training": {}})
    weights, config = checkpoints.load_folder(tmp_path / "checkpoint")
    for newer in (config["options"].pop, config.pop):
        newer("keep_best" if newer == config["options"].pop else "validated")
    checkpoints.save_folder(tmp_path / "checkpoint", weights, config)
    context = {"data": {"source": "a", "flip": False}, "vae_training": {"keep_best": True}}
    with pytest.raises(ValueError, match=r"context\.data\.flip was None, now True"):
        run(tmp_path, context={**context, "data": {"source": "a", "flip": True}}, resume=True)
    assert same(run(tmp_path, context=context, resume=True), uninterrupted[0])


class Flat(Noise):
    """Images of one grey."""

    def __init__(self, grey):
        self.pixels = torch.full((25, 3, 4, 4), grey, dtype=torch.uint8)


def rising(folder, objective=None, **changes):
    """A mean that rises from grey to white, past a held-out grey: (its result, its validation losses by step)."""
    chosen = options(20, learning_rate=0.1, ema_decay=0.5, validate_every=4, precision="fp32", **changes)
    averaged = run(folder, objective or Mean(), Flat(255), chosen, validation=Flat(160))
    return averaged, {line["step"]: line["validation/loss"] for line in lines(folder) if "validation/loss" in line}


def test_the_best_average_of_held_out_images_is_taken(tmp_path, caplog):
    caplog.set_level("INFO")
    averaged, losses = rising(tmp_path / "best")
    step = min(losses, key=losses.get)
    assert 0 < step < 20
    assert (averaged["mean"] - (160 / 127.5 - 1)).square().mean().item() == pytest.approx(losses[step], rel=1e-4)
    words = f"the weights of step {step} are taken: their validation loss is {losses[step]:.4g}, after the last step, 20, it is"
    assert f"{words} {losses[20]:.4g}" in caplog.text
    assert same(rising(tmp_path / "again")[0], averaged)
    last, _ = rising(tmp_path / "last", keep_best=False)
    assert last["mean"].mean() > averaged["mean"].mean()
    _, config = checkpoints.load_folder(tmp_path / "best" / "checkpoint")
    assert config["best"] == {"step": step, "loss": pytest.approx(losses[step])}
    kept = rising_resumed(tmp_path / "best"), rising_resumed(tmp_path / "best", keep_best=False)
    assert same(kept[0], averaged) and same(kept[1], last)


def rising_resumed(folder, **changes):
    chosen = options(20, learning_rate=0.1, ema_decay=0.5, validate_every=4, precision="fp32", **changes)
    return run(folder, Mean(), Flat(255), chosen, validation=Flat(160), resume=True)


@pytest.mark.parametrize("from_, taken", [(0.0, 4), (0.3, 8), (0.9, 20), (1.5, 20)])  # of 20 steps; the best is among the first
def test_losses_of_another_meaning_do_not_decide(tmp_path, from_, taken):
    objective = Mean()
    objective.comparable_from = from_
    _, losses = rising(tmp_path, objective)
    assert min(losses, key=losses.get) == 4 and losses[8] < losses[12] < losses[16] < losses[20]
    _, config = checkpoints.load_folder(tmp_path / "checkpoint")
    assert config.get("best", {"step": 20})["step"] == taken


def test_a_longer_training_forgets_a_best_before_its_losses_compare(tmp_path):
    objective = Mean()
    objective.comparable_from = 0.3
    rising(tmp_path, objective)
    chosen = options(40, learning_rate=0.1, ema_decay=0.5, validate_every=4, precision="fp32")
    run(tmp_path, objective, Flat(255), chosen, validation=Flat(160), resume=True)  # step 8 of 40 is a progress of 0.2
    assert checkpoints.load_config(tmp_path / "checkpoint")["best"]["step"] >= 24


@pytest.mark.parametrize("step", [4, 6, 8])  # as it is validated, afterwards, and long after
def test_the_best_average_survives_an_interruption(tmp_path, step):
    averaged, losses = rising(tmp_path / "whole")

    class Stopping(Mean):
        def __call__(self, batch, generator):
            if self.module.training and batch.step + 1 == step:
                signal.raise_signal(signal.SIGTERM)
            return super().__call__(batch, generator)

    with pytest.raises(TrainingInterrupted):
        rising(tmp_path / "parts", Stopping())
    assert same(rising_resumed(tmp_path / "parts"), averaged)
    again = {line["step"]: line["validation/loss"] for line in lines(tmp_path / "parts") if "validation/loss" in line}
    assert again == losses


@pytest.mark.parametrize("kill", [7, 10])
def test_what_is_seen_of_a_killed_run_is_bitwise_that_of_a_whole_one(tmp_path, kill):
    held_out = Noise(20, seed=1)
    chosen = options(validate_every=5)
    whole = run(tmp_path / "whole", chosen=chosen, validation=held_out)

    class Killed(Exception):
        pass

    def die_at_once():
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "parts", Denoise({kill: die_at_once}), chosen=chosen, validation=held_out)
    assert same(run(tmp_path / "parts", chosen=chosen, validation=held_out, resume=True), whole)
    first, second = (checkpoints.load_config(tmp_path / name / "checkpoint") for name in ("whole", "parts"))
    assert first["best"] == second["best"] and first["validated"] == second["validated"]
    measured = [[line for line in lines(tmp_path / name) if "validation/loss" in line] for name in ("whole", "parts")]
    assert measured[0] == measured[1] and [line["step"] for line in measured[0]] == [5, 10, 12]


def test_something_is_seen_early(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", validation=Noise(20, seed=1))
    monkeypatch.setattr(training.run, "FIRST_LOOK_SECONDS", 0.0)
    seen = []
    look = {"validation": Noise(20, seed=1), "on_validate": lambda step, _: seen.append(step)}
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "early", stopped_after(3), **look)
    assert seen == [1]
    assert same(run(tmp_path / "early", resume=True, **look), whole)  # looking changes nothing
    assert seen == [1, 6, 12]
    assert checkpoints.load_config(tmp_path / "early" / "checkpoint")["best"]["step"] in (6, 12)


def test_the_bar_says_what_is_left_of_the_whole(tmp_path, capfd):
    asked = []

    def outlook(steps, pace):
        asked.append((steps, pace))
        return "one day"

    train(Denoise(), Noise(), options(), tmp_path, outlook=outlook)
    assert [steps for steps, _ in asked] == list(range(11, -1, -1))
    assert all(pace is None or pace > 0 for _, pace in asked)
    assert "left=one day" in capfd.readouterr().err


def test_tensorboard_is_written_where_installed(tmp_path, monkeypatch):
    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, step))

        def close(self):
            events.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    run(tmp_path)
    assert events[0] == (tmp_path, 1) and events[-1] == "closed"
    assert ("loss", 12) in events


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": math.nan},
        {"ema_decay": 1.0},
        {"accumulate": 9},
        {"precision": "fp16"},
        {"clip_norm": -1},
    ],
)
def test_impossible_options_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        options(**change)


def test_progress_can_be_quiet(tmp_path, capfd):
    run(tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    train(Denoise(), Noise(), options(), tmp_path / "loud", description="toy stage")
    assert "toy stage: 100% 12/12 [" in capfd.readouterr().err


class Critic:
    """What tells images from those that a `Contest` restores, with dropout of its own."""

    def __init__(self, contest):
        self.contest, self.seen = contest, []
        self.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.2), nn.Conv2d(4, 1, 2))

    def parameter_groups(self):
        return [{"params": self.module.parameters(), "betas": (0.5, 0.9), "learning_rate_scale": 2.0}]

    def __call__(self, batch, generator):
        restored = self.contest.restore(batch.images, generator)
        weight = self.contest.module[0].weight
        self.seen.append((batch, restored.detach(), weight.detach().clone(), weight.requires_grad))
        images = batch.images.to(self.module[0].weight.dtype)
        loss = self.module(restored).mean() - self.module(images).mean() + self.module(images).square().mean()
        return loss, {"apart": loss.detach()}


class Contest(Denoise):
    """Denoise, against a critic."""

    def __init__(self, at=None):
        super().__init__(at)
        self.opponent, self.restored, self.constant = Critic(self), [], []

    def restore(self, images, generator):
        return self.module((images + draws.noise_like(images, generator)).to(self.module[0].weight.dtype))

    def __call__(self, batch, generator):
        restored = self.restore(batch.images, generator)
        if self.module.training:
            self.at.get(batch.step, lambda: None)()
            self.restored.append(restored.detach())
            self.constant.append([parameter.requires_grad for parameter in self.opponent.module.parameters()])
        return (restored - batch.images).square().mean() - self.opponent.module(restored).mean(), {}


def test_an_opponent_is_updated_after_the_objective_on_the_same_batch(tmp_path):
    objective = Contest()
    run(tmp_path, objective, chosen=options(5, log_every=1))
    assert objective.constant == [[False] * 4] * 5
    weights = [seen[2] for seen in objective.opponent.seen]
    assert not torch.equal(weights[0], Contest().module[0].weight) and torch.equal(weights[-1], objective.module[0].weight)
    for (batch, restored, _, learning), own in zip(objective.opponent.seen, objective.restored, strict=True):
        assert not learning and not torch.equal(restored, own)
        assert torch.equal(batch.indices, training.batch_indices(batch.step, 25, 8, 0))
    assert all(parameter.requires_grad for each in (objective, objective.opponent) for parameter in each.module.parameters())
    assert all(math.isfinite(line[name]) for line in lines(tmp_path) for name in ("apart", "opponent_loss", "opponent_grad_norm"))


def test_an_opponent_moves_by_its_own_betas_and_rate(tmp_path):
    """Where the gradient is constant, Adam moves by the learning rate whatever the betas; where it turns, by what they keep."""

    class Turning:
        def __init__(self):
            self.module = nn.Module()
            self.module.place = nn.Parameter(torch.zeros(()))

        def parameter_groups(self):
            return [{"params": [self.module.place], "betas": (0.0, 0.0), "learning_rate_scale": 3.0}]

        def __call__(self, batch, generator):
            return (-1.0) ** (batch.step // 2) * self.module.place, {}

    objective = Mean()
    objective.opponent = Turning()
    chosen = options(3, learning_rate=0.1, warmup_steps=0, final_learning_rate=1.0, precision="fp32")
    run(tmp_path, objective, chosen=chosen)
    assert objective.opponent.module.place.item() == pytest.approx(-0.3)  # two steps down, one up, each of 3 x 0.1


def test_a_contest_resumes_bit_for_bit(tmp_path):
    averaged = run(tmp_path / "whole", Contest())
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "parts", Contest({6: lambda: signal.raise_signal(signal.SIGTERM)}))
    assert same(run(tmp_path / "parts", Contest(), resume=True), averaged)
    whole, parts = (checkpoints.load_folder(tmp_path / name / "checkpoint")[0] for name in ("whole", "parts"))
    assert parts.keys() == {"module", "ema", "optimizer", "opponent", "opponent_optimizer"} | ({"best"} & whole.keys())
    assert all(same(parts[name], whole[name]) for name in whole)
    assert lines(tmp_path / "parts")[-1]["apart"] == lines(tmp_path / "whole")[-1]["apart"]


def test_an_opponent_that_a_checkpoint_does_not_hold_is_missed(tmp_path):
    with pytest.raises(TrainingInterrupted):
        run(tmp_path, Denoise({6: lambda: signal.raise_signal(signal.SIGTERM)}))
    with pytest.raises(ValueError, match="it names no file of opponent"):
        run(tmp_path, Contest(), resume=True)


def test_a_contest_in_pieces_is_that_of_the_whole_batch(tmp_path):
    def learned(folder, pieces):
        objective = Contest()
        objective.module[1] = nn.Identity()  # of batches
        for each in (objective, objective.opponent):
            each.module.double()
        run(folder, objective, chosen=options(precision="fp32", accumulate=pieces))
        return [*objective.module.parameters(), *objective.opponent.module.parameters()]

    torch.testing.assert_close(learned(tmp_path / "parts", 3), learned(tmp_path / "whole", 1))


def test_an_opponent_that_is_not_finite_stops_the_training(tmp_path):
    objective = Contest()
    objective.opponent.module[0].weight.data[:] = math.nan
    objective.__class__ = type("Deaf", (Contest,), {"__call__": Denoise.__call__})
    with pytest.raises(TrainingStopped, match=r"opponent_loss nan and gradient norm nan at step 0"):
        run(tmp_path, objective)
