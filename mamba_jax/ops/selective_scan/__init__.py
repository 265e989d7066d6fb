"""The selective scan of Mamba behind one function."""

from mamba_jax.ops.selective_scan.api import (
    IMPLEMENTATIONS,
    choose,
    selective_scan,
    unsupported,
)
from mamba_jax.ops.selective_scan.epilogue import SAVEABLE

__all__ = ["IMPLEMENTATIONS", "SAVEABLE", "choose", "selective_scan", "unsupported"]
