"""Rules on whether the model learns: loss, learning rate, evaluation."""

import numpy as np

from mamba_jax.checkpoints.folder import step_name
from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import Curve, RunSignals, above_recent, groups, median, noise, windows

# A model that learns at all reduces the first loss (about the logarithm of the vocabulary size) by
# a tenth in its first hundred steps: token frequencies alone reduce it by a third.
FLAT_SHARE = 0.05  # of the first loss: a smaller decrease does not count
FLAT_STEPS = 200  # after the warm-up, before the rule judges
# A model picks up frequencies within a few hundred steps; going lower takes context.
UNIGRAM_STEPS = 1_000  # after the warm-up
UNIGRAM_MARGIN = 0.99  # × the unigram loss, as train and held-out text differ a little
STILL_FALLING = 0.02  # of the loss, over the last half: a slow run is not a stuck one
RISE_STEPS = 50  # at least
# The loss varies by a few percent with the text. Rises that a decaying learning rate or more text
# would undo are smaller than this.
RISE_SHARE = 0.05  # of the lowest loss
RISE_SHARE_OF_FIRST = 0.01  # and of the first: losses near 0 vary by more than a twentieth
RISE_NOISE = 6.0  # standard errors of a window's median
OVERSHOOT = 1.1  # × the first loss, a random guess: only confident wrong predictions are worse
OVERSHOOT_WITHIN = 500  # steps after the warm-up; a later rise is not an overshoot
OVERSHOOT_STEPS = 20  # of the median: a shorter rise is a spike
FIRST_STEPS = 5  # whose median is the first loss: a single batch may be unusual
HIGH_RATE = 0.3  # of the peak: below it, the learning rate is not the cause of a rise

SPIKE_MEMORY = 50  # steps whose median is the baseline of a spike
SPIKE_NOISE = 8.0  # standard deviations: never reached by chance in 200,000 steps
SPIKE_SHARE = 0.1  # of the loss before it; for a single step, of the first loss too
SPIKE_LENGTH = 3  # steps: an unusual batch affects one step; two in a row are chance
SPIKE_ALONE = 3.5  # × the loss before it, for a single step: an unusual batch may reach 2.5
SPIKES_MANY = 3
# In the first SPIKE_MEMORY steps the baseline covers fewer steps, because the loss falls fast
# there, and the share is larger, because a loss that rises step by step is not a spike.
SPIKE_EARLY = 5  # steps
SPIKE_EARLY_SHARE = 0.25
SPIKE_STEPS = 50  # at least

OVERFIT_EVALUATIONS = 4  # at least
OVERFIT_PATIENCE = 2  # evaluations since the best: the next one often reverses a single rise
OVERFIT_SHARE = 0.01  # of the best evaluation loss
OVERFIT_NATS = 0.02


