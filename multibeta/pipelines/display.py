"""How models and directions show themselves in a notebook: facts, and pictures where these take about a second."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from multibeta import markup, processors
from multibeta.inference import Snapshot
from multibeta.latents import SHOWN_STRENGTHS

if TYPE_CHECKING:
    from multibeta.pipelines.inputs import Images
    from multibeta.pipelines.protocol import Beta, Pipeline

SECONDS, DIRECTION_SECONDS = 1.0, 3.0  # that pictures of a model and of directions may take, after what warms up
SHOWN_IMAGES = 6
DENOISED_DIRECTIONS = 4  # where there is no time for so many, images are decoded at once

Pictures = tuple[str | None, Tensor | None]  # a word on them, and images, where there are some


class TooSlow(Exception):
    """Pictures would take longer than they may."""


class Remembered:
    """Pictures of a model, for as long as its weights are the same."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.pictures: Pictures = (None, None)

    def get(self, model: Pipeline, make: Callable[[], Pictures]) -> Pictures:
        """What `make` gave when the weights were what they are now; of an error its words."""
        parts = [getattr(model, name) for name in model.present_parts]
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        if self.snapshot is None or not self.snapshot.is_of(tensors):
            try:
                self.pictures = make()
            except TooSlow as slow:
                self.pictures = str(slow), None
            except Exception as error:  # a notebook that shows a value has not asked for anything that could fail
                self.pictures = f"no pictures here: {type(error).__name__}: {error}", None
            self.snapshot = Snapshot(tensors)
        return self.pictures


_of_models: weakref.WeakKeyDictionary[Any, Remembered] = weakref.WeakKeyDictionary()


class Watch:
    """A callback that ends a walk for one image that takes too long, not counting the first evaluation, which warms up.

    Raises:
        TooSlow: From within the walk.
    """

    def __init__(self) -> None:
        self.began: float | None = None
        self.seconds = 0.0  # that the whole walk takes, by its pace so far

    def __call__(self, done: int, total: int, latent: Tensor) -> None:
        now = time.perf_counter()
        if self.began is None:
            self.began = now
            return
        self.seconds = (now - self.began) / (done - 1) * total
        if now - self.began > SECONDS and done < total:
            raise TooSlow(f"no pictures here: one takes about {self.seconds:.2g} s")


def model_html(model: Pipeline) -> str:
    """What a model is, and a few new images where these take about a second."""
    note, images = _of_models.setdefault(model, Remembered()).get(model, lambda: new_images(model))
    below = "" if note is None else f"<p>{escape(note)}</p>"
    if images is not None:
        below += "".join(markup.picture(image, f"new image {number} of seed 0") for number, image in enumerate(images))
    return f"{markup.table((), {name: [escape(value)] for name, value in facts(model).items()})}<div>{below}</div>"


def facts(model: Pipeline) -> dict[str, str]:
    """What a model is, by name."""
    config, recipe = model.vae.config, model.info.get("recipe")
    count = sum(weight.numel() for name in model.present_parts for weight in getattr(model, name).parameters())
    said = {
        "class": type(model).__name__,
        "recipe": recipe.get("name") if isinstance(recipe, dict) else recipe,
        "images": f"{config.image_channels} x {config.resolution} x {config.resolution}",
        "latents": " x ".join(map(str, config.latent_shape)),
        "parameters": f"{count:,}, {str(model.dtype).removeprefix('torch.')} on {model.device}",
        "auto beta": auto_beta(model) if model.usual_levels else None,
        "samplers": ", ".join(model.samplers),
        "by default": ", ".join(f"{name} {value}" for name, value in model.usual_sampling.items()),
    }
    return {name: str(value) for name, value in said.items() if value}


def auto_beta(model: Pipeline) -> str:
    """The beta at which edits start, in words."""
    try:
        return f"{model.auto_beta:g}"
    except ValueError:
        return "not measured: model.measure_spectrum(images)"


