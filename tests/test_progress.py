"""What is seen of a long work: a bar on a terminal, lines in a file, the log beside both."""

import importlib.machinery
import importlib.util
import io
import logging
import re
import sys
import types
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


class Trait(types.SimpleNamespace):
    """A widget: what it was given, and a layout."""

    def __init__(self, **given):
        super().__init__(bar_style="", value=0, **given)
        self.layout, self.style = types.SimpleNamespace(), types.SimpleNamespace()

    def close(self):
        pass


@pytest.fixture
def notebook(monkeypatch):
    """A kernel with ipywidgets, as far as bars see one; the widgets that it displayed."""
    shown, modules = [], {name: types.ModuleType(name) for name in ("ipykernel", "ipywidgets", "IPython", "IPython.display")}
    for name in ("HTML", "FloatProgress", "HBox"):
        setattr(modules["ipywidgets"], name, type(name, (Trait,), {}))
    modules["IPython.display"].display = shown.append
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tqdm.notebook", raising=False)
    progress.widget_bar.cache_clear()
    yield shown
    progress.widget_bar.cache_clear()
    sys.modules.pop("tqdm.notebook", None)


def test_in_a_notebook_a_bar_is_a_widget(notebook, capsys):
    assert list(progress.progress_bar(range(3), desc="encoding", unit="batch")) == [0, 1, 2]
    with progress.progress_bar(desc="generating", unit="step") as later:  # which hears of its end when it has begun
        for done in range(1, 4):
            progress.advance(later, done, 3)
    for box, name in zip(notebook, ("encoding", "generating"), strict=True):
        words, bar, numbers = box.children
        assert words.value == f"{name}:\u2007100%" and "3/3" in numbers.value
        assert (bar.max, bar.value, bar.bar_style, getattr(bar.layout, "width", None)) == (3, 3, "success", None)
    assert list(progress.progress_bar(range(3), disable=True)) == [0, 1, 2] and len(notebook) == 2
    assert capsys.readouterr() == ("", "")


def test_the_log_of_a_notebook_stands_beside_its_widgets(notebook, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    log, handler = logging.getLogger("multibeta"), logging.StreamHandler(stream)
    monkeypatch.setattr(log, "handlers", [handler])
    with progress.log_above_bars(), progress.progress_bar(total=2) as bar:
        bar.update()
        log.warning("a word")
        bar.update()
    assert stream.getvalue() == "a word\n"


def test_a_notebook_without_widgets_has_text_and_no_warning(monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(progress, "widget_bar", lambda: None)
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    assert list(progress.progress_bar(range(3), desc="encoding")) == [0, 1, 2]
    assert stream.getvalue().startswith("\rencoding:   0%|") and not recwarn.list


NOTEBOOK = (
    "import logging, sys, multibeta\nfrom multibeta import cli\n"
    "model = multibeta.DenoisingMultiBetaVAE.from_pretrained('scenes32'); model",
    "model.set_progress_bar_config(); model.generate(2, steps=3).shape",
    "model.principal_directions(model.generate(8, steps=3))",
    "assert cli.main(['sample', 'scenes32', '--num-images', '2', '--steps', '2', '--out', 'new.png']) == 0",
    "assert cli.main(['edit', 'scenes32', 'nothing.png', '--out', 'edited.png']) == 2",
    "%run -m multibeta sample scenes32 --num-images 2 --steps 2 --out other.png",
    "assert not logging.root.handlers and sys.argv[0] != 'multibeta'; print('on'); print('and on', file=sys.stderr)",
)


def test_a_real_notebook(tmp_path):
    pytest.importorskip("ipykernel", reason="needs a kernel of Jupyter")
    nbclient, nbformat = (pytest.importorskip(name, reason="needs what runs notebooks") for name in ("nbclient", "nbformat"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in NOTEBOOK])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert all("<table>" in outputs[cell][-1].data["text/html"] for cell in (0, 2))
    kinds = {output.output_type for output in outputs[1]}
    widgets = importlib.util.find_spec("ipywidgets") is not None
    assert kinds == ({"display_data", "execute_result"} if widgets else {"stream", "execute_result"})
    texts = ["".join(output.get("text", "") for output in each) for each in outputs]
    assert "new.png: 2 images from noise" in texts[3] and "No such file or directory" in texts[4]
    assert "other.png: 2 images from noise" in texts[5] and "on\n" in texts[6] and "and on\n" in texts[6]
    assert "Warning" not in "".join(texts)


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
