"""mamba_jax: a pure JAX/Flax trainer for Mamba and Hybrid Recursive Mamba language models."""

import sys
from types import TracebackType

__version__ = "0.1.0"


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Makes one line and status 130 of a Ctrl-C that comes before a command's ``main``."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


# ``python -m mamba_jax.<command>`` imports this first, and then what the command needs. Programs
# that only use the package keep their own hook.
if sys.argv[:1] == ["-m"] and any(word.startswith("mamba_jax") for word in sys.orig_argv):
    sys.excepthook = _interrupted
