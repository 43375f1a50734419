"""The pictures of the studio: what is asked for, what the model makes of it, and the lines of Python that make the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from multibeta import latents
from multibeta.checks import check_beta, check_integer, check_number
from multibeta.markup import signed
from multibeta.pipelines import DiffusionVAE, Pipeline
from multibeta.sampling import Callback
from multibeta.studio.origins import MOST_NEW, OfData, OfNoise, Origin, Sampling, arguments

if TYPE_CHECKING:
    from multibeta.studio.desk import Desk

STRONGEST = 10.0  # deviations
MOST_FRAMES = 16  # of a path
STRENGTHS = tuple(range(-3, 4))  # of what a direction means


@dataclass(frozen=True)
class Drawn:
    """Images that were made, and what they are.

    Attributes:
        images: (N, C, H, W) in [-1, 1], row by row.
        labels: What each shows.
        columns: Images in a row.
        name: Of files of them.
        captions: What stands below each in place of its label; none for the labels.
        about: What they show together.
        moving: Which of the images are the frames of an animation, in their order; none where there is none.
    """

    images: Tensor
    labels: tuple[str, ...]
    columns: int
    name: str
    captions: tuple[str, ...] = ()
    about: str = ""
    moving: tuple[int, ...] = ()


Early = Callable[[Drawn], None]
"""Called with a picture before its denoised images are made, which are grey in it."""


def unseen(drawn: Drawn) -> None:
    """Nobody waits for what can be shown early."""


@dataclass(frozen=True)
class Place:
    """Where in the latent space an image is edited.

    Attributes:
        beta: The level; None of a model of one representation.
        inverted: None for its mean encoding at beta; otherwise its encoding at 0 goes up to beta along the ODE of this sampling.
    """

    beta: float | None = None
    inverted: Sampling | None = None

    def find(self, model: Pipeline, image: Tensor, callback: Callback | None = None) -> Tensor:
        """The latent of an image (1, C, H, W), (1, c, h, w)."""
        if self.inverted is None:
            return model.encode(image, self.beta)
        return model.invert(model.encode(image, 0.0), beta=self.beta, **self.inverted.options, callback=callback)

    def lines(self, latent: str, image: str) -> list[str]:
        if self.inverted is None:
            level = "" if self.beta is None else f", beta={self.beta!r}"
            return [f"{latent} = model.encode({image}{level})"]
        return [f"{latent} = model.invert(model.encode({image}, beta=0.0), beta={self.beta!r}, {self.inverted})"]

    def check(self, model: Pipeline) -> None:
        """`ValueError` unless the model has this level."""
        model.levels(None if self.beta is None else [self.beta])
        if self.inverted is not None:
            self.inverted.check(model)

    @property
    def argument(self) -> str:
        """What stands for the level in a call."""
        return "" if self.beta is None else f", beta={self.beta!r}"


@dataclass(frozen=True)
class Move:
    """How far along which direction.

    Attributes:
        kind, name: Of the direction.
        strength: In standard deviations.
        found_at: The beta at which the direction was found; None of a model of one representation.
    """

    kind: str
    name: str
    strength: float
    found_at: float | None = None

    def check(self) -> None:
        """`ValueError` for a strength or a beta that is none."""
        check_number(f"the strength of {self.name}", self.strength, least=-STRONGEST, most=STRONGEST)
        if self.found_at is not None:
            check_beta(self.found_at)


@dataclass(frozen=True)
class Edit:
    """An image, moved along directions, decoded at once and denoised (MultiBeta Algorithm 4)."""

    origin: Origin
    place: Place
    moves: tuple[Move, ...]
    sampling: Sampling

    title: ClassVar[str] = "edit"

    def draw(self, desk: Desk, callback: Callback | None = None, early: Early = unseen) -> Drawn:
        check(desk.model, self.sampling, self.place, *self.moves)
        image, beta = desk.image(self.origin, callback), self.place.beta
        moved = latents.manipulate(desk.latent(self.origin, self.place, callback), direction_of(desk, self.moves), 1.0)
        direct = desk.model.render(moved, beta, denoise=False).cpu()
        drawn = Drawn(torch.cat([image, direct, grey(direct)]), (self.origin.label, *made(desk.model, beta)), 3, self.title)
        early(drawn)
        denoised = denoise(desk.model, moved, beta, self.sampling, callback).cpu()
        return replace(drawn, images=torch.cat([image, direct, denoised]))

    def lines(self, desk: Desk) -> str:
        level = "" if self.place.beta is None else f", {self.place.beta!r}"
        return program(
            desk,
            {"image": self.origin},
            self.moves,
            [
                *self.place.lines("latent", "image"),
                *moved_lines(self.moves),
                f"direct = model.render(moved{level}, denoise=False)",
                f"denoised = model.render(moved{level}, denoise=True, {self.sampling}, seeds=[{self.sampling.seed}])",
            ],
            "torch.cat([image, direct, denoised])",
            self.title,
            3,
        )


@dataclass(frozen=True)
class Meaning:
    """What a direction means: an image moved along it by -3 to 3 deviations, decoded at once above, denoised below."""

    origin: Origin
    place: Place
    move: Move
    sampling: Sampling

    title: ClassVar[str] = "direction"

    def draw(self, desk: Desk, callback: Callback | None = None, early: Early = unseen) -> Drawn:
        check(desk.model, self.sampling, self.place, self.move)
        beta, count = self.place.beta, len(STRENGTHS)
        start = desk.latent(self.origin, self.place, callback).repeat(count, 1, 1, 1)
        moved = latents.manipulate(start, direction_of(desk, [replace(self.move, strength=1.0)]), torch.tensor(STRENGTHS))
        direct = desk.model.render(moved, beta, denoise=False).cpu()
        names, name = made(desk.model, beta), self.move.name
        drawn = Drawn(
            torch.cat([direct, grey(direct)]),
            tuple(f"{made_so}, {name} {strength:+d}" for made_so in names for strength in STRENGTHS),
            count,
            self.title,
            captions=("",) * count + tuple(signed(strength) for strength in STRENGTHS),
            about=f"{name}, in deviations; above {names[0]}, below {names[1]}",
            moving=back_and_forth(count, count),
        )
        early(drawn)
        denoised = denoise(desk.model, moved, beta, self.sampling, callback).cpu()
        return replace(drawn, images=torch.cat([direct, denoised]))

    def lines(self, desk: Desk) -> str:
        level, count = "" if self.place.beta is None else f", {self.place.beta!r}", len(STRENGTHS)
        return program(
            desk,
            {"image": self.origin},
            [replace(self.move, strength=1.0)],
            [
                *self.place.lines("latent", "image"),
                f"strengths = torch.arange({STRENGTHS[0]}, {STRENGTHS[-1] + 1})",
                f"moved = latents.manipulate(latent.repeat({count}, 1, 1, 1), direction, strengths)",
                f"direct = model.render(moved{level}, denoise=False)",
                f"denoised = model.render(moved{level}, denoise=True, {self.sampling}, seeds=[{self.sampling.seed}] * {count})",
            ],
            "torch.cat([direct, denoised])",
            self.title,
            count,
        )


@dataclass(frozen=True)
class Path:
    """Images between two (MultiBeta Algorithm 5, DiffusionVAE Eq. 10): one at a weight, or the whole path.

    Attributes:
        weight: 0 is the first image, 1 the second; None for a path of `count` images.
        dims: Latent channels that change; None for all.
        how: See `latents.between`.
        shared_noise: As of `DiffusionVAE.interpolate`.
    """

    first: Origin
    second: Origin
    place: Place
    weight: float | None
    sampling: Sampling
    count: int = 8
    dims: tuple[int, ...] | None = None
    how: str = "slerp"
    shared_noise: bool = False

    title: ClassVar[str] = "path"

    def draw(self, desk: Desk, callback: Callback | None = None, early: Early = unseen) -> Drawn:
        check(desk.model, self.sampling, self.place)
        check_integer("the number of images on a path", self.count, 2, MOST_FRAMES)
        model, beta = desk.model, self.place.beta
        start, end = (desk.latent(origin, self.place, callback) for origin in (self.first, self.second))
        weights = torch.linspace(0, 1, self.count).tolist() if self.weight is None else [self.weight]
        points = torch.cat([latents.interpolate(start, end, weight, self.dims, self.how) for weight in weights])
        direct = model.render(points, beta, denoise=False).cpu()
        names = made(model, beta)
        if self.weight is None:
            drawn = Drawn(
                torch.cat([direct, grey(direct)]),
                tuple(f"{name}, {weight:.2f} of the way" for name in names for weight in weights),
                self.count,
                self.title,
                captions=("",) * self.count + tuple(f"{weight:.2f}" for weight in weights),
                about=f"from {self.first.label} to {self.second.label}; above {names[0]}, below {names[1]}",
                moving=back_and_forth(self.count, self.count),
            )
            before, after = [direct], []
        else:
            first, second = desk.image(self.first), desk.image(self.second)
            labels = (self.first.label, *names, self.second.label)
            drawn = Drawn(torch.cat([first, direct, grey(direct), second]), labels, 4, self.title)
            before, after = [first, direct], [second]
        early(drawn)
        options: dict[str, Any] = self.options | ({} if callback is None else {"callback": callback})
        denoised = model.interpolate(start, end, weights, beta, self.dims, **options)[0].cpu()
        return replace(drawn, images=torch.cat([*before, denoised, *after]))

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `interpolate`."""
        shared = {"shared_noise": True} if self.shared_noise else {}
        return {"how": self.how, "seeds": [self.sampling.seed], **self.sampling.options, **shared}

    def lines(self, desk: Desk) -> str:
        level = "" if self.place.beta is None else f", {self.place.beta!r}"
        dims = "" if self.dims is None else f", dims={self.dims!r}"
        weights = f"torch.linspace(0, 1, {self.count}).tolist()" if self.weight is None else f"[{self.weight!r}]"
        body = [
            *self.place.lines("start", "first"),
            *self.place.lines("end", "second"),
            f"weights = {weights}",
            f"points = torch.cat([latents.interpolate(start, end, weight{dims}, how={self.how!r}) for weight in weights])",
            f"direct = model.render(points{level}, denoise=False)",
            f"denoised = model.interpolate(start, end, weights{self.place.argument}{dims}, {arguments(self.options)})[0]",
        ]
        shown = "[direct, denoised]" if self.weight is None else "[first, direct, denoised, second]"
        columns = self.count if self.weight is None else 4
        return program(desk, {"first": self.first, "second": self.second}, (), body, f"torch.cat({shown})", self.title, columns)


