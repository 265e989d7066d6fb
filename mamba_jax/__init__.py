"""mamba_jax: a pure JAX/Flax trainer for Mamba and Hybrid Recursive Mamba language models.

The names in ``__all__`` are the public interface; everything else may change in 0.x. They are
imported when first used, so that ``mamba-jax --help`` starts without JAX.
"""

import importlib
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mamba_jax import train as train
    from mamba_jax.config import default_config as default_config
    from mamba_jax.config import preset_config as preset_config
    from mamba_jax.generation.loaded import LoadedModel as LoadedModel
    from mamba_jax.generation.loaded import load_model as load_model
    from mamba_jax.ops.selective_scan import selective_scan as selective_scan

__version__ = "0.1.0"
__all__ = [
    "LoadedModel",
    "default_config",
    "load_model",
    "preset_config",
    "selective_scan",
    "train",
]

_MODULE_OF = {
    "LoadedModel": "mamba_jax.generation.loaded",
    "default_config": "mamba_jax.config",
    "load_model": "mamba_jax.generation.loaded",
    "preset_config": "mamba_jax.config",
    "selective_scan": "mamba_jax.ops.selective_scan",
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the command's module, which is callable: see mamba_jax/train.py
        return importlib.import_module("mamba_jax.train")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Turns a Ctrl-C into one line and status 130 if it arrives before a command's ``main``."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


# ``python -m mamba_jax.<command>`` imports this first, and then what the command needs. Programs
# that only use the package keep their own hook.
if sys.argv[:1] == ["-m"] and any(word.startswith("mamba_jax") for word in sys.orig_argv):
    sys.excepthook = _interrupted
