"""Rules on gradients: too small, growing, always clipped, skipped."""

import numpy as np

from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import RunSignals, median, windows

LEAST_STEPS = 50  # after the warm-up
VANISHED_SHARE = 1e-3  # of the first gradients: healthy ones fall by a factor of 10 to 50
# AdamW divides by the gradient's size plus adam_eps: at 10 × adam_eps a tenth of the step is lost.
VANISHED_EPSILONS = 10
LOW_LOSS_SHARE = 0.5  # of the first loss: below it small gradients are what success looks like
GROWN = 10.0  # × the lowest window: healthy ones double or triple late in a run
GROWN_CLIPS = 1.0  # × the clip: below it growth does nothing
CLIPPED_SHARE = 0.99  # of the steps; many healthy runs are clipped half of the time
CLIPPED_TIMES = 5.0  # the clip, at the median
SKIPPED_SHARE = 0.01  # of the steps
SKIPPED_LEAST = 5


def vanishing(run: RunSignals) -> Verdict:
    """Gradients so small that AdamW no longer moves, though there is much to learn."""
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
        "There is much left to learn, but hardly any gradient reaches the weights: some part is "
        "saturated, so that a change of it changes nothing.",
        (
            Remedy(
                "Begin with a lower learning rate, in a new run: weights that were thrown far off "
                "saturate",
                remedies.rate_flag(run.peak_rate / 3) if run.peak_rate else "",
            ),
            remedies.longer_warm_up(run),
            Remedy("In bfloat16 small gradients are lost", "--config.model.dtype=float32"),
        ),
    )


def growing(run: RunSignals) -> Verdict:
    """Gradients that grow and grow."""
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
            f"steps are clipped at {clip:g}",
        ),
        "Clipping keeps each step small, but gradients that grow like this mean a model that "
        "becomes more and more sensitive; such runs tend to end in a divergence.",
        (remedies.lower_rate(run), remedies.skip_spikes(run)),
    )


def always_clipped(run: RunSignals) -> Verdict:
    """Nearly every step is cut down, and by much."""
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
        "Nearly every step is clipped, by much",
        (
            f"{share:.1%} of {recent.span} exceed the clip of {clip:g}",
            f"the median gradient norm is {usual:.3g}",
        ),
        "Every gradient is cut to the same length, so that a large one no longer stands out and "
        "clipping protects from nothing.",
        (
            Remedy(
                "Clip where gradients are unusual, at twice their median",
                remedies.resume(
                    run, f"--config.training.gradient_clip={float(f'{2 * usual:.1g}'):g}"
                ),
            ),
            Remedy(
                "Average over more sequences: noise is what makes a gradient long",
                remedies.resume(
                    run,
                    "--config.vram.effective_batch_size="
                    f"{2 * run.config.vram.effective_batch_size}",
                ),
            ),
        ),
    )


def skipped(run: RunSignals) -> Verdict:
    """Many steps were left out as spikes."""
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
        "A skipped step is paid for and teaches nothing. So many are no accident: the training "
        "is unsteady, or skip_spikes too strict.",
        (
            remedies.lower_rate(run),
            Remedy("Or skip fewer", _skip_fewer(run)),
        ),
    )


def _skip_fewer(run: RunSignals) -> str:
    """Returns the command that goes on with twice the factor, at least 5."""
    factor = run.config.training.skip_spikes if run.config is not None else 0.0
    return remedies.resume(run, f"--config.training.skip_spikes={max(5.0, 2 * factor):g}")
