"""The command that opens the studio."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from multibeta.cli.arguments import SHIPPED, Model, OnModel, Source, Switch, require_at_least
from multibeta.cli.images import open_source
from multibeta.latents import NamedDirections

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Studio(OnModel):
    """A page on this machine on which beta, directions and paths are moved with sliders: pip install "multibeta[studio]"."""

    model: Model = SHIPPED
    beside: Annotated[tuple[str, ...], arg(metavar="MODEL")] = ()  # More models, each on a page of its own.
    data: Source = None  # Images to play with; by default the model's own data.
    directions: tuple[Path, ...] = ()  # Files that `multibeta directions` wrote, for sliders on the page of their model.
    direction_images: int = 1000  # Images whose encodings give the directions.
    host: str = "127.0.0.1"  # Address to listen at: this one is reached from this machine alone.
    port: int | None = None  # By default the first free one from 7860 on.
    allowed_hosts: tuple[str, ...] = ()  # Names besides localhost by which the page may be asked for; * for any.
    browser: Switch = False  # Open it in a browser.
    upscale: Switch = False  # Accept images of the data smaller than the model's; dropped ones always are.

    def run(self) -> None:
        from multibeta.studio.desk import Desk
        from multibeta.studio.server import is_local, require_free, require_gradio, serve

        require_gradio()
        require_at_least(2, direction_images=self.direction_images)
        if self.port is not None:
            require_free(self.host, self.port)
        if not is_local(self.host):
            logger.warning("%s may be reached from other machines, and whoever reaches it can use the model", self.host)
        owners = {path: NamedDirections.load(path).model for path in self.directions}
        desks, unused = {}, {*map(str, owners)}
        for name in (self.model, *self.beside):
            model = replace(self, model=name).load()
            dataset, source = open_source(model, self.data, "--data", upscale=self.upscale)
            files = {str(path): model.load_directions(path) for path, of in owners.items() if of == model.latent_digest()}
            unused -= {*files}
            desks[name] = Desk(name, model, dataset, source, files, self.direction_images, upscale=self.upscale)
        if unused:
            raise ValueError(f"{', '.join(sorted(unused))}: directions of none of these models, {', '.join(desks)}")
        with contextlib.suppress(KeyboardInterrupt), ended_like_ctrl_c():  # its usual end
            serve(desks, self.host, self.port, self.allowed_hosts, browser=self.browser, ready=say)


@contextlib.contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Let what else ends a program leave nothing behind either: `kill`, and a terminal that is closed."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def say(address: str) -> None:
    """Where the page is."""
    print(f"The studio is at {address} until Ctrl-C ends it.", flush=True)
