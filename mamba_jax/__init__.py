"""mamba_jax: a pure JAX/Flax trainer for Mamba and Hybrid Recursive Mamba language models."""

__version__ = "0.1.0"
