"""A model on the desk: the images it is shown with, and what was found in its latent space."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from multibeta import data
from multibeta.latents import NamedDirections
from multibeta.pipelines import DenoisingMultiBetaVAE, Pipeline, named_directions
from multibeta.sampling import Callback
from multibeta.studio.origins import Origin
from multibeta.studio.pictures import Place

logger = logging.getLogger(__name__)

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
        num_images: Of the dataset, whose encodings give directions.
    """

    def __init__(
        self,
        reference: str,
        model: Pipeline,
        dataset: data.Dataset,
        source: str,
        files: Mapping[str, NamedDirections] | None = None,
        num_images: int = 250,
    ) -> None:
        self.reference, self.model, self.dataset, self.source = reference, model, dataset, source
        self.files, self.num_images = dict(files or {}), min(num_images, len(dataset))
        self.image: Callable[[Origin], Tensor] = functools.lru_cache(KEPT)(self._image)
        self._latents: OrderedDict[tuple[Origin, Place], Tensor] = OrderedDict()
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

    def _image(self, origin: Origin) -> Tensor:
        return origin.load(self.model, self.dataset).cpu()

    def latent(self, origin: Origin, place: Place, callback: Callback | None = None) -> Tensor:
        """The latent of an image at a place, (1, c, h, w); `callback` is called while it is inverted."""
        if (origin, place) not in self._latents:
            self._latents[origin, place] = place.find(self.model, self.image(origin), callback)
        self._latents.move_to_end((origin, place))
        while len(self._latents) > KEPT:
            self._latents.popitem(last=False)
        return self._latents[origin, place]

    def _directions(self, kind: str, beta: float | None) -> NamedDirections:
        if kind in self.files:
            return self.files[kind]
        if kind not in KINDS:
            raise ValueError(f"there are directions of the kinds {', '.join((*KINDS, *self.files))}, got {kind!r}")
        return named_directions(self.model, kind, self.sample, beta)
