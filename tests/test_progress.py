"""What is seen of a long work: a bar on a terminal, lines in a file, the log beside both."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest

import multibeta
from multibeta import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_the_log_is_not_glued_to_a_bar(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    log, handler = logging.getLogger("multibeta"), logging.StreamHandler(stream)
    monkeypatch.setattr(log, "handlers", [handler])
    with progress.log_above_bars(), progress.progress_bar(total=300, desc="stage 1", unit="step") as bar:
        for step in range(300):
            bar.set_postfix({"loss": "0.5"}, refresh=False)
            bar.update()
            if step == 100:
                log.warning("a word")
    assert handler.stream is stream
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]  # which a carriage return begins as well
    assert "a word" in lines and lines[-1].startswith("stage 1: ") and lines[-1].endswith("step/s, loss=0.5]")
    if not stream.isatty():
        assert "\r" not in stream.getvalue() and len(lines) == 3  # at the beginning and at the end: no minute has passed


def write_down(monkeypatch, *arguments, **options):
    """The lines of a bar that is not on a terminal, after three updates or the iteration."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar(*arguments, **options) as bar:
        if arguments:
            assert list(bar) == [0, 1, 2]
        else:
            for done in range(1, 4):
                progress.advance(bar, done, 3) if options.get("desc") == "later" else bar.update()
    text = sys.stderr.getvalue()
    assert "\r" not in text and text.endswith("\n")
    return text.splitlines()


def test_a_bar_in_a_file_is_its_numbers_and_their_unit(monkeypatch):
    first, last = write_down(monkeypatch, total=3, desc="tuning", unit="step")
    assert first == "tuning:   0% 0/3 [00:00<?, ?step/s]"
    assert re.fullmatch(r"tuning: 100% 3/3 \[00:00<00:00, .*step/s\]", last)


def test_a_bar_that_does_not_know_its_end_has_lines_as_well(monkeypatch):
    first, last = write_down(monkeypatch, desc="listing", unit="image")
    assert first == "listing: 0image [00:00, ?image/s]" and last.startswith("listing: 3image [00:00, ")
    _, last = write_down(monkeypatch, desc="later", unit="evaluation")
    assert last.startswith("later: 100% 3/3 [00:00<00:00, ")


def test_what_is_iterated_over_is_passed_on(monkeypatch):
    assert write_down(monkeypatch, range(3), unit="batch")[-1].startswith("100% 3/3 ")
    assert write_down(monkeypatch, iter(range(3)), unit="batch")[-1].startswith("3batch ")


def test_lines_come_as_often_as_is_asked_for(monkeypatch):
    counts = [line.split()[1] for line in write_down(monkeypatch, total=3, mininterval=0, miniters=1)]
    assert counts[:4] == ["0/3", "1/3", "2/3", "3/3"]


def test_options_of_a_user_have_the_last_word(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    own = io.StringIO()
    for options in ({"file": own}, {"disable": None}, {"disable": True}):  # None is tqdm's word for: on a terminal alone
        assert list(progress.progress_bar(range(3), **options)) == [0, 1, 2]
    assert sys.stderr.getvalue() == "" and own.getvalue().startswith("\r  0%|")


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def fail(self, *_):
        raise type(self.error)(*self.error.args)

    write = flush = isatty = fail


class Bare:
    """What an application may put in the place of standard error."""

    def write(self, text):
        pass


UNWRITABLE = {
    "none": None,
    "bare": Bare(),
    "no reader": Broken(BrokenPipeError("Broken pipe")),
    "hung up": Broken(OSError("Input/output error")),
    "closed": Broken(ValueError("I/O operation on closed file")),
}


@pytest.mark.parametrize("stream", UNWRITABLE.values(), ids=UNWRITABLE.keys())
def test_what_cannot_be_written_ends_no_work(stream, monkeypatch, capsys):
    """Neither a bar, one of a user's options, nor what the log says above it; nor does it go elsewhere."""
    monkeypatch.setattr(sys, "stderr", stream)
    log, handler = logging.getLogger("multibeta"), logging.StreamHandler()
    monkeypatch.setattr(log, "handlers", [handler])
    handler.handleError = lambda record: pytest.fail("the log did not write")
    with progress.log_above_bars():
        for options in (
            {},
            {"disable": True},
            {"disable": None},
            {"file": Broken(OSError("gone"))},
            {"ncols": 80, "mininterval": 0},
        ):
            with progress.progress_bar(range(3), desc="x", **options) as bar:
                for done in bar:
                    log.warning("a word")
                    bar.set_postfix({"done": done})
    assert capsys.readouterr().out == ""


def test_every_bar_of_the_library_is_made_here():
    folder = Path(multibeta.__file__).parent
    makers = {path.name for path in folder.rglob("*.py") if re.search(r"\btqdm\(", path.read_text(encoding="utf-8"))}
    assert makers == {"progress.py"}
