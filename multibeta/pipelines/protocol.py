"""The protocol of all models: one set of verbs, with one order of arguments."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard, cast

import torch
from torch import Tensor

from multibeta import latents as latent_space
from multibeta import ops, processors
from multibeta.blocks import input_dtype
from multibeta.checks import check_beta, check_steps, is_integer
from multibeta.pipelines.base import ENCODER_STREAM, Pretrained
from multibeta.pipelines.display import Traversals, model_html
from multibeta.pipelines.generation import along, choose_seed, gather, generate_each
from multibeta.pipelines.inputs import Images, as_images
from multibeta.sampling import Callback, check_latents
from multibeta.seeds import as_seeds

if TYPE_CHECKING:
    from pathlib import Path

    from multibeta.latents import LatentMixture, NamedDirections, PrincipalDirections

    Seeds = Sequence[int] | Tensor
    Beta = float | Tensor | Literal["auto"] | None


INVERTED_STEPS = 50  # up, and down again: near beta = 0 the ODE is steep, and 20 up to 0.9 lose their way


class Pipeline(Pretrained):
    """What every model answers to.

        image --encode(beta)--> latent --render--> image

    A class implements `encode`, `decode` and `draw_latents`, and if it denoises `_render_denoised` and `_image_maker`; the other
    verbs are made of these. Images that they return are float (N, C, H, W) in [-1, 1]; those that they take may also be bytes,
    NumPy arrays or images of Pillow, see `inputs.as_images`. Latents are (N, c, h, w). `beta` is the level in [0, 1] of a model
    that has several, or "auto" for its `auto_beta`, and None for a model of one representation.

    Attributes:
        denoises: Whether latents can be denoised, or are decoded at once.
        samplers: Names of the samplers that it denoises by, or makes new latents by; () for a model that decodes at once.
        usual_sampling: {"sampler": ..., "steps": ...} of every verb that denoises, and of measurements, where nothing else is
            asked for; {} for a model that decodes at once. `denoise` alone has the defaults of its signature.
        inverting: Those of `samplers` that walk up as well, which `invert=True` edits by; () for a model of one representation.
        usual_levels: Betas at which it is measured where nothing else is asked for; () for a model of one representation.
        usual_path: How `interpolate` goes from one latent to another: "lerp" or "slerp".
        mixture: Where `draw_latents` takes new latents from in place of the prior; None for the prior.
    """

    denoises: ClassVar[bool] = False
    samplers: tuple[str, ...] = ()
    inverting: ClassVar[tuple[str, ...]] = ()
    usual_sampling: Mapping[str, Any] = types.MappingProxyType({})
    usual_levels: ClassVar[tuple[float, ...]] = ()
    usual_path: ClassVar[str] = "slerp"
    mixture: LatentMixture | None = None
    _progress: dict[str, Any] = {"disable": True}  # noqa: RUF012, replaced and never changed

    def _repr_html_(self) -> str:
        return model_html(self)

    def resolve_beta(self, beta: Beta) -> float | Tensor | None:
        """The level that a verb computes at: `beta` itself, or what "auto" stands for.

        Raises:
            ValueError: "auto" of a model that does not know its own, and any other text.
        """
        if not isinstance(beta, str):
            return beta
        if beta != "auto":
            raise ValueError(f'beta must be a number in [0, 1] or "auto", got {beta!r}')
        return self.auto_beta

    @property
    def auto_beta(self) -> float:
        """The beta of "auto", at which edits keep what an image is."""
        raise ValueError(f'a {type(self).__name__} has one representation and takes no beta, got "auto"')

    def _edit_beta(self, beta: Beta) -> float | Tensor | None:
        """Where an edit happens: at `beta`, which by default is "auto" of a model of several levels."""
        return self.resolve_beta("auto" if beta is None and self.usual_levels else beta)

    def levels(
        self, betas: Sequence[float | str] | None = None, default: Sequence[float] | None = None
    ) -> tuple[float | None, ...]:
        """The betas of the representations asked for, checked; (None,) for a model of one representation.

        Args:
            betas: Each in [0, 1], or "auto".
            default: In their place where there are none; by default `usual_levels`.

        Raises:
            ValueError: No beta, one outside [0, 1], or any for a model that has none.
        """
        if not self.usual_levels:
            if betas is not None:
                raise ValueError(f"a {type(self).__name__} has one representation and takes no betas, got {list(betas)}")
            return (None,)
        if betas is None:
            betas = self.usual_levels if default is None else default
        if len(betas) == 0:
            raise ValueError("name at least one beta")
        resolved = tuple(cast("float", self.resolve_beta(cast("Beta", beta))) for beta in betas)
        for beta in resolved:
            check_beta(beta)
        return resolved

    def sampling_options(self, sampler: str | None = None, steps: int | None = None, *, invert: bool = False) -> dict[str, Any]:
        """How the model denoises, {"sampler": ..., "steps": ...}: as asked for, and for what was not, `usual_sampling`.

        The usual steps are no more than the grid has. {} for a model that decodes at once.

        Args:
            invert: Of a walk up and down again: by one of `inverting`, "ode2" where the usual sampler is none of them, and by
                default in 50 steps each way.

        Raises:
            ValueError: A sampler of another class, or one that cannot invert; steps that the grid does not have; any of them for
                a model that takes none.
        """
        if invert:
            sampler = self._inverting_sampler(sampler)
        asked = {"sampler": sampler, "steps": steps}
        if not self.samplers:
            if given := [key for key, value in asked.items() if value is not None]:
                raise ValueError(f"a {type(self).__name__} decodes at once and takes no {' or '.join(given)}")
            return {}
        named: str = self.usual_sampling["sampler"] if sampler is None else sampler
        self._check_sampler(named)
        if steps is None:
            usual = INVERTED_STEPS if invert else self.usual_sampling["steps"]
            return {"sampler": named, "steps": min(usual, self.num_steps)}
        check_steps(steps, self.num_steps, ", the steps of the grid")
        return {"sampler": named, "steps": int(steps)}

    def _inverting_sampler(self, sampler: str | None) -> str:
        """The sampler of a walk up, and down again: see `sampling_options`."""
        if not self.inverting:
            raise ValueError(f"a {type(self).__name__} has one representation, and no beta to invert its latents to")
        if sampler is None:
            sampler = self.usual_sampling["sampler"] if self.usual_sampling["sampler"] in self.inverting else "ode2"
        if sampler not in self.inverting:
            raise ValueError(f"to invert, sampler must be one of {', '.join(self.inverting)}, which walk up too, got {sampler!r}")
        return sampler

    def _check_sampler(self, sampler: str) -> None:
        """`ValueError` unless the model has this sampler."""
        if sampler not in self.samplers:
            raise ValueError(f"sampler of a {type(self).__name__} must be one of {', '.join(self.samplers)}, got {sampler!r}")

    def _with_usual_sampling(self, sampling: dict[str, Any], *, invert: bool = False) -> dict[str, Any]:
        """Arguments of `denoise` with the sampler and the steps of `sampling_options`."""
        if not (self.denoises or invert):
            return sampling
        return sampling | self.sampling_options(sampling.get("sampler"), sampling.get("steps"), invert=invert)

    @property
    def num_steps(self) -> int:
        """Steps of the grid that a model denoises on."""
        raise AttributeError(f"a {type(self).__name__} decodes at once and has no steps")

    def encode(self, images: Images, beta: Beta = None, *, seeds: Seeds | None = None) -> Tensor:
        """Latents of images (see `inputs.as_images`) at beta, (N, c, h, w) float32: means, or with one seed per image samples."""
        raise NotImplementedError

    def decode(self, latents: Tensor, beta: Beta = None) -> Tensor:
        """Images of latents (N, c, h, w) at beta, decoded at once, (N, C, H, W) float32 in [-1, 1]."""
        raise NotImplementedError

    def invert(self, latents: Tensor, *, beta: Beta = None, **sampling: Any) -> Tensor:
        """Latents at beta, (N, c, h, w), that denoising takes to `latents` at beta = 0, of a model of several levels."""
        self._inverting_sampler(None)
        raise NotImplementedError

    def draw_latents(self, seeds: Seeds) -> Tensor:
        """New latents, one for each seed, (N, c, h, w): where `generate` begins."""
        raise NotImplementedError

    def render(
        self,
        latents: Tensor,
        beta: Beta = None,
        *,
        denoise: bool,
        seeds: Seeds | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Images of latents at beta, decoded at once or denoised, (N, C, H, W) in [-1, 1].

        A `DenoisingMultiBetaVAE` denoises the latent to 0 and decodes it there, a `DiffusionVAE` decodes the latent and denoises
        the image.

        Args:
            latents: (N, c, h, w), at beta.
            denoise: False decodes at once; a model that does not denoise takes nothing else.
            seeds: One integer per sample, of the noise of the reverse process; by default 0, 1, 2 ...
            sampling: Arguments of the model's `denoise`; sampler and steps are by default those of `usual_sampling`.

        Raises:
            ValueError: Denoising asked of a model that does not, options of a sampler where nothing is sampled, and what `decode`
                and `denoise` raise.
        """
        beta = self.resolve_beta(beta)
        if denoise:
            return self._render_denoised(latents, beta, seeds=seeds, **self._with_usual_sampling(sampling))
        if sampling:
            raise ValueError(f"decoding at once takes no {' or '.join(sampling)}")
        return self.decode(latents, beta)

    def _render_denoised(self, latents: Tensor, beta: Beta, *, seeds: Seeds | None = None, **sampling: Any) -> Tensor:
        raise ValueError(f"a {type(self).__name__} decodes at once and does not denoise")

    def generate(
        self,
        num_images: int,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        output_type: str = "pt",
        callback: Callback | None = None,
        *,
        generator: torch.Generator | None = None,
        **sampling: Any,
    ) -> Any:
        """New images.

        Image i depends on (seed, i) alone, not on `num_images` or `batch_size`.

        Args:
            sampler, steps: By default those of `usual_sampling`.
            output_type: "pt" (N, C, H, W) float in [-1, 1], "np" (N, H, W, C) float32 in [0, 1], "pil" a list of images.
            callback: Called with (evaluations done, evaluations in total over all batches, latent).
            generator: Gives the seed, one int64 drawn from it, where none is given.
            sampling: What the class takes besides. Of a model that denoises, `callback_on_step_end` is called as diffusers does,
                with (model, index of the evaluation in its batch, its grid index, {"latents": latent}), and returns the dict:
                the plain loop goes on from changed latents, the engine refuses them.
        """
        batches = self.generate_batches(
            num_images,
            sampler=sampler,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            callback=callback,
            generator=generator,
            **sampling,
        )
        return gather(batches, output_type)

    def generate_batches(
        self,
        num_images: int,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        *,
        callback: Callback | None = None,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | Tensor | None = None,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """The images of `generate` as they are made, (n, C, H, W) each: memory holds one batch, however many are asked for.

        Args:
            indices: Which of the `num_images` to make, in this order; by default all. Image i is the same in any choice.
        """
        asked = {"sampler": sampler, "steps": steps}
        known = sampler if sampler in self.samplers else None  # what is none is refused where its rows are made
        usual = self.sampling_options(known) if self.samplers else self.sampling_options(sampler, steps)
        sampling |= usual | {name: value for name, value in asked.items() if value is not None}
        first, batches = self._seed_batches(num_images, seed, batch_size, generator, indices)
        return generate_each(self._image_maker(first, **sampling), batches, callback, self._progress)

    def _image_maker(self, first_seed: Tensor, **sampling: Any) -> Callable[[Tensor, Callback], Tensor]:
        """What makes the images of seeds (n,), and calls its second argument after each evaluation.

        Args:
            first_seed: Of image 0, whatever batch is made, (1,).
        """
        if sampling:
            raise TypeError(f"a {type(self).__name__} decodes at once and takes no {' or '.join(sampling)}")

        def make(seeds: Tensor, advance: Callback) -> Tensor:
            images = self.decode(self.draw_latents(seeds))
            advance(1, 1, images)
            return images

        return make

    def manipulate(
        self,
        images: Images,
        direction: Tensor,
        strength: float | Tensor,
        beta: Beta = None,
        *,
        invert: bool = False,
        seeds: Seeds | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Images edited along a latent direction (MultiBeta Algorithm 4): encode at beta, move, render.

        Args:
            images: See `inputs.as_images`; or latents (N, c, h, w) in their place, at beta, to be inverted at 0.
            direction: (c, h, w), for instance from `principal_directions` or `attribute_direction`.
            strength: alpha, a number or (N,).
            beta: One number, or "auto", which is the default of a model of several levels.
            invert: Encode at 0 and `invert` to beta in place of encoding there: strength 0 then gives back decode(encode(images,
                0)), but for the error of `steps`. Of a model of several levels, by one of its `inverting` samplers.
            seeds, sampling: As of `render`, which denoises where the model can.

        Not inverted, the mean is moved, as the algorithm prints, not a sample around it: the mean keeps much more of the input
        and comes back as sharp (`evaluation.compare_denoising` measures both; `evaluation.compare_editing` measures this beside
        `invert`). For variations of an image denoise samples instead: `encode` with seeds.
        """
        beta = self._edit_beta(beta)
        sampling = self._with_usual_sampling(sampling, invert=invert)
        moved = latent_space.manipulate(self._edited_latents(images, beta, invert, sampling), direction, strength)
        return self.render(moved, beta, denoise=self.denoises, seeds=seeds, **sampling)

    def interpolate(
        self,
        first: Images,
        second: Images,
        weights: float | Sequence[float],
        beta: Beta = None,
        dims: Sequence[int] | None = None,
        *,
        how: str | None = None,
        invert: bool = False,
        seeds: Seeds | None = None,
        **sampling: Any,
    ) -> Tensor:
        """Images between two by their latents at beta: the path of one to the other, rendered.

        A slerp (MultiBeta Algorithm 5) or, by a `DiffusionVAE`, z = (1 - weight) z_1 + weight z_2 (DiffusionVAE Eq. 10).

        Args:
            first, second: Images, see `inputs.as_images`, which stand for their latents; or latents, as of `manipulate`.
            weights: One number, or K numbers for K images per pair; 0 is `first`, 1 is `second`.
            beta: As of `manipulate`.
            dims: Latent channels to interpolate, for a vector its dimensions; None for all.
            how: "lerp" or "slerp"; by default `usual_path`, as printed.
            invert: As of `manipulate`, of both ends.
            seeds: One per pair, of the noise that all images of its path start from; by default 0, 1, 2 ...
            sampling: As of `render`, which denoises where the model can.

        Returns:
            (N, C, H, W) for one weight, (N, K, C, H, W) for a sequence.

        Paper note: the lambda of DiffusionVAE Eq. 10 weighs the first latent.
        """
        if isinstance(beta, str) and beta != "auto":
            paths = ", ".join(latent_space.PATHS)
            raise ValueError(f'beta must be a number, "auto" or None; how= names a path, one of {paths}, got {beta!r} as beta')
        beta = self._edit_beta(beta)
        sampling = self._with_usual_sampling(sampling, invert=invert)
        start, end = (self._edited_latents(images, beta, invert, sampling) for images in (first, second))
        path = self.usual_path if how is None else how
        return along(
            weights,
            lambda weight: latent_space.interpolate(start, end, weight, dims, path),
            lambda points: self._render_paths(points, len(start), beta, seeds, **sampling),
        )

    def _render_paths(self, points: Tensor, num_paths: int, beta: Beta, seeds: Seeds | None, **sampling: Any) -> Tensor:
        """Images of the points of `num_paths` paths, those of a path one after another, (N K, c, h, w); `seeds` are of paths."""
        if seeds is not None:
            seeds = self._seeds(seeds, num_paths).repeat_interleave(len(points) // num_paths)
        return self.render(points, beta, denoise=self.denoises, seeds=seeds, **sampling)

    def principal_directions(self, images: Images, beta: Beta = None, num_directions: int | None = None) -> PrincipalDirections:
        """PCA of the mean latents of images at beta, or of latents in their place: see `latents.principal_directions`.

        Args:
            images: See `inputs.as_images`.
            beta: As of `manipulate`; latents need none.
        """
        encodings = self._encode_many(images, beta)
        found = latent_space.principal_directions(encodings, num_directions)
        if beta is None and self.usual_levels and self._are_latents(images):
            return found  # at a level that is not told
        return replace(found, shown_by=Traversals(self, beta, encodings[:1]))

    def attribute_direction(self, images_with: Images, images_without: Images, beta: Beta = None) -> Tensor:
        """From images without an attribute to those with it: the difference of their mean latents at beta, (c, h, w).

        Args:
            images_with, images_without: See `inputs.as_images`; or latents (N, c, h, w) in their place.
            beta: As of `manipulate`; latents need none.

        Raises:
            ValueError: No images on one side.
        """
        groups = [each if self._are_latents(each) else self._as_images(each) for each in (images_with, images_without)]
        if not all(map(len, groups)):
            counts = f"{len(groups[0])} with and {len(groups[1])} without"
            raise ValueError(f"a direction needs images on both sides, got {counts}")
        towards, away = (self._encode_many(images, beta).mean(0) for images in groups)
        return towards - away

    def load_directions(self, path: str | Path) -> NamedDirections:
        """The directions of a file that `NamedDirections.save` wrote, where the model is.

        Raises:
            FileNotFoundError, ValueError: There is no such file, it is damaged, or its directions are of another model's latents.
        """
        found = latent_space.NamedDirections.load(path)
        if found.model != self.latent_digest():
            raise ValueError(
                f"{path} holds directions of another model, whose latents mean something else: find them anew for this"
            )
        return replace(found, steps=found.steps.to(self.device), shown_by=Traversals(self, found.beta))

    def set_progress_bar_config(self, **options: Any) -> None:
        """Show a `progress_bar` in `generate`, with these options of tqdm. None is shown before, nor with `disable=True`."""
        self._progress = options

    def _encode_many(self, images: Images, beta: Beta) -> Tensor:
        """Mean latents of images, encoded in batches at the beta of `_edit_beta`; latents as they are."""
        if self._are_latents(images):
            return self._as_latents(images, beta)
        beta = self._edit_beta(beta)
        prepared = self._as_images(images)
        at_once = processors.images_at_once(prepared.shape[-1], self.device)
        return torch.cat([self.encode(chunk, beta) for chunk in prepared.split(at_once)])

    def _as_latents(self, images: Images, beta: Beta) -> Tensor:
        """Mean latents of images at beta; latents as they are, float32."""
        return self._check_latents(images).float() if self._are_latents(images) else self.encode(images, beta)

    def _edited_latents(self, images: Images, beta: Beta, invert: bool, sampling: Mapping[str, Any]) -> Tensor:
        """Latents at beta where an edit begins: those of `_as_latents`, or at 0 and inverted as `sampling` denoises."""
        if not invert:
            return self._as_latents(images, beta)
        return self.invert(self._as_latents(images, 0.0), beta=beta, sampler=sampling["sampler"], steps=sampling["steps"])

    def _are_latents(self, images: Images) -> TypeGuard[Tensor]:
        """Whether a tensor has the shape of latents, and not that of images."""
        config = self.vae.config
        if not isinstance(images, Tensor) or images.is_nested:
            return False
        shape = tuple(images.shape[1:])
        return shape == tuple(config.latent_shape) and shape != (config.image_channels, config.resolution, config.resolution)

    def _check_images(self, images: Images) -> Tensor:
        """The images, where the model is and in the dtype of the encoder."""
        return self._as_images(images).to(self.device, input_dtype(self.vae.encoder))

    def _as_images(self, images: Images) -> Tensor:
        """The images as floats (N, C, H, W) in [-1, 1]: see `inputs.as_images`."""
        return as_images(images, self)

    def _check_latents(self, latents: Tensor) -> Tensor:
        """The latents, where the model is; in their own dtype."""
        check_latents(latents, self.vae.config.latent_shape)
        return latents.to(self.device)

    def _seeds(self, seeds: Seeds | None, count: int) -> Tensor:
        """One seed per sample, (count,) int64, by default 0, 1, 2 ..."""
        seeds = torch.arange(count) if seeds is None else as_seeds(seeds)
        if seeds.shape != (count,):
            raise ValueError(f"one seed per sample is needed, got {tuple(seeds.shape)} for {count} samples")
        return seeds.to(self.device)

    def _encoder_noise(self, seeds: Seeds, mean: Tensor) -> Tensor:
        """eps of the samples of a posterior, (N, c, h, w) like its `mean`."""
        return ops.standard_normal(self._seeds(seeds, len(mean)), 0, mean.shape[1:], stream=ENCODER_STREAM)

    def _seed_batches(
        self,
        num_images: int,
        seed: int,
        batch_size: int,
        generator: torch.Generator | None,
        indices: Sequence[int] | Tensor | None,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """The seed of image 0, (1,), and those of the images at `indices`, by default all, `batch_size` at a time."""
        if not (is_integer(num_images) and is_integer(batch_size)):
            raise ValueError(f"num_images and batch_size must be integers, got {num_images!r} and {batch_size!r}")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be positive, got {num_images} and {batch_size}")
        chosen = torch.arange(num_images) if indices is None else torch.as_tensor(indices).cpu()
        masks = chosen.dtype == torch.bool
        if masks or chosen.dim() != 1 or (chosen != chosen.long()).any() or ((chosen < 0) | (chosen >= num_images)).any():
            raise ValueError(f"indices must be a sequence of integers from 0 to {num_images - 1}, got {indices}")
        seeds = ops.sample_seeds(choose_seed(seed, generator), torch.cat([torch.zeros(1, dtype=torch.int64), chosen.long()]))
        seeds = seeds.to(self.device)
        return seeds[:1], seeds[1:].split(batch_size) if len(chosen) else ()
