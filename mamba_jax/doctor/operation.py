"""Rules on how a run performs on its machine: its end, speed, data, memory, warnings."""

import re

import numpy as np

from mamba_jax.doctor import remedies
from mamba_jax.doctor.finding import Finding, Remedy, Severity, Unchecked, Verdict, too_few
from mamba_jax.doctor.signals import RunSignals, median
from mamba_jax.runs.recorded import FAILED, STOPPED

# A machine's speed varies; a slowdown worth reporting lasts and is larger than this.
SLOWER = 0.25
SPEED_INTERVALS = 20  # of log_steps each
SPEED_RECENT = 5  # at least; their median is the current speed
# The loader reads batches while the device computes: up to half of the time, this costs nothing.
# When reading takes nearly all of the time, the device waits.
DATA_NEAR, DATA_STALL = 0.5, 0.8
DATA_INTERVALS = 5
MEMORY_SHARE = 0.97  # of the device's memory at the peak
MIB = 2**20
_EXPECTED = re.compile(r"\bis a spike\b|^out of memory")  # other rules report these


def ended(run: RunSignals) -> Verdict:
    """An error ended the run, or a value was not finite."""
    state, error = run.status.state, run.status.error
    if run.not_finite:
        name, step = min(run.not_finite.items(), key=lambda item: item[1])
        evidence = [f"{name.replace('_', ' ')} is NaN or infinite at step {step:,}"]
        if error:
            evidence.append(f"ended at step {error.step:,}: {error}")
        return _diverged(run, tuple(evidence))
    if state not in (FAILED, STOPPED):
        return None
    text = run.status.why
    if error:
        evidence = (f"after step {error.step:,}: {error.message or error.kind}",)
    else:
        evidence = (f"after step {run.last_step:,}: {text}",)
    if "training diverged" in text:
        return _diverged(run, evidence)
    then_resume = Remedy("Then resume from the newest checkpoint", remedies.resume(run))
    if state == STOPPED:
        return Finding(
            Severity.NOTE,
            "The run was stopped",
            evidence,
            "A user or the system asked the run to stop.",
            (Remedy("Resume from the newest checkpoint", remedies.resume(run)),),
        )
    if "out of memory" in text.lower() or "RESOURCE_EXHAUSTED" in text:
        return Finding(
            Severity.CRITICAL,
            "The run ran out of memory",
            evidence,
            "A training step needs more memory than the device has free.",
            (
                remedies.more_memory_free(run),
                Remedy(
                    "Store fewer activations",
                    remedies.resume(run, "--config.model.remat=full"),
                ),
                Remedy("Or start a new run with a smaller model", "--model_size medium-lite"),
            ),
        )
    return Finding(
        Severity.CRITICAL,
        f"{'An error' if error is None or error.kind == 'UserError' else error.kind} ended the run",
        evidence,
        "The message says what is wrong."
        if error is None or error.kind == "UserError"
        else "The trainer does not expect this error; the log has the details.",
        (Remedy("Fix what the message names"), then_resume),
    )


def _diverged(run: RunSignals, evidence: tuple[str, ...]) -> Finding:
    return Finding(
        Severity.CRITICAL,
        "The training diverged",
        (*evidence, f"learning rate up to {run.peak_rate:.2g}"),
        "An update was so large that values overflowed or the gradient exploded. Everything after "
        "that step is unusable; earlier checkpoints are fine.",
        (remedies.lower_rate(run), remedies.skip_spikes(run), remedies.longer_warm_up(run)),
    )


