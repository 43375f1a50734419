"""What a flow map buys: quality over evaluations of the network, beside the samplers that it was learned of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from multibeta.flow_map import MAP_SAMPLERS
from multibeta.pipelines import Pipeline
from multibeta.report.page import DENOISED, DIRECT, FLOOR, MEAN, Curves, figure, logarithmic, pictures, plot, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = (1, 2, 4, 8)
SHOWN = 16
MAP_CURVES = Curves("flow_map", "Flow map: error over spans", {"map_error": ""}, MEAN)
COLORS = {"map": DENOISED, "map_noise": MEAN}
CAPTION = """New images by the flow map of this model, which takes the walk of the sampler in few evaluations of a network of the
    same size, and by the sampler itself ({usual}); distances as in the table of samplers. Below, images of the same noise."""


def few_samplings(model: Pipeline) -> list[dict[str, Any]]:
    """Few evaluations by the usual sampler of a model with a flow map, which its map is shown beside; none of another."""
    if not set(MAP_SAMPLERS) <= set(model.samplers):
        return []
    return [{"sampler": model.usual_sampling["sampler"], "steps": steps} for steps in FEW if steps <= model.num_steps]


def few_steps_section(model: Pipeline, generated: dict[str, Any]) -> str:
    """Distance over evaluations and images of few of them; nothing for a model without a flow map.

    Args:
        generated: Of `evaluation.generation`, with rows of `few_samplings`.
    """
    if not set(MAP_SAMPLERS) <= set(model.samplers):
        return ""
    usual, first = model.usual_sampling["sampler"], generated["samples"][0]["latents"]

    def curve(sampler: str) -> tuple[Sequence[int], Sequence[float]]:
        named = [row for row in generated["samples"] if (row["latents"], row["sampler"]) == (first, sampler)]
        points = sorted({row["steps"]: row["frechet"] for row in named}.items())
        return [steps for steps, _ in points], [distance for _, distance in points]

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        for name in (usual, *MAP_SAMPLERS):
            axis.plot(*curve(name), "o-", color=COLORS.get(name, DIRECT), label=name)
        axis.axhline(generated["autoencoder_floor"], color=FLOOR, linestyle="--", label="autoencoded training images")
        axis.set(title="New images", xlabel="evaluations of the network", ylabel="Fréchet distance, lower is better")
        logarithmic(axis)
        axis.set_xscale("log", base=2)
        axis.legend()

    drawn = plot(
        draw, "Frechet distance over evaluations, of the flow map and of the sampler it was learned of", columns=1, height=3.4
    )
    blocks = []
    for sampler, steps in (("map", 1), ("map", 2), ("map_noise", 4), (usual, model.sampling_options()["steps"])):
        images = model.generate(SHOWN, sampler=sampler, steps=min(steps, model.num_steps))
        blocks.append(pictures(images, 4, f"{sampler}, {steps} evaluation{'s' * (steps > 1)}", width=264))
    content = f'{drawn}<div class="blocks">{"".join(blocks)}</div>'
    return section("few", "Few evaluations", figure(content, CAPTION.format(usual=usual)))
