"""Diagnoses of a model that was measured."""

from __future__ import annotations

import math
from collections.abc import Callable

from multibeta.blocks import BETA_FREQUENCY_MAX
from multibeta.doctor.finding import Finding, longer_first_stage
from multibeta.doctor.measured import Measured
from multibeta.multibeta_vae import LEAST_DEVIATION

MEAN_IMAGE, POOR = 0.8, 0.3  # error of reconstructions as a share of the variance of pixels: no better than the mean image, poor
LOWEST_EQUAL, HIGHEST_EQUAL = 0.2, 0.9  # beta of equal signal and noise
STARVED = 0.05  # R^2 of the second head, the mean over beta
SIGMAS_APART = 1e-3
EVEN = 1, 4  # balance at which information goes evenly over beta
COLLAPSE_EXPONENT = 8.0


def says_nothing(model: Measured) -> bool:
    """Whether codes tell nothing of images where they should keep everything."""
    if model.facts:
        return model.facts["deviation_zero"]["value"] < LEAST_DEVIATION
    return model.mse > MEAN_IMAGE * model.variance


def posterior_collapse(model: Measured) -> Finding | None:
    """Codes that tell nothing of images where they should keep everything."""
    if not says_nothing(model):
        return None
    error = f"images come back with {model.mse / model.variance:.0%} of their variance as error (sound: a few percent)"
    if not model.facts:
        return Finding(
            "posterior collapse",
            "vae",
            error,
            "reconstructions are the same blur for every image",
            "lower --vae-training.learning-rate or the price of a nat (--vae-objective.gamma)",
        )
    anneal, literal = model.options.get("anneal", 0.0), "balance" in model.options and model.options["balance"] is None
    ways = {
        f"raise --vae-objective.balance{now(model, 'balance')}": not literal,  # as printed it is as large as pixels are many
        f"lengthen --vae-objective.anneal{now(model, 'anneal')}": anneal < 1 and not literal,
        "lower --vae-training.learning-rate": True,
        "use --vae.activation silu": model.network.get("activation") != "silu",
    }
    return Finding(
        "posterior collapse at beta = 0",
        "vae",
        f"f(x, 0) deviates by {model.facts['deviation_zero']['value']:.3g} over images (sound: 0.8 to 1.2); {error}",
        "the KL term won before reconstruction was learned: every image has the same code, and stage 2 has nothing to learn",
        ", or ".join(way for way, helps in ways.items() if helps),
    )


def poor_reconstruction(model: Measured) -> Finding | None:
    """Images that come back, but badly."""
    if says_nothing(model) or model.mse <= POOR * model.variance:
        return None
    return Finding(
        "it underfits",
        "vae",
        f"images come back with {model.mse / model.variance:.0%} of their variance as error (sound: a few percent)",
        "stage 1 had not converged: what stage 2 makes cannot be sharper than this",
        more_steps(model)
        + "; where its error stopped falling early, another run of a larger network (--vae.base-channels, --vae.latent-channels)",
        undertrained=True,
    )


def prior_not_reached(model: Measured) -> Finding | None:
    """Latents at beta = 1 that are not those of the prior."""
    broken = [model.facts[key] for key in ("sigma_one", "deviation_one", "kl_one") if key in model.facts]
    broken = [fact for fact in broken if not fact["holds"]]
    if not broken:
        return None
    exponent, balance = model.network.get("collapse_exponent"), model.options.get("balance")
    ways = {
        f"pin it by --vae.collapse-exponent {COLLAPSE_EXPONENT:g}": exponent is None or exponent > COLLAPSE_EXPONENT,
        f"use a --vae-objective.balance of {EVEN[0]} to {EVEN[1]}{now(model, 'balance')}": balance is None or balance > EVEN[1],
    }
    advice = ", and ".join(way for way, helps in ways.items() if helps)
    return Finding(
        "f(x, 1) has not collapsed",
        "vae",
        "; ".join(f"{fact['name']}: {fact['value']:.3g} (sound: {fact['low']:g} to {fact['high']:g})" for fact in broken),
        "z_1 is not N(0, I), where generate begins: new images start from the wrong place",
        advice or more_steps(model),
        undertrained=not advice,
    )


def sigma_not_rising(model: Measured) -> Finding | None:
    """A curve sigma(beta) that does not rise everywhere."""
    if not model.facts or model.facts["decreasing_steps"]["holds"]:
        return None
    return Finding(
        "sigma is not monotone",
        "vae",
        f"{model.facts['decreasing_steps']['value']:g} steps of sigma on the grid of beta do not rise (sound: none)",
        "between these steps there is no noise to add, so the ancestral sampler and stage 2 have no variance there",
        "lower --vae-objective.curve-learning-rate (now "
        f"{model.options.get('curve_learning_rate', 'unknown')}) or --vae-training.learning-rate, and train anew",
    )


