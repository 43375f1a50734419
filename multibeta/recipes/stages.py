"""The two stages of a recipe: a VAE, then a diffusion model of what the frozen VAE makes, saved together."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from multibeta import checkpoints, data, distribution, processors, seeds
from multibeta.data.images import MEMORY_LIMIT_BYTES
from multibeta.diffusion_vae import CapacityVAE, ConditionalDiffusion
from multibeta.files import occupy, read_json
from multibeta.gaussian_diffusion import GaussianDiffusion, GaussianDiffusionObjective
from multibeta.latents import LatentMixture
from multibeta.multibeta_vae import MultiBetaVAE, fold_principal_axes, untie_sigma
from multibeta.nonlinear_diffusion import (
    NonlinearDiffusion,
    NonlinearDiffusionObjective,
    encoding_table,
    process_statistics,
    table_nodes,
    table_statistics,
)
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, LatentDiffusion, Pipeline
from multibeta.pipelines.spectrum import SPECTRUM_IMAGES
from multibeta.progress import progress_bar
from multibeta.recipes import pictures, preflight
from multibeta.recipes.decoder_tuning import DECODER, tune_decoder
from multibeta.recipes.distillation import FLOW_MAP, distill
from multibeta.recipes.planning import TimePlan
from multibeta.recipes.presets import changes
from multibeta.recipes.recipe import (
    RECORD,
    DiffusionVAERecipe,
    LatentDiffusionRecipe,
    MultiBetaRecipe,
    MultiBetaStageRecipe,
    Recipe,
    build,
    located,
    record,
    to_dict,
)
from multibeta.recipes.warm_start import start_warm
from multibeta.saving import unwrapped
from multibeta.training import Parallel, train

logger = logging.getLogger(__name__)

TABLE = Path("diffusion", "encodings")  # in the folder of a run
TITLES = {"vae-untied": "sigma per channel", "diffusion": "stage 2"}  # of trainings that others wait for


@dataclass(frozen=True)
class Stages:
    """The training of a recipe, on the images and in the folder of one run. A subclass says what is particular to a system.

    Attributes:
        resume: Continue whichever stage was interrupted.
        whole: Whether all trainings of the recipe follow each other: then words and bars tell of those to come.
        planned_seconds: Of trainings to come, by folder, where they were planned.
        measures: Whether a trained model gets what is measured of it, such as what each beta keeps of images.
        parallel: Of several processes, see `training.train`.
    """

    recipe: Any
    train_images: data.Dataset
    test_images: data.Dataset
    folder: Path
    resume: bool = False
    device: str | torch.device = "cpu"
    progress: bool = True
    whole: bool = False
    planned_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    measures: bool = True
    parallel: Parallel = "ddp"

    def train_vae(self) -> nn.Module:
        """Stage 1: the VAE, frozen."""
        vae = build(self.recipe)[0].to(self.device)
        self._train("vae", "stage 1 of 2, VAE", self.recipe.first_objective(vae), self._draws_vae(vae, "vae"), resume=self.resume)
        return self.finish(vae)

    def train_diffusion(self, vae: nn.Module, command: str | None = None) -> Pipeline:
        """Stage 2: the diffusion model of what a frozen `vae` makes, and the trained model, which is saved."""
        diffusion = build(self.recipe)[1].to(self.device)
        if self.recipe.warm_start is not None and not self._resumes("diffusion"):
            start_warm(diffusion, self.recipe)
            logger.info("stage 2 starts from the diffusion network of %s", self.recipe.warm_start)
        model = self.join(vae, diffusion, origin(self.recipe, command, self.train_images, self.test_images))
        diffusion.requires_grad_(True)
        self._train(
            "diffusion",
            "stage 2 of 2, diffusion",
            self.second_objective(vae, diffusion),
            self._draws("diffusion", "samples", functools.partial(self.draw_model, model)),
            resume=self._resumes("diffusion"),
        )
        distribution.by_first(lambda: self.save(model))
        return model

    def save(self, model: Pipeline) -> None:
        """Save a trained model, with what is measured of it."""
        model.save_pretrained(self.folder / "model")
        shutil.rmtree(self.folder / TABLE, ignore_errors=True)
        logger.info("saved the model in %s", self.folder / "model")
        if self.measures:
            self.measure(model)

    def finish(self, vae: nn.Module) -> nn.Module:
        """The VAE as stage 2 sees it, after its training."""
        return vae

    def join(self, vae: nn.Module, diffusion: nn.Module, info: dict[str, Any]) -> Pipeline:
        """The model of both parts, ready for stage 2."""
        raise NotImplementedError

    def second_objective(self, vae: nn.Module, diffusion: nn.Module) -> Any:
        """The objective of stage 2."""
        return self.recipe.second_objective(vae, diffusion)

    def measure(self, model: Pipeline) -> None:
        """Add to a saved model what is measured of it."""

    def draw_vae(self, vae: nn.Module, path: Path) -> None:
        """A picture of what the VAE makes of images."""
        raise NotImplementedError

    def draw_model(self, model: Pipeline, path: Path) -> None:
        """A picture of what the model makes."""
        raise NotImplementedError

    @functools.cached_property
    def shown(self) -> Tensor:
        """Images for the pictures along the way, (N, C, H, W) in [-1, 1]."""
        return pictures.shown_images(self.train_images, self.test_images)

    def _draws_vae(self, vae: nn.Module, name: str) -> Callable[[int, Any], None]:
        return self._draws(name, "reconstructions", functools.partial(self.draw_vae, vae))

    def _draws(self, name: str, shows: str, draw: Callable[[Path], None]) -> Callable[[int, Any], None]:
        """What draws a picture after a step, in the folder of a training; the first time the log says where."""
        drawn: list[Path] = []

        def on_validate(step: int, module: nn.Module) -> None:
            path = self.folder / name / f"{shows}-{step:06d}.png"
            draw(path)
            if not drawn:
                logger.info("after step %d: %s, and more of them to come", step, path)
            drawn.append(path)

        return on_validate

    @property
    def at_once(self) -> int:
        """Images that are encoded together, where there are many."""
        return processors.images_at_once(self.recipe.vae.resolution, self.device)

    def _later(self, name: str) -> dict[str, int]:
        """Steps of the trainings that follow one in this run, by folder."""
        steps = {each: options.steps for each, (options, _) in self.recipe.plan().items()}
        return {each: steps[each] for each in list(steps)[list(steps).index(name) + 1 :]} if self.whole else {}

    def _outlook(self, name: str) -> Callable[[int, float | None], str] | None:
        """Words on the time that is left of the whole run during a training; None where its own is all.

        A step of `vae-untied` takes as long as one of `vae`. How long stage 2 takes is known where it was planned; if not, its
        steps are told.
        """
        later = self._later(name)
        alike = later.pop("vae-untied", 0)
        planned = sum(self.planned_seconds.get(each, 0.0) for each in later)
        known = [f"with {TITLES.get(each, each)}" for each in later if each in self.planned_seconds]
        others = [told(*each) for each in later.items() if each[0] not in self.planned_seconds]

        def words(steps: int, pace: float | None) -> str:
            own = "?" if pace is None else tqdm.format_interval((steps + alike) * pace + planned)
            return " + ".join([" ".join([own, *known]), *others])

        return words if later or alike else None

    def _resumes(self, name: str) -> bool:
        return self.resume and checkpoints.exists(self.folder / name / "checkpoint")  # it may have stopped before

    def _finished(self, name: str) -> bool:
        """Whether nothing is left of a training that this run resumes."""
        checkpoint = self.folder / name / "checkpoint"
        return self._resumes(name) and checkpoints.load_config(checkpoint).get("step") == self.recipe.plan()[name][0].steps

    def _key(self, vae: nn.Module, **more: Any) -> dict[str, Any]:
        """What a measurement of a frozen VAE on the training images depends on."""
        images = {"images": len(self.train_images), "fingerprint": data.fingerprint_of(self.train_images)}
        return {"vae": checkpoints.digest(vae.state_dict()), **images, **more}

    def _watched(self, batches: Iterable[Tensor], total: int, label: str) -> Iterator[Tensor]:
        """Batches of images, `total` in all, with a bar of them."""
        with progress_bar(total=total, desc=label, unit="image", disable=not self.progress) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def _train(
        self, name: str, description: str, objective: Any, on_validate: Callable[[int, Any], None], *, resume: bool
    ) -> None:
        """Train the module of an objective by the plan of that name, and leave it averaged and frozen."""
        options, context = self.recipe.plan()[name]
        then = "".join(f", then {told(*each)}" for each in self._later(name).items())
        logger.info("%s: %d steps%s", description, options.steps, then)
        state = train(
            objective,
            self.train_images,
            options,
            self.folder / name,
            validation=self.test_images if len(self.test_images) else None,
            resume=resume,
            on_validate=on_validate,
            progress=self.progress,
            description=description,
            context=context,
            outlook=self._outlook(name),
            parallel=self.parallel,
        )
        unwrapped(objective.module).load_state_dict(state)
        objective.module.eval().requires_grad_(False)


def told(name: str, steps: int) -> str:
    """A training to come, in words."""
    return f"{TITLES.get(name, name)} ({steps} steps)"


class MultiBetaVAEStages(Stages):
    """The systems built on a multi-beta VAE, which is folded and untied as the recipe says."""

    recipe: MultiBetaStageRecipe

    def train_vae(self) -> nn.Module:
        self.recipe.adversarial.say_what_is_left_out()
        return super().train_vae()

    def finish(self, vae: MultiBetaVAE) -> MultiBetaVAE:
        options = self.recipe.vae_objective
        if options.fold:
            fold_principal_axes(vae, self._encodings(vae, 0.5))
        if options.untie_steps:
            vae, name = untie_sigma(vae).to(self.device), "vae-untied"
            objective = self.recipe.first_objective(vae, anneal=0.0)
            words = "stage 1 of 2, sigma per channel"
            self._train(name, words, objective, self._draws_vae(vae, name), resume=self._resumes(name))
        return vae

    def statistics_images(self) -> Tensor:
        """The training images that the fold and the latents are measured on, (N, C, H, W) in [-1, 1]."""
        count = min(self.recipe.diffusion_objective.statistics_images, len(self.train_images))
        return data.to_float(self.train_images.images(range(count)))

    def draw_vae(self, vae: MultiBetaVAE, path: Path) -> None:
        pictures.save_reconstructions(vae, self.shown, path)

    def draw_model(self, model: Pipeline, path: Path) -> None:
        pictures.save_samples(model, path)

    def _encodings(self, vae: MultiBetaVAE, beta: float) -> Tensor:
        """f(x, beta) of `statistics_images`, kept in the folder of the run, so that a resumed one does not wait for it again."""

        def compute() -> dict[str, Tensor]:
            images, encode = self.statistics_images(), self._encode_all(vae)
            batches = self._watched(images.split(self.at_once), len(images), "principal axes")
            return {"encodings": torch.cat([encode(batch, beta) for batch in batches])}

        count = self.recipe.diffusion_objective.statistics_images
        return checkpoints.stored(self.folder / "vae" / "encodings", self._key(vae, count=count, beta=beta), compute)["encodings"]

    def _encode_all(self, vae: MultiBetaVAE) -> Callable[[Tensor, float], Tensor]:
        """`vae.encode` of many images, batch by batch, without gradients, in float32, on the CPU side again."""

        @torch.no_grad()
        def encode_all(images: Tensor, beta: float) -> Tensor:
            return torch.cat([vae.encode(batch.to(self.device), beta).float().cpu() for batch in images.split(self.at_once)])

        return encode_all


class MultiBetaStages(MultiBetaVAEStages):
    """The first system: the process is measured on the VAE, and the training images are encoded at its nodes."""

    recipe: MultiBetaRecipe

    def join(self, vae: MultiBetaVAE, diffusion: NonlinearDiffusion, info: dict[str, Any]) -> DenoisingMultiBetaVAE:
        count, nodes = self.recipe.diffusion_objective.statistics_images, self.recipe.diffusion_objective.nodes
        key = self._key(
            vae, count=count, nodes=nodes, basis=self.recipe.diffusion.basis, precision=self.recipe.diffusion_training.precision
        )
        statistics = checkpoints.stored(self.folder / "diffusion" / "process", key, lambda: self._statistics(vae, diffusion))
        diffusion.set_process(vae.sigmas(), **statistics)
        return DenoisingMultiBetaVAE(vae, diffusion, info)

    def second_objective(self, vae: MultiBetaVAE, diffusion: NonlinearDiffusion) -> NonlinearDiffusionObjective:
        tabled = self.recipe.encodes_before(len(self.train_images)) and not self._finished("diffusion")
        return self.recipe.second_objective(vae, diffusion, table=self._table(vae, self.train_images) if tabled else None)

    def measure(self, model: Pipeline) -> None:
        """What each beta keeps of held-out images, or where there are none of training images."""
        assert isinstance(model, DenoisingMultiBetaVAE)
        dataset = self.test_images if len(self.test_images) else self.train_images
        images = data.to_float(dataset.images(range(min(SPECTRUM_IMAGES, len(dataset)))))
        model.measure_spectrum(images, progress=self.progress)
        model.save_info(self.folder / "model")
        logger.info(
            "edits keep what an image is up to beta %g: see multibeta spectrum %s", model.auto_beta, self.folder / "model"
        )

    def _statistics(self, vae: MultiBetaVAE, diffusion: NonlinearDiffusion) -> dict[str, Tensor]:
        """Mean, deviation and velocity rms of the process, for `NonlinearDiffusion.set_process`."""
        config, options, images = self.recipe.vae, self.recipe.diffusion_objective, self.train_images
        if options.nodes:
            count = min(options.statistics_images, len(images))
            spread = torch.arange(count) * len(images) // count  # mirror images, which stand last, among them
            if self.recipe.encodes_before(len(images)):
                table = self._table(vae, images)[spread]
            else:
                logger.info("each batch is encoded as it comes: a table of all %d images is more work, or too large", len(images))
                table = self._table(vae, data.Subset(images, spread))
            nodes = table_nodes(config.num_steps, options.nodes)
            mean, deviation, rms = table_statistics(diffusion.as_measured(table), nodes)
        else:
            measured = self.statistics_images()
            encode = self._encode_all(vae)
            mean, deviation, rms = process_statistics(
                lambda images, beta: diffusion.as_measured(encode(images, beta)), measured, config.num_steps, config.schedule
            )
        return {"latent_mean": mean, "latent_deviation": deviation, "velocity_rms": rms}

    def _table(self, vae: MultiBetaVAE, images: data.Dataset) -> Tensor:
        """f(x, beta) of images at the nodes, kept in the folder of the run until the model is trained."""
        precision, count = self.recipe.diffusion_training.precision, self.recipe.diffusion_objective.nodes
        device, nodes = torch.device(self.device), table_nodes(self.recipe.vae.num_steps, count)

        def encode(batch: Tensor, beta: float) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                return vae.encode(batch.to(device), beta)

        def compute() -> dict[str, Tensor]:
            options = {"at_once": self.at_once, "progress": self.progress}
            return {"table": encoding_table(encode, images, nodes, self.recipe.vae.grid, **options)}

        key = self._key(vae, nodes=count, precision=precision) | {"images": len(images)}
        return checkpoints.stored(self.folder / TABLE, key, compute, together=True)["table"]


class LatentDiffusionStages(MultiBetaVAEStages):
    """Plain latent diffusion: z_0 is normalised, and that of every training image is computed once."""

    recipe: LatentDiffusionRecipe

    def join(self, vae: MultiBetaVAE, diffusion: GaussianDiffusion, info: dict[str, Any]) -> LatentDiffusion:
        diffusion.set_statistics(self._encode_all(vae)(self.statistics_images(), 0.0))
        return LatentDiffusion(vae, diffusion, info)

    def second_objective(self, vae: MultiBetaVAE, diffusion: GaussianDiffusion) -> GaussianDiffusionObjective:
        """As of the recipe, with all encodings, unless memory may not hold them: then every batch is encoded."""
        size = 4 * len(self.train_images) * math.prod(vae.config.latent_shape)
        if size > MEMORY_LIMIT_BYTES:
            logger.info("latents of all images would take %d MiB: each batch is encoded anew", size >> 20)
            return self.recipe.second_objective(vae, diffusion)
        encode_all, chunks = self._encode_all(vae), torch.arange(len(self.train_images)).split(1024)
        bar = progress_bar(chunks, desc="latents", unit="1024 images", disable=not self.progress)
        encodings = torch.cat([encode_all(data.to_float(self.train_images.images(chunk)), 0.0) for chunk in bar])
        return self.recipe.second_objective(vae, diffusion, encodings=encodings)


class DiffusionVAEStages(Stages):
    """The second system: new latents come from a mixture, where the recipe asks for one."""

    recipe: DiffusionVAERecipe

    def join(self, vae: CapacityVAE, diffusion: ConditionalDiffusion, info: dict[str, Any]) -> DiffusionVAE:
        model = DiffusionVAE(vae, diffusion, info)
        if components := self.recipe.diffusion_objective.mixture_components:

            def fit() -> dict[str, Tensor]:
                model.fit_latents(self.train_images, components, progress=self.progress)
                assert model.mixture is not None
                return model.mixture.state_dict()

            place, key = self.folder / "diffusion" / "mixture", self._key(vae, components=components)
            model.mixture = LatentMixture(**checkpoints.stored(place, key, fit)).to(self.device)
        return model

    def draw_vae(self, vae: CapacityVAE, path: Path) -> None:
        pictures.save_sketches(vae, self.shown, path)

    def draw_model(self, model: DiffusionVAE, path: Path) -> None:
        pictures.save_refinements(model, self.shown, path)


STAGES: dict[type[Recipe], type[Stages]] = {
    MultiBetaRecipe: MultiBetaStages,
    LatentDiffusionRecipe: LatentDiffusionStages,
    DiffusionVAERecipe: DiffusionVAEStages,
}


def train_vae(
    recipe: Recipe, train_images: data.Dataset, test_images: data.Dataset, folder: str | Path, **options: Any
) -> nn.Module:
    """Stage 1 alone: the VAE of a recipe, frozen; `options` are resume, device and progress of `run`."""
    return STAGES[type(recipe)](recipe, train_images, test_images, Path(folder), **options).train_vae()


def train_diffusion(
    recipe: Recipe, vae: nn.Module, train_images: data.Dataset, test_images: data.Dataset, folder: str | Path, **options: Any
) -> Pipeline:
    """Stage 2 alone: the diffusion model of what a frozen `vae` makes, saved together; `options` of `train_vae`, and measures."""
    return STAGES[type(recipe)](recipe, train_images, test_images, Path(folder), **options).train_diffusion(vae)


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    dataset: data.Dataset | data.Foreign | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
    command: str | None = None,
    warm_start: str | Path | None = None,
    plan: TimePlan | None = None,
    parallel: Parallel = "ddp",
) -> Pipeline:
    """Train both stages of a recipe, on a `dataset` in place of the source that it names where one is given.

    A `dataset` is one of ours with images of the recipe's size, or any map-style dataset, see `data.MapDataset`. A model records
    its class alone: what opens the images of a model needs to be told which.

    `folder` receives recipe.json, vae/ and diffusion/ (checkpoint, metrics.jsonl, image grids along the way, the first of them
    after little more than a minute) and model/, the result as `Pipeline.save_pretrained` writes it. See `preflight.prepare` for
    what is checked before the first begins.

    Args:
        resume: Continue whichever stage was interrupted; or a finished one, where the recipe has more steps than it had. Stage 1
            goes no further once there is a stage 2, which was trained on what it made: see `preflight.check_steps`.
        warm_start: A model, a folder or the name of a shipped one, from whose diffusion network that of stage 2 starts; it must
            have the same shape. It becomes the recipe's `warm_start`, recorded with it; a resumed run takes the recorded one.
        plan: Of `fit_to_time`, by which the bar of stage 1 tells the time that is left of the whole run.
        parallel: How several processes train together, see `training.train`; the first prepares what the others read.

    Raises:
        OSError, ValueError: See `preflight.prepare`, `preflight.check_steps` and `check_warm_start`.
    """
    if warm_start is not None:
        recipe = dataclasses.replace(recipe, warm_start=str(warm_start))
    folder, recipe, device = Path(folder), located(recipe, dataset), distribution.local_device(device)
    if resume and recipe.warm_start is None and (folder / RECORD).exists():
        recorded = cast("dict[str, Any]", read_json(folder / RECORD))
        recipe = dataclasses.replace(recipe, warm_start=recorded.get("warm_start"))
    with distribution.held_by_first(occupy(folder, "training in")), seeds.global_generators():
        if resume:
            preflight.check_steps(recipe, folder)
        images = distribution.first_goes_before(
            lambda: preflight.prepare(recipe, folder, resume=resume, device=device, dataset=dataset)
        )
        distribution.by_first(lambda: record(recipe, folder))
        options: dict[str, Any] = {"resume": resume, "device": device, "progress": progress and distribution.world().first}
        planned = {} if plan is None else {"diffusion": plan.second_seconds}
        together: dict[str, Any] = {"whole": True, "planned_seconds": planned, "parallel": parallel}
        stages = STAGES[type(recipe)](recipe, *images, folder, **options, **together)
        model = stages.train_diffusion(stages.train_vae(), command)
        if recipe.flow_map.steps:
            distill(model, folder / FLOW_MAP, recipe.flow_map, resume=stages._resumes(FLOW_MAP), progress=options["progress"])
            distribution.by_first(lambda: model.save_pretrained(folder / "model"))
        if isinstance(recipe, MultiBetaStageRecipe) and recipe.decoder_tuning.steps:
            again: dict[str, Any] = {"resume": stages._resumes(DECODER), "progress": options["progress"]}
            tune_decoder(model, *images, folder / DECODER, recipe.decoder_tuning, **again)
            distribution.by_first(lambda: model.save_pretrained(folder / "model"))
        return model


def origin(recipe: Recipe, command: str | None, train_images: data.Dataset, test_images: data.Dataset) -> dict[str, Any]:
    """What a model records of its training: `Pipeline.info`."""
    images = {
        "training": len(train_images),
        "held_out": len(test_images),
        "fingerprint": data.fingerprint_of(train_images),
    }
    folder = {"command": command, "working_folder": str(Path.cwd())}
    return {"recipe": to_dict(recipe), "changes": changes(recipe), "images": images, **folder}
