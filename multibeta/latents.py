"""Directions, paths and densities in a latent space: the latent half of MultiBeta Algorithms 4 and 5 and of their kin."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from multibeta import markup
from multibeta.checkpoints import naming, typed
from multibeta.checks import check_floating, check_real, is_integer
from multibeta.files import require_file, write_atomically
from multibeta.seeds import as_short_seed
from multibeta.weights import shorten

if TYPE_CHECKING:
    from typing import Self

HEADER = "multibeta.directions"  # of a file of directions: what it says of them, in JSON
SHOWN_DIRECTIONS, SHOWN_STRENGTHS = 8, (-3.0, -1.5, 0.0, 1.5, 3.0)  # in a notebook

Traverse = Callable[[Tensor], tuple[str | None, Tensor | None]]
"""Steps (K, c, h, w) to images (k, S, C, H, W) of the first k, moved by `SHOWN_STRENGTHS`, or none; and a word on them."""


@dataclass(frozen=True)
class PrincipalDirections:
    """Principal components of a set of encodings (MultiBeta C.2).

    Attributes:
        mean: (c, h, w).
        directions: Unit vectors, largest variance first, (K, c, h, w).
        deviations: Standard deviation of the encodings along each, (K,).
        shown_by: What moves an image along them in a notebook, of those that a model found.
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor
    shown_by: Traverse | None = field(default=None, compare=False, repr=False)

    def named(self) -> dict[str, Tensor]:
        """A standard deviation along each, (c, h, w), by its number and its share of the variance: "0 · 15%"."""
        return {
            f"{index} · {share:.0%}": direction * deviation
            for index, (share, direction, deviation) in enumerate(
                zip(self.shares.tolist(), self.directions, self.deviations, strict=True)
            )
        }

    @property
    def shares(self) -> Tensor:
        """Of each in the variance along all of them, (K,) float64."""
        variances = self.deviations.double().square()
        return variances / variances.sum()

    def __repr__(self) -> str:
        largest = ", ".join(f"{value:.3g}" for value in self.deviations[:3].tolist())
        more = ", ..." if len(self.deviations) > 3 else ""
        return f"PrincipalDirections({len(self.directions)} of shape {tuple(self.mean.shape)}, deviations {largest}{more})"

    def _repr_html_(self) -> str:
        steps = {str(index): self.directions[index] * self.deviations[index] for index in range(len(self.directions))}
        return _shown(repr(self), steps, self.shown_by)


