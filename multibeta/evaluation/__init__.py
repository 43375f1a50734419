"""What a trained model does, in numbers: the facts of stage 1, codes and factors, the heads, generation, the headline claim."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from multibeta import data, diffusion_vae, nonlinear_diffusion
from multibeta.checks import check_beta
from multibeta.metrics import (
    FactorClassifier,
    FactorClassifierObjective,
    frechet_distance,
    gradient_energy,
    information_gap,
    mig_from_codes,
)
from multibeta.metrics.checks import as_images, as_integer
from multibeta.metrics.streaming import image_batches
from multibeta.multibeta_vae import kl_to_standard_normal, slope_ratio
from multibeta.pipelines import DenoisingMultiBetaVAE, DiffusionVAE, Pipeline
from multibeta.schedules import beta_to_step, spatial, step_to_beta
from multibeta.training import TrainingOptions, train
from multibeta.weights import weights_hash

logger = logging.getLogger(__name__)

CLASSIFIER_BATCH = 128
PIXEL_VALUES = 2**27  # 512 MiB of the images whose principal components are measured in
BETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
HEADLINE_BETAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
DENOISER = {"sampler": "ode2", "steps": 20}
REFINER = {"sampler": "ddim", "steps": 100}  # of a DiffusionVAE
ROTATIONS = 5  # random ones: with few channels MIG differs by half between them
# sampler, steps, sign of delta; sign -1 is Algorithm 2 as printed
SAMPLERS = (
    ("ode2", 10, 1),
    ("ode2", 20, 1),
    ("heun", 10, 1),
    ("ode", 50, 1),
    ("ancestral", 50, 1),
    ("resample", 50, 1),
    ("resample", 50, -1),
)


@dataclass(frozen=True)
class Features:
    """What the Frechet distance is measured in: a function from images to features, as `metrics.extract_features` takes it.

    Attributes:
        name: For the report.
        function: Images (N, C, H, W) in [-1, 1] to features (N, d), in units of the real deviation.
        classifier: The factor classifier behind them, or None where no factors are known.
        accuracy: Its accuracy on held-out images, per factor.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    classifier: FactorClassifier | None = None
    accuracy: dict[str, float] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(as_images(images))

    def of_checked(self, images: Tensor) -> Tensor:
        """The same of one batch of many that were checked together."""
        return self.function(images)

    @property
    def origin(self) -> dict:
        """The dict to store beside a result."""
        weights = {} if self.classifier is None else {"weights_hash": weights_hash(self.classifier.state_dict())}
        return {"features": self.name} | weights

    def distance(self, images: Tensor, real: Tensor) -> float:
        """Frechet distance of two sets of images."""
        return frechet_distance(self(images), self(real))


