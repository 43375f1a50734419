"""The server of the studio: who may ask it, and for what."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import itertools
import logging
import os
import re
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from multibeta.checks import check_integer
from multibeta.studio.origins import MOST_BYTES

if TYPE_CHECKING:
    import gradio

    from multibeta.studio.desk import Desk
    from multibeta.studio.worker import Worker

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]

LONGEST_QUEUE, KEPT_SECONDS = 200, 600  # of requests; of files that were dropped
QUIET_GRADIO = {
    "GRADIO_ANALYTICS_ENABLED": "False",  # nobody is asked or told anything
    "GRADIO_ANALYTICS_MAX_EVENTS": "100",  # of its statistics of events,
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000",  # which it would make anew after each
}
LOCAL = ("127.0.0.1", "localhost", "::1")
ASKED = ("app_id", "cancel", "file=", "heartbeat/", "info", "queue/", "reset", "run/predict", "startup-events", "upload")
SERVED = ("/config", "/theme.css", "/favicon.ico", "/manifest.json", "/assets/", "/static/", "/svelte/")
SERVED += tuple(f"/gradio_api/{name}" for name in ASKED)
POLICY = {
    "default-src": "'self'",
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio makes functions of its templates
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "frame-ancestors": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Gate:
    """What stands before the page (ASGI): it lets pass what a page of this server asks this server for, and nothing else.

    A browser names the host that it believes to ask, and the page that asks. A page of another site that had its name point here
    (DNS rebinding) is refused by the first, a form or script of another site by the second. Of the many addresses of Gradio those
    that the page needs are served. The answers tell the browser to load nothing from anywhere else.

    Args:
        app: What is behind it.
        hosts: Names, without ports, by which the server may be asked; "*" for any.
        pages: Paths of the pages.
    """

    def __init__(self, app: App, hosts: Sequence[str], pages: Sequence[str]) -> None:
        self.app, self.hosts, self.pages = app, tuple(host.lower() for host in hosts), tuple(pages)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        reason = self.why_not(scope["type"], scope["path"], headers)
        if reason is not None:
            logger.warning("refused %s: %s", scope["path"][:100], reason)
            await refuse(scope["type"], reason, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value) for name, value in message.get("headers", []) if name.decode("latin-1").lower() not in HEADERS
                ]
                message = {**message, "headers": kept + [(name.encode(), value.encode()) for name, value in HEADERS.items()]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def why_not(self, kind: str, path: str, headers: dict[str, str]) -> str | None:
        """Why a request is refused; None for one that passes."""
        if kind != "http":
            return "only HTTP is served"
        host = headers.get("host", "")
        if not self.is_ours(host):
            return f"the host {host[:100]!r} is not one of {', '.join(self.hosts)} (--allowed-hosts)"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return f"it came from a page of {origin[:100]!r}"
        if headers.get("sec-fetch-site") in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate":
            return "it came from a page of another site"
        if path not in self.pages and not path.startswith(SERVED):
            return "no such page"
        return None

    def is_ours(self, host: str) -> bool:
        """Whether a Host header, with or without a port, names this server."""
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return "*" in self.hosts or name in self.hosts


async def refuse(kind: str, reason: str, send: Any) -> None:
    """Answer 403 with the reason, or close a socket."""
    if kind == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": f"multibeta studio: {reason}\n".encode()})


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    desks: Mapping[str, Desk],
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: Sequence[str] = (),
    *,
    browser: bool = False,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the studio until it is interrupted.

    Args:
        desks: By the names of their pages; the first is the page that one comes to.
        host, port: Where to listen; without a port the first free one from 7860 on.
        allowed_hosts: Names besides `host` and those of this machine by which the server may be asked.
        browser: Open the page in a browser.
        ready: Called with the address.

    Raises:
        OSError: The port is taken.
        ModuleNotFoundError: Gradio is not installed; says how.
    """
    with running(desks, host, port, allowed_hosts, browser=browser) as address:
        ready(address)
        threading.Event().wait()


@contextlib.contextmanager
def running(
    desks: Mapping[str, Desk],
    host: str = "127.0.0.1",
    port: int | None = None,
    allowed_hosts: Sequence[str] = (),
    *,
    browser: bool = False,
) -> Iterator[str]:
    """The address of a studio, which is served within a `with` block: see `serve`."""
    require_gradio()
    if port is not None:
        require_free(host, port)
    from multibeta.studio.shown import CSS
    from multibeta.studio.worker import Worker

    with tempfile.TemporaryDirectory(prefix="multibeta-studio-") as folder, contextlib.closing(Worker()) as worker:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where dropped files lie; said before Gradio is imported
        from gradio.themes import Base
        from starlette.middleware import Middleware

        blocks, paths = blocks_of(desks, worker)
        gate = Middleware(Gate, hosts=(*LOCAL, host, *allowed_hosts), pages=paths)
        _, address, _ = blocks.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inline=False,
            theme=Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),  # no fonts of the web
            head=f"<style>{CSS}</style>",  # its own css= would keep the rules within its container
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            max_file_size=MOST_BYTES,
            app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None},
        )
        try:
            yield address
        finally:
            blocks.close(verbose=False)


def require_gradio() -> None:
    """`ModuleNotFoundError` where Gradio is not installed; where it is, it will ask and tell nobody.

    Its environment variables could open folders and addresses, so none but ours is left, before it is imported.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ.update(QUIET_GRADIO)
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError('the studio needs Gradio: pip install "multibeta[studio]"', name="gradio")


def require_free(host: str, port: int) -> None:
    """`OSError` unless one can listen at a port, which says what to do; `ValueError` for a number that is none."""
    check_integer("port", port, 1, 65535)
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen at port {port} of {host}, {error}: without --port a free one is taken") from error


def blocks_of(desks: Mapping[str, Desk], worker: Worker) -> tuple[gradio.Blocks, list[str]]:
    """The pages of all desks, and their paths."""
    from gradio.routes import INTERNAL_ROUTES

    from multibeta.studio.page import Page, Pages

    (_, first), *others = desks.items()
    titles = titles_of(desks)
    paths = ["/", *(f"/{slug}" for slug in slugs(titles, INTERNAL_ROUTES)[1:])]
    with Pages(title="multibeta studio", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
        Page(first, worker)
    for (_, desk), title, path in zip(others, titles[1:], paths[1:], strict=True):
        with blocks.route(title, path):
            Page(desk, worker)
    blocks.pages[0] = ("", titles[0], True)
    blocks.queue(max_size=LONGEST_QUEUE, api_open=False, default_concurrency_limit=None)
    return blocks, paths


def titles_of(names: Iterable[str]) -> list[str]:
    """What pages are called whose models are named so: the last part of a path that says something."""
    return [next((part for part in reversed(Path(name).parts) if part not in ("model", "/", "..")), name) for name in names]


def slugs(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """What stands for each name in an address; all different, and none of those that are `taken`."""
    chosen: list[str] = []
    for name in names:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
        numbered = itertools.chain([slug], (f"{slug}-{number}" for number in itertools.count(2)))
        chosen.append(next(each for each in numbered if each not in {*chosen, *taken}))
    return chosen
