"""Rules on how a run goes on its machine: its end, speed, data, memory, warnings."""

import re

import numpy as np

from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import RunSignals, median

# A machine's speed wanders; what is worth a look lasts and is larger than this.
SLOWER = 0.25
SPEED_INTERVALS = 20  # of log_steps each
SPEED_RECENT = 5  # at least, which the present speed is the median of
# Batches are read while the device computes: up to half of the time this costs nothing. Near all
# of it the device waits.
DATA_NEAR, DATA_STALL = 0.5, 0.8
DATA_INTERVALS = 5
MEMORY_SHARE = 0.97  # of the device's memory at the peak
MIB = 2**20
_EXPECTED = re.compile(r"a spike; step skipped|^out of memory with a microbatch")


def ended(run: RunSignals) -> Verdict:
    """An error ended the run, or a number was not finite."""
    if run.not_finite:
        name, step = min(run.not_finite.items(), key=lambda item: item[1])
        evidence = [f"{name.replace('_', ' ')} is NaN or infinite at step {step:,}"]
        if run.ended:
            evidence.append(f"ended at step {run.ended[0]:,}: {run.ended[1]}")
        return _diverged(run, tuple(evidence))
    if run.ended is None:
        return None
    step, text = run.ended
    kind, _, message = text.partition(": ")
    evidence = (f"after step {step:,}: {message or kind}",)
    if "training diverged" in text:
        return _diverged(run, evidence)
    then_resume = Remedy("Then go on from the newest checkpoint", remedies.resume(run))
    if kind in ("KeyboardInterrupt", "StoppedEarly", "SystemExit"):
        return Finding(
            Severity.NOTE,
            "The run was stopped",
            evidence,
            "Somebody, or the system, asked it to end.",
            (Remedy("Go on from the newest checkpoint", remedies.resume(run)),),
        )
    if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
        return Finding(
            Severity.CRITICAL,
            "The run ran out of memory",
            evidence,
            "The step needs more than the device has left.",
            (
                remedies.more_memory_free(run),
                Remedy(
                    "Keep fewer activations",
                    remedies.resume(run, "--config.model.remat=full"),
                ),
                Remedy("Or train a smaller model, in a new run", "--model_size medium-lite"),
            ),
        )
    return Finding(
        Severity.CRITICAL,
        f"The run was ended by {'an error' if kind == 'UserError' else kind}",
        evidence,
        "The message says what is in the way."
        if kind == "UserError"
        else "This is none of the errors that the trainer expects; the log has more of it.",
        (Remedy("Clear away what the message names"), then_resume),
    )


def _diverged(run: RunSignals, evidence: tuple[str, ...]) -> Finding:
    return Finding(
        Severity.CRITICAL,
        "The training diverged",
        (*evidence, f"learning rate up to {run.peak_rate:.2g}"),
        "A step went so far that the numbers overflowed or the gradient exploded. Nothing that "
        "comes after can be used; checkpoints from before can.",
        (remedies.lower_rate(run), remedies.skip_spikes(run), remedies.longer_warm_up(run)),
    )


