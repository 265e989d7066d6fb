"""Where the log of a run is."""

import os
import pathlib

# Set by launchers of background runs: the file to which they redirected standard output.
VARIABLE = "MAMBA_JAX_LOG"


def path(log_dir: str, name: str) -> pathlib.Path:
    """Returns the log file of a run; ``name`` includes the time."""
    return pathlib.Path(log_dir) / f"training_{name}.log"


def redirected() -> pathlib.Path | None:
    """Returns the log file that standard output is redirected to; None: it is not."""
    file = os.environ.get(VARIABLE, "")
    try:
        same = bool(file) and os.path.samestat(os.stat(file), os.fstat(1))
    except OSError:
        return None
    return pathlib.Path(file) if same else None


def environment(log: pathlib.Path) -> dict[str, str]:
    """Returns the variables for a run whose standard output is redirected to its log."""
    return {VARIABLE: str(log), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