def slowing(run: RunSignals) -> Verdict:
    """Tokens per second dropped and stayed low."""
    speed = run["tokens_per_sec"].after(run.layout_step)
    if len(speed) < SPEED_INTERVALS:
        return too_few(len(speed), SPEED_INTERVALS, "speed measurements")
    usual, recent = speed[: len(speed) // 2], speed.last(0.1, SPEED_RECENT)
    before, now = median(usual), median(recent)
    # If the distributions overlap, the speed varies, but the machine did not become slower.
    apart = np.quantile(recent.values, 0.75) < np.quantile(usual.values, 0.1)
    if now > (1 - SLOWER) * before or not apart:
        return None
    evidence = [
        f"{before:,.0f} tokens/s at {usual.span}, {now:,.0f} at {recent.span} "
        f"({now / before - 1:+.0%}, medians)"
    ]
    waits = run["data_wait"].between(int(recent.steps[0]), int(recent.steps[-1]))
    if len(waits):
        evidence.append(f"{median(waits):.0%} of that time was spent waiting for data")
    return Finding(
        Severity.WARNING,
        "The training has become slower",
        tuple(evidence),
        "The model, the device and the layout are unchanged, so the cause is outside the run: for "
        "example another program, thermal throttling, or a slow disk.",
        (
            Remedy("Check what else uses the device, and its temperature", "nvidia-smi"),
            Remedy(
                "Record a trace of a few steps and view it in TensorBoard",
                remedies.resume(run, "--profile"),
            ),
        ),
    )


def data_stall(run: RunSignals) -> Verdict:
    """The device waits for batches."""
    waits = run["data_wait"].after(run.layout_step)
    if len(waits) < DATA_INTERVALS:
        return too_few(len(waits), DATA_INTERVALS, "measurements of the wait for data")
    recent = waits.last(0.5, DATA_INTERVALS)
    share = median(recent)
    if share < DATA_NEAR:
        return None
    stalled = share >= DATA_STALL
    return Finding(
        Severity.WARNING if stalled else Severity.NOTE,
        "The training waits for data" if stalled else "Reading data takes a long time",
        (f"{share:.0%} of the time is spent waiting for a batch (median over {recent.span})",),
        "The loader reads batches while the device computes, so up to a point reading is free. "
        + (
            "This run is past that point, and the device sits idle."
            if stalled
            else "This run is close to that point; on a faster device it would be past it."
        ),
        (
            Remedy(
                "Put the token cache on a local disk instead of a network one; the loader reads it "
                "in random order",
                remedies.resume(run, "--config.data.cache_dir=/PATH/ON/A/LOCAL/DISK"),
            ),
            Remedy("Make sure that no other program uses that disk or the CPU heavily"),
        ),
    )


def memory(run: RunSignals) -> Verdict:
    """The peak is close to the device's memory size, or exceeded it."""
    out_of_memory = [
        (step, text) for step, text in run.warnings if text.startswith("out of memory")
    ]
    free_memory = remedies.more_memory_free(run)
    if out_of_memory:
        return Finding(
            Severity.WARNING,
            "Out of memory; the trainer halved the microbatch",
            tuple(f"step {step:,}: {text}" for step, text in out_of_memory[-3:]),
            "The run continues with the same results, but slower than it could. Another program "
            "may be using the device's memory.",
            (free_memory, Remedy("Check what else uses the device", "nvidia-smi")),
        )
    peak = run["memory_bytes"].after(run.layout_step)
    if not len(peak):
        return Unchecked("memory is not recorded")
    if run.device_kind == "cpu":
        return None  # the process's memory, which the budget does not cover
    if run.config is None or run.config.vram.auto:
        return Unchecked("the device's memory is not recorded")
    size, most = run.config.vram.memory_gb * 2**30, float(peak.values.max())
    if most < MEMORY_SHARE * size:
        return None
    return Finding(
        Severity.NOTE,
        "The memory is nearly full",
        (
            f"peak use {most / MIB:,.0f} MiB of {size / MIB:,.0f} MiB ({most / size:.1%}), "
            f"up to step {peak.steps[-1]:,}",
        ),
        "A small increase, for example by another program on the device, would exhaust the memory.",
        (free_memory,),
    )


def warned(run: RunSignals) -> Verdict:
    """The run logged warnings that no other rule covers."""
    others = [(step, text) for step, text in run.warnings if not _EXPECTED.search(text)]
    if not others:
        return None
    return Finding(
        Severity.NOTE,
        f"The run logged {len(others)} warnings" if len(others) > 1 else "The run logged a warning",
        tuple(f"step {step:,}: {text}" for step, text in others[-3:]),
        "Training continued; each warning names what failed or was skipped.",
        (Remedy("Fix what the warnings name; the log shows when they occurred"),),
    )