def new_images(model: Pipeline) -> Pictures:
    """As many new images, up to six, as are made in about a second: those of `generate` from seed 0."""
    watch, bars = Watch(), model._progress
    sampling = model.sampling_options()
    model.set_progress_bar_config(disable=True)
    try:
        began = time.perf_counter()
        first = model.generate(1, callback=watch, **sampling)
        each = watch.seconds or time.perf_counter() - began
        count = min(SHOWN_IMAGES, max(1, int(SECONDS / each)))
        return None, first if count == 1 else model.generate(count, **sampling)
    finally:
        model.set_progress_bar_config(**bars)


class Traversals:
    """What shows directions of a model that is still there: one image moved along each. It is `latents.Traverse`.

    Args:
        model: Referred to weakly; copies and pickles of directions leave it out, and all of this.
        beta: As of `Pipeline.manipulate`.
        latent: Of the image, at beta, (1, c, h, w); by default of a new one.
    """

    def __init__(self, model: Pipeline, beta: Beta, latent: Tensor | None = None) -> None:
        self.model, self.latent = weakref.ref(model), latent
        self.beta: Beta = beta
        self.remembered, self.steps = Remembered(), torch.empty(0)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def __call__(self, steps: Tensor) -> Pictures:
        model = self.model()
        if model is None:
            return None, None
        if not torch.equal(self.steps, steps):
            self.remembered, self.steps = Remembered(), steps
        return self.remembered.get(model, lambda: self.pictures(model))

    def pictures(self, model: Pipeline) -> Pictures:
        """Images of as many directions as there is time for, denoised where these are some."""
        note, latent, beta = None, self.latent, model._edit_beta(self.beta)
        if latent is None:
            note, images = new_images(model)
            if images is None:
                return note, None
            latent = model.encode(images[:1], beta)
        for denoise in (True, False) if model.denoises else (False,):
            count = affordable(model, latent, beta, denoise)
            if count >= (min(DENOISED_DIRECTIONS, len(self.steps)) if denoise else 1):
                note = "decoded at once: to denoise them would take longer" if model.denoises > denoise else None
                return note, traversals(model, latent, self.steps[:count], SHOWN_STRENGTHS, beta, denoise=denoise)
        return f"no pictures here: they would take longer than {DIRECTION_SECONDS:g} s", None


def affordable(model: Pipeline, latent: Tensor, beta: Beta, denoise: bool) -> int:
    """Along how many directions a latent (1, c, h, w) can be moved, and rendered, in `DIRECTION_SECONDS`."""
    watch = Watch()
    options: dict[str, Any] = {"callback": watch} if denoise else {}
    began = time.perf_counter()
    try:
        model.render(latent, beta, denoise=denoise, **options)
    except TooSlow:
        return 0
    seconds = watch.seconds or time.perf_counter() - began
    return int(DIRECTION_SECONDS / (seconds * (len(SHOWN_STRENGTHS) - 1)))


def traversals(
    model: Pipeline,
    image: Images,
    directions: Tensor,
    strengths: Sequence[float],
    beta: Beta,
    *,
    denoise: bool,
    **sampling: Any,
) -> Tensor:
    """An image moved along directions, a row for each and a column for each strength: (K, S, C, H, W).

    Args:
        image: One, see `inputs.as_images`, or its latent (1, c, h, w) at beta.
        directions: What strength 1 of each direction adds to a latent, (K, c, h, w).
        denoise, sampling: As of `Pipeline.render`.
    """
    moves = torch.tensor(strengths).view(1, -1, 1, 1, 1).to(directions) * directions[:, None]
    latents = model._as_latents(image, beta) + moves.flatten(0, 1).to(model.device)
    chunks = latents.split(processors.images_at_once(model.vae.config.resolution, model.device))
    seeds = torch.zeros(len(latents), dtype=torch.int64)  # the same noise for all, so that the direction alone changes
    rendered = [model.render(each, beta, denoise=denoise, seeds=seeds[: len(each)], **sampling) for each in chunks]
    return torch.cat(rendered).unflatten(0, (len(directions), len(strengths)))