@dataclass(frozen=True)
class NoisePath:
    """One reconstruction refined from one noise to another (DiffusionVAE Eq. 11).

    Attributes:
        seeds: Of the noise at both ends.
        weight, count, how, shared_noise: See `Path`.
    """

    origin: Origin
    seeds: tuple[int, int]
    weight: float | None
    sampling: Sampling
    count: int = 8
    how: str = "slerp"
    shared_noise: bool = False

    title: ClassVar[str] = "noise"

    def draw(self, desk: Desk, callback: Callback | None = None, early: Early = unseen) -> Drawn:
        check(desk.model, self.sampling)
        check_integer("the number of images on a path", self.count, 2, MOST_FRAMES)
        model, place = desk.model, Place()
        assert isinstance(model, DiffusionVAE), "the others have no noise at one latent"
        weights = torch.linspace(0, 1, self.count).tolist() if self.weight is None else [self.weight]
        latent = desk.latent(self.origin, place, callback)
        options: dict[str, Any] = self.options | ({} if callback is None else {"callback": callback})
        first, second = self.seeds
        refined = model.interpolate_noise(latent, [first], [second], weights, **options)[0].cpu()
        if self.weight is not None:
            sketch = model.render(latent, denoise=False).cpu()
            labels = self.origin.label, *made(model, None)
            return Drawn(torch.cat([desk.image(self.origin), sketch, refined]), labels, 3, self.title)
        return Drawn(
            refined,
            tuple(f"{weight:.2f} of the way from noise {first} to {second}" for weight in weights),
            self.count,
            self.title,
            captions=tuple(f"{weight:.2f}" for weight in weights),
            about=f"from noise {first} to {second}",
            moving=back_and_forth(self.count),
        )

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `interpolate_noise`."""
        shared = {"shared_noise": True} if self.shared_noise else {}
        return {"how": self.how, **self.sampling.options, **shared}

    def lines(self, desk: Desk) -> str:
        weights = f"torch.linspace(0, 1, {self.count}).tolist()" if self.weight is None else f"[{self.weight!r}]"
        first, second = self.seeds
        call = f"model.interpolate_noise(latent, [{first}], [{second}], weights, {arguments(self.options)})[0]"
        body = ["latent = model.encode(image)", f"weights = {weights}", f"refined = {call}"]
        shown, columns = "refined", self.count
        if self.weight is not None:
            shown, columns = "torch.cat([image, model.render(latent, denoise=False), refined])", 3
        return program(desk, {"image": self.origin}, (), body, shown, self.title, columns)


@dataclass(frozen=True)
class New:
    """New images from noise.

    Attributes:
        count: How many.
        shared_noise: As of `DiffusionVAE.generate`.
    """

    count: int
    sampling: Sampling
    shared_noise: bool = False

    title: ClassVar[str] = "new"

    def draw(self, desk: Desk, callback: Callback | None = None, early: Early = unseen) -> Drawn:
        check(desk.model, self.sampling)
        check_integer("the number of new images", self.count, 1, MOST_NEW)
        images = desk.model.generate(self.count, **self.options, callback=callback).cpu()
        labels, numbers = (tuple(f"{name}{index}" for index in range(self.count)) for name in ("new image ", ""))
        return Drawn(images, labels, self.columns, self.title, captions=numbers)

    @property
    def columns(self) -> int:
        return min(8, self.count)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return OfNoise(0, self.count, self.sampling, self.shared_noise).options

    def lines(self, desk: Desk) -> str:
        body = [f"images = model.generate({self.count}, {arguments(self.options)})"]
        return program(desk, {}, (), body, "images", self.title, self.columns)


def quickly(picture: Any, desk: Desk) -> Any:
    """The picture in a few evaluations, for a first look; a latent is inverted in all its steps, once."""
    return replace(picture, sampling=replace(picture.sampling, **desk.quick))


Picture = Edit | Meaning | Path | NoisePath | New


def check(model: Pipeline, *parts: Sampling | Place | Move) -> None:
    """`ValueError` for a part of a picture that the model has not."""
    for part in parts:
        part.check() if isinstance(part, Move) else part.check(model)


def made(model: Pipeline, beta: float | None) -> tuple[str, str]:
    """What an image is called that was decoded at once, and one that was denoised."""
    return ("the sketch", "refined") if beta is None else (f"decoded at beta {beta:g}", "denoised")


def denoise(model: Pipeline, moved: Tensor, beta: float | None, sampling: Sampling, callback: Callback | None) -> Tensor:
    """The images of latents, denoised from one noise."""
    options = {} if callback is None else {"callback": callback}
    return model.render(moved, beta, denoise=True, seeds=[sampling.seed] * len(moved), **sampling.options, **options)


def grey(images: Tensor) -> Tensor:
    """What stands for images that are not made yet."""
    return torch.zeros_like(images)


def back_and_forth(count: int, first: int = 0) -> tuple[int, ...]:
    """`count` images from `first` on, there and back."""
    return (*range(first, first + count), *range(first + count - 2, first, -1))


def direction_of(desk: Desk, moves: Sequence[Move]) -> Tensor:
    """The sum of all moves, (c, h, w)."""
    total = torch.zeros(desk.model.vae.config.latent_shape, device=desk.model.device)
    for move in moves:
        total = total + move.strength * desk.directions(move.kind, move.found_at)[move.name].to(total)
    return total


def moved_lines(moves: Sequence[Move]) -> list[str]:
    """What moves `latent` along `direction`."""
    return ["moved = latents.manipulate(latent, direction, 1.0)"] if moves else ["moved = latent"]


def program(
    desk: Desk,
    origins: Mapping[str, Origin],
    moves: Sequence[Move],
    body: Sequence[str],
    shown: str,
    title: str,
    columns: int,
) -> str:
    """The lines of Python that make a picture.

    Args:
        origins: Images by the names of their variables.
        moves: Whose sum is the `direction`.
        body: What makes the images.
        shown: What stands for them.
    """
    model = desk.model
    device = "" if model.device.type == "cpu" else f", device={str(model.device)!r}"
    kinds = list(dict.fromkeys((move.kind, move.found_at) for move in moves))
    opened_for_directions = any(kind not in desk.files for kind, _ in kinds)
    opened = opened_for_directions or any(isinstance(origin, OfData) for origin in origins.values())
    lines = [
        "import torch",
        "",
        "import multibeta",
        f"from multibeta import data{', latents' * any('latents.' in line for line in body)}",
        *["from multibeta.pipelines import named_directions"] * opened_for_directions,
        "",
        f"model = multibeta.{type(model).__name__}.from_pretrained({desk.reference!r}{device})",
    ]
    if opened:
        lines.append(f"dataset = data.open_dataset({desk.source!r}, {arguments(desk.opening)})")
    for name, origin in origins.items():
        lines += [f"{name} = {line}" for line in origin.lines(model)]
    if moves:
        if opened_for_directions:
            lines.append(f"sample = data.Subset(dataset, data.choose(len(dataset), {desk.num_images}))")
        names = {kind: f"directions_{index}" if index else "directions" for index, kind in enumerate(kinds)}
        for (kind, beta), name in names.items():
            found = f"named_directions(model, {kind!r}, sample{'' if beta is None else f', beta={beta!r}'})"
            lines.append(f"{name} = {f'model.load_directions({kind!r})' if kind in desk.files else found}")
        terms = [f"{move.strength!r} * {names[move.kind, move.found_at]}[{move.name!r}]" for move in moves]
        lines.append(f"direction = {' + '.join(terms)}")
    return "\n".join([*lines, *body, f'data.save_grid({shown}, "{title}.png", columns={columns})', ""])
