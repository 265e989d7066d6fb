"""The selective scan of Mamba behind one function."""

from mamba_jax.ops.selective_scan.api import IMPLEMENTATIONS, selective_scan

__all__ = ["IMPLEMENTATIONS", "selective_scan"]
