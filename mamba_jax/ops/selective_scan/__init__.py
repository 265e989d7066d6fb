"""The selective scan of Mamba behind one function."""

from mamba_jax.ops.selective_scan.api import (
    IMPLEMENTATIONS,
    choose,
    selective_scan,
    unsupported,
)

__all__ = ["IMPLEMENTATIONS", "choose", "selective_scan", "unsupported"]
