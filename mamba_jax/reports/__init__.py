"""Reports on the sizes and on runs: what ``python -m mamba_jax.report`` prints and draws."""