def classifier_features(train_set, test_set, *, steps: int = 600, progress: bool = True) -> Features:
    """Train a factor classifier on images with known factors; its 64 features, divided by their deviation on real images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the distance depends on the network: the same in every call
        network = FactorClassifier(train_set.factor_sizes, resolution=train_set.resolution)
    batch_size = min(CLASSIFIER_BATCH, len(train_set))
    if batch_size < CLASSIFIER_BATCH:
        logger.warning("the factor classifier learns from %d images only: its accuracy and distances are rough", len(train_set))
    options = TrainingOptions(steps=steps, batch_size=batch_size, learning_rate=2e-3, ema_decay=0.99, checkpoint_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        state = train(
            FactorClassifierObjective(network, train_set),
            train_set,
            options,
            folder,
            progress=progress,
            description="classifier",
        )
    network.load_state_dict(state)
    network.eval()
    held_out = torch.arange(min(2000, len(test_set)))
    images = read(test_set, held_out)
    values = network.accuracy(images, test_set.factors(held_out))
    accuracy = {name: float(value) for name, value in zip(test_set.factor_names, values, strict=True)}
    deviation = batched(network.features, images).std(0)
    return Features("features of a factor classifier", lambda x: batched(network.features, x) / deviation, network, accuracy)


def pixel_features(train_set, components: int = 64, *, indices: Tensor | None = None) -> Features:
    """Principal components of the pixels of up to 4000 images, for images without known factors.

    Args:
        indices: The images in order of preference; by default the first ones. Of large images fewer are taken.
    """
    indices = torch.arange(len(train_set)) if indices is None else indices
    fitting = PIXEL_VALUES // (train_set.channels * train_set.resolution**2)
    images = read(train_set, indices[: min(4000, fitting)]).flatten(1)
    mean = images.mean(0)
    count = min(components, len(images) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the random projection that it begins with
        _, deviations, axes = torch.pca_lowrank(images - mean, q=count, center=False)
    scale = deviations / len(images) ** 0.5
    return Features(f"{count} principal components of the pixels", lambda x: (x.flatten(1) - mean) @ axes / scale)


def read(dataset, indices: Tensor) -> Tensor:
    """Images of a dataset, asked for in batches, (N, C, H, W) in [-1, 1]."""
    return torch.cat(list(image_batches(dataset, indices, progress=False)))


def checked_walk(model: Pipeline, sampler: str | None = None, steps: int | None = None) -> dict:
    """How a model denoises, {"sampler": ..., "steps": ...}: as asked for, and for what was not, as is usual for its class.

    That is `DENOISER`, or `REFINER` of a DiffusionVAE, in no more steps than the grid has; {} of a model that does not denoise.

    Raises:
        ValueError: A sampler of another class, steps that the grid does not have, either of them for a model that takes none.
    """
    name, given = type(model).__name__, {"sampler": sampler, "steps": steps}
    if not hasattr(model, "denoise"):
        if named := [key for key, value in given.items() if value is not None]:
            raise ValueError(f"a {name} decodes at once and takes no {' or '.join(named)}")
        return {}
    refines = isinstance(model, DiffusionVAE)
    samplers, usual = (diffusion_vae.SAMPLERS, REFINER) if refines else (nonlinear_diffusion.SAMPLERS, DENOISER)
    sampler = usual["sampler"] if sampler is None else sampler
    if sampler not in samplers:
        raise ValueError(f"sampler of a {name} must be one of {', '.join(samplers)}, got {sampler!r}")
    if steps is None:
        return {"sampler": sampler, "steps": min(usual["steps"], model.num_steps)}
    steps = as_integer(steps, "steps")
    if not 1 <= steps <= model.num_steps:
        raise ValueError(f"steps must lie between 1 and {model.num_steps}, the steps of the grid, got {steps}")
    return {"sampler": sampler, "steps": steps}


def reads_factors(dataset) -> bool:
    """Whether a `FactorClassifier` can judge images of a dataset; the log says where their resolution alone is against it."""
    if not data.knows_factors(dataset) or dataset.channels != 3:
        return False
    if not FactorClassifier.takes(dataset.resolution):
        logger.warning("no factor classifier takes images of %d pixels: they are judged by their pixels", dataset.resolution)
        return False
    return True


def usual_features(train_set, test_set, *, progress: bool = True, **training) -> Features:
    """Those of a factor classifier, trained as `training` says, where factors of colour images are known, else of the pixels."""
    if reads_factors(test_set):
        return classifier_features(train_set, test_set, progress=progress, **training)
    return pixel_features(train_set)


def as_many(train_set, test_set, num_images: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equally many training and held-out images, (N, C, H, W) in [-1, 1], and the factors of the latter where they are known."""
    count = min(as_integer(num_images, "num_images"), len(train_set), len(test_set))
    if count < 2:
        raise ValueError(f"an evaluation needs at least 2 training and 2 held-out images, got {count}")
    train_images, real = (data.to_float(part.images(range(count))) for part in (train_set, test_set))
    return train_images, real, test_set.factors(range(count)) if data.knows_factors(test_set) else None


@torch.no_grad()
def batched(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 250, *, label: str | None = None) -> Tensor:
    """`function` over many images, a batch at a time, collected on the CPU; with a `label` there is a progress bar."""
    chunks = tqdm(images.split(size), desc=label, unit="batch", disable=label is None)
    return torch.cat([function(chunk).cpu() for chunk in chunks])


def mean_energy(images: Tensor) -> float:
    """Mean gradient energy of images, whose ratio is their sharpness."""
    return float(gradient_energy(images).mean())


def likeness(features: Features, made: Tensor, images: Tensor, factors: Tensor | None, energy: float) -> dict:
    """What images made from others are like.

    Args:
        made, images: (N, C, H, W) each.
        factors: Of `images`, (N, F), where they are known.
        energy: The `mean_energy` that sharpness is relative to.

    Returns:
        "frechet", "sharpness", "mse" to `images`, and "accuracy" by factor where a classifier can tell.
    """
    found = {
        "frechet": features.distance(made, images),
        "sharpness": mean_energy(made) / energy,
        "mse": float((made - images).square().mean()),
    }
    if features.classifier is not None and factors is not None:
        found["accuracy"] = [float(a) for a in features.classifier.accuracy(made, factors)]
    return found


