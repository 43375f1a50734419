"""The page of the studio, in Gradio: what can be moved, and what is asked for when something moves."""

from __future__ import annotations

import functools
import logging
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
import torch
from gradio.context import Context

from multibeta.checks import check_number
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE
from multibeta.studio import shown
from multibeta.studio.desk import Desk
from multibeta.studio.origins import MOST_NEW, MOST_SEED, OfData, OfFile, OfNoise, Origin, Sampling, from_page, to_page
from multibeta.studio.pictures import MOST_FRAMES, Drawn, Edit, Meaning, Move, New, NoisePath, Path, Picture, Place, quickly
from multibeta.studio.worker import Superseded, Waiting, Wish, Worker

logger = logging.getLogger(__name__)

SLIDERS = 12  # of one kind of directions at once
STRONGEST = 3.0  # deviations
PAUSE_SECONDS = 0.4  # that nothing moves, before the full walk begins
LONGEST_LIST = 1000  # letters of a list of channels
MOST_NEW_SEED = 999  # of the slider
LATENTS, NOISES = "two latents", "two noises at one latent"
KIND_TITLES = {"principal": "Principal", "channel": "Channels", "attribute": "Attributes"}
STEER, PATH, MEANING, NEW = "Steer", "Path", "What a direction means", "New images"
HINT = (
    "A slider moves the image along a direction of the latent space, in standard deviations of the data. The percentage of a "
    "principal direction is its share of the variance. What is decoded at once changes first, and is blurred; denoising gives "
    "back a sharp image, and leaves out what is still too small a change."
)
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
QUEUED: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

Values = dict[Any, Any]