def loss_not_falling(run: RunSignals) -> Verdict:
    """The loss stays at its initial level, or never falls below that of token frequencies."""
    loss = run["loss"]
    if not run.from_beginning:
        return Unchecked("the record does not begin at step 1")
    past = int(loss.steps[-1]) - run.warm_step
    if past < FLAT_STEPS:
        return too_few(past, FLAT_STEPS, "steps after the warm-up")
    first, last = loss[:FIRST_STEPS], loss.last(0.1, 20)
    first_loss, now = median(first), median(last)
    lowest = min(map(median, windows(loss)))
    figures = (
        f"loss {first_loss:.3f} at {first.span}, {now:.3f} at {last.span}",
        f"learning rate up to {run.peak_rate:.2g}",
    )
    if first_loss - lowest < FLAT_SHARE * first_loss and now < (1 + FLAT_SHARE) * first_loss:
        return Finding(
            Severity.CRITICAL,
            "The loss does not fall",
            figures,
            "The loss normally falls by a tenth within the first few hundred steps. This model "
            "still predicts about as badly as at the start.",
            _flat_remedies(run),
        )
    unigram = run.unigram_nll
    if unigram is None or past < UNIGRAM_STEPS or lowest < UNIGRAM_MARGIN * unigram:
        return None
    halfway = loss[len(loss) // 2 :][: len(last)]
    if median(halfway) - now < STILL_FALLING * now:
        return Finding(
            Severity.CRITICAL,
            "The model has only learned token frequencies",
            (*figures, f"{unigram:.3f} is the loss of token frequencies alone"),
            "The model has learned nothing from the order of the tokens: either their order "
            "carries no information (shuffled or encoded text), or the learning rate prevents "
            "learning.",
            _flat_remedies(run),
        )
    return None


def _flat_remedies(run: RunSignals) -> tuple[Remedy, ...]:
    rate = run.peak_rate
    data = remedies.look_at_data(run)
    if rate < remedies.RATE_LOW:
        text = f"Raise the learning rate: {rate:.2g} is far below that of the presets, 1e-4 to 5e-4"
        return Remedy(text, remedies.resume(run, remedies.rate_flag(remedies.RATE_USUAL))), data
    return data, remedies.lower_rate(run)


def learning_rate_too_high(run: RunSignals) -> Verdict:
    """The loss rises, or jumps above its initial value."""
    loss = run["loss"]
    parts = windows(loss)
    if len(parts) < RISE_STEPS // 10:
        return too_few(len(loss), RISE_STEPS, "steps")
    if run.from_beginning and (finding := _overshoot(run)):
        return finding
    medians = [median(part) for part in parts]
    lowest, last = int(np.argmin(medians)), parts[-1]
    low, now = medians[lowest], medians[-1]
    # The standard error of a median is 1.25 × that of a mean; both ends have one.
    error = 1.25 * 2**0.5 * noise(last.values) / len(last) ** 0.5
    least = max(
        RISE_SHARE * low,
        RISE_SHARE_OF_FIRST * medians[0],
        RISE_NOISE * error,
    )
    if now - low < least:
        return None
    at_lowest, rising = parts[lowest], loss.after(int(parts[lowest].steps[-1]))
    evidence = [
        f"lowest loss {low:.3f} at {at_lowest.span}; {now:.3f} at {last.span}",
    ]
    rate_low, rate_now = _rate_over(run, at_lowest), _rate_over(run, rising)
    if rate_now:
        evidence.append(f"learning rate {rate_low:.2g} then, {rate_now:.2g} since (medians)")
    norm_low, norm_now = (
        run["gradient_norm"].between(int(part.steps[0]), int(part.steps[-1]))
        for part in (at_lowest, last)
    )
    if len(norm_low) and len(norm_now):
        evidence.append(f"gradient norm {median(norm_low):.3g} then, {median(norm_now):.3g} now")
    if rate_now and rate_now < HIGH_RATE * run.peak_rate:
        return Finding(
            Severity.WARNING,
            "The loss rises",
            tuple(evidence),
            "The learning rate was already low when the loss began to rise, so it is probably not "
            "the cause. A change in the training text or drifting weights are more likely.",
            (remedies.look_at_data(run), remedies.skip_spikes(run)),
        )
    return Finding(
        Severity.CRITICAL,
        "The learning rate is too high",
        tuple(evidence),
        "The updates are so large that they undo what the model had learned: the loss rises while "
        "the learning rate is high.",
        (
            remedies.lower_rate(run, rate_low, before=int(at_lowest.steps[-1])),
            remedies.longer_warm_up(run),
        ),
    )


def _rate_over(run: RunSignals, part: Curve) -> float:
    """Returns the median learning rate over the steps of a part; 0 where none is recorded."""
    rate = run["learning_rate"].between(int(part.steps[0]), int(part.steps[-1]))
    return median(rate) if len(rate) else 0.0


def _overshoot(run: RunSignals) -> Finding | None:
    loss, n = run["loss"].between(1, run.warm_step + OVERSHOOT_WITHIN), OVERSHOOT_STEPS
    if len(loss) < n:
        return None
    first_loss = (
        median(loss[:FIRST_STEPS]) if run.warm_step > FIRST_STEPS else float(loss.values[0])
    )
    runs_n = np.median(np.lib.stride_tricks.sliding_window_view(loss.values, n), axis=1)
    worst = int(np.argmax(runs_n))
    if runs_n[worst] < OVERSHOOT * first_loss:
        return None
    there = loss[worst : worst + n]
    return Finding(
        Severity.CRITICAL,
        "The learning rate is too high",
        (
            f"loss {first_loss:.3f} at the start, {runs_n[worst]:.3f} at {there.span} (median)",
            f"learning rate {_rate_over(run, there):.2g} there, up to {run.peak_rate:.2g}",
        ),
        "An untrained model guesses at random. A loss above that level means that the first "
        "updates were so large that the model became confident in wrong predictions.",
        (
            Remedy(
                "Start a new run with a lower learning rate",
                remedies.rate_flag(min(run.peak_rate / 3, remedies.RATE_USUAL))
                if run.peak_rate
                else "",
            ),
            remedies.longer_warm_up(run),
        ),
    )


def loss_spikes(run: RunSignals) -> Verdict:
    """The loss jumps for a few steps and recovers."""
    loss = run["loss"]
    if len(loss) < SPIKE_STEPS:
        return too_few(len(loss), SPIKE_STEPS, "steps")
    rise_n = above_recent(loss.values, SPIKE_MEMORY, SPIKE_EARLY)
    before_n = loss.values - rise_n
    settled = SPIKE_MEMORY if len(loss) >= 3 * SPIKE_MEMORY else SPIKE_EARLY
    usual = noise(rise_n[settled:])
    share_n = np.where(np.arange(len(loss)) < SPIKE_MEMORY, SPIKE_EARLY_SHARE, SPIKE_SHARE)
    high_n = rise_n > np.maximum(SPIKE_NOISE * usual, share_n * np.abs(before_n))
    first_loss = median(loss[:FIRST_STEPS])
    far_n = (loss.values > SPIKE_ALONE * before_n) & (rise_n > SPIKE_SHARE * first_loss)
    # One step within a spike may be low, because of an easy batch.
    spikes = [
        spike
        for spike in groups(np.flatnonzero(high_n), SPIKE_LENGTH)
        if len(spike) >= SPIKE_LENGTH or far_n[spike].any()
    ]
    if not spikes:
        return None
    worst = max(spikes, key=lambda spike: rise_n[spike].max())
    top = worst[np.argmax(rise_n[worst])]
    steps = [int(loss.steps[spike[0]]) for spike in spikes]
    named = ", ".join(f"{step:,}" for step in steps[:5]) + (" …" if len(steps) > 5 else "")
    evidence = [
        f"{len(spikes)} spike{'s' * (len(spikes) > 1)}, beginning at step {named}",
        f"the worst: loss {before_n[top]:.3f} before it, {loss.values[top]:.3f} at step "
        f"{loss.steps[top]:,}; the usual noise is {usual:.2g}",
    ]
    is_wild = run.from_beginning and loss.values[top] > OVERSHOOT * first_loss
    if is_wild:
        evidence[-1] += f"; the loss at the start was {first_loss:.3f}"
    norm = run["gradient_norm"].between(int(loss.steps[worst[0]]), int(loss.steps[worst[-1]]))
    if len(norm):
        evidence.append(
            f"gradient norm up to {norm.values.max():.3g} during it; its median over the run is "
            f"{median(run['gradient_norm']):.3g}"
        )
    short = all(len(spike) < SPIKE_LENGTH for spike in spikes)
    return Finding(
        Severity.WARNING if len(spikes) >= SPIKES_MANY or is_wild else Severity.NOTE,
        "The loss spikes",
        tuple(evidence),
        "For some steps the loss was far above its previous level: an update was too large, or a "
        "batch differs from the rest. A spike costs the steps that the loss needs to recover, and "
        "a run may not recover from the next one.",
        (
            remedies.skip_spikes(run),
            remedies.lower_rate(run),
            *([remedies.look_at_data(run)] if short else []),
        ),
    )


def overfitting(run: RunSignals) -> Verdict:
    """The evaluation loss rises while the training loss does not."""
    evaluation, loss = run["eval_loss"], run["loss"]
    if len(evaluation) < OVERFIT_EVALUATIONS:
        return too_few(len(evaluation), OVERFIT_EVALUATIONS, "evaluations")
    best = int(np.argmin(evaluation.values))
    low, now = float(evaluation.values[best]), float(evaluation.values[-1])
    rise = now - low
    if len(evaluation) - 1 - best < OVERFIT_PATIENCE or rise < max(
        OVERFIT_SHARE * low, OVERFIT_NATS
    ):
        return None
    step, last = int(evaluation.steps[best]), int(evaluation.steps[-1])
    span = last - int(evaluation.steps[-2])
    then, since = loss.between(step - span + 1, step), loss.between(last - span + 1, last)
    if not len(then) or not len(since):
        return Unchecked("no training loss is recorded around the evaluations")
    if median(since) - median(then) > rise / 2:
        return None  # the training loss rises as well: that is another problem
    dropout = min(0.5, max(0.1, 2 * run.config.model.dropout if run.config is not None else 0.0))
    checkpoint = run.folder / step_name(step)
    keep = Remedy("Use the model from the best evaluation, not the last one")
    if checkpoint.is_dir():
        command = f'mamba-jax generate --checkpoint {checkpoint} --prompt ""'
        keep = Remedy(keep.text + "; its checkpoint still exists", command)
    return Finding(
        Severity.WARNING,
        "The model overfits",
        (
            f"best evaluation loss {low:.3f} at step {step:,}; {now:.3f} at step {last:,}",
            f"training loss {median(then):.3f} then, {median(since):.3f} now "
            f"(medians of {span:,} steps)",
        ),
        "The evaluation loss gets worse while the training loss does not: the model memorises its "
        "training text, which does not help on other text.",
        (
            keep,
            Remedy("Train on more text, which helps most", "--data_dir PATH"),
            Remedy("Increase dropout", remedies.resume(run, f"--config.model.dropout={dropout:g}")),
            Remedy("Or start a new run with a smaller model", "--model_size small"),
        ),
    )
