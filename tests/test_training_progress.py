"""What is seen of a training: a bar on a terminal, lines in a file, the log beside both."""

import io
import logging
import sys

import pytest

from multibeta.training import progress


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
