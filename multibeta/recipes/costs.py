"""What a training will cost: parameters, operations, memory of a GPU, time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from multibeta import ops
from multibeta.checks import check_integer, check_number
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion
from multibeta.gaussian_diffusion import GaussianDiffusion
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.nonlinear_diffusion import NonlinearDiffusion
from multibeta.recipes.planning import TITLES
from multibeta.recipes.recipe import MultiBetaRecipe, Recipe
from multibeta.training import TrainingOptions
from multibeta.training.blockwise import blocks_of, set_forwards
from multibeta.training.operations import counted

GIB = 2**30
PEAK_TFLOPS = 989.0  # of an H100 in bfloat16, dense
MFU = 0.35  # share of the peak that a training reaches


@dataclass(frozen=True)
class StageCost:
    """What one stage takes.

    Attributes:
        options: Of its training.
        steps: Updates, those after the curves of sigma part among them.
        learning, frozen: Parameters.
        largest_block: Parameters of the largest unit that FSDP gathers.
        flops: Operations of one image, forward and backward, and forward alone of what is frozen; nothing is counted twice.
        kept: Bytes that the backward pass finds kept of one image.
        cast: Bytes besides, however many images there are: weights in bfloat16.
    """

    options: TrainingOptions
    steps: int
    learning: int
    frozen: int
    largest_block: int
    flops: int
    kept: int
    cast: int

    @property
    def step_flops(self) -> int:
        """Operations of an update."""
        return self.flops * self.options.batch_size

    def days(self, gpus: int = 1, mfu: float = MFU, peak_tflops: float = PEAK_TFLOPS) -> float:
        """Of all steps, on GPUs that reach the share `mfu` of their peak."""
        return self.steps * self.step_flops / (gpus * mfu * peak_tflops * 1e12) / 86400

    def memory(self, processes: int = 1, parallel: str = "ddp") -> dict[str, float]:
        """Bytes of a GPU, by what they hold; of "fsdp" each process holds a part.

        Weights, gradients, moments and averages follow from the parameters. Activations are those that plain PyTorch keeps: fused
        kernels keep about a third less, and what a convolution needs as room to work comes on top.
        """
        sharded = parallel != "ddp" and processes > 1
        parts, own = (processes if sharded else 1), 4 * self.learning
        widths = len(self.options.posthoc_ema)
        at_once = math.ceil(math.ceil(self.options.batch_size / processes) / self.options.accumulate)
        gathered = own + 2 * 4 * self.largest_block if sharded else 0  # the whole copy for pictures, and blocks at work
        buckets = own if processes > 1 and not sharded else 0  # in which DDP sends gradients
        return {
            "weights": own / parts + 4 * self.frozen + gathered,
            "gradients": own / parts + buckets,
            "moments": 2 * own / parts,
            "averages": (1 + widths) * own / parts,
            "activations": at_once * self.kept + self.cast,
        }


def costs(recipe: Recipe) -> dict[str, StageCost]:
    """What each stage of a recipe takes, by the name of its options; a discriminator, LPIPS and statistics are not counted.

    The networks run forward and backward on tensors that have shapes and no values (`FakeTensorMode`), so that those of any size
    take seconds and no memory. In stage 2 images are encoded as they come, unless the recipe says so few that they are encoded
    before it.
    """
    with FakeTensorMode(), ops.backend("reference"):
        vae, diffusion = (recipe.model.parts[name][0](getattr(recipe, name)) for name in ("vae", "diffusion"))
        steps = recipe.vae_training.steps + getattr(recipe.vae_objective, "untie_steps", 0)
        first = _cost(recipe.vae_training, steps, vae, functools.partial(_autoencode, vae))
        vae.requires_grad_(False)
        with counted() as counter, torch.no_grad():
            _prepare(recipe, vae)
        predict = functools.partial(_predict, recipe, diffusion)
        second = _cost(recipe.diffusion_training, recipe.diffusion_training.steps, diffusion, predict)
        second = dataclasses.replace(second, frozen=_count(vae), flops=second.flops + counter.total)
    return {"vae_training": first, "diffusion_training": second}


def table(stages: dict[str, StageCost], gpus: int = 1, mfu: float = MFU, peak_tflops: float = PEAK_TFLOPS) -> str:
    """What stages cost on GPUs of this peak that reach the share `mfu` of it, as a small table."""
    check_assumptions(gpus, mfu, peak_tflops)
    rows: list[tuple[str, ...]] = [("stage", "learning", "frozen", "GFLOP an image", "TFLOP a step", "time")]
    for name, cost in stages.items():
        parameters = (f"{count / 1e6:.2f} M" for count in (cost.learning, cost.frozen))
        amounts = (f"{cost.flops / 1e9:.4g}", f"{cost.step_flops / 1e12:.4g}", duration(cost.days(gpus, mfu, peak_tflops)))
        rows.append((TITLES[name], *parameters, *amounts))
    rows.append(("GiB a GPU", "weights", "gradients", "moments", "averages", "activations", "together"))
    for name, cost in stages.items():
        for way in ("ddp", "fsdp") if gpus > 1 else ("",):
            held = cost.memory(gpus, way or "ddp")
            rows.append(
                (f"{TITLES[name]} {way}".strip(), *(f"{each / GIB:.3g}" for each in (*held.values(), sum(held.values()))))
            )
    lines = ["  " + f"{first:<19}" + "".join(f"{each:>15}" for each in others) for first, *others in rows]
    total = sum(cost.days(gpus, mfu, peak_tflops) for cost in stages.values())
    assumed = f"--gpus {gpus}, --mfu {mfu:g}, --peak-tflops {peak_tflops:g} each"
    lines += [
        f"  times are those of {assumed}: {duration(total)} together",
        "  small networks reach a far smaller share of the peak",
    ]
    return "\n".join(lines)


def duration(days: float) -> str:
    """A time in the largest unit of which there are two, seconds at least, such as "3.5 hours"."""
    units = {"days": 1, "hours": 24, "minutes": 1440, "seconds": 86400}
    name = next((name for name, parts in units.items() if days * parts >= 2), "seconds")
    return f"{days * units[name]:.3g} {name}"


def check_assumptions(gpus: int, mfu: float, peak_tflops: float) -> None:
    """`ValueError` where there are no GPUs, or they reach nothing, or more than their peak."""
    check_integer("gpus", gpus, 1)
    check_number("mfu", mfu, above=0, most=1)
    check_number("peak_tflops", peak_tflops, above=0)


def _cost(options: TrainingOptions, steps: int, learner: nn.Module, predict: Callable[[int], Tensor]) -> StageCost:
    """The cost of a stage whose `learner` predicts something of so many images."""
    set_forwards(learner.train(), compiled=False, recomputed=options.recompute)
    kept = [_kept(options, learner, predict, images) for images in (1, 2)]
    with counted() as counter:
        predict(1).sum().backward()
    largest = max(map(_count, blocks_of(learner)), default=0)
    each = kept[1] - kept[0]
    return StageCost(options, steps, _count(learner), 0, largest, counter.total, each, kept[0] - each)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _images(vae: nn.Module, count: int) -> Tensor:
    assert isinstance(vae, MultiBetaVAE | CapacityVAE)
    config = vae.config
    return torch.zeros(count, config.image_channels, config.resolution, config.resolution)


def _autoencode(vae: nn.Module, count: int) -> Tensor:
    """What stage 1 computes of so many images."""
    images = _images(vae, count)
    if isinstance(vae, MultiBetaVAE):
        return vae.decode(vae.encode(images, 0.5), 0.5)
    assert isinstance(vae, CapacityVAE)
    return vae.reconstruct(images, torch.Generator())


def _prepare(recipe: Recipe, vae: nn.Module) -> None:
    """What a frozen VAE computes of each image of stage 2."""
    if isinstance(vae, CapacityVAE) and getattr(recipe.diffusion, "conditional", False):
        vae.reconstruct(_images(vae, 1), torch.Generator())
    elif isinstance(recipe, MultiBetaRecipe) and isinstance(vae, MultiBetaVAE):
        count = recipe.data.num_train
        if count is None or not recipe.encodes_before(count * (2 if recipe.data.mirror else 1)):
            vae.encode(_images(vae, 2), 0.5)  # at both ends of an interval


def _predict(recipe: Recipe, diffusion: nn.Module, count: int) -> Tensor:
    """What the diffusion network computes of so many images."""
    count *= getattr(recipe.diffusion_objective, "noise_draws", 1)
    steps = torch.ones(count, dtype=torch.int64)
    if isinstance(diffusion, ConditionalDiffusion):
        config = diffusion.config
        images = torch.zeros(count, config.image_channels, config.resolution, config.resolution)
        return diffusion(images, steps, images)
    latents = torch.zeros(count, *recipe.vae.latent_shape)
    if isinstance(diffusion, NonlinearDiffusion):
        return torch.cat(diffusion.heads(latents, steps))
    assert isinstance(diffusion, GaussianDiffusion)
    return diffusion(latents, steps)


def _kept(options: TrainingOptions, learner: nn.Module, predict: Callable[[int], Tensor], images: int) -> int:
    """Bytes that autograd keeps for the backward pass of some images, without the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in learner.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        predict(images)
    return sum(storage.nbytes() for storage in kept.values())
