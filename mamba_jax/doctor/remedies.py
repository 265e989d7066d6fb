"""Remedies that several rules share, as commands and flags of this project."""

import math
import shlex

from mamba_jax.checkpoints.folder import list_checkpoints
from mamba_jax.doctor.finding import Remedy
from mamba_jax.doctor.signals import RunSignals

# The presets use 1e-4 to 5e-4; more than a factor of 5 outside that range is unusual.
RATE_LOW, RATE_USUAL, RATE_HIGH = 2e-5, 3e-4, 2.5e-3


def resume(run: RunSignals, *flags: str, before: int | None = None) -> str:
    """Returns the command that resumes from a checkpoint of the run with other settings.

    Args:
      run: to resume.
      flags: what to change.
      before: use the newest checkpoint up to this step; None: the newest of all.

    Returns:
      Only the flags if nothing can be resumed: there is no checkpoint yet, or the run is complete.
    """
    end = run.config.training.max_steps if run.config is not None else math.inf
    checkpoints = [(step, path) for step, path in list_checkpoints(run.folder)]
    newest = max(checkpoints, default=(0, None))
    fitting = [each for each in checkpoints if before is None or each[0] <= before]
    step, path = max(fitting, default=(0, None))
    if path is None or step >= end:
        return " ".join(flags)
    start = run.folder if step == newest[0] else path
    return " ".join(("mamba-jax train --resume", shlex.quote(str(start)), *flags))


def rate_flag(rate: float) -> str:
    """Returns the flag for a learning rate, rounded down to one digit."""
    size = 10.0 ** math.floor(math.log10(rate))
    # 3e-4 / 1e-4 is 2.9999999999999996: the small factor keeps the 3.
    return f"--config.training.learning_rate={math.floor(rate / size * (1 + 1e-9)) * size:g}"


def lower_rate(run: RunSignals, most: float | None = None, before: int | None = None) -> Remedy:
    """Advises a third of the learning rate, or the usual one; ``most`` if that is lower.

    Args:
      run: whose rate is too high.
      most: a learning rate at which training was healthy; None: unknown.
      before: resume from a checkpoint up to this step; None: from the newest.
    """
    rate = run.peak_rate / 3 if run.peak_rate < RATE_HIGH else RATE_USUAL
    if most is not None and 0 < most < rate:
        rate = most
    return Remedy(
        f"Lower the learning rate (so far up to {run.peak_rate:.2g})",
        resume(run, rate_flag(rate), before=before) if rate > 0 else "",
    )


def longer_warm_up(run: RunSignals) -> Remedy:
    """Advises more steps at a low learning rate, which only a new run can have."""
    steps = max(2 * run.warm_step, 100)
    return Remedy(
        "Or start a new run with a longer warm-up",
        f"--config.training.warmup_steps={steps}",
    )


def skip_spikes(run: RunSignals) -> Remedy:
    """Advises to skip steps with unusual gradients, and more of them than so far."""
    now = run.config.training.skip_spikes if run.config is not None else 0.0
    factor = max(2.0, now / 2) if 0 < now <= 5 else 5.0
    return Remedy(
        f"Skip steps whose gradient norm exceeds {factor:g} times its running mean",
        resume(run, f"--config.training.skip_spikes={factor:g}"),
    )


def more_memory_free(run: RunSignals) -> Remedy:
    """Advises a larger safety margin."""
    now = run.config.vram.safety_margin_mb if run.config is not None else 2048
    return Remedy(
        "Keep more memory free: the microbatch shrinks, the effective batch stays the same",
        resume(run, f"--vram_safety_margin {now + 1024}"),
    )


def look_at_data(run: RunSignals) -> Remedy:
    """Advises to check what the run trains on."""
    logs = run.config.log_dir if run.config is not None else "logs"
    return Remedy(
        f"Check the data: the start of the run's log (in {logs}/) lists the files, their tokens "
        "and what was skipped. To train on other data",
        "--data_dir PATH",
    )