def rough_encoder(model: Measured) -> Finding | None:
    """An encoder that oscillates in beta."""
    if not model.facts or model.facts["slope"]["holds"] or says_nothing(model):
        return None
    smooth = model.network.get("embedding_max_frequency", math.inf) <= BETA_FREQUENCY_MAX
    return Finding(
        "f(x, beta) is rough in beta",
        "vae",
        f"its slope over 0.001 of beta is {model.facts['slope']['value']:.3g} times that over 0.02 (sound: below 2)",
        "most of what the second head of stage 2 has to predict is oscillation that says nothing of the image",
        more_steps(model) if smooth else f"lower --vae.embedding-max-frequency, to {BETA_FREQUENCY_MAX:.1f} or less",
        undertrained=smooth,
    )


def balance_off(model: Measured) -> Finding | None:
    """Information that goes too early in beta, or too late."""
    if not model.rows or says_nothing(model) or LOWEST_EQUAL <= model.equal_beta <= HIGHEST_EQUAL:
        return None
    low = model.equal_beta < LOWEST_EQUAL
    balance = model.options.get("balance", 0.0 if low else math.inf)  # of what is not recorded the cause is thought to be this
    balance = math.inf if balance is None else balance  # as Eq. 4 prints it
    meant = balance >= EVEN[0] if low else balance <= EVEN[1]
    return Finding(
        f"information goes too {'early' if low else 'late'}" if meant else f"balance is too {'low' if low else 'high'}",
        "vae",
        f"f(x, beta) deviates as much as its noise at beta = {model.equal_beta:.2f} (sound: 0.4 to 0.85)",
        "the KL term outweighs reconstruction: little is left of an image at any beta, and even beta = 0 is blurred"
        if low
        else "almost nothing is lost until the very end, where all goes at once: the spectrum over beta is not used, and stage 2 "
        "has to do all its work in a few steps",
        more_steps(model)
        if meant
        else f"{'raise' if low else 'lower'} --vae-objective.balance{now(model, 'balance')}: between {EVEN[0]} and {EVEN[1]} "
        "information goes evenly",
        undertrained=meant,
    )


def delta_starved(model: Measured) -> Finding | None:
    """A second head that learned nothing beside the first."""
    if not model.heads or model.mean_fit("velocity_r2") >= STARVED:
        return None
    literal = model.parameterization == "literal"
    steps = f" (now {model.steps['diffusion']})" if "diffusion" in model.steps else ""
    return Finding(
        "the delta head is starved",
        "diffusion",
        f"it explains {max(model.mean_fit('velocity_r2'), 0.0):.0%} of the velocity of encodings, the other head "
        f"{model.mean_fit('noise_r2'):.0%} of the noise (sound: 40% or more of both)",
        "latents lose their noise on the way to beta = 0 but do not move to where images are",
        "train anew with --diffusion.parameterization v, or residual with --diffusion-objective.move-share 0.8: as printed "
        "(literal) its error counts a millionth of the other's"
        if literal
        else f"--resume with more --diffusion-training.steps{steps}",
        undertrained=not literal,
    )


def other_process(model: Measured) -> Finding | None:
    """A stage 2 that belongs to another stage 1."""
    if model.sigmas_apart <= SIGMAS_APART:
        return None
    return Finding(
        "stage 2 was trained on another stage 1",
        "diffusion",
        f"its sigma(beta) differs from that of the VAE by up to {model.sigmas_apart:.2g} (sound: not at all)",
        "it denoises latents of a VAE that this one is not: stage 1 was trained further since, or exchanged",
        "train stage 2 anew on this VAE: delete the folder diffusion of the run, then --resume; --warm-start starts it from what "
        "is there",
    )


def more_steps(model: Measured) -> str:
    """Advice for stage 1 where the option that is a known cause is as it should be already: what is left are too few steps."""
    return longer_first_stage("--vae-training.steps", model.steps.get("vae"), model.followed)


def now(model: Measured, option: str) -> str:
    """The value of an option of stage 1, in brackets, where it is known."""
    return f" (now {model.options[option]})" if option in model.options else ""


OF_MODELS: tuple[Callable[[Measured], Finding | None], ...] = (
    posterior_collapse,
    poor_reconstruction,
    prior_not_reached,
    sigma_not_rising,
    rough_encoder,
    balance_off,
    delta_starved,
    other_process,
)
