"""A model on the desk: the images it is shown with, and what was found in its latent space."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from multibeta import data
from multibeta.latents import NamedDirections
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline, named_directions
from multibeta.pipelines.inputs import image_options
from multibeta.sampling import Callback
from multibeta.studio.origins import Origin
from multibeta.studio.pictures import Place

logger = logging.getLogger(__name__)
Key = TypeVar("Key")

KINDS = ("principal", "channel", "attribute")
KEPT = 32  # images and latents
KEPT_DIRECTIONS = 16
QUICK_STEPS = 4
UNMEASURED_BETA = 0.7


class Desk:
    """A model, a dataset, and what is kept of both between two answers of a studio.

    Args:
        reference: What `from_pretrained` takes to load the model.
        model: Loaded.
        dataset, source: Images of the model's size, and as `data.open_dataset` takes them.
        files: Paths of files of directions, with what is in them.
        upscale: Whether the dataset was opened so that it takes smaller images.
        num_images: Of the dataset, whose encodings give directions.
    """

    def __init__(
        self,
        reference: str,
        model: Pipeline,
        dataset: data.Dataset,
        source: str,
        files: Mapping[str, NamedDirections] | None = None,
        num_images: int = 1000,
        *,
        upscale: bool = False,
    ) -> None:
        self.reference, self.model, self.dataset, self.source = reference, model, dataset, source
        self.files, self.num_images = dict(files or {}), min(num_images, len(dataset))
        self.opening: dict[str, Any] = image_options(model) | ({"upscale": True} if upscale else {})
        self._images: collections.OrderedDict[Origin, Tensor] = collections.OrderedDict()
        self._latents: collections.OrderedDict[tuple[Origin, Place], Tensor] = collections.OrderedDict()
        self.directions: Callable[..., NamedDirections] = functools.lru_cache(KEPT_DIRECTIONS)(self._directions)

    @functools.cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of directions that the images give, and those of files."""
        found = []
        for kind in KINDS if data.knows_attributes(self.dataset) else KINDS[:2]:
            try:
                self.directions(kind, self.usual_beta)
                found.append(kind)
            except ValueError as error:
                logger.warning("no sliders of the kind %s: %s", kind, error)
        return (*found, *self.files)

    @property
    def usual_beta(self) -> float | None:
        """Where edits begin; None of a model of one representation."""
        if not isinstance(self.model, DenoisingMultiBetaVAE):
            return None
        return UNMEASURED_BETA if self.model.spectrum is None else self.model.auto_beta

    @property
    def sample(self) -> data.Subset:
        """The images that give directions."""
        return data.Subset(self.dataset, data.choose(len(self.dataset), self.num_images))

    @property
    def quick(self) -> dict[str, Any]:
        """The sampler and the steps of a first look, in place of those of a `Sampling`."""
        sampler = "map" if "map" in self.model.samplers else self.model.usual_sampling["sampler"]
        return {"sampler": sampler, "steps": min(QUICK_STEPS, self.model.num_steps)}

    def name_of(self, kind: str, beta: float | None, index: int) -> str:
        """The name of a direction of a kind by its number; the last there is for one beyond."""
        names = self.directions(kind, beta).names
        return names[min(max(index, 0), len(names) - 1)]

    def image(self, origin: Origin, callback: Callback | None = None) -> Tensor:
        """(1, C, H, W) on the CPU; `callback` may end it where it is sampled."""
        return kept(self._images, origin, lambda: origin.load(self.model, self.dataset, callback).cpu())

    def latent(self, origin: Origin, place: Place, callback: Callback | None = None) -> Tensor:
        """(1, c, h, w), where the model is; `callback` may end it where it is inverted."""
        return kept(self._latents, (origin, place), lambda: place.find(self.model, self.image(origin, callback), callback))

    def _directions(self, kind: str, beta: float | None) -> NamedDirections:
        if kind in self.files:
            return self.files[kind]
        if kind not in KINDS:
            raise ValueError(f"there are directions of the kinds {', '.join((*KINDS, *self.files))}, got {kind!r}")
        return named_directions(self.model, kind, self.sample, beta)


def kept(newest: collections.OrderedDict[Key, Tensor], key: Key, make: Callable[[], Tensor]) -> Tensor:
    """What was made for a key, if it is among the newest that are kept; otherwise made now."""
    if key not in newest:
        newest[key] = make()
        if len(newest) > KEPT:
            newest.popitem(last=False)
    newest.move_to_end(key)
    return newest[key]
