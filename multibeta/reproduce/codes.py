"""What the experiments measure: the codes that trained methods make of images, in which axes, and which of them to report."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from multibeta import data
from multibeta.files import read_arrays, write_atomically
from multibeta.metrics import dci_from_codes, information_gap, mig_from_codes
from multibeta.metrics.disentanglement import encode_images
from multibeta.multibeta_vae import MultiBetaVAE
from multibeta.recipes.directions import disco_options, train_disco
from multibeta.reproduce.models import Study, started, study_images, trained_vae
from multibeta.seeds import as_short_seed

logger = logging.getLogger(__name__)

SWEEP = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # beta of the multi-beta VAE
FOLD_BETA = 0.5
AXES = ("trained", "random", "pca", "ica")


def codes_of(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> dict[str, np.ndarray]:
    """What one method makes of 2 num_images held-out images: `betas` (B,), `codes` (B, 2 num_images, K).

    `factors` and `attributes` of the images are stored with them, where they are known. All is kept in `folder`, so that a
    repeated call only reads it.
    """
    path = folder / method / "codes.npz"
    if not path.exists():
        vae = trained_vae(method, study, seed, folder, progress)
        _, test_set = study_images(study)
        indices = np.arange(2 * study.num_images)
        if isinstance(vae, MultiBetaVAE):
            betas, encoders = SWEEP, [functools.partial(vae.encode, beta=beta) for beta in SWEEP]
        else:
            betas, encoders = (0.0,), [vae.encode]
        codes = [encode_images(encode, test_set, indices, 250, progress=progress)[0] for encode in encoders]
        arrays: dict[str, Any] = {"betas": np.array(betas), "codes": np.stack(codes)}
        arrays |= {name: getattr(test_set, name)(indices).numpy() for name, known in data.KNOWS.items() if known(test_set)}
        write_atomically(path, lambda file: np.savez(file, **arrays))
    return read_arrays(path)


@dataclass(frozen=True)
class Basis:
    """A linear change of the axes that codes are read in: (codes - mean) @ matrix."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """Codes (N, K) in this basis, (N, M)."""
        return (codes - self.mean) @ self.matrix


def bases(codes: np.ndarray, seed: int) -> dict[str, Basis]:
    """The four sets of axes that a representation is scored in, fitted on codes (N, K).

    "trained": as they are; "random": a random rotation, the control; "pca": principal axes, which `fold_principal_axes` puts
    into the weights; "ica": independent components (FastICA) of the principal components that hold at least a hundredth of the
    variance of the first.
    """
    from sklearn.decomposition import PCA, FastICA

    seed, mean, size = as_short_seed(seed), codes.mean(0), codes.shape[1]
    rotation, _ = np.linalg.qr(np.random.RandomState(seed).randn(size, size))
    principal = PCA().fit(codes)
    components, variances = (cast("np.ndarray", fitted) for fitted in (principal.components_, principal.explained_variance_))
    axes = components[variances >= 0.01 * variances[0]].T
    independent = FastICA(whiten="unit-variance", random_state=seed, max_iter=2000, tol=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        independent.fit((codes - mean) @ axes)
    if caught:
        logger.info("independent components: %s", caught[0].message)
    return {
        "trained": Basis(mean, np.eye(size)),
        "random": Basis(mean, rotation),
        "pca": Basis(mean, components.T),
        "ica": Basis(mean, axes @ cast("np.ndarray", independent.components_).T),
    }


@dataclass(frozen=True)
class Representation:
    """Codes (2 n, K) of one method at one beta, the bases they are read in, and what is known of the images.

    `labels`: "factors" (2 n, F) and "attributes" (2 n, A), where the data has them.
    """

    method: str
    beta: float
    seed: int
    axes: dict[str, Basis]
    codes: np.ndarray
    labels: dict[str, np.ndarray]

    def half(self, axes: str, which: int, label: str = "factors") -> tuple[np.ndarray, np.ndarray]:
        """Codes in a basis, and labels: of the half that chooses (0) or of the half that reports (1)."""
        middle = len(self.codes) // 2
        part = slice(0, middle) if which == 0 else slice(middle, None)
        return self.axes[axes](self.codes[part]), self.labels[label][part]

    def score(self, axes: str, study: Study, cache: Path, progress: bool) -> dict:
        """MIG with its gap of each factor, and DCI, on the half that reports."""
        codes, factors = self.half(axes, 1)
        cut = study.dci_train
        train, test = (codes[:cut], factors[:cut]), (codes[cut : cut + study.dci_test], factors[cut : cut + study.dci_test])
        dci = dci_from_codes(*train, *test, seed=self.seed, cache=cache, progress=progress)
        gap = information_gap(codes, factors)
        return {
            "method": self.method,
            "beta": self.beta,
            "seed": self.seed,
            "mig": gap["mig"],
            "gaps": gap["gaps"].tolist(),
            "dci": dci["disentanglement"],
            "completeness": dci["completeness"],
            "informativeness": dci["informativeness_test"],
        }


def representations(method: str, study: Study, seed: int, folder: Path, progress: bool = True) -> list[Representation]:
    """What one method offers at one seed: one representation, or one for each beta of the sweep.

    The bases of a multi-beta VAE are fitted once, at beta = 0.5.
    """
    arrays = codes_of(method, study, seed, folder, progress)
    betas, codes = arrays["betas"].tolist(), arrays["codes"].astype(np.float64)
    labels = {name: arrays[name] for name in ("factors", "attributes") if name in arrays}
    axes = bases(codes[betas.index(FOLD_BETA) if FOLD_BETA in betas else 0, : study.num_images], seed)
    return [Representation(method, beta, seed, axes, own, labels) for beta, own in zip(betas, codes, strict=True)]


def select(candidates: list[Representation], axes: str) -> Representation:
    """The candidate of highest MIG on the half that chooses."""
    return max(candidates, key=lambda candidate: mig_from_codes(*candidate.half(axes, 0)))


def disco_representation(base: Representation, study: Study, folder: Path, progress: bool = True) -> Representation:
    """The codes that DisCo learns on the frozen decoder of `base` at its beta."""
    train_set, test_set = study_images(study)
    vae = trained_vae(base.method, study, base.seed, folder, progress)

    place = folder / f"disco-{base.method}"
    module = train_disco(
        vae,
        base.beta,
        train_set,
        disco_options(study.disco_steps, min(128, len(train_set)), base.seed),
        place,
        width=study.disco_width,
        context={"beta": base.beta, "method": base.method},
        resume=started(place),
        progress=progress,
        description=f"DisCo on {base.method}",
    )
    codes, _ = encode_images(module.encode, test_set, np.arange(2 * study.num_images), 250, progress=progress)
    axes = bases(codes[: study.num_images].astype(np.float64), base.seed)
    return dataclasses.replace(base, method=f"disco-{base.method}", axes=axes, codes=codes.astype(np.float64))