def slowing(run: RunSignals) -> Verdict:
    """Tokens per second fell and stay low."""
    speed = run["tokens_per_sec"].after(run.layout_step)
    if len(speed) < SPEED_INTERVALS:
        return too_few(len(speed), SPEED_INTERVALS, "measures of the speed")
    usual, recent = speed[: len(speed) // 2], speed.last(0.1, SPEED_RECENT)
    before, now = median(usual), median(recent)
    # Overlapping distributions are a machine that wanders, not one that became slow.
    apart = np.quantile(recent.values, 0.75) < np.quantile(usual.values, 0.1)
    if now > (1 - SLOWER) * before or not apart:
        return None
    evidence = [
        f"{before:,.0f} tokens/s at {usual.span}, {now:,.0f} at {recent.span} "
        f"({now / before - 1:+.0%}, medians)"
    ]
    waits = run["data_wait"].between(int(recent.steps[0]), int(recent.steps[-1]))
    if len(waits):
        evidence.append(f"{median(waits):.0%} of the time there went into waiting for data")
    return Finding(
        Severity.WARNING,
        "The training has become slower",
        tuple(evidence),
        "Same model, same device, same layout: something else takes its time, such as another "
        "program, heat that throttles the device, or a slow disk.",
        (
            Remedy("See what else uses the device, and how warm it is", "nvidia-smi"),
            Remedy(
                "Write a trace of some steps and look at it in TensorBoard",
                remedies.resume(run, "--profile"),
            ),
        ),
    )


def data_stall(run: RunSignals) -> Verdict:
    """The device waits for batches."""
    waits = run["data_wait"].after(run.layout_step)
    if len(waits) < DATA_INTERVALS:
        return too_few(len(waits), DATA_INTERVALS, "measures of the wait for data")
    recent = waits.last(0.5, DATA_INTERVALS)
    share = median(recent)
    if share < DATA_NEAR:
        return None
    stalled = share >= DATA_STALL
    return Finding(
        Severity.WARNING if stalled else Severity.NOTE,
        "The training waits for data" if stalled else "Reading data takes long",
        (f"{share:.0%} of the time goes into waiting for a batch (median over {recent.span})",),
        "Batches are read while the device computes, so that they cost nothing up to a point; "
        + (
            "here reading takes nearly all of the time and the device idles."
            if stalled
            else "this run comes close to it, and on a faster device would be past it."
        ),
        (
            Remedy(
                "Put the cache of tokens onto a local disk, not one on the network; tokens are "
                "read from there at random",
                remedies.resume(run, "--config.data.cache_dir=/PATH/ON/A/LOCAL/DISK"),
            ),
            Remedy("See that no other program reads from that disk, or takes the processor"),
        ),
    )


def memory(run: RunSignals) -> Verdict:
    """The peak lies at the edge of the device's memory, or went over it."""
    out_of_memory = [
        (step, text) for step, text in run.warnings if text.startswith("out of memory with")
    ]
    free_memory = remedies.more_memory_free(run)
    if out_of_memory:
        return Finding(
            Severity.WARNING,
            "The memory was not enough; the microbatch was halved",
            tuple(f"step {step:,}: {text}" for step, text in out_of_memory[-3:]),
            "The run goes on as before, only slower than it could; something else may be using "
            "the device's memory.",
            (free_memory, Remedy("See what else uses the device", "nvidia-smi")),
        )
    peak = run["memory_bytes"].after(run.layout_step)
    if not len(peak):
        return Unchecked("memory is not recorded")
    if run.device_kind == "cpu":
        return None  # the process's memory: the budget is not about it
    if run.config is None or run.config.vram.auto:
        return Unchecked("the device's memory is not recorded")
    size, most = run.config.vram.memory_gb * 2**30, float(peak.values.max())
    if most < MEMORY_SHARE * size:
        return None
    return Finding(
        Severity.NOTE,
        "The memory is nearly full",
        (
            f"at most {most / MIB:,.0f} MiB in use of {size / MIB:,.0f} MiB ({most / size:.1%}), "
            f"up to step {peak.steps[-1]:,}",
        ),
        "A little more, such as another program on the device, and the run is out of memory.",
        (free_memory,),
    )


def warned(run: RunSignals) -> Verdict:
    """The run itself warned, of what no other rule is about."""
    others = [(step, text) for step, text in run.warnings if not _EXPECTED.search(text)]
    if not others:
        return None
    return Finding(
        Severity.NOTE,
        f"The run warned {len(others)} times" if len(others) > 1 else "The run warned once",
        tuple(f"step {step:,}: {text}" for step, text in others[-3:]),
        "Training went on, without what the warning names.",
        (Remedy("Clear away what the warnings name; the log has them with their time"),),
    )