class Pages(gr.Blocks):
    """Blocks that pass on what a page sends as it is.

    Gradio would fetch what a page names as the address of a file, and refuse numbers in words of its own, and in the log; here
    files are read where they were dropped, and what uses a number says what is wrong with it.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False) -> list[Any]:
        for component in block_fn.inputs:
            block = component if state is None else state[component._id]  # sliders that are named anew are others in a session
            block.async_move_resource_to_block_cache = where_it_is
            if isinstance(block, gr.Slider | gr.Number):
                block.preprocess = as_it_is
        return await super().preprocess_data(block_fn, inputs, state, explicit_call)


async def where_it_is(path: Any) -> Any:
    return path


def as_it_is(payload: Any) -> Any:
    return payload


class Page:
    """The page of a desk, within the Blocks of now: one picture above, and tabs below with what moves it.

    Args:
        desk: What is shown.
        worker: Who computes, for all desks.
    """

    def __init__(self, desk: Desk, worker: Worker) -> None:
        self.desk, self.worker = desk, worker
        self.refiner = isinstance(desk.model, DiffusionVAE)
        self.moved: set[Any] = set()  # components on which the picture depends
        self.strengths: dict[str, list[gr.Slider]] = {}  # by kind of directions
        self.first: dict[str, gr.Slider] = {}  # which direction the first of them moves, of kinds that have more
        gr.HTML(heading(desk))
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=270):
                self.origin = self.chooser("Image", OfData(0))
                self.common_controls()
            with gr.Column(scale=3, min_width=320):
                self.figure, self.line = gr.HTML(elem_classes="picture"), gr.HTML(shown.said(""))
                self.number, self.tab = hidden("0"), self.keep(hidden(STEER))
                self.code = gr.Code(language="python", interactive=False, show_label=False, render=False)
                with gr.Tabs() as self.tabs:
                    pictures = {title: self.build_tab(title, build) for title, build in self.contents().items()}
                with gr.Accordion("This picture in Python", open=False):
                    self.code.render()
        self.answer(lambda values: pictures[values[self.tab]](values))

    def contents(self) -> dict[str, Callable[[], Callable[[Values], Picture]]]:
        """What builds each tab, and gives what its picture is."""
        meaning = {MEANING: self.meaning_tab} if self.desk.kinds else {}
        return {STEER: self.steer_tab, PATH: self.path_tab, **meaning, NEW: self.new_tab}

    def build_tab(self, title: str, build: Callable[[], Callable[[Values], Picture]]) -> Callable[[Values], Picture]:
        with gr.Tab(title, id=title) as tab:
            picture = build()
        tab.select(functools.partial(str, title), None, self.tab, **QUIET)
        return picture

    def keep(self, component: Any) -> Any:
        """A component on which the picture depends."""
        self.moved.add(component)
        return component

    def chooser(self, label: str, start: OfData) -> gr.Textbox:
        """Where an image comes from: the data, or a file that is dropped; the component that holds it, as `to_page` says it."""
        desk = self.desk
        last, origin = len(desk.dataset) - 1, self.keep(hidden(to_page(start)))
        with gr.Group():
            with gr.Row(equal_height=True):
                index = gr.Number(start.index, label=f"{label}, 0 to {last:,}", minimum=0, maximum=last, precision=0, scale=3)
                another = gr.Button("Another", scale=1, min_width=90)
            drop = gr.Image(label="or a file", sources=["upload", "clipboard"], height=150, buttons=[])
            drop.preprocess = as_dropped
        line = gr.HTML()

        def choose(chosen: Any) -> tuple:
            try:
                return to_page(OfData(as_integer(chosen, "the image"))), ""
            except ValueError as error:
                return gr.skip(), shown.said(str(error), wrong=True)

        def random_one() -> int:
            return int(torch.randint(len(desk.dataset), ()))

        def take(dropped: tuple[str, str] | None) -> tuple:
            if dropped is None:
                return gr.skip(), gr.skip(), gr.skip(), gr.skip()
            try:
                given = OfFile.read(*dropped, desk.model)
            except (ValueError, OSError) as error:
                logger.warning("%s", error)
                return gr.skip(), None, shown.said(str(error), wrong=True), gr.skip()
            return to_page(given), None, shown.said(f"{given.name}, as the model sees it"), None

        index.input(choose, index, [origin, line], **QUIET)
        another.click(random_one, None, index, **QUIET).then(choose, index, [origin, line], **QUIET)
        drop.upload(take, drop, [origin, drop, line, index], **QUIET)
        return origin

    def common_controls(self) -> None:
        """Where the image is edited, and how it is denoised."""
        model, usual = self.desk.model, self.desk.model.sampling_options()
        self.beta = self.found_at = self.invert = None
        if not self.refiner:
            label = "β: the higher, the less the latent keeps"
            self.beta = self.keep(gr.Slider(0, 1, self.desk.usual_beta, step=0.01, label=label))
        with gr.Accordion("How it is denoised", open=False):
            self.sampler = self.keep(gr.Dropdown(list(model.samplers), value=usual["sampler"], label="Sampler"))
            self.steps = self.keep(gr.Slider(1, model.num_steps, usual["steps"], step=1, label="Steps"))
            label = "Seed of the noise"
            self.seed = self.keep(gr.Number(0, label=label, minimum=0, maximum=MOST_SEED, precision=0))
        if not self.refiner:
            label = "Exact: every detail comes back where nothing is moved (slower)"
            self.invert = self.keep(gr.Checkbox(False, label=label))
            self.invert.change(self.usual_sampling, self.invert, [self.sampler, self.steps], **QUIET)

    def usual_sampling(self, inverts: bool) -> list[Any]:
        """Sampler and steps that suit an edit."""
        return list(self.desk.model.sampling_options(invert=bool(inverts)).values())

    def origin_of(self, values: Values) -> Origin:
        return from_page(values[self.origin])

    def inverts(self, values: Values) -> bool:
        return self.invert is not None and bool(values[self.invert])

    def sampling(self, values: Values) -> Sampling:
        sampler, model = values[self.sampler], self.desk.model
        if self.inverts(values) and sampler not in model.inverting:
            sampler = model.sampling_options(invert=True)["sampler"]
        return Sampling(sampler, as_integer(values[self.steps], "steps"), as_integer(values[self.seed], "the seed"))

    def place(self, values: Values) -> Place:
        if self.beta is None:
            return Place()
        return Place(as_number(values[self.beta], "beta"), self.sampling(values) if self.inverts(values) else None)

    def level_of_directions(self, values: Values) -> float | None:
        return None if self.found_at is None else as_number(values[self.found_at], "beta of directions")

    def steer_tab(self) -> Callable[[Values], Picture]:
        """The image, decoded at once, denoised; a slider for each direction."""
        with gr.Tabs():
            for kind in self.desk.kinds:
                with gr.Tab(title_of(kind)):
                    self.direction_sliders(kind)
        with gr.Row():
            reset = gr.Button("Reset the directions", min_width=160)
            if not self.refiner:
                self.found_at = gr.Slider(0, 1, self.desk.usual_beta, step=0.01, label="Directions are found at β")
                self.keep(self.found_at)
        gr.HTML(f'<p class="hint">{HINT}</p>')
        moving = [slider for sliders in self.strengths.values() for slider in sliders]
        reset.click(lambda: [0.0] * len(moving), None, moving, **QUIET)
        for kind in self.strengths:
            self.name_anew(kind)

        def moves(values: Values) -> Iterator[Move]:
            found_at = self.level_of_directions(values)
            for kind, sliders in self.strengths.items():
                first = as_integer(values[self.first[kind]], "the first direction") if kind in self.first else 0
                for index, slider in enumerate(sliders, first):
                    if strength := as_number(values[slider], "a strength"):
                        yield Move(kind, self.desk.name_of(kind, found_at, index), strength, found_at)

        def picture(values: Values) -> Picture:
            return Edit(self.origin_of(values), self.place(values), tuple(moves(values)), self.sampling(values))

        return picture

    def direction_sliders(self, kind: str) -> None:
        """Sliders of the first directions of a kind, and where there are more one that chooses which."""
        names = self.desk.directions(kind, self.desk.usual_beta).names
        if len(names) > SLIDERS:
            label = f"There are {len(names)}: show {SLIDERS} from number"
            self.first[kind] = self.keep(gr.Slider(0, len(names) - SLIDERS, 0, step=1, label=label))
        with gr.Row():
            self.strengths[kind] = [
                self.keep(gr.Slider(-STRONGEST, STRONGEST, 0, step=0.05, label=name, min_width=200)) for name in names[:SLIDERS]
            ]

    def name_anew(self, kind: str) -> None:
        """Sliders that become those of other directions get their names, and stand at 0."""
        sliders, first, found_at = self.strengths[kind], self.first.get(kind), self.found_at
        chosen = [each for each in (first, None if kind in self.desk.files else found_at) if each is not None]

        def named(values: dict) -> list[Any]:
            try:
                start = 0 if first is None else as_integer(values[first], "the first direction")
                level = None if found_at is None else as_number(values[found_at], "beta of directions")
                indices = range(start, start + len(sliders))
                names = self.worker.run(lambda: [self.desk.name_of(kind, level, index) for index in indices])
            except ValueError as error:
                gr.Warning(escape(str(error)))
                return [gr.skip()] * len(sliders)
            return [gr.Slider(value=0, label=name) for name in names]

        if chosen:
            inputs = {each for each in (first, found_at) if each is not None}
            gr.on([each.release for each in chosen], named, inputs, sliders, **QUEUED)

    def path_tab(self) -> Callable[[Values], Picture]:
        """Between two images, or of a DiffusionVAE between two noises."""
        weight = self.keep(gr.Slider(0, 1, 0.5, step=0.01, label="How far: 0 is the first image, 1 the second"))
        with gr.Row():
            with gr.Column(min_width=240):
                second = self.chooser("Second image", OfData(len(self.desk.dataset) // 2))
            with gr.Column(min_width=240):
                how = self.keep(
                    gr.Radio(
                        ["slerp", "lerp"],
                        value=self.desk.model.usual_path,
                        label="Path: along an arc (slerp), or straight (lerp)",
                    )
                )
                label = "Channels that change, such as 0-3, 7; all if it is empty"
                dims = self.keep(gr.Textbox("", label=label, max_length=LONGEST_LIST))
                if self.refiner:
                    between = self.keep(gr.Radio([LATENTS, NOISES], value=LATENTS, label="Between"))
                    label = "Seed of the second noise"
                    other = self.keep(gr.Number(1, label=label, minimum=0, maximum=MOST_SEED, precision=0))
                    label = "All images take the same noise at every step"
                    shared = self.keep(gr.Checkbox(False, label=label))
                with gr.Row():
                    count = gr.Slider(4, MOST_FRAMES, 8, step=4, label="Images", min_width=120)
                    whole = gr.Button("Draw the whole path", min_width=120)

        def picture(values: Values) -> Path | NoisePath:
            sampling, origin, far = self.sampling(values), self.origin_of(values), as_number(values[weight], "the way")
            common: dict[str, Any] = {"how": values[how], "shared_noise": self.refiner and bool(values[shared])}
            if self.refiner and values[between] == NOISES:
                seeds = sampling.seed, as_integer(values[other], "the second seed")
                return NoisePath(origin, seeds, far, sampling, **common)
            chosen = channels_of(values[dims], self.desk.model.vae.config.latent_shape[0])
            return Path(origin, from_page(values[second]), self.place(values), far, sampling, dims=chosen, **common)

        def whole_path(values: Values) -> Picture:
            return replace(picture(values), weight=None, count=as_integer(values[count], "the number of images"))

        self.draw_when(whole, whole_path, {count})
        return picture

    def meaning_tab(self) -> Callable[[Values], Picture]:
        """What one direction does to the image, from -3 to 3 deviations."""
        numbers = {kind: len(self.desk.directions(kind, self.desk.usual_beta).names) for kind in self.desk.kinds}
        first = self.desk.kinds[0]
        with gr.Row():
            titles = [(title_of(kind), kind) for kind in numbers]
            kind = self.keep(gr.Radio(titles, value=first, label="Directions"))
            index = self.keep(gr.Slider(0, numbers[first] - 1, 0, step=1, label="Number"))
        kind.change(lambda chosen: gr.Slider(maximum=numbers[chosen] - 1, value=0), kind, index, **QUIET)

        def picture(values: Values) -> Picture:
            found_at, chosen = self.level_of_directions(values), values[kind]
            name = self.desk.name_of(chosen, found_at, as_integer(values[index], "the number"))
            move = Move(chosen, name, 1.0, found_at)
            return Meaning(self.origin_of(values), self.place(values), move, self.sampling(values))

        return picture

    def new_tab(self) -> Callable[[Values], Picture]:
        """New images from noise, each of which can be steered."""
        with gr.Row():
            count = self.keep(gr.Slider(4, MOST_NEW, 8, step=4, label="How many"))
            seed = self.keep(gr.Slider(0, MOST_NEW_SEED, 0, step=1, label="Seed"))
            if self.refiner:
                shared = self.keep(gr.Checkbox(False, label="All take the same noise"))
        with gr.Row(equal_height=True):
            index = gr.Number(0, label="Number of an image", minimum=0, maximum=MOST_NEW - 1, precision=0)
            steer = gr.Button("Steer this one")

        def picture(values: Values) -> New:
            sampling = Sampling(
                values[self.sampler], as_integer(values[self.steps], "steps"), as_integer(values[seed], "the seed")
            )
            return New(as_integer(values[count], "the number of images"), sampling, self.refiner and bool(values[shared]))

        def take(values: dict) -> tuple:
            try:
                asked, number = picture(values), as_integer(values[index], "the number")
                if not 0 <= number < asked.count:
                    raise ValueError(f"there are images 0 to {asked.count - 1}, got {number}")
            except ValueError as error:
                return gr.skip(), gr.skip(), shown.said(str(error), wrong=True)
            origin = OfNoise(number, asked.count, asked.sampling, asked.shared_noise)
            return to_page(origin), gr.Tabs(selected=STEER), gr.skip()

        inputs = {count, seed, index, self.sampler, self.steps} | ({shared} if self.refiner else set())
        steer.click(take, inputs, [self.origin, self.tabs, self.line], **QUIET)
        return picture

    def answer(self, picture_of: Callable[[Values], Picture]) -> None:
        """Show a picture when the page opens and whenever something moves: at first quickly, after a pause in full."""

        def look(values: dict, request: gr.Request) -> Iterator[tuple]:
            wish = self.worker.wish(page_of(request))

            def work(callback: Any) -> tuple:
                began, picture = time.perf_counter(), quickly(picture_of(values), self.desk)
                drawn = picture.draw(self.desk, callback, lambda drawn: wish.show(shown.as_html(drawn)))
                return shown.as_html(drawn), shown.said(timed(picture, drawn, began)), str(wish.number)

            yield from told(wish.run(work))

        def finish(values: dict, request: gr.Request) -> Iterator[tuple]:
            time.sleep(PAUSE_SECONDS)
            yield from self.in_full(self.worker.again(page_of(request), int(values[self.number] or 0)), picture_of, values)

        opened = Context.root_block
        assert opened is not None, "within Blocks"
        triggers = [opened.load, *(component.change for component in self.moved)]
        outputs = [self.figure, self.line]
        gr.on(triggers, look, self.moved, [*outputs, self.number], trigger_mode="always_last", **QUEUED)
        self.number.change(finish, self.moved | {self.number}, [*outputs, self.code], trigger_mode="always_last", **QUEUED)

    def draw_when(self, button: gr.Button, picture_of: Callable[[Values], Picture], more: set[Any]) -> None:
        """Show a picture in full when a button is clicked; it depends on `more` as well."""

        def draw(values: dict, request: gr.Request) -> Iterator[tuple]:
            yield from self.in_full(self.worker.wish(page_of(request)), picture_of, values)

        button.click(draw, {*self.moved, *more}, [self.figure, self.line, self.code], **QUEUED)

    def in_full(self, wish: Wish, picture_of: Callable[[Values], Picture], values: Values) -> Iterator[tuple]:
        """HTML of a picture, a line with files of it, its Python."""

        def work(callback: Any) -> tuple:
            began, picture = time.perf_counter(), picture_of(values)
            drawn, lines = picture.draw(self.desk, callback), picture.lines(self.desk)
            return shown.as_html(drawn), shown.said(timed(picture, drawn, began), *shown.downloads(drawn, lines)), lines

        yield from told(wish.run(work))


def told(updates: Iterator[Waiting | tuple]) -> Iterator[tuple]:
    """What a wish yields, for a figure, a line and something third: words and errors are said in the line."""
    try:
        for update in updates:
            if isinstance(update, Waiting):
                yield update.early or gr.skip(), shown.said(str(update)), gr.skip()
            else:
                yield update
    except Superseded:
        yield gr.skip(), gr.skip(), gr.skip()  # a generator that gives nothing empties the picture now and then
    except (ValueError, KeyError, TypeError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        message = str(error.args[0] if isinstance(error, KeyError) else error)
        logger.warning("%s", message)
        yield gr.skip(), shown.said(message, wrong=True), gr.skip()


def timed(picture: Picture, drawn: Drawn, began: float) -> str:
    """What a picture shows, how it was denoised, and how long it took."""
    seconds, about = time.perf_counter() - began, f"{drawn.about}; " if drawn.about else ""
    return f"{about}{picture.sampling.words}, {f'{seconds * 1000:.0f} ms' if seconds < 1 else f'{seconds:.1f} s'}"


def title_of(kind: str) -> str:
    """What a kind of directions is called: of a file, its name."""
    return KIND_TITLES.get(kind) or pathlib.Path(kind).stem


def as_dropped(payload: Any) -> Any:
    """Path and name of a dropped file, in the place of `gr.Image.preprocess`, which would decode it."""
    return None if payload is None or payload.path is None else (payload.path, payload.orig_name or "image")


def page_of(request: gr.Request) -> str:
    return request.session_hash or "one"


def as_number(value: Any, name: str) -> float:
    """`ValueError` for what is no number."""
    check_number(name, value)
    return float(value)


def as_integer(value: Any, name: str) -> int:
    """`ValueError` for what is no whole number."""
    if (number := as_number(value, name)) != int(number):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def hidden(value: str) -> gr.Textbox:
    """What a page remembers and does not show."""
    return gr.Textbox(value, visible="hidden")


def heading(desk: Desk) -> str:
    """What is on the desk."""
    model, config = desk.model, desk.model.vae.config
    facts = [
        f"images of {config.resolution} × {config.resolution}",
        f"latents of {' × '.join(map(str, config.latent_shape))}",
        f"{len(desk.dataset):,} images of {desk.source}",
    ]
    if isinstance(model, DenoisingMultiBetaVAE) and model.spectrum is not None:
        facts.append(f"edits keep an image up to β = {model.auto_beta:g} (auto)")
    title = "Denoising Multi-β VAE" if isinstance(model, DenoisingMultiBetaVAE) else type(model).__name__
    return f"<h1>{escape(desk.reference)}</h1><p>{title}: {escape('; '.join(facts))}.</p>"


def channels_of(text: str | None, count: int) -> tuple[int, ...] | None:
    """Channels as a person lists them, "0-3, 7"; None for all.

    Raises:
        ValueError: Something else, or channels that there are not.
    """
    chosen: list[int] = []
    for part in filter(None, re.split(r"[,\s]+", (text or "")[:LONGEST_LIST])):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        if ends is None:
            raise ValueError(f"channels are numbers and ranges, such as 0-3, 7, got {part!r}")
        low, high = int(ends[1]), int(ends[2] or ends[1])
        if not low <= high < count:
            raise ValueError(f"there are channels 0 to {count - 1}, got {part}")
        chosen += range(low, high + 1)
    return tuple(dict.fromkeys(chosen)) or None
