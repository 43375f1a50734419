"""Diagnoses of the log of a training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from multibeta.doctor.finding import Finding, longer_first_stage
from multibeta.doctor.logs import Log
from multibeta.recipes import DECODER, FLOW_MAP
from multibeta.recipes.preflight import warms_up_too_long

JUMP, ERROR_JUMP = 2.0, 1.5  # of a gradient norm and an error, times the median of those before; in sound trainings 1.7 and 1.3
BEFORE = 5
MUCH_LEFT_OUT = 0.01  # of the updates
WARMED_UP = 0.2  # of the records, in which anything may jump
RISE = 0.1  # of a held-out loss after its lowest, as a share of how far it had fallen
LEAST_FALL = 0.1  # of a held-out loss, as a share of its size: smaller ones say nothing of where it goes
UNSEEN = 1.6  # error of a flow map on held-out trajectories, times that on its own
UNTRAINED = 0.9  # of the error of predicted noise
WAITING = 0.5  # share of the time
LEAST_SECONDS = 120.0  # of a training whose time is worth a word
LEAST_CAPACITY = 0.2  # share of the nats that a VAE may hold, below which it holds next to nothing
LATE = 0.2  # of the records
ALIKE = 0.05


def flag(log: Log, option: str) -> str:
    """The flag of `multibeta train` for an option of a training."""
    if (log.name, option) == ("vae-untied", "steps"):
        return "--vae-objective.untie-steps"
    part = {"vae-untied": "vae-training", FLOW_MAP: "flow-map", DECODER: "decoder-tuning"}
    return f"--{part.get(log.name, f'{log.name}-training')}.{option}"


def longer_warm_up(log: Log, joint: str = ", or ") -> str:
    """Advice to lengthen the warm-up, of a training that has a flag for it."""
    return "" if log.name in (FLOW_MAP, DECODER) else f"{joint}lengthen {flag(log, 'warmup-steps')}"


def in_float32(log: Log) -> str:
    """Advice to compute in float32, of a training that does not."""
    return "" if log.options and log.options.precision == "fp32" else f", or {flag(log, 'precision')} fp32"


def adversarial_flag(log: Log, option: str) -> str:
    """The flag of `multibeta train` for an option of a training against a discriminator."""
    return flag(log, option) if log.name == DECODER else f"--adversarial.{option}"


def jumps(values: NDArray[np.float64], times: float) -> int:
    """How many values exceed `times` the median of the few before them, those of the warm-up apart."""
    first = max(BEFORE, int(len(values) * WARMED_UP))
    return sum(values[i] > times * np.median(values[i - BEFORE : i]) for i in range(first, len(values)))


def not_finite(log: Log) -> Finding | None:
    """A loss or a gradient that was no number."""
    broken = [each["step"] for each in log.records if None in (each.get("loss", 0.0), each.get("grad_norm", 0.0))]
    if not broken:
        return None
    return Finding(
        "the loss was not finite",
        log.name,
        f"at step {broken[0]} of {log.last_step} the loss or its gradient was no finite number",
        "the training stopped there; what it gives, if anything, is its last checkpoint",
        f"lower {flag(log, 'learning-rate')}{now(log)}{longer_warm_up(log, ', ')}{in_float32(log)}",
    )


def nothing_kept(log: Log) -> Finding | None:
    """A training that has no checkpoint yet, or was ended before it had one."""
    if log.options is None or log.finished or log.checkpoint is not None or not_finite(log):
        return None
    return Finding(
        "it is not finished and has no checkpoint",
        log.name,
        f"{log.logged_step} of {log.last_step} steps are logged; a checkpoint comes every {log.options.checkpoint_every}",
        "nothing of what it learned could be measured; unless it still runs, these steps are lost",
        "where it still runs, wait for its first checkpoint; if not, the same command with --resume begins it again, with a "
        f"smaller {flag(log, 'checkpoint-every')} less is lost",
    )


def learning_rate_too_high(log: Log) -> Finding | None:
    """Gradients or errors that jump again and again."""
    gradients, errors = jumps(log.series("grad_norm")[1], JUMP), jumps(log.errors()[1], ERROR_JUMP)
    if gradients + errors < 2:
        return None
    return Finding(
        "the learning rate is too high",
        log.name,
        f"after the warm-up the gradient norm was more than {JUMP:g} times that before in {gradients} records, the error more "
        f"than {ERROR_JUMP:g} times in {errors} (a sound training: none)",
        "steps overshoot: what was learned is thrown away again, and a VAE may collapse",
        f"halve {flag(log, 'learning-rate')}{now(log)}{longer_warm_up(log)}",
    )


def warm_up_too_long(log: Log) -> Finding | None:
    """A learning rate that only ever rose, or hardly did anything else."""
    if log.options is None or not warms_up_too_long(log.options):
        return None
    shorter = "" if log.name in (FLOW_MAP, DECODER) else f"{flag(log, 'warmup-steps')} {max(log.last_step // 20, 1)}, or "
    return Finding(
        "the warm-up is most of the training",
        log.name,
        f"the learning rate rises for {log.options.warmup_steps} of {log.last_step} steps (sound: a twentieth, or 100 steps)",
        "it learns at its full rate late or never, and the little that is left of the rate's decay does not let it settle",
        f"{shorter}more {flag(log, 'steps')}",
    )


def updates_left_out(log: Log) -> Finding | None:
    """A guard against spikes that has much to do."""
    shares = log.series("left_out")[1]
    if not len(shares) or (share := float(shares.mean())) <= MUCH_LEFT_OUT:
        return None
    return Finding(
        "updates are left out again and again",
        log.name,
        f"{share:.1%} of the updates had gradients far larger than usual, or not finite, and were left out (sound: below 0.1%)",
        "the guard hides that steps overshoot; what is left out is not learned from",
        f"lower {flag(log, 'learning-rate')}{now(log)}{longer_warm_up(log)}",
    )


def now(log: Log) -> str:
    """The learning rate that it had, in brackets."""
    return f" (now {log.options.learning_rate:g})" if log.options else ""


def overfitting(log: Log) -> Finding | None:
    """A held-out loss that rises again."""
    steps, losses = log.series("validation/loss", comparable=True)
    if len(losses) < 3:
        return None
    best = int(losses.argmin())
    fall, rise = losses[0] - losses[best], losses[-1] - losses[best]
    if rise <= RISE * fall or rise <= RISE / 2 * abs(losses[best]):
        return None
    return Finding(
        "it overfits",
        log.name,
        f"the loss on held-out images was lowest at step {steps[best]:g}, {losses[best]:.4g}, and is {losses[-1]:.4g} at step "
        f"{steps[-1]:g}",
        "from there on it learned its images by heart; keep_best takes the weights of the lowest loss, later steps are lost",
        f"train on more images (--data.num-train, --data.mirror where mirror images are true), or fewer {flag(log, 'steps')}; a "
        "smaller network (--vae.base-channels, --diffusion.base-channels) or its --vae.dropout, --diffusion.dropout help as well",
    )


def unseen_trajectories(log: Log) -> Finding | None:
    """A flow map that knows its own trajectories better than others."""
    ratios = log.series("validation/ratio")[1]
    if not len(ratios) or ratios[-1] <= UNSEEN:
        return None
    return Finding(
        "the flow map overfits its trajectories",
        log.name,
        f"its error on held-out trajectories is {ratios[-1]:.2f} times that on those it learned from (sound: 0.9 to 1.3)",
        "images in one to four evaluations are worse than the error of the training says",
        "use each trajectory less often (--uses, --flow-map.uses) or keep more of them (--pool, --flow-map.pool)",
    )


def still_falling(log: Log) -> Finding | None:
    """A held-out loss that falls in the second half of a training as much as in the first."""
    steps, losses = log.series("validation/loss", comparable=True)
    if len(losses) < 3:
        return None
    fall = losses[0] - losses[-1]
    middle = float(np.interp((steps[0] + steps[-1]) / 2, steps, losses))
    if fall <= LEAST_FALL * abs(losses[0]) or middle - losses[-1] < fall / 2:
        return None
    after = "what was trained on it learned from an unfinished model" if log.followed else "more steps would make it better"
    return Finding(
        "it had not converged",
        log.name,
        f"the loss on held-out images fell by {losses[0] - middle:.3g} in the first half, by {middle - losses[-1]:.3g} in the "
        "second (a training that levels out: by less than half of that)",
        f"it underfits; {after}",
        longer_first_stage(flag(log, "steps"), log.last_step, log.followed),
        undertrained=True,
    )


def noise_unknown(log: Log) -> Finding | None:
    """A denoiser that predicts the noise hardly better than before its training, when that error was 1."""
    errors = np.concatenate([log.series(name)[1] for name in ("noise_error", "v_error")])  # a training logs one of them
    late = float(np.median(errors[-max(int(len(errors) * LATE), 1) :])) if len(errors) else 0.0
    if late <= UNTRAINED:
        return None
    return Finding(
        "it underfits",
        log.name,
        f"the error of what it predicts of the noise is {late:.2g} (before training 1; sound: below 0.7)",
        "new images, and latents that are denoised, are guesses",
        f"more {flag(log, 'steps')} (now {log.last_step}; --resume goes on); where the error stopped falling early, another "
        f"{flag(log, 'learning-rate')}{now(log)} or a larger network (--diffusion.base-channels)",
        undertrained=True,
    )


def waiting_for_images(log: Log) -> Finding | None:
    """Steps that mostly wait for their images."""
    seconds, shares = log.series("seconds")[1], log.series("data_seconds_share")[1]
    if not len(shares) or seconds[-1] < LEAST_SECONDS or (share := float(np.median(shares))) <= WAITING:
        return None
    workers = log.options.num_workers if log.options else 0
    threads = f"raise {flag(log, 'num-workers')} (now {workers})" if workers >= 2 else f"{flag(log, 'num-workers')} 2"
    return Finding(
        "it waits for images",
        log.name,
        f"of the seconds of a step {share:.0%} went by until its images were there (sound: less than 20%)",
        "a faster processor or GPU would train no faster",
        f"{threads}, so that threads read ahead; images on a local disk and the folder of caches (--cache) "
        "where there is room, so that they are decoded once; smaller files where they are much larger than the model's pixels",
    )


def waiting_between_steps(log: Log) -> Finding | None:
    """A training that spends its time on what is not a step."""
    steps, seconds = log.series("seconds")
    rates = log.series("images_per_second")[1]
    if log.options is None or len(seconds) < 3 or len(rates) != len(seconds) or seconds[-1] - seconds[0] < LEAST_SECONDS:
        return None
    in_steps = float((np.diff(steps) * log.options.batch_size / rates[1:]).sum())
    share = 1 - in_steps / float(seconds[-1] - seconds[0])
    if share <= WAITING:
        return None
    return Finding(
        "its time goes by between the steps",
        log.name,
        f"{share:.0%} of the time was spent on validation, pictures and checkpoints (sound: less than 20%)",
        "the same steps could take less than half as long",
        f"raise {flag(log, 'validate-every')} (now {log.options.validate_every}) and {flag(log, 'checkpoint-every')} (now "
        f"{log.options.checkpoint_every})",
    )


def capacity_unused(log: Log) -> Finding | None:
    """A VAE of limited capacity whose latent says hardly anything."""
    kl, capacity = (log.series(name)[1] for name in ("kl", "capacity"))
    if not len(kl) or not len(capacity) or kl[-1] >= LEAST_CAPACITY * capacity[-1]:
        return None
    return Finding(
        "posterior collapse",
        log.name,
        f"the latent holds {kl[-1]:.3g} nats where its capacity is {capacity[-1]:.3g} (sound: about as much)",
        "reconstructions hardly depend on the image, so the refiner learns to make images of nothing",
        f"lower {flag(log, 'learning-rate')}{now(log)}, or --vae-objective.gamma, which is what a nat costs",
    )


def late_and_early(log: Log, *names: str) -> list[tuple[float, float]]:
    """(median of the last records, median of as many early ones) of each scalar; none where one of them is logged too rarely."""
    values = [log.series(name)[1] for name in names]
    count = max(int(min(map(len, values)) * LATE), BEFORE)
    if min(map(len, values)) < 3 * count:
        return []
    return [(float(np.median(each[-count:])), float(np.median(each[count : 2 * count]))) for each in values]


def discriminator_blind(log: Log) -> Finding | None:
    """A hinge discriminator that scores real images and decoded ones alike."""
    medians = late_and_early(log, "discriminator_loss", "discriminator_real", "discriminator_fake")
    if not medians:
        return None
    loss, real, fake = (late for late, _ in medians)
    if abs(loss - 1) > ALIKE or abs(real - fake) > 2 * ALIKE:
        return None
    return Finding(
        "the discriminator tells nothing apart",
        log.name,
        f"at the end its loss is {loss:.3g}, real images score {real:.3g} and the decoder's {fake:.3g} (sound: a loss of 0.1 to "
        "0.9, and real images well above the decoder's)",
        "the decoder learns nothing from it, and the adversarial term is noise",
        f"raise {adversarial_flag(log, 'discriminator-rate')} or {adversarial_flag(log, 'discriminator-channels')}, or lower "
        f"{adversarial_flag(log, 'start')}",
    )


def discriminator_won(log: Log) -> Finding | None:
    """A hinge discriminator that the decoder can no longer fool, and whose scores grow without bound."""
    medians = late_and_early(log, "discriminator_loss", "discriminator_fake", "adversarial_loss")
    if not medians:
        return None
    (loss, _), (fake, _), (fooling, fooling_before) = medians
    if loss > ALIKE or fake > -2 or fooling < 2 * max(fooling_before, 1.0):
        return None
    return Finding(
        "the discriminator has won",
        log.name,
        f"at the end its loss is {loss:.3g}, the decoder's images score {fake:.3g}, and the decoder's term is {fooling:.3g}, "
        f"{fooling_before:.3g} before (sound: a loss of 0.1 to 0.9, scores around -1, a term that levels out)",
        "it tells all apart: the gradient that the decoder gets from it grows without bound and says little",
        f"lower {adversarial_flag(log, 'discriminator-rate')} or {adversarial_flag(log, 'weight')}, raise "
        f"{adversarial_flag(log, 'start')}, or set {adversarial_flag(log, 'penalty')}",
    )


OF_LOGS: tuple[Callable[[Log], Finding | None], ...] = (
    not_finite,
    nothing_kept,
    learning_rate_too_high,
    warm_up_too_long,
    updates_left_out,
    overfitting,
    unseen_trajectories,
    still_falling,
    noise_unknown,
    waiting_for_images,
    waiting_between_steps,
    capacity_unused,
    discriminator_blind,
    discriminator_won,
)
