"""Commands that say what a model learned: its codes, the measures of the field, the report."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from multibeta import caches, data, distribution, files, metrics
from multibeta.cli.arguments import (
    SHIPPED,
    AnySampler,
    AnySteps,
    Beta,
    Model,
    OnModel,
    Source,
    Switch,
    given,
    require_at_least,
    require_suffix,
)
from multibeta.cli.images import open_for, open_source
from multibeta.data.files import EncodedImages
from multibeta.evaluation import evaluate, results_table
from multibeta.numbered_files import write_npz
from multibeta.pipelines import resolve_pretrained
from multibeta.progress import progress_bar
from multibeta.recipes import FLOW_MAP
from multibeta.training import METRICS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Encode(OnModel):
    """Codes of many images as .npz: `codes` (num_samples, num_codes), their `beta`, and `names`, or `factors` of scenes.

    Of images of known classes also `labels` (num_samples,), positions in `class_names`. A second
    call goes on where one was stopped, and several processes that torchrun starts share the work.
    """

    images: Annotated[Positional[str], arg(metavar="FOLDER|scenes|NAME:PATH")]  # Images to encode.
    out: Path  # An .npz file.
    beta: Beta = None  # Compression, 0 to 1 or auto, by default 0.5: higher keeps less. A baseline has none.
    limit: int | None = None  # Encode this many, chosen at random.
    seed: int = 0  # Seed of that choice.
    batch_size: int = 256  # Images computed at once.
    upscale: Switch = False  # Accept images smaller than the model's.

    def run(self) -> None:
        require_suffix(self.out, ".npz")
        require_at_least(1, limit=self.limit, batch_size=self.batch_size)
        model = self.load(denoising=False)
        (beta,) = model.levels(None if self.beta is None else [self.beta], default=[0.5])
        dataset = open_for(model, self.images, upscale=self.upscale)
        indices = data.choose(len(dataset), self.limit, self.seed)

        def encode(chunks: list[range]) -> Iterator[dict[str, np.ndarray]]:
            for chunk in progress_bar(chunks, desc="encoding", unit="batch"):
                images = data.to_float(dataset.images(indices[chunk.start : chunk.stop]))
                yield {"codes": model.encode(images, beta).flatten(1).cpu().numpy()}

        beside: dict[str, Any] = {} if beta is None else {"beta": np.float32(beta)}
        if data.knows_factors(dataset):
            beside |= {"factors": dataset.factors(indices).numpy(), "factor_names": np.array(dataset.factor_names)}
        else:
            assert isinstance(dataset, data.ImageFolder | EncodedImages)
            beside["names"] = np.array([dataset.paths[index] for index in indices.tolist()])
        if data.knows_classes(dataset):
            beside |= {"labels": dataset.labels(indices).numpy(), "class_names": np.array(dataset.class_names)}
        facts = {"digest": model.digest(), "beta": beta, "limit": self.limit, "seed": self.seed}
        facts |= {"images": self.images, "fingerprint": data.fingerprint_of(dataset)}
        shapes = write_npz(self.out, facts, len(indices), self.batch_size, encode, beside=beside)
        print(f"{self.out}: codes {shapes['codes']}" + ("" if beta is None else f" at beta {beta:g}"))


@dataclass(frozen=True, kw_only=True)
class Evaluate(OnModel):
    """The measures of the field on any model: MIG, DCI, TAD and a probe of its codes; distance and sharpness of its images.

    Beside the Frechet distance stand precision and recall, and sharpness: the energy of gradients relative to that of the images
    measured on, 1 where what was made is as sharp as they are.
    """

    model: Model = SHIPPED
    out: Path = Path("scores.json")  # A .json file.
    # Images to measure on; by default the model's own data. MIG and DCI need known factors, TAD attributes, --probe any of them
    # or classes.
    data: Source = None

    betas: tuple[float, ...] | None = None  # Compressions, by default 0.1 0.3 0.5 0.7 0.9; a baseline has none.
    num_images: int = 10_000  # Images to measure; 10000 is published for MIG and DCI. TAD takes at most 1000, as published.
    dci: Switch = False  # Measure DCI too: boosted trees, minutes for each beta, kept in ~/.cache/multibeta.
    auroc: Literal["grid", "exact"] = "grid"  # Of TAD: thresholds 0.01 apart as published, which count ties as right, or exact.

    # Measure how well a linear classifier and nearest neighbours tell classes by codes, and by principal components of pixels.
    # A folder with one subfolder for each class has them; else known factors or attributes are told.
    probe: Switch = False

    # Measure a bound on the log-likelihood of up to 500 images, in bits per dimension, beside a Gaussian of the pixels: minutes.
    # Of a DenoisingMultiBetaVAE.
    likelihood: Switch = False

    fidelity: bool = True  # Measure generated and decoded images.

    # Weights of the FID Inception: the distance is FID then. By default the features are those of a classifier of the factors,
    # or principal components of the pixels where no factors are known.
    features: Path | None = None

    reference: Path | None = None  # Statistics (.npz with mu and sigma) to measure FID to in place of the data's own.
    sampler: AnySampler = None
    steps: AnySteps = None
    seed: int = 0  # Of the choice of images and of all noise.
    batch_size: int = 64  # Images computed at once.
    upscale: Switch = False  # Accept images smaller than the model's.

    def run(self) -> None:
        require_suffix(self.out, ".json")
        require_at_least(1, num_images=self.num_images, batch_size=self.batch_size)
        model = self.load(denoising=False)
        model.levels(self.betas)
        model.sampling_options(self.sampler, self.steps)
        names = "betas num_images dci auroc probe likelihood fidelity reference sampler steps seed batch_size"
        options: dict = {name: getattr(self, name) for name in names.split()}
        if self.features:
            options["features"] = metrics.load_features(self.features).to(model.device)
        dataset, source = open_source(model, self.data, "--data", upscale=self.upscale)
        result = evaluate(model, dataset, cache=dci_cache(), **options)
        result["data"]["source"] = source
        document = json.dumps(result, indent=1, allow_nan=False)
        if distribution.world().first:
            files.write_text(self.out, document)
        print(f"{results_table(result)}\n{self.out}: all numbers, and what they depend on")


@dataclass(frozen=True, kw_only=True)
class Report(OnModel):
    """What a model learned, as one HTML page with figures and numbers."""

    model: Model = SHIPPED
    out: Path = Path("report.html")  # An .html file.
    data: Source = None  # Images to measure on; by default the model's own data.
    quick: Switch = False  # Fewer images, coarser numbers.
    beside: Annotated[str | None, arg(metavar="MODEL")] = None  # Another model that the same held-out images go through.
    beta: float | None = None  # Where a multi-beta VAE encodes images for --beside, 0 to 1; by default 0.9.

    def run(self) -> None:
        from multibeta.report import write_report  # brings matplotlib and scikit-learn

        if self.beta is not None and self.beside is None:
            raise ValueError("--beta says where images are encoded for --beside MODEL: name that too")
        run = resolve_pretrained(self.model).parent  # where `train` left its curves
        curves = run if any((run / stage / METRICS).exists() for stage in ("vae", FLOW_MAP)) else None
        options = {"source": self.data, "quick": self.quick, "progress": True, "training_folder": curves}
        if self.beside is not None:
            beside = replace(self, model=self.beside).load(denoising=False)
            options |= {"beside": beside, **given(beta=self.beta)}
        model = self.load()
        require_suffix(self.out, ".html")
        write_report(model, self.out, **options)
        print(f"{self.out}: open it in a browser")


def dci_cache() -> Path | None:
    """Where fits of DCI are kept, or None, with a word in the log, where there is no place for them."""
    try:
        return caches.cache_folder() / "dci"
    except OSError as error:
        logger.warning("fits of DCI are not kept: %s", error)
        return None