def encodings(model: DenoisingMultiBetaVAE, images: Tensor, betas: Sequence[float] = BETAS) -> dict[float, Tensor]:
    """f(x, beta) of images (N, C, H, W) at each beta, (N, c, h, w) on the CPU."""
    return {beta: batched(lambda x, b=beta: model.encode(x, b), images) for beta in betas}


@torch.no_grad()
def spectrum(model: DenoisingMultiBetaVAE, images: Tensor, means: dict[float, Tensor]) -> list[dict[str, float]]:
    """The representation at each beta: sigma (geometric mean over channels), s, KL in nats, error, sharpness, deviation.

    Args:
        means: The `encodings` of `images`.
    """
    real_energy = mean_energy(images)
    rows = []
    for beta, mean in means.items():
        latents = add_noise(model, mean, beta)
        reconstruction = batched(lambda z, b=beta: model.decode(z, b), latents)
        at = torch.tensor([float(beta)], device=model.device)
        sigma, decoder_sigma = model.vae.sigma(at).cpu(), float(model.vae.decoder_sigma(at))
        kl = float(kl_to_standard_normal(mean, sigma.expand(len(mean), *sigma.shape[1:])).mean())
        rows.append(
            {
                "beta": beta,
                "sigma": float(sigma.log().mean().exp()),
                "decoder_sigma": decoder_sigma,
                "kl": kl,
                "kl_per_dimension": kl / mean[0].numel(),
                "encoding_deviation": float((mean - mean.mean(0)).square().mean().sqrt()),
                "mse": float((reconstruction - images).square().mean()),
                "sharpness": mean_energy(reconstruction) / real_energy,
            }
        )
    return rows


def disentanglement(means: dict[float, Tensor], factors: Tensor, names: Sequence[str]) -> list[dict]:
    """What single codes tell of known factors at each beta (MultiBeta Fig. 4), and MIG beside that of randomly rotated codes.

    The rotations are of the channels: a network can take these into its weights at every position, and noise of one sigma is
    blind to them.

    Args:
        means: `encodings`, (N, c, h, w) for each beta.
        factors: Of the same images, (N, F), integers. A factor that never changes is left out.
        names: Of the factors.

    Returns:
        One row for each beta, none where there is a single code or no factor changes: "beta"; "mig"; "mig_random_rotation", the
        mean over rotations; "information", by factor the highest mutual information with any code as a share of the factor's
        entropy; "information_by_chance", the mean over factors of the same for shuffled images, which tells how far the
        estimate is above zero for want of images.
    """
    names = [name for name, column in zip(names, factors.T, strict=True) if (column != column[0]).any()]
    factors = factors[:, (factors != factors[0]).any(0)]
    shape = next(iter(means.values())).shape[1:]
    if not names or shape.numel() < 2:
        return []
    generator = torch.Generator().manual_seed(0)
    shuffled = factors[torch.randperm(len(factors), generator=generator)]
    rotations = torch.linalg.qr(torch.randn(ROTATIONS, shape[0], shape[0], generator=generator)).Q
    rows = []
    for beta, mean in means.items():
        gap, chance = (information_gap(mean.flatten(1), known) for known in (factors, shuffled))
        shares, by_chance = (found["mutual_information"].max(1) / found["entropy"] for found in (gap, chance))
        rotated = (torch.einsum("cd,nchw->ndhw", rotation, mean).flatten(1) for rotation in rotations)
        rows.append(
            {
                "beta": beta,
                "mig": gap["mig"],
                "mig_random_rotation": sum(mig_from_codes(codes, factors) for codes in rotated) / ROTATIONS,
                "information": dict(zip(names, shares.tolist(), strict=True)),
                "information_by_chance": float(by_chance.mean()),
            }
        )
    return rows


def add_noise(model: DenoisingMultiBetaVAE, mean: Tensor, beta: float) -> Tensor:
    """z_beta = f + sigma eps with fixed noise."""
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return mean + spatial(model.vae.sigma(torch.tensor([float(beta)], device=model.device))).to(mean) * noise.to(mean)


