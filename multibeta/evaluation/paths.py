"""Where the evaluations of a flow map stand: chosen on held-out images, and stored with the model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging

import torch
from torch import Tensor
from tqdm import tqdm

from multibeta import data, inference, recipes
from multibeta.evaluation.features import Features, usual_features
from multibeta.evaluation.records import recorded_recipe
from multibeta.flow_map import FlowMap, spread
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline

logger = logging.getLogger(__name__)

EVALUATIONS = (2, 3, 4)
POWERS = (1.0, 1.5, 2.0, 2.5)  # see `spread`
LIFTS = (0.05, 0.1, 0.15)
CHOICE_IMAGES = 1000
LEAST_IMAGES = 32  # that a distance tells something by


def choose_paths(
    model: DenoisingMultiBetaVAE | DiffusionVAE, features: Features, real: Tensor, *, seed: int = 1, progress: bool = True
) -> dict[str, list[dict[str, float]]]:
    """Choose where "map" and "map_noise" stand in 2, 3 and 4 evaluations: where new images are nearest to real ones.

    The flow map of the model has these `paths` and `noise_paths` from then on.

    Args:
        features: In which the Frechet distance is measured.
        real: (N, C, H, W) in [-1, 1]; as many are made along each path. What is measured later should be measured on others.
        seed: Of the images.

    Returns:
        Of each sampler a row for every path that was tried: "steps", "power", "lift", "frechet".
    """
    assert model.flow_map is not None, "whose paths they are"
    tried: dict[str, list[dict[str, float]]] = {"map": [], "map_noise": []}
    total = len(EVALUATIONS) * len(POWERS) * (1 + len(LIFTS))
    with tqdm(total=total, desc="choosing paths", unit="path", disable=not progress) as bar:
        for sampler, lifts in (("map", (0.0,)), ("map_noise", LIFTS)):
            chosen: list[tuple[int, ...]] = []
            for steps in EVALUATIONS:
                rows = []
                for power, lift in itertools.product(POWERS, lifts):
                    path = spread(model.num_steps, steps, power, lift)
                    if len({model.num_steps, 0, *(to for _, to in path)}) < steps + 1:  # a grid too short for it
                        continue
                    flat = tuple(itertools.chain(*path)) if sampler == "map_noise" else tuple(to for _, to in path)
                    set_paths(model.flow_map, sampler, [*chosen, flat])
                    images = model.generate(len(real), sampler=sampler, steps=steps, seed=seed)
                    rows.append(
                        ({"steps": steps, "power": power, "lift": lift, "frechet": features.distance(images, real)}, flat)
                    )
                    bar.update()
                if not rows:
                    break
                best = min(rows, key=lambda row: row[0]["frechet"])
                chosen.append(best[1])
                tried[sampler] += [row for row, _ in rows]
                set_paths(model.flow_map, sampler, chosen)
    return tried


def set_paths(flow_map: FlowMap, sampler: str, paths: list[tuple[int, ...]]) -> None:
    """Give a flow map the paths of a sampler."""
    name = "noise_paths" if sampler == "map_noise" else "paths"
    flow_map.config = dataclasses.replace(flow_map.config, **{name: tuple(paths)})


def choose_recorded_paths(model: Pipeline, *, progress: bool = True) -> bool:
    """`choose_paths` on half of the images that a model held out, at most `CHOICE_IMAGES`; returns whether it was done.

    Where the images cannot be opened or are too few to be measured on, the log says so, and the paths stay as they were.
    """
    assert isinstance(model, DenoisingMultiBetaVAE | DiffusionVAE), "others have no flow map"
    assert model.flow_map is not None, "whose paths they are"
    try:
        train_set, test_set = recipes.open_data(recipes.from_dict(recorded_recipe(model)))
        dataset = test_set if len(test_set) else train_set
        count = min(CHOICE_IMAGES, len(dataset) // 2)
        if count < LEAST_IMAGES:
            raise ValueError(f"half of {len(dataset)} images are fewer than {LEAST_IMAGES}")
        features = usual_features(train_set, dataset, progress=progress, device=model.device)
        real = data.to_float(dataset.images(torch.arange(len(dataset) - count, len(dataset))))
        fast = copy.deepcopy(model).to(dtype=inference.fast_dtype(model.device))  # decoding is most of the work
        assert fast.flow_map is not None, "a copy of it"
        choose_paths(fast, features, real, progress=progress)
    except (OSError, ImportError, ValueError, KeyError, TypeError) as error:
        logger.warning("where map and map_noise stand between their evaluations is not chosen: %s", error)
        return False
    model.flow_map.config = fast.flow_map.config
    return True
