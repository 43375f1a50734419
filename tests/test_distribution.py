"""What several processes share, and how they say that they disagree."""

import contextlib
import functools
import os
import subprocess
import sys

import pytest
import torch
from processes import free_port, in_processes, torchrun

from multibeta import distribution
from multibeta.distribution import World


@pytest.mark.parametrize("size", (1, 2, 3, 7))
@pytest.mark.parametrize("count", (0, 1, 5, 21))
def test_the_shares_of_all_processes_are_all_items_in_order(size, count):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_is_a_world_of_its_own():
    assert distribution.world() == World(0, 1, 1)
    assert distribution.gather("x") == ["x"]
    assert distribution.by_first(lambda: 3) == distribution.first_goes_before(lambda: 3) == 3
    distribution.wait()
    distribution.agree("anything", 1)
    assert list(distribution.in_turn("abc")) == distribution.world().turns("abc") == ["a", "b", "c"]


@pytest.mark.parametrize("there", (False, True))
def test_the_gpu_is_taken_where_there_is_one_and_nothing_else_is_named(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert distribution.local_device() == torch.device("cuda" if there else "cpu")
    assert distribution.local_device("cpu") == torch.device("cpu")
    assert distribution.local_device("cuda:1") == torch.device("cuda:1")


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    current = []
    monkeypatch.setattr(distribution, "world", lambda: World(1, 2, 2))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distribution.local_device() == torch.device("cuda:1") and current == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine needs a GPU of its own, there are 1: lower --nproc-per-node"):
        distribution.local_device("cuda")


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"RANK.*start with torchrun"), distribution.joined():
        pass


def test_a_missing_process_is_named_with_the_place(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    missing = pytest.raises(ValueError, match=r"process 1 of 2 could not join the others at 127\.0\.0\.1:1")
    with missing, distribution.joined(timeout_seconds=1):
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"WORLD_SIZE": "two"}, "of the environment WORLD_SIZE must be whole numbers, got two"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be whole numbers, got http"),
        ({"RANK": "5"}, "RANK must be below WORLD_SIZE, got 5 of 2"),
    ),
)
def test_an_odd_environment_is_refused(monkeypatch, change, words):
    for name, value in ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"} | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words), distribution.joined():
        pass


def raised(work):
    """The type and the words of what `work` raises; None where it does not."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def fail():
    raise OSError("no room")


def fail_oddly():
    class Odd(Exception):
        """No other process knows it."""

    raise Odd("no room")


def once(path):
    """Whether this call made the file."""
    made = not path.exists()
    path.touch()
    return made


def held():
    """What a context of the first process says when it is entered and left."""
    said = []

    @contextlib.contextmanager
    def context():
        said.append("in")
        yield "anything"
        said.append("out")

    with distribution.held_by_first(context()):
        said.append("work")
    return said


def taken(letters, ended):
    """The letters, and a note of the process that comes to their end."""
    yield from letters
    ended.append(distribution.world().rank)


def what_two_say(folder):
    here, ended = distribution.world(), []
    return {
        "world": (here.rank, here.size, here.first),
        "gathered": distribution.gather(here.rank * 10),
        "disagreement": raised(lambda: distribution.agree("seed", here.rank)),
        "agreement": raised(lambda: distribution.agree("seed", 5)),
        "by first": distribution.by_first(lambda: here.rank),
        "failed": raised(lambda: distribution.by_first(fail)),
        "failed oddly": raised(lambda: distribution.by_first(fail_oddly)),
        "failed before": raised(lambda: distribution.first_goes_before(fail)),
        "rows": distribution.gather_rows(torch.arange(2 + here.rank)[:, None].float()),
        "anywhere": distribution.anywhere(here.rank == 1, False),
        "total": distribution.total(torch.tensor([1.0, here.rank])).tolist(),
        "alone": distribution.by_first(lambda: distribution.world().size),
        "held": held(),
        "before": distribution.first_goes_before(functools.partial(once, folder / "there")),
        "in turn": "".join(distribution.in_turn(taken(here.turns("abcde"), ended))),
        "ended": ended,
    }


def test_two_processes_share_and_fail_together(tmp_path):
    first, second = in_processes(2, what_two_say, tmp_path, folder=tmp_path)
    assert first["world"] == (0, 2, True)
    assert second["world"] == (1, 2, False)
    assert first["before"]
    assert not second["before"]
    assert first["held"] == ["in", "work", "out"]
    assert second["held"] == ["work"]
    assert (first["ended"], second["ended"]) == ([0], [1])  # also of the first, which has an item more
    for said in (first, second):
        assert said["gathered"] == [0, 10]
        assert said["disagreement"] == ("ValueError", "seed must be the same in all processes: in process 0 0, in 1 1")
        assert said["agreement"] is None
        assert said["by first"] == 0
        assert said["rows"].flatten().tolist() == [0, 1, 0, 1, 2]
        assert said["anywhere"] == [True, False]
        assert said["total"] == [2, 1]
        assert said["alone"] == 1
        assert said["in turn"] == "abcde"
        assert said["failed oddly"] == ("RuntimeError", "Odd: no room")
        assert said["failed"] == said["failed before"] == ("OSError", "no room")


PATIENT = """
import time
from multibeta import distribution

