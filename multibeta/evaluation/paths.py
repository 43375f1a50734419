"""Where the evaluations of a flow map stand: chosen on held-out images, and stored with the model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging

import torch
from torch import Tensor

from multibeta import data, inference, recipes
from multibeta.evaluation.features import Features, usual_features
from multibeta.evaluation.records import recorded_recipe
from multibeta.flow_map import FlowMap, spread
from multibeta.flow_map.network import flat_path
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.progress import progress_bar

logger = logging.getLogger(__name__)

EVALUATIONS = (2, 3, 4)
POWERS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)  # see `spread`; every second one, and those beside the nearest
LIFTS = (0.2, 0.1, 0.3)  # the first of them unless another is clearly nearer
CLEARLY = 0.97  # of 2000 images, how two paths compare differs by hundredths from one seed to the next
CHOICE_IMAGES = 2000
LEAST_IMAGES = 32  # that a distance tells something by


def choose_paths(
    model: DenoisingMultiBetaVAE | DiffusionVAE, features: Features, real: Tensor, *, seed: int = 1, progress: bool = True
) -> dict[str, list[dict[str, float]]]:
    """Choose where "map" and "map_noise" stand in 2, 3 and 4 evaluations: where new images are nearest to real ones.

    How early they stand, the power of `spread`, is chosen for each number of evaluations; how far noise lifts, which matters
    less, once for all of them, and as usual unless distances say clearly otherwise: of a few thousand images they are rough.

    The flow map of the model has these `paths` and `noise_paths` from then on.

    Args:
        features: In which the Frechet distance is measured.
        real: (N, C, H, W) in [-1, 1]; as many are made along each path. What is measured later should be measured on others.
        seed: Of the images.

    Returns:
        Of each sampler a row for every path that was tried: "steps", "power", "lift", "frechet".
    """
    flow_map, last = model.flow_map, model.num_steps
    assert flow_map is not None, "whose paths they are"
    tried: dict[str, list[dict[str, float]]] = {"map": [], "map_noise": []}
    total = len(EVALUATIONS) * (2 * (len(POWERS[1::2]) + 2) + len(LIFTS) - 1)
    with progress_bar(total=total, desc="choosing paths", unit="path", disable=not progress) as bar:

        def walk(sampler: str, steps: int, power: float, lift: float) -> None:
            """A row of the distance along one path, where the grid is long enough for it."""
            bar.update()
            if len({last, 0, *(to for _, to in spread(last, steps, power))}) == steps + 1:
                set_paths(flow_map, sampler, [flat_path(sampler, last, few, power, lift) for few in range(2, steps + 1)])
                images = model.generate(len(real), sampler=sampler, steps=steps, seed=seed)
                distance = features.distance(images, real)
                tried[sampler].append({"steps": steps, "power": power, "lift": lift, "frechet": distance})

        for sampler, (first, *others) in (("map", (0.0,)), ("map_noise", LIFTS)):
            powers: dict[int, float] = {}
            for steps in EVALUATIONS:
                for power in POWERS[1::2]:
                    walk(sampler, steps, power, first)
                if (best := nearest_power(tried[sampler], steps)) is None:
                    break
                place = POWERS.index(best)
                walk(sampler, steps, POWERS[place - 1], first)
                walk(sampler, steps, POWERS[place + 1], first)
                powers[steps] = nearest_power(tried[sampler], steps) or best
            for lift, (steps, power) in itertools.product(others, powers.items()):
                walk(sampler, steps, power, lift)
            ends = [row for row in tried[sampler] if row["power"] == powers.get(int(row["steps"]))]
            nearness = {lift: sum(row["frechet"] for row in ends if row["lift"] == lift) for lift in (first, *others)}
            nearest = min(nearness, key=lambda lift: nearness[lift])
            lift = nearest if nearness[nearest] < CLEARLY * nearness[first] else first
            set_paths(flow_map, sampler, [flat_path(sampler, last, steps, power, lift) for steps, power in powers.items()])
    return tried


def nearest_power(rows: list[dict[str, float]], steps: int) -> float | None:
    """That of the least distance in so many evaluations; None where none was tried."""
    own = [row for row in rows if row["steps"] == steps]
    return min(own, key=lambda row: row["frechet"])["power"] if own else None


def set_paths(flow_map: FlowMap, sampler: str, paths: list[tuple[int, ...]]) -> None:
    """Give a flow map the paths of a sampler."""
    name = "noise_paths" if sampler == "map_noise" else "paths"
    flow_map.config = dataclasses.replace(flow_map.config, **{name: tuple(paths)})


def choose_recorded_paths(model: Pipeline, *, images: int = CHOICE_IMAGES, progress: bool = True) -> bool:
    """`choose_paths` on half of the images that a model held out, at most `images`; returns whether it was done.

    Distances of 2000 images tell paths apart that lie a tenth from each other in 2 to 4 evaluations; those of fewer mislead.
    Where the images cannot be opened or are too few to be measured on, the log says so, and the paths stay as they were.
    """
    assert isinstance(model, DenoisingMultiBetaVAE | DiffusionVAE), "others have no flow map"
    assert model.flow_map is not None, "whose paths they are"
    try:
        train_set, test_set = recipes.open_data(recipes.from_dict(recorded_recipe(model)))
        dataset = test_set if len(test_set) else train_set
        count = min(images, len(dataset) // 2)
        if count < LEAST_IMAGES:
            raise ValueError(f"half of {len(dataset)} images are fewer than {LEAST_IMAGES}")
        logger.info("choosing on %d held-out images where map and map_noise stand between their evaluations", count)
        features = usual_features(train_set, dataset, progress=progress, device=model.device)
        real = data.to_float(dataset.images(torch.arange(len(dataset) - count, len(dataset))))
        fast = copy.deepcopy(model).to(dtype=inference.fast_dtype(model.device))  # decoding is most of the work
        assert fast.flow_map is not None, "a copy of it"
        choose_paths(fast, features, real, progress=progress)
    except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
        logger.warning("where map and map_noise stand between their evaluations is not chosen: %s", error)
        return False
    model.flow_map.config = config = fast.flow_map.config
    logger.info("in 2, 3 and 4 evaluations map stands at %s, map_noise at %s (low, to)", config.paths, config.noise_paths)
    return True
