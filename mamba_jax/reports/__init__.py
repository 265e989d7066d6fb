"""Reports on sizes and runs: what ``mamba-jax report`` prints and draws."""
