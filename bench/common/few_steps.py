"""Images a second of a trained model with a flow map, in one to four evaluations, in 20 and 1000, and by what else there is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import multibeta
from common import measure, networks
from multibeta import data, evaluation, recipes
from multibeta.pipelines import DenoisingMultiBetaVAE

LONG = 1000  # evaluations of the paper's setting
WALKED = 20
ARMS = (("map", 1), ("map", 2), ("map", 4), ("map_noise", 2), ("map_noise", 3), ("map_noise", 4))
PEER = "diffusers DPM-Solver++(2M)"


def measured(
    name: str, batch: int, device: torch.device, dtype: torch.dtype | None, repetitions: int, num_images: int
) -> dict[str, Any]:
    """Each way to make images of a model: time of a batch from noise to images, in turn, and the Frechet distance of new ones.

    Args:
        name: Of a model, see `from_pretrained`.
        num_images: On each side of the distance, which is not measured of `LONG` evaluations; 0 measures none.
    """
    dtype = dtype or multibeta.inference.fast_dtype(device)
    model = DenoisingMultiBetaVAE.from_pretrained(name, device=device, dtype=dtype)
    ways = [*ARMS, (model.usual_sampling["sampler"], WALKED), ("ancestral", LONG)]
    calls: dict[str, Callable[[], object]] = {
        f"{sampler} {steps}": functools.partial(model.generate, batch, sampler=sampler, steps=steps, batch_size=batch)
        for sampler, steps in ways
    }
    failed = {}
    try:
        calls[f"{PEER} {WALKED}"] = peer(model, batch, device, dtype)
    except Exception as error:  # what is not installed is not compared with
        failed[PEER] = measure.one_line(error)
    times = measure.interleaved(calls, device, repetitions=repetitions, warmup=1)
    distances = quality(model, ways[:-1], num_images) if num_images else {}  # so many by the last take hours
    rows = [
        {
            "arm": arm,
            **{key: timing[key] for key in ("median_ms", "p10_ms", "p90_ms")},
            "images_per_second": batch / timing["median_ms"] * 1000,
            "frechet": distances.get(arm),
        }
        for arm, timing in times.items()
    ]
    facts = {"model": name, "dtype": str(dtype), "batch": batch, "repetitions": repetitions, "num_images": num_images}
    return {**facts, "arms": rows, "failed": failed}


def peer(model: DenoisingMultiBetaVAE, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """diffusers' U-Net of the same shape with its best multistep scheduler, and our decoder as PyTorch runs it.

    Its weights are random: it stands for the time of a latent diffusion model of this shape, whose distance is another's.
    """
    from diffusers import DPMSolverMultistepScheduler  # pyright: ignore[reportPrivateImportUsage]

    config = model.diffusion.config
    network = networks.channels_last(networks.diffusers_unet(config, device).to(dtype))
    scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2)
    noise = torch.randn(batch, *model.vae.config.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def sample() -> Tensor:
        scheduler.set_timesteps(WALKED, device=device)
        latent = noise
        for time in scheduler.timesteps:
            output = network(latent.to(dtype, memory_format=torch.channels_last), time).sample.float().chunk(2, dim=1)[0]
            latent = scheduler.step(output, time, latent).prev_sample
        with multibeta.backend("reference"):
            return model.decode(latent.clamp(-5, 5))

    return sample


def quality(model: DenoisingMultiBetaVAE, ways: list[tuple[str, int]], num_images: int) -> dict[str, float]:
    """Frechet distance of new images to held-out ones, of each way; the half that paths are not chosen on comes first."""
    train_set, test_set = recipes.open_data(recipes.from_dict(model.info["recipe"]))
    features = evaluation.usual_features(train_set, test_set)
    train_images, real = (data.to_float(part.images(range(num_images))) for part in (train_set, test_set))
    samplings = [{"sampler": sampler, "steps": steps} for sampler, steps in ways]
    rows = evaluation.generation(model, features, train_images, real, samplings)["samples"]
    return {f"{row['sampler']} {row['steps']}": row["frechet"] for row in rows}


def report(result: dict[str, Any]) -> None:
    """The table."""
    for name, reason in result["failed"].items():
        print(f"{name}: {reason}")
    print(f"{result['model']}, batch {result['batch']}, noise to images")
    print(f"{'way, evaluations':36s} {'ms a batch':>12s} {'p10-p90':>20s} {'images/s':>10s} {'Frechet':>8s}")
    for row in result["arms"]:
        spread = "{p10_ms:.1f}-{p90_ms:.1f}".format(**row)
        distance = "" if row["frechet"] is None else f"{row['frechet']:.2f}"
        print(f"{row['arm']:36s} {row['median_ms']:12.1f} {spread:>20s} {row['images_per_second']:10.2f} {distance:>8s}")