def facts(model: DenoisingMultiBetaVAE, images: Tensor) -> list[dict]:
    """What must come out of stage 1 (MultiBeta Prop. 3.1, 3.2, Fig. 3), measured: name, value, target, whether it holds."""
    sigmas = model.vae.sigmas().cpu().double().view(model.num_steps + 1, -1)
    rows = {row["beta"]: row for row in spectrum(model, images, encodings(model, images, (0.0, 1.0)))}
    slopes = max(slope_ratio(model.vae, images[:64].to(model.device), beta) for beta in (0.1, 0.3, 0.5, 0.7, 0.9))
    measured = [
        ("sigma(0): Prop. 3.1, the noise vanishes as beta goes to 0", float(sigmas[0].min()), 0.0, 0.04),
        ("sigma(1): the noise of the prior", float(sigmas[-1].max()), 0.98, 1.02),
        ("decreasing steps of sigma on the grid", float((sigmas.diff(dim=0) <= 0).sum()), 0.0, 0.0),
        ("deviation of f(x, 0) over images", rows[0.0]["encoding_deviation"], 0.8, 1.2),
        ("deviation of f(x, 1) over images: collapsed", rows[1.0]["encoding_deviation"], 0.0, 0.1),
        ("KL at beta = 1, nats per dimension: Prop. 3.2, no information", rows[1.0]["kl_per_dimension"], 0.0, 0.01),
        ("mean squared error at beta = 0", rows[0.0]["mse"], 0.0, 0.003),
        ("slope ratio of f in beta: smooth below 2", slopes, 0.0, 2.0),
    ]
    return [
        {"name": name, "value": value, "low": low, "high": high, "holds": low <= value <= high}
        for name, value, low, high in measured
    ]


@torch.no_grad()
def head_fit(model: DenoisingMultiBetaVAE, images: Tensor, betas=(0.05, 0.1, 0.2, 0.5, 0.7, 0.9)) -> list[dict[str, float]]:
    """R^2 of eps_hat and of the predicted velocity on held-out images, per beta (1 is exact, 0 predicts nothing).

    The heads are trained on the grid: "beta" of a row is that of the index nearest to one of `betas`, whatever the schedule.
    """
    num_steps, schedule = model.num_steps, model.vae.config.schedule
    rows = []
    for step in dict.fromkeys(max(beta_to_step(beta, num_steps, schedule), 1) for beta in betas):
        here, before = (float(step_to_beta(s, num_steps, schedule)) for s in (step, step - 1))
        encoding, previous = (batched(lambda x, b=b: model.encode(x, b), images) for b in (here, before))
        latents = add_noise(model, encoding, here)
        noise = (latents - encoding) / spatial(model.diffusion.sigmas[step : step + 1].cpu())
        outputs = [model.diffusion.predict(chunk.to(model.device), step) for chunk in latents.split(250)]
        noise_prediction, delta = (torch.cat([output[i].cpu() for output in outputs]) for i in (0, 1))
        difference = previous - encoding
        rows.append(
            {
                "beta": here,
                "noise_r2": 1 - float((noise_prediction - noise).square().mean() / noise.square().mean()),
                "velocity_r2": 1 - float((delta - difference).square().mean() / difference.square().mean()),
            }
        )
    return rows


def generation(
    model: DenoisingMultiBetaVAE,
    features: Features,
    train_images: Tensor,
    real: Tensor,
    samplers: Sequence[tuple[str, int, int]],
    *,
    progress: bool = True,
) -> dict:
    """Frechet distance and sharpness of generated images per (sampler, steps), with the two floors they are judged by.

    Args:
        train_images: As many training images as `real` holds.
        real: Held-out images.
        samplers: (sampler, steps, sign of delta) each; sign -1 of "resample" is MultiBeta Algorithm 2 as printed.

    Returns:
        "real_floor": training against held-out images; "autoencoder_floor": decode(encode(training, 0)) against held-out;
        "samples": one row for each sampler.

    Raises:
        ValueError: A sampler, steps or sign that the model does not have, before anything is made.
    """
    for name, steps, delta_sign in samplers:
        checked_walk(model, name, steps)
        if delta_sign not in (1, -1):
            raise ValueError(f"the sign of delta must be 1 or -1, got {delta_sign!r}")
    energy = mean_energy(real)
    rebuilt = batched(lambda x: model.decode(model.encode(x, 0.0)), train_images)
    result = {
        "num_images": len(real),
        "features": features.name,
        "real_floor": features.distance(train_images, real),
        "autoencoder_floor": features.distance(rebuilt, real),
        "autoencoder_sharpness": mean_energy(rebuilt) / energy,
        "samples": [],
    }
    for name, steps, delta_sign in samplers:
        with tqdm(desc=f"{name} {steps}", unit="evaluation", disable=not progress) as bar:
            images = model.generate(
                len(real),
                name,
                steps,
                batch_size=250,
                callback=lambda done, total, _, bar=bar: advance(bar, done, total),
                delta_sign=delta_sign,
            ).cpu()
        row = {
            "sampler": name,
            "steps": steps,
            "delta_sign": delta_sign,
            "frechet": features.distance(images, real),
            "sharpness": mean_energy(images) / energy,
        }
        result["samples"].append(row)
    return result


