"""`multibeta studio`: what it needs, what it opens, what it refuses."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from multibeta import data
from multibeta.cli import main
from multibeta.pipelines import named_directions
from multibeta.studio import server


@pytest.fixture
def opened(monkeypatch):
    """The desks and options of studios that would have been served."""
    calls = []
    monkeypatch.setattr(server, "serve", lambda desks, *where, **how: calls.append((desks, where, how)))
    monkeypatch.setattr(server, "require_gradio", lambda: None)
    return calls


def test_each_model_gets_a_desk(opened, refiner, tmp_path):
    refiner.save_pretrained(tmp_path / "refiner")
    assert (
        main(["studio", "scenes32", "--beside", str(tmp_path / "refiner"), "--data", "scenes", "--direction-images", "20"]) == 0
    )
    ((desks, (host, port, allowed), how),) = opened
    assert list(desks) == ["scenes32", str(tmp_path / "refiner")] and (host, port, allowed) == ("127.0.0.1", None, ())
    assert [desk.dataset.resolution for desk in desks.values()] == [32, 16] and not how["browser"]
    desk = desks["scenes32"]
    assert desk.kinds == ("principal", "channel", "attribute") and desk.usual_beta == desk.model.auto_beta
    assert desk.quick == {"sampler": "map", "steps": 4} and len(desk.sample) == 20


def test_files_of_directions_go_to_the_models_that_they_are_of(opened, refiner, tmp_path, capsys):
    refiner.save_pretrained(tmp_path / "refiner")
    named_directions(refiner, "channel", data.Scenes(16), most=2).save(tmp_path / "two.safetensors")
    files = "--directions", str(tmp_path / "two.safetensors"), "--data", "scenes", "--direction-images", "20"
    assert main(["studio", "scenes32", "--beside", str(tmp_path / "refiner"), *files]) == 0
    (desks, *_), kind = opened[0], str(tmp_path / "two.safetensors")
    assert [kind in desk.kinds for desk in desks.values()] == [False, True]
    assert main(["studio", "scenes32", *files]) == 2
    assert "two.safetensors: directions of none of these models, scenes32" in capsys.readouterr().err


def test_it_says_what_it_cannot_do(opened, baseline, tmp_path, capsys, caplog):
    baseline.save_pretrained(tmp_path / "baseline")
    refused = {
        "studio needs a DenoisingMultiBetaVAE or a DiffusionVAE": [str(tmp_path / "baseline")],
        "no shipped model of that name": ["scenes33"],
        "direction_images must be at least 2": ["scenes32", "--direction-images", "1"],
        "port must be at least 1": ["scenes32", "--port", "0"],
        "no.safetensors": ["scenes32", "--directions", str(tmp_path / "no.safetensors")],
        "no-such-folder": ["scenes32", "--data", str(tmp_path / "no-such-folder")],
    }
    for said, arguments in refused.items():
        assert main(["studio", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert opened == []
    assert main(["studio", "scenes32", "--host", "0.0.0.0"]) == 0
    assert "may be reached from other machines" in caplog.text


def test_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["studio", "scenes32"]) == 2
    assert 'pip install "multibeta[studio]"' in capsys.readouterr().err


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at port {port} of 127.0.0.1.*without --port"):
            server.require_free("127.0.0.1", port)
    server.require_free("127.0.0.1", port)
    with pytest.raises(OSError, match=r"no\.such\.host"):
        server.require_free("no.such.host.invalid", 80)
    with pytest.raises(ValueError, match="at most 65535, got 99999"):
        server.require_free("127.0.0.1", 99999)


def answer(address):
    """Status and text."""
    try:
        with urllib.request.urlopen(address, timeout=30) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_serves_until_it_is_interrupted_and_no_variable_opens_it(end, tmp_path):
    pytest.importorskip("gradio", reason='needs Gradio (pip install "multibeta[studio]")')
    command = [sys.executable, "-m", "multibeta", "studio", "scenes32", "--direction-images", "20"]
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "tmp").mkdir()
    opening = {"SHARE": "True", "SERVER_NAME": "0.0.0.0", "ALLOWED_PATHS": str(tmp_path), "MCP_SERVER": "True", "DEBUG": "1"}
    opening |= {"SSR_MODE": "True", "ROOT_PATH": "http://evil.example"}
    environment = os.environ | {f"GRADIO_{name}": value for name, value in opening.items()} | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as studio:
        try:
            line = studio.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
            status, text = answer(address)
            folders = [path.name for path in (tmp_path / "tmp").iterdir()]
            refused, told = answer(f"{address}gradio_api/file={tmp_path / 'secret'}")
            studio.send_signal(end)
            rest, errors = studio.communicate(timeout=30)
        finally:
            studio.kill()
    assert status == 200 and "multibeta studio" in text and "evil" not in text
    assert refused == 403 and told != "secret"
    assert [name for name in folders if name.startswith("multibeta-studio-")] == folders != []
    assert studio.returncode == 0 and "Traceback" not in errors and rest == ""
    assert list((tmp_path / "tmp").iterdir()) == []
