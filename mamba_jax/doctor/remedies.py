"""What can be done, as commands and flags of this project; several rules share them."""

import math
import shlex

from mamba_jax.checkpoints.folder import list_checkpoints
from mamba_jax.doctor.finding import Remedy
from mamba_jax.doctor.signals import RunSignals

# The presets have 1e-4 to 5e-4; a factor of 5 beyond at either side is out of the usual.
RATE_LOW, RATE_USUAL, RATE_HIGH = 2e-5, 3e-4, 2.5e-3


def resume(run: RunSignals, *flags: str, before: int | None = None) -> str:
    """Returns the command that goes on from a checkpoint of the run with other settings.

    Args:
      run: that is to go on.
      flags: what to change.
      before: take the newest checkpoint up to this step; None: of all.

    Returns:
      The flags alone where there is nothing to go on from: no checkpoint yet, or a complete run.
    """
    end = run.config.training.max_steps if run.config is not None else math.inf
    checkpoints = [(step, path) for step, path in list_checkpoints(run.folder)]
    newest = max(checkpoints, default=(0, None))
    fitting = [each for each in checkpoints if before is None or each[0] <= before]
    step, path = max(fitting, default=(0, None))
    if path is None or step >= end:
        return " ".join(flags)
    start = run.folder if step == newest[0] else path
    return " ".join(("python -m mamba_jax.train --resume", shlex.quote(str(start)), *flags))


def rate_flag(rate: float) -> str:
    """Returns the flag for a learning rate, rounded down to one digit."""
    size = 10.0 ** math.floor(math.log10(rate))
    # 3e-4 / 1e-4 is 2.9999999999999996: rounding up a hair keeps the 3.
    return f"--config.training.learning_rate={math.floor(rate / size * (1 + 1e-9)) * size:g}"


def lower_rate(run: RunSignals, most: float | None = None, before: int | None = None) -> Remedy:
    """A third of the learning rate, or what is usual; ``most`` if that is less.

    Args:
      run: that has too high a rate.
      most: a learning rate at which all was well; None: not known.
      before: go back to a checkpoint up to this step; None: to the newest.
    """
    rate = run.peak_rate / 3 if run.peak_rate < RATE_HIGH else RATE_USUAL
    if most is not None and 0 < most < rate:
        rate = most
    return Remedy(
        f"Lower the learning rate (so far up to {run.peak_rate:.2g})",
        resume(run, rate_flag(rate), before=before) if rate > 0 else "",
    )


def longer_warm_up(run: RunSignals) -> Remedy:
    """More steps at a small learning rate; for a run from the beginning."""
    steps = max(2 * run.warm_step, 100)
    return Remedy(
        "Or begin with a longer warm-up, in a new run",
        f"--config.training.warmup_steps={steps}",
    )


def skip_spikes(run: RunSignals) -> Remedy:
    """Leave out the steps whose gradient is far from what is usual; more of them than so far."""
    now = run.config.training.skip_spikes if run.config is not None else 0.0
    factor = max(2.0, now / 2) if 0 < now <= 5 else 5.0
    return Remedy(
        f"Skip steps whose gradient norm exceeds {factor:g} times its running mean",
        resume(run, f"--config.training.skip_spikes={factor:g}"),
    )


def more_memory_free(run: RunSignals) -> Remedy:
    """A larger safety margin."""
    now = run.config.vram.safety_margin_mb if run.config is not None else 2048
    return Remedy(
        "Leave more free: the microbatch becomes smaller, the effective batch stays",
        resume(run, f"--vram_safety_margin {now + 1024}"),
    )


def look_at_data(run: RunSignals) -> Remedy:
    """What a run reads."""
    logs = run.config.log_dir if run.config is not None else "logs"
    return Remedy(
        f"Look at the data: the top of the run's log (in {logs}/) says which files were read, how "
        "many tokens they hold and what was skipped; another source is given by a flag",
        "--data_dir PATH",
    )
