"""Rules on gradients: too small, growing, always clipped, skipped."""

import numpy as np

from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import RunSignals, median, windows

LEAST_STEPS = 50  # after the warm-up
VANISHED_SHARE = 1e-3  # of the first gradients: healthy ones fall by a factor of 10 to 50
# AdamW divides by the gradient's size plus adam_eps: at 10 × adam_eps a tenth of the step is lost.
VANISHED_EPSILONS = 10
LOW_LOSS_SHARE = 0.5  # of the first loss: below it, small gradients are a sign of success
GROWN = 10.0  # × the lowest window: healthy ones double or triple late in a run
GROWN_CLIPS = 1.0  # × the clip: below it, growth has no effect
CLIPPED_SHARE = 0.99  # of the steps; many healthy runs are clipped half of the time
CLIPPED_TIMES = 5.0  # the clip, at the median
SKIPPED_SHARE = 0.01  # of the steps
SKIPPED_LEAST = 5


def vanishing(run: RunSignals) -> Verdict:
    """Gradients so small that AdamW hardly moves the weights, while the loss is still high."""
    norm, loss = run["gradient_norm"], run["loss"]
    if len(norm) < LEAST_STEPS or not len(loss):
        return too_few(len(norm), LEAST_STEPS, "gradient norms")
    if not run.from_beginning:
        return Unchecked("the record does not begin at step 1")
    first, last = norm[:20], norm.last(0.1, 20)
    early, now = median(first), median(last)
    is_low = median(loss.last(0.1, 20)) < LOW_LOSS_SHARE * median(loss[:5])
    limit = VANISHED_SHARE * early
    if run.config is not None and run.parameters:
        epsilons = VANISHED_EPSILONS * run.config.training.adam_eps
        limit = max(limit, epsilons * run.parameters**0.5)
    if is_low or now >= limit:
        return None
    return Finding(
        Severity.CRITICAL,
        "The gradients vanish",
        (
            f"gradient norm {early:.2g} at {first.span}, {now:.2g} at {last.span} (medians)",
            f"loss {median(loss[:5]):.3f} at the start, {median(loss.last(0.1, 20)):.3f} now",
        ),
        "The loss is still high, but almost no gradient reaches the weights: some part of the "
        "model is saturated, so changes to its weights do not change the output.",
        (
            Remedy(
                "Start a new run with a lower learning rate: weights that large updates have "
                "pushed far away saturate",
                remedies.rate_flag(run.peak_rate / 3) if run.peak_rate else "",
            ),
            remedies.longer_warm_up(run),
            Remedy(
                "Train in float32: bfloat16 loses small gradients", "--config.model.dtype=float32"
            ),
        ),
    )


def growing(run: RunSignals) -> Verdict:
    """Gradients that keep growing."""
    norm = run["gradient_norm"].after(run.warm_step)
    parts = windows(norm)
    if len(parts) < 5:
        return too_few(len(norm), LEAST_STEPS, "steps after the warm-up")
    medians = [median(part) for part in parts]
    lowest = int(np.argmin(medians))
    low, now = medians[lowest], medians[-1]
    clip = run.config.training.gradient_clip if run.config is not None else 1.0
    if now < GROWN * low or now < GROWN_CLIPS * clip:
        return None
    return Finding(
        Severity.WARNING,
        "The gradients grow",
        (
            f"gradient norm {low:.3g} at {parts[lowest].span}, {now:.3g} at {parts[-1].span} "
            "(medians)",
            f"gradient norms are clipped at {clip:g}",
        ),
        "Clipping keeps each update small, but gradients that grow like this mean that the model "
        "becomes increasingly sensitive; such runs often diverge.",
        (remedies.lower_rate(run), remedies.skip_spikes(run)),
    )


def always_clipped(run: RunSignals) -> Verdict:
    """Nearly every step is clipped heavily."""
    norm = run["gradient_norm"].after(run.warm_step)
    if run.config is None:
        return Unchecked("the config is not recorded")
    if len(norm) < LEAST_STEPS:
        return too_few(len(norm), LEAST_STEPS, "steps after the warm-up")
    clip, recent = run.config.training.gradient_clip, norm.last(0.5)
    share, usual = float(np.mean(recent.values > clip)), median(recent)
    if share < CLIPPED_SHARE or usual < CLIPPED_TIMES * clip:
        return None
    return Finding(
        Severity.NOTE,
        "Nearly every step is clipped heavily",
        (
            f"{share:.1%} of {recent.span} exceed the clip of {clip:g}",
            f"the median gradient norm is {usual:.3g}",
        ),
        "Every gradient is scaled down to the same norm, so an unusually large one no longer "
        "stands out and clipping does not protect against it.",
        (
            Remedy(
                "Clip only unusual gradients: set the limit to twice their median norm",
                remedies.resume(
                    run, f"--config.training.gradient_clip={float(f'{2 * usual:.1g}'):g}"
                ),
            ),
            Remedy(
                "Increase the effective batch: averaging over more sequences reduces the noise "
                "that inflates gradient norms",
                remedies.resume(
                    run,
                    "--config.vram.effective_batch_size="
                    f"{2 * run.config.vram.effective_batch_size}",
                ),
            ),
        ),
    )


def skipped(run: RunSignals) -> Verdict:
    """The trainer skipped many steps as spikes."""
    steps, count = len(run["loss"]), len(run.skipped)
    if steps < LEAST_STEPS:
        return too_few(steps, LEAST_STEPS, "steps")
    if count < SKIPPED_LEAST or count < SKIPPED_SHARE * steps:
        return None
    return Finding(
        Severity.WARNING,
        "Many steps are skipped as spikes",
        (
            f"{count:,} of {steps:,} steps ({count / steps:.1%}), the first at step "
            f"{run.skipped[0]:,}, the last at step {run.skipped[-1]:,}",
        ),
        "A skipped step costs time but does not train the model. This many are unlikely to be "
        "chance: training is unstable, or skip_spikes is too strict.",
        (
            remedies.lower_rate(run),
            Remedy("Or skip fewer steps", _skip_fewer(run)),
        ),
    )


def _skip_fewer(run: RunSignals) -> str:
    """Returns the command that resumes with twice the factor, at least 5."""
    factor = run.config.training.skip_spikes if run.config is not None else 0.0
    return remedies.resume(run, f"--config.training.skip_spikes={max(5.0, 2 * factor):g}")