def advance(bar: tqdm, done: int, total: int) -> None:
    """Set a progress bar to `done` of `total`."""
    bar.total = total
    bar.update(done - bar.n)


def decoded(model: Pipeline, latents: Tensor, beta: float | None, how: str, *, seeds: Tensor | None = None, **walk) -> Tensor:
    """Images of latents at beta, (N, C, H, W).

    Args:
        how: "direct": decoded at beta; "denoised": denoised to 0 and decoded there or, by a `DiffusionVAE`, decoded and refined,
            by the sampler and steps of `walk`.
        seeds: One integer per image, of the noise of the walk.
    """
    if how == "direct":
        return model.decode(latents, beta)
    if isinstance(model, DiffusionVAE):
        return model.denoise(model.decode(latents), seeds=seeds, **walk)
    return model.decode(model.denoise(latents, beta, seeds=seeds, **walk))


def headline(
    model: DenoisingMultiBetaVAE, features: Features, images: Tensor, factors: Tensor | None, betas=HEADLINE_BETAS
) -> list[dict]:
    """Encode at beta; decode directly, or denoise to 0 and decode: distance to real, sharpness, error, factor accuracy.

    "direct" and "denoised" start from one sample z = f + sigma eps, "direct_mean" and "denoised_mean" from f itself.

    Sharpness is relative to decode(encode(x, 0)); accuracy is the classifier's on the images made, against the true factors.
    """
    energy = mean_energy(batched(lambda x: model.decode(model.encode(x, 0.0)), images))
    walk, rows = checked_walk(model), []
    for beta in betas:
        mean = batched(lambda x, b=beta: model.encode(x, b), images)
        latents = add_noise(model, mean, beta)
        made = {
            f"{how}{suffix}": batched(lambda z, b=beta, how=how: decoded(model, z, b, how, **walk), start)
            for suffix, start in (("", latents), ("_mean", mean))
            for how in ("direct", "denoised")
        }
        rows.append({"beta": beta} | {name: likeness(features, made[name], images, factors, energy) for name in made})
    return rows


def evaluate(
    model: DenoisingMultiBetaVAE,
    train_set,
    test_set,
    *,
    num_images: int = 1000,
    samplers: Sequence[tuple[str, int, int]] = SAMPLERS,
    betas: Sequence[float] = HEADLINE_BETAS,
    features: Features | None = None,
    progress: bool = True,
) -> dict:
    """Every figure of the report as one JSON-ready dictionary.

    Args:
        train_set, test_set: Disjoint data sets; with `factors` where they are known.
        num_images: Images on each side of a Frechet distance, at most what the sets hold.
        samplers, betas: Rows of `generation` and of `headline`, which denoises by `checked_walk`: "walk" says how.
        features: Measured in these; by default those of a factor classifier where factors are known, else of the pixels.
    """
    for name, steps, _ in samplers:
        checked_walk(model, name, steps)
    for beta in betas:
        check_beta(beta)
    train_images, real, factors = as_many(train_set, test_set, num_images)
    features = features or usual_features(train_set, test_set, progress=progress)
    logger.info("measuring %d images in %s", len(real), features.name)
    means = encodings(model, real)
    return {
        "facts": facts(model, real),
        "spectrum": spectrum(model, real, means),
        "disentanglement": disentanglement(means, factors, test_set.factor_names) if factors is not None else [],
        "heads": head_fit(model, real[:500]),
        "generation": generation(model, features, train_images, real, samplers, progress=progress),
        "headline": headline(model, features, real, factors, betas),
        "walk": checked_walk(model),
        "classifier_accuracy": features.accuracy,
        "factor_names": list(test_set.factor_names) if factors is not None else None,
    }


def json_ready(value):
    """Lists for tuples, and None for a number that is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
