"""DisCo: disentangled directions and codes found by contrast in a frozen generator (MultiBeta D.1, Table 7; Ren et al. 2022)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multibeta.blocks import zero_bias
from multibeta.training import Batch

COARSEST_PIXELS = 4


class Navigator(nn.Module):
    """Learned unit directions in a latent space (Ren et al. 2022).

    Args:
        latent_shape: Of one latent, (d,) or (c, h, w); d is the product. "ortho" costs the exponential of a d x d matrix.
        num_directions: K, at most d for "ortho"; by default the published 64, or d if that is less.
        kind: "ortho": the first K columns of exp(L - L^T), with L (d, d) drawn from N(0, 1) and learned. "linear": K free
            columns, drawn from 0.1 N(0, 1), each scaled to norm 1.
        basis: What each of d coordinates adds to a latent, (d, *latent_shape), such as principal directions times their
            deviations: directions are then unit vectors of these, and spatial latents have few enough. "ortho" begins at the
            first K of them, L = 0. By default the numbers of a latent are its coordinates.

    Paper note: the published linear navigator also learns a bias, which makes the direction of a shift depend on its
    strength; without it a shift by -s undoes a shift by s.
    """

    basis: Tensor | None

    def __init__(
        self,
        latent_shape: Sequence[int],
        num_directions: int | None = None,
        kind: Literal["ortho", "linear"] = "ortho",
        basis: Tensor | None = None,
    ) -> None:
        super().__init__()
        if basis is not None and basis.shape[1:] != tuple(latent_shape):
            raise ValueError(f"basis must be (d, {', '.join(map(str, latent_shape))}), got {tuple(basis.shape)}")
        dimensions = math.prod(latent_shape) if basis is None else len(basis)
        count = min(64, dimensions) if num_directions is None else num_directions
        if kind not in ("ortho", "linear"):
            raise ValueError(f"kind must be 'ortho' or 'linear', got {kind!r}")
        if count < 2 or (kind == "ortho" and count > dimensions):
            most = f" and at most {dimensions}" if kind == "ortho" else ""
            raise ValueError(f"num_directions must be at least 2{most}, got {count}")
        self.latent_shape, self.num_directions, self.kind = tuple(latent_shape), count, kind
        square = kind == "ortho"
        self.register_buffer("basis", basis)
        self.weight = nn.Parameter(torch.randn(dimensions, dimensions) if square else 0.1 * torch.randn(dimensions, count))
        if square and basis is not None:
            nn.init.zeros_(self.weight)

    def directions(self) -> Tensor:
        """What strength 1 adds to a latent, (num_directions, *latent_shape), float32: without a `basis` unit vectors."""
        # Matrices are multiplied here, which autocast would do in bfloat16: the columns would lose their right angles.
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.kind == "linear":
                columns = F.normalize(self.weight, dim=0)
            else:
                columns = torch.linalg.matrix_exp(self.weight - self.weight.T)[:, : self.num_directions]
            in_latents = columns.T if self.basis is None else columns.T @ self.basis.flatten(1)
        return in_latents.reshape(-1, *self.latent_shape)

    def forward(self, indices: Tensor, strengths: Tensor) -> Tensor:
        """Shifts (N, *latent_shape): direction indices (N,), each times its strength (N,)."""
        return self.directions()[indices] * strengths.view(-1, *[1] * len(self.latent_shape))


class Contrastor(nn.Module):
    """Encoder of images to codes, in which DisCo compares variations (Ren et al. 2022, published code).

    A 7x7 convolution, then 4x4 convolutions of stride 2 down to 4 x 4 pixels, LeakyReLU(0.01), three linear layers.

    Args:
        image_channels: 1 for grey, 3 for colour.
        resolution: Pixels per side: 4 times a power of two, at least 8.
        code_size: Length of a code.
        width: Channels of the first layer; then 2, 4, 4 ... times as many, and 4 times in the linear layers. 64 as published.

    Shapes: images (N, image_channels, resolution, resolution) in [-1, 1]; result (N, code_size).
    """

    def __init__(self, image_channels: int = 3, resolution: int = 64, code_size: int = 64, width: int = 64) -> None:
        super().__init__()
        halvings = (resolution // COARSEST_PIXELS).bit_length() - 1
        if halvings < 1 or resolution != COARSEST_PIXELS * 2**halvings:
            raise ValueError(f"resolution must be 4 times a power of two and at least 8, got {resolution}")
        self.image_shape = (image_channels, resolution, resolution)
        channels = [width, 2 * width] + [4 * width] * (halvings - 1)
        layers = [nn.Conv2d(image_channels, width, 7, padding=3), nn.LeakyReLU()]
        for i, o in itertools.pairwise(channels):
            layers += [nn.Conv2d(i, o, 4, stride=2, padding=1), nn.LeakyReLU()]
        layers += [nn.Flatten(), nn.Linear(channels[-1] * COARSEST_PIXELS**2, 4 * width), nn.LeakyReLU()]
        layers += [nn.Linear(4 * width, 4 * width), nn.LeakyReLU(), nn.Linear(4 * width, code_size)]
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                zero_bias(layer)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape (N, {expected}), got {tuple(images.shape)}")
        return self.layers((images + 1) / 2)


class DisCo(nn.Module):
    """What DisCo learns on a frozen generator: a `Navigator` of its latents and a `Contrastor` of its images.

    MultiBeta Table 7 scores, by MIG and DCI, the codes that `encode` gives of the dataset's images.
    """

    def __init__(self, navigator: Navigator, contrastor: nn.Module) -> None:
        super().__init__()
        self.navigator, self.contrastor = navigator, contrastor

    def encode(self, images: Tensor) -> Tensor:
        """Codes (N, code_size) of images (N, C, H, W) in [-1, 1]."""
        return self.contrastor(images)


def variations(codes: Tensor, shifted_codes: Tensor) -> Tensor:
    """What a shift changes in the codes: |shifted - codes| scaled to norm 1, (N, code_size), entries in [0, 1]."""
    return F.normalize((shifted_codes - codes).abs(), dim=1)


def flipped_labels(negative_logits: Tensor, flip_above: float = 0.95) -> Tensor:
    """Labels of negatives, of the shape of their logits: 0, but a logit above `flip_above` is its own label.

    Different directions that change the same thing are such hard negatives: they are not driven apart (Ren et al. 2022).
    """
    return torch.where(negative_logits > flip_above, negative_logits, 0.0).detach()


def contrastive_loss(queries: Tensor, positives: Tensor, negatives: Tensor, flip_above: float = 0.95) -> Tensor:
    """Binary cross-entropy that makes variations along one direction alike and unlike those of other directions.

    Args:
        queries, positives: Variations along one direction, (B, code_size) and (N, code_size).
        negatives: Variations along other directions, (K, code_size); they receive no gradient.
        flip_above: See `flipped_labels`.

    Returns:
        The mean over the B (N + K) logits, which are inner products of variations and so lie in [0, 1]: a scalar.
    """
    positive_logits, negative_logits = queries @ positives.T, queries @ negatives.detach().T
    labels = torch.cat([torch.ones_like(positive_logits), flipped_labels(negative_logits, flip_above)], 1)
    return F.binary_cross_entropy_with_logits(torch.cat([positive_logits, negative_logits], 1), labels)


def dominance_entropy(variation: Tensor) -> Tensor:
    """Mean entropy of softmax(variation), in nats, (N, code_size) to a scalar: lowest where a shift changes one code alone."""
    return torch.special.entr(variation.softmax(1)).sum(1).mean()


def shift_strengths(count: int, scale: float, least: float, generator: torch.Generator) -> Tensor:
    """Strengths from N(0, scale^2), their magnitude raised to at least `least`: (count,), on the generator's device.

    Paper note: the published code means to raise small strengths of both signs and raises the positive ones only;
    `test_small_strengths_of_both_signs_are_raised`.
    """
    strengths = scale * torch.randn(count, generator=generator, device=generator.device)
    return strengths.abs().clamp(min=least).copysign(strengths)


def direction_indices(num_directions: int, num_alike: int, num_others: int, generator: torch.Generator) -> Tensor:
    """One random direction `num_alike` times, then `num_others` random ones that are not it: (num_alike + num_others,)."""
    chosen = torch.randint(num_directions, (1,), generator=generator, device=generator.device)
    others = torch.randint(num_directions - 1, (num_others,), generator=generator, device=generator.device)
    return torch.cat([chosen.expand(num_alike), others + (others >= chosen)])


class DisCoObjective:
    """Contrastive learning of directions and codes on a frozen generator (MultiBeta D.1; Ren et al. 2022), for `training.train`.

    A step chooses one direction. Queries (a quarter of the latents), positives (a quarter) and negatives (the rest) are what a
    shift changes in the code of the generated image: along the chosen direction, along it for other latents and strengths,
    and along random other directions. The loss is `contrastive_loss` plus `dominance_entropy` of the queries, all in
    float32, also under autocast.

    Published training is `TrainingOptions(steps=70_000, batch_size=128, learning_rate=1e-4, warmup_steps=0,
    final_learning_rate=1.0, adam_betas=(0.9, 0.999), clip_norm=0.0, ema_decay=0.0)`: 32 queries, 32 positives, 64 negatives.

    Args:
        module: The `DisCo` trained.
        decode: Latents (N, *latent_shape) to images (N, C, H, W) in [-1, 1], differentiable, such as
            `lambda latents: vae.decode(latents, beta)` with `vae` in evaluation mode. The gradient reaches the latents and
            never the parameters inside, whatever their `requires_grad` says.
        sample: (batch, generator) to latents (N, *latent_shape), N >= 4, on the device of `batch.images`, called without
            gradient. For a VAE its prior; for a multi-beta VAE at beta < 1, whose encodings together are not N(0, I),
            encodings of `batch.images` with their noise. N latents for N images make `batch_size` the number of latents.
        shift_scale: Deviation of the strengths, in units of the latent. By default that of the difference of two latents
            along an axis of N(0, I): shifts as large as those from image to image. Where the latents' deviation is not 1,
            multiply this and `min_shift` by it. A direction of a spatial latent spreads thinly over all its numbers and
            needs more: images of scenes32 (4 x 8 x 8) changed by 0.004 root mean square, with 16 times the default by 0.17.
        min_shift: Least magnitude of a strength, 0.5 as published.
        flip_above: See `flipped_labels`.

    Paper note: the published shift_scale is 6, for GANs; six deviations lie far outside what the decoder of a VAE was
    trained on. The published entropy adds 1e-5 in its logarithm, where no probability is below 1 / (e code_size).
    `test_the_default_shift_is_as_large_as_that_between_two_latents`, `test_the_entropy_is_the_published_one`.
    """

    whole_batch = "DisCo compares every latent of an update with every other"

    def __init__(
        self,
        module: DisCo,
        decode: Callable[[Tensor], Tensor],
        sample: Callable[[Batch, torch.Generator], Tensor],
        *,
        shift_scale: float = math.sqrt(2),
        min_shift: float = 0.5,
        flip_above: float = 0.95,
    ) -> None:
        self.module, self.decode, self.sample = module, decode, sample
        self.shift_scale, self.min_shift, self.flip_above = shift_scale, min_shift, flip_above

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; "contrast" and "entropy", its parts; "positive" and "negative", mean similarities; "flipped", a share."""
        # Variations are small differences of codes: on scenes32 those in bfloat16 had cosine 0.45 to 0.68 with those in float32.
        with torch.autocast(batch.images.device.type, enabled=False):
            queries, positives, negatives = self.draw_variations(batch, generator)
            contrast = contrastive_loss(queries, positives, negatives, self.flip_above)
            entropy = dominance_entropy(queries)
            with torch.no_grad():
                similarities = queries @ negatives.T
                scalars = {
                    "contrast": contrast.detach(),
                    "entropy": entropy.detach(),
                    "positive": (queries @ positives.T).mean(),
                    "negative": similarities.mean(),
                    "flipped": (similarities > self.flip_above).float().mean(),
                }
            return contrast + entropy, scalars

    def draw_variations(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N // 4, code_size), positives (N // 4, code_size) and, without gradient, negatives: the rest of N."""
        navigator = self.module.navigator
        with torch.no_grad():
            latents = self.sample(batch, generator)
        if len(latents) < 4 or latents.shape[1:] != navigator.latent_shape:
            expected = ", ".join(map(str, navigator.latent_shape))
            raise ValueError(f"sample must return latents (N, {expected}) with N >= 4, got {tuple(latents.shape)}")
        quarter = len(latents) // 4
        alike, others = slice(None, 2 * quarter), slice(2 * quarter, None)
        indices = direction_indices(navigator.num_directions, 2 * quarter, len(latents) - 2 * quarter, generator)
        strengths = shift_strengths(len(latents), self.shift_scale, self.min_shift, generator)
        shifts = navigator(indices.to(latents.device), strengths.to(latents.device))
        queries, positives = self.variations(latents[alike], shifts[alike]).split(quarter)
        with torch.no_grad():
            negatives = self.variations(latents[others], shifts[others])
        return queries, positives, negatives

    def variations(self, latents: Tensor, shifts: Tensor) -> Tensor:
        """`variations` of the codes of decoded latents (N, *latent_shape) under shifts of that shape: (N, code_size)."""
        return variations(*(self.module.encode(_DecodeFrozen.apply(z, self.decode)) for z in (latents, latents + shifts)))


class _DecodeFrozen(torch.autograd.Function):
    """decode(latents) whose gradient reaches the latents and no parameter inside `decode`."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
        needed = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(needed):
            ctx.latents = latents.detach().requires_grad_(needed)
            ctx.images = decode(ctx.latents)
        return ctx.images.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.images, ctx.latents, gradient)[0], None
