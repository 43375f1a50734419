"""What stands before the studio: who may ask, for what, and what is answered to the others."""

import asyncio

import pytest

from multibeta.studio import server
from multibeta.studio.server import Gate, is_local, slugs

HERE = "127.0.0.1:7860"


def ask(path="/", kind="http", hosts=server.LOCAL, **headers):
    """Status, headers and body that a gate before a page of ours answers."""
    sent = []

    async def app(scope, receive, send):
        given = [(b"content-type", b"text/html"), (b"X-Frame-Options", b"ALLOWALL")]
        await send({"type": "http.response.start", "status": 200, "headers": given})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    asyncio.run(Gate(app, hosts, ("/", "/other"))({"type": kind, "path": path, "headers": named}, None, send))
    if kind == "websocket":
        return sent[0]["type"], {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize("host", [HERE, "localhost:7860", "LOCALHOST", "[::1]:7860", "127.0.0.1"])
def test_it_may_be_asked_from_here(host):
    assert ask(host=host)[0] == 200
    assert ask(host=host, origin=f"http://{host}", sec_fetch_site="same-origin")[0] == 200


@pytest.mark.parametrize(
    "host", ["", "evil.example", "127.0.0.1.evil.example:7860", "evil.example#@127.0.0.1", "[", "0.0.0.0:7860"]
)
def test_a_host_of_another_name_is_refused(host):
    status, _, body = ask(host=host)
    assert status == 403 and b"--allowed-hosts" in body


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:7860",
        "http://127.0.0.1:8000",
        "http://[",
        "https://127.0.0.1.evil.example",
    ],
)
def test_a_page_of_another_site_is_refused(origin):
    status, _, body = ask("/gradio_api/queue/join", host=HERE, origin=origin)
    assert status == 403 and b"came from a page" in body


def test_what_a_browser_says_another_site_asks_for_is_refused_unless_it_opens_the_page():
    assert ask("/gradio_api/file=x.png", host=HERE, sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert ask(host=HERE, sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://evil.example",
        "/gradio_api/vibe-code",
        "/login",
        "/docs",
        "/monitoring",
        "/othe",
        "/gradio_api/run/other",
        "/gradio_api/custom_component/1/a/b/c",
    ],
)
def test_only_what_the_page_needs_is_served(path):
    assert ask(path, host=HERE)[0] == 403
    assert ask("/other", host=HERE)[0] == 200 and ask("/assets/index.js", host=HERE)[0] == 200


def test_answers_forbid_to_load_anything_from_elsewhere():
    _, headers, body = ask(host=HERE)
    assert body == b"page" and headers[b"x-frame-options"] == b"DENY" and headers[b"content-type"] == b"text/html"
    assert b"X-Frame-Options" not in headers and b"default-src 'self'" in headers[b"content-security-policy"]
    assert b"http" not in headers[b"content-security-policy"]


def test_other_hosts_may_ask_where_they_are_allowed():
    assert ask(host="studio.lab:80", hosts=(*server.LOCAL, "Studio.lab"))[0] == 200
    assert ask(host="evil.example", hosts=("*",))[0] == 200
    assert ask(host="evil.example", hosts=("*",), origin="http://other.example")[0] == 403


def test_sockets_are_closed():
    assert ask(kind="websocket", host=HERE)[0] == "websocket.close"


def test_addresses_of_this_machine_alone():
    assert all(map(is_local, ("127.0.0.1", "127.3.4.5", "::1", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "192.168.0.3", "evil.example", "")))


def test_pages_have_different_addresses():
    assert slugs(["a-2", "a", "a", "config"], taken=["config"]) == ["a-2", "a", "a-3", "config-2"]
    assert slugs(["scenes32", "runs/A b/model", "runs/a-b/model", "???"]) == [
        "scenes32",
        "runs-a-b-model",
        "runs-a-b-model-2",
        "model",
    ]
