"""The selective scan as kernels for NVIDIA GPUs, written in Pallas for its Triton backend."""

from mamba_jax.ops.selective_scan.pallas_gpu.fused import scan, supports

__all__ = ["scan", "supports"]
