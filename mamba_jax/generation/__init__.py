"""From a prompt to text: sampling, prefill in pieces, and a compiled decoding loop."""

from mamba_jax.generation.generate import check_settings, generate_text
from mamba_jax.generation.sampling import Sampling, sample

__all__ = ["Sampling", "check_settings", "generate_text", "sample"]