try:
    with distribution.joined(timeout_seconds=2) as here:
        time.sleep(3 * here.rank)
        assert distribution.gather(here.rank) == [0, 1]
        if not here.first:
            raise OSError("no room")
        distribution.wait()
except Exception as error:
    print(f"{here.rank} {type(error).__name__} {error}\\n", end="", flush=True)  # at once: both processes write here
    time.sleep(3 * here.rank)  # torchrun ends both where one ends
"""


def test_a_late_process_is_waited_for_and_one_that_failed_is_not(tmp_path):
    script = tmp_path / "patient.py"
    script.write_text(PATIENT)
    ended = torchrun(2, script)
    assert sorted(ended.stdout.splitlines()) == [
        "0 OtherProcessFailed another process failed before process 0 of 2",
        "1 OSError no room",
    ], ended.stderr


KILLED = """
import os, signal
import torch
from multibeta import distribution

distribution._LIFE_SECONDS, distribution._SILENT_SECONDS = 0.2, 1.0
try:
    with distribution.joined() as here:
        distribution.wait()
        if not here.first:
            os.kill(os.getpid(), signal.SIGKILL)
        {next}
except ConnectionError as error:
    print(error, flush=True)
"""


@pytest.mark.parametrize(
    ("next_call", "words"),
    (
        ("distribution.wait()", "process 1 has given no sign of life for"),
        ("distribution.total(torch.ones(1))", "another process ended without a word: it was killed, or ran out of memory"),
    ),
)
def test_a_killed_process_is_noticed(tmp_path, next_call, words):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(next=next_call))
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    second = subprocess.Popen([sys.executable, script], env=environment | {"RANK": "1"})  # and no agent that looks after both
    first = subprocess.run([sys.executable, script], env=environment | {"RANK": "0"}, capture_output=True, text=True, timeout=60)
    second.wait()
    assert words in first.stdout


STANDSTILL = """
import time
import torch
from multibeta import distribution

try:
    with distribution.joined(timeout_seconds=2) as here:
        for step in range(1, 10):
            if step == 5 and not here.first:
                time.sleep(5)
            distribution.tell_step(step)
            distribution.total(torch.ones(1))
except Exception as error:
    print(f"{here.rank} {type(error).__name__} {error}\\n", end="", flush=True)  # at once: both processes write here
"""


def test_a_process_that_came_to_a_standstill_is_named(tmp_path):
    script = tmp_path / "standstill.py"
    script.write_text(STANDSTILL)
    ended = torchrun(2, script)
    assert sorted(ended.stdout.splitlines())[0] == (
        "0 TimeoutError not all processes came together within 2 s: process 1 after step 4 behind step 5"
    )
