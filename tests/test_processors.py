"""Cores are those that may be used, threads are no more, and who waits for processors is told so."""

import os

import pytest
import torch
from torch import nn

from multibeta import environment, processors
from multibeta.cli import main
from multibeta.training import TrainingOptions, train


def groups(tmp_path, line, **files):
    """A control group file and its mount, with files named by path."""
    (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    for name, text in files.items():
        path = tmp_path / "mount" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "cgroup", tmp_path / "mount"


@pytest.mark.parametrize(
    "line, files, expected",
    [
        ("0::/", {"cpu_max": "150000 100000\n"}, 1.5),
        ("0::/", {"cpu_max": "max 100000\n"}, None),
        ("0::/pod/one", {"pod__one__cpu_max": "400000 100000\n", "pod__cpu_max": "300000 100000\n"}, 3.0),  # the parent's binds
        ("0::/seen/from/outside", {"cpu_max": "200000 100000\n"}, 2.0),  # a container sees its group as the root
        ("0::/", {}, None),
        ("3:cpu,cpuacct:/job", {"cpu,cpuacct__job__cfs_quota_us": "50000\n", "cpu,cpuacct__job__cfs_period_us": "100000\n"}, 0.5),
        ("3:cpu,cpuacct:/job", {"cpu__cfs_quota_us": "250000\n", "cpu__cfs_period_us": "100000\n"}, 2.5),
        ("3:cpu:/", {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}, None),
        (
            "3:cpuset:/",
            {"cpu__cfs_quota_us": "100000\n", "cpu__cfs_period_us": "100000\n"},
            None,
        ),  # the group of cpu is elsewhere
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, line, files, expected):
    assert processors.quota(*groups(tmp_path, line, **files)) == expected


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert processors.quota(tmp_path / "nothing", tmp_path) is None


@pytest.mark.parametrize("granted, expected", [(None, 6), (2.5, 2), (0.5, 1), (64.0, 6)])
def test_cores_are_the_least_of_machine_affinity_and_quota(monkeypatch, granted, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(processors, "quota", lambda: granted)
    assert processors.cores() == environment.cores() == expected
    assert environment.machine()["cores"] == expected


@pytest.fixture
def sixteen(monkeypatch):
    """Torch has 16 threads of its own accord, one core may be used."""
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    monkeypatch.setattr(processors, "_AT_IMPORT", 16)
    monkeypatch.setattr(processors, "cores", lambda: 1)
    for name in processors.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


class Look:
    """An objective that notes the number of threads."""

    def __init__(self):
        self.module, self.threads = nn.Linear(1, 1), set()

    def __call__(self, batch, generator):
        self.threads.add(torch.get_num_threads())
        return self.module.weight.square().sum(), {}


class Images:
    resolution, channels = 1, 1

    def __len__(self):
        return 4

    def images(self, indices):
        return torch.zeros(len(indices), 1, 1, 1, dtype=torch.uint8)


def run(folder, objective):
    train(objective, Images(), TrainingOptions(steps=2, batch_size=2), folder, progress=False)
    return objective.threads


def test_training_takes_no_more_threads_than_cores_and_gives_them_back(tmp_path, sixteen, caplog):
    caplog.set_level("INFO")
    assert run(tmp_path, Look()) == {1}
    assert torch.get_num_threads() == 16
    assert "computing with 1 threads" in caplog.text and "not 16; OMP_NUM_THREADS sets it" in caplog.text


def test_threads_that_were_asked_for_stay(tmp_path, sixteen, monkeypatch):
    torch.set_num_threads(3)
    assert run(tmp_path / "set", Look()) == {3}
    torch.set_num_threads(16)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    assert run(tmp_path / "named", Look()) == {16}


def test_commands_compute_with_the_cores_there_are_and_env_shows_them(sixteen, capsys):
    assert main(["env"]) == 0
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert shown["threads"].split() == ["threads", "1"] and shown["cores"]
    assert torch.get_num_threads() == 16


@pytest.fixture
def clock(monkeypatch):
    """Wall, computed and ready seconds that a test moves on."""
    now = {"perf_counter": 100.0, "process_time": 50.0, "ready": 7.0}
    monkeypatch.setattr(processors.time, "perf_counter", lambda: now["perf_counter"])
    monkeypatch.setattr(processors.time, "process_time", lambda: now["process_time"])
    monkeypatch.setattr(processors, "seconds_ready", lambda: now["ready"])

    def move(wall, computed, ready):
        now["perf_counter"] += wall
        now["process_time"] += computed
        now["ready"] += ready

    return move


def look(waiting, move, *seconds):
    waiting.look()
    move(*seconds)
    waiting.look()


def test_who_waits_for_processors_is_told_once_and_again_when_it_gets_much_worse(clock, caplog):
    waiting = processors.Waiting()
    look(waiting, clock, 5.0, 10.0, 0.2)  # alone, two threads
    assert not caplog.records
    for _ in range(3):
        look(waiting, clock, 5.0, 5.0, 5.0)  # each of two threads half of the time
    assert len(caplog.records) == 1
    assert "this process computed for 5.0 s and its threads stood ready for 5.0 s more" in caplog.text
    assert "OMP_NUM_THREADS" in caplog.text
    look(waiting, clock, 5.0, 1.0, 9.0)
    assert len(caplog.records) == 2


def test_wall_time_far_beyond_processor_time_is_told_too(clock, caplog):
    look(processors.Waiting(), clock, 10.0, 0.26, 0.0)
    assert "computed for 0.3 s. It waits for something" in caplog.text and "OMP_NUM_THREADS" in caplog.text
    caplog.clear()
    look(processors.Waiting(idle=float("inf")), clock, 10.0, 0.26, 0.0)  # the work is done by a GPU
    assert not caplog.records


def test_a_step_that_is_short_is_not_judged(clock, caplog):
    look(processors.Waiting(), clock, 1.0, 0.01, 5.0)
    assert not caplog.records


@pytest.mark.skipif(not processors.TASKS.exists(), reason="the system counts no waiting")
def test_waiting_is_counted_by_the_system():
    assert processors.seconds_ready() >= 0