@dataclass(frozen=True)
class NamedDirections:
    """Directions in the latent space of one model, each with a name, in a unit that is the same for all.

    Attributes:
        names: Of K directions, all different.
        steps: What strength 1 adds to a latent, one standard deviation along each: (K, c, h, w), see `in_deviations`.
        beta: Where they were found; None of a model of one representation.
        kind: How they were found, such as "principal".
        model: `Pretrained.latent_digest` of the model whose latents they are of.
        shown_by: What moves an image along them in a notebook, where the model is there.

    Raises:
        ValueError: No direction, names that are empty or not different, or steps of another number or not finite.
    """

    names: tuple[str, ...]
    steps: Tensor
    beta: float | None
    kind: str
    model: str
    shown_by: Traverse | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_floating("steps", self.steps)
        if self.steps.dim() != 4 or len(self.steps) != len(self.names) or not self.names:
            given = f"{len(self.names)} names and steps of shape {tuple(self.steps.shape)}"
            raise ValueError(f"directions need K names, at least one, and steps (K, c, h, w), got {given}")
        if not all(self.names) or len(set(self.names)) < len(self.names):
            raise ValueError(f"names of directions must be different and not empty, got {shorten(self.names)}")
        if not self.steps.isfinite().all():
            raise ValueError("steps of directions must be finite")

    def __repr__(self) -> str:
        level = "" if self.beta is None else f" at beta {self.beta:g}"
        return f"NamedDirections({len(self)} {self.kind}{level} of shape {tuple(self.steps.shape[1:])}: {shorten(self.names)})"

    def _repr_html_(self) -> str:
        return _shown(repr(self), dict(zip(self.names, self.steps, strict=True)), self.shown_by)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, which: str | int) -> Tensor:
        """What strength 1 of a direction adds to a latent, (c, h, w): see `index`."""
        return self.steps[self.index(which)]

    def index(self, which: str | int) -> int:
        """The number of a direction, by its name; a number, or one that is typed, is itself.

        Raises:
            KeyError, IndexError: There is none of this name or number; says which there are.
        """
        if which in self.names:
            return self.names.index(which)
        if isinstance(which, str) and not which.removeprefix("-").isdecimal():
            raise KeyError(f"no direction {which!r}; there are {shorten(self.names, 12)}")
        number = int(which)
        if not 0 <= number < len(self):
            raise IndexError(f"direction must lie between 0 and {len(self) - 1}, got {number}")
        return number

    def save(self, path: str | Path) -> None:
        """Write the directions to one safetensors file, with all but the steps as JSON in its header; atomic."""
        said = {name: getattr(self, name) for name in ("names", "beta", "kind", "model")}
        steps = self.steps.detach().cpu().contiguous().clone()
        write_atomically(path, lambda file: save_file({"steps": steps}, file.name, {HEADER: json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; nothing in a file is executed. `Pipeline.load_directions` asks also whose they are.

        Raises:
            FileNotFoundError, OSError: There is no such file.
            ValueError: It is damaged, or of another kind; names it.
        """
        path = require_file(path)
        with naming(path.parent, "directions of latents", path.name), safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ValueError(f"its header has no {HEADER}, so `multibeta directions` did not write it")
            return cls(**typed(cls, json.loads(header) | {"steps": file.get_tensor("steps")}))


def _shown(title: str, steps: dict[str, Tensor], shown_by: Traverse | None) -> str:
    """Directions as HTML: a row of images for each that is shown, or what strength 1 of each adds in length."""
    note, moved = (None, None) if shown_by is None else shown_by(torch.stack(list(steps.values())[:SHOWN_DIRECTIONS]))
    strengths = [markup.signed(strength) for strength in SHOWN_STRENGTHS]
    names = list(steps)[: SHOWN_DIRECTIONS if moved is None else len(moved)]
    if moved is None:
        rows = {name: [f"{float(steps[name].norm()):.3g}"] for name in names}
        header = ["standard deviation"]
    else:
        rows = {
            name: [markup.picture(each, f"{name}, moved by {by}") for each, by in zip(row, strengths, strict=True)]
            for name, row in zip(names, moved, strict=True)
        }
        header = strengths
    more = [f"{len(steps) - len(names)} more are not shown"] if len(steps) > len(names) else []
    said = "; ".join([*([] if note is None else [note]), *more])
    return f"<p>{escape(title)}</p>{markup.table(header, rows)}" + (f"<p>{escape(said)}</p>" if said else "")


def in_deviations(direction: Tensor, encodings: Tensor) -> Tensor:
    """What strength 1 adds to a latent, where strengths are standard deviations: (c, h, w), like `direction`.

    It is the unit vector along the direction, times the standard deviation of the encodings projected on it: of principal
    directions `directions[i] * deviations[i]`.

    Args:
        direction: (c, h, w), of any length but 0.
        encodings: Of images at one beta, (N, c, h, w), at least two.
    """
    check_real("direction", direction)
    check_real("encodings", encodings)
    if direction.shape != encodings.shape[1:]:
        shapes = f"{tuple(direction.shape)} for encodings {tuple(encodings.shape)}"
        raise ValueError(f"a direction (c, h, w) must have the shape of encodings (N, c, h, w), got {shapes}")
    if len(encodings) < 2:
        raise ValueError(f"a standard deviation needs at least 2 encodings, got {len(encodings)}")
    along = direction.flatten().double().to(encodings.device)
    length = torch.linalg.vector_norm(along)
    if not (length.isfinite() and length > 0):
        raise ValueError(f"direction must be of finite numbers that are not all 0, got a norm of {float(length):g}")
    unit = along / length
    deviation = ((encodings - encodings[0]).flatten(1).double() @ unit).std()
    return (unit * deviation).view(direction.shape).to(direction)


def as_count(name: str, value: int, most: int, of_what: str = "{}") -> int:
    """An integer from 1 to `most`, of Python, NumPy or torch; anything else is a `ValueError`."""
    limits = f"between 1 and {of_what.format(most)}"
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer {limits}, got {value!r}") from None
    if not 1 <= count <= most:
        raise ValueError(f"{name} must lie {limits}, got {count}")
    return count


def principal_directions(encodings: Tensor, num_directions: int | None = None) -> PrincipalDirections:
    """PCA of encodings (N, c, h, w) at one beta: the candidates for the direction of MultiBeta Algorithm 4.

    The sign of a direction makes its largest entry positive. Raises `ValueError` for fewer than two encodings or more
    directions than there are dimensions or encodings to find them.
    """
    check_real("encodings", encodings)
    flat = encodings.flatten(1).double()
    available = min(len(flat) - 1, flat.shape[1])
    if available < 1:
        raise ValueError(f"principal directions need at least 2 encodings, got {len(flat)}")
    count = available if num_directions is None else as_count("num_directions", num_directions, available)
    mean = flat.mean(0)
    _, singular_values, axes = torch.linalg.svd(flat - mean, full_matrices=False)
    axes = axes[:count]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    deviations = singular_values[:count] / (len(flat) - 1) ** 0.5
    shape = encodings.shape[1:]
    return PrincipalDirections(mean.view(shape).to(encodings), axes.view(-1, *shape).to(encodings), deviations.to(encodings))


def _per_sample(name: str, value: float | Tensor, latents: Tensor) -> Tensor:
    """A finite number, or one for each sample, as (N, 1, 1 ...) to go with `latents` (N, ...)."""
    try:
        each = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be one number, or one for each of {len(latents)} samples, got {value!r}") from None
    check_real(name, each)
    each = each.to(latents)
    if each.shape not in ((), (1,), (len(latents),)):
        raise ValueError(f"{name} must be one number, or one for each of {len(latents)} samples, got {tuple(each.shape)}")
    if not each.isfinite().all():
        raise ValueError(f"{name} must be finite, got {value}")
    return each.expand(len(latents)).view(-1, *[1] * (latents.dim() - 1))


def slerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical linear interpolation between vectors (MultiBeta Algorithm 5): (N, ...) and (N, ...) to (N, ...).

    Args:
        weight: 0 gives `first`, 1 gives `second`; a number or (N,).

    Nearly parallel vectors are interpolated linearly, which is the limit.
    """
    a, b = first.flatten(1), second.flatten(1)
    weight = _per_sample("weight", weight, a)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)[:, None]
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    nearly_parallel = sine < 1e-4
    safe = torch.where(nearly_parallel, torch.ones_like(sine), sine)
    on_first = torch.where(nearly_parallel, 1 - weight, torch.sin((1 - weight) * angle) / safe)
    on_second = torch.where(nearly_parallel, weight, torch.sin(weight * angle) / safe)
    return (on_first * a + on_second * b).view_as(first)


def lerp(first: Tensor, second: Tensor, weight: float | Tensor) -> Tensor:
    """Linear interpolation, (N, ...) and (N, ...) to (N, ...).

    Args:
        weight: 0 gives `first`, 1 gives `second`; a number or (N,).
    """
    weight = _per_sample("weight", weight, first)
    return (1 - weight) * first + weight * second


PATHS = {"lerp": lerp, "slerp": slerp}


def between(first: Tensor, second: Tensor, weight: float | Tensor, how: str = "lerp") -> Tensor:
    """Tensors on the path `how` from `first` to `second`: see `lerp` and `slerp`.

    Between independent draws of N(0, I) `lerp` has the variance (1 - weight)^2 + weight^2, a half in the middle; `slerp` has 1.
    """
    if how not in PATHS:
        raise ValueError(f"how must be one of {', '.join(PATHS)}, got {how!r}")
    if first.shape != second.shape:
        raise ValueError(f"pairs must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    return PATHS[how](first, second, weight)


def interpolate(
    first: Tensor, second: Tensor, weight: float | Tensor, dims: Sequence[int] | None = None, how: str = "slerp"
) -> Tensor:
    """Latents between two sets (MultiBeta Algorithm 5, lines 2-3): slerp in the chosen channels, `first` elsewhere.

    Args:
        first, second: (N, c, h, w).
        weight: 0 ... 1, a number or (N,).
        dims: Channels to interpolate (for a vector latent: its dimensions), each once; None for all.
        how: See `between`.
    """
    if first.shape != second.shape:
        raise ValueError(f"pairs must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    if dims is None:
        return between(first, second, weight, how)
    if isinstance(dims, int) or (isinstance(dims, Tensor) and dims.dim() == 0):
        raise ValueError(f"dims must be a sequence of channels, got {dims}")
    dims = dims.tolist() if isinstance(dims, Tensor) else list(dims)
    bad = [d for d in dims if not (is_integer(d) and 0 <= d < first.shape[1])]
    if bad:
        raise ValueError(f"dims must lie between 0 and {first.shape[1] - 1}, got {bad}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"dims must name each channel once, got {dims}")
    result = first.clone()
    result[:, dims] = between(first[:, dims], second[:, dims], weight, how)
    return result


def manipulate(latents: Tensor, direction: Tensor, strength: float | Tensor) -> Tensor:
    """Latents moved along a direction (MultiBeta Algorithm 4, line 2): z + strength * direction.

    Args:
        latents: (N, c, h, w).
        direction: (c, h, w) or (N, c, h, w), of any dtype and device.
        strength: A number or (N,).
    """
    shape = tuple(latents.shape[1:])
    wanted = f"direction must have the latent's shape {shape}"
    if not isinstance(direction, Tensor):
        raise TypeError(f"{wanted}, got {type(direction).__name__}")
    check_real("direction", direction)
    if tuple(direction.shape) not in (shape, (1, *shape), tuple(latents.shape)):
        raise ValueError(f"{wanted}, got {tuple(direction.shape)}")
    if not direction.isfinite().all():
        raise ValueError(f"direction must be of finite real numbers, got {direction.dtype}")
    return latents + _per_sample("strength", strength, latents) * direction.to(latents)


class LatentMixture(nn.Module):
    """A mixture of Gaussians over latents.

    Args:
        weights: Of the components, (K,), with sum 1.
        means: (K, c, h, w).
        scales: Deviations of each component, (K, c h w); or L of its covariance L L^T, (K, c h w, c h w).
    """

    weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, weights: Tensor, means: Tensor, scales: Tensor):
        super().__init__()
        count, size = len(weights), means.shape[1:].numel()
        fit = means.dim() == 4 and weights.shape == means.shape[:1] and scales.shape in ((count, size), (count, size, size))
        if not fit:
            given = ", ".join(str(tuple(values.shape)) for values in (weights, means, scales))
            raise ValueError(f"weights, means, scales must be (K,), (K, c, h, w), (K, c h w) or (K, c h w, c h w), got {given}")
        for name, values in {"weights": weights, "means": means, "scales": scales}.items():
            self.register_buffer(name, values)

    def sample(self, uniform: Tensor, noise: Tensor) -> Tensor:
        """Latents, (N, c, h, w).

        Args:
            uniform: In [0, 1], chooses the component, (N,).
            noise: Standard normal, (N, c, h, w).
        """
        component = torch.searchsorted(self.weights.cumsum(0), uniform).clamp(max=len(self.weights) - 1)
        scales, flat = self.scales[component], noise.flatten(1)
        spread = scales * flat if scales.dim() == 2 else (scales @ flat[:, :, None]).squeeze(2)
        return self.means[component] + spread.view_as(noise)


COVARIANCES = ("diag", "full")


def fit_mixture(encodings: Tensor, num_components: int = 10, covariance_type: str = "full", seed: int = 0) -> LatentMixture:
    """The mixture of Gaussians of highest likelihood that scikit-learn finds for encodings (N, c, h, w).

    Args:
        covariance_type: "full", whose (c h w)^2 numbers a component need many times as many encodings, or "diag".
        seed: Of the first assignment to components, any integer; scikit-learn takes 32 bits of it.

    Raises:
        ValueError: An unknown covariance type, or fewer encodings than components.
    """
    from sklearn.mixture import GaussianMixture

    if covariance_type not in COVARIANCES:
        raise ValueError(f"covariance_type must be one of {', '.join(COVARIANCES)}, got {covariance_type!r}")
    num_components = as_count("num_components", num_components, len(encodings), "the {} encodings")
    mixture = GaussianMixture(num_components, covariance_type=covariance_type, random_state=as_short_seed(seed))
    mixture.fit(encodings.flatten(1).double().cpu().numpy())
    weights, means, covariances = (torch.from_numpy(array) for array in (mixture.weights_, mixture.means_, mixture.covariances_))
    scales = covariances.sqrt() if covariance_type == "diag" else torch.linalg.cholesky(covariances)
    return LatentMixture(weights.float(), means.float().view(-1, *encodings.shape[1:]), scales.float())
