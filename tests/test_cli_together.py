"""Commands that several processes do together, as torchrun starts them."""

import pytest
from processes import torchrun

pytest.importorskip("tyro")


def test_commands_of_one_process_say_which_are_for_several():
    ended = torchrun(2, "-m", "multibeta", "cache")
    said = [line for line in ended.stderr.splitlines() if line.startswith("multibeta:")]
    assert ended.returncode and not ended.stdout
    assert [line.partition("of 2: ")[2] for line in said] == [
        "cache is for one process, torchrun started 2; several can train, sample, encode, evaluate"
    ]
