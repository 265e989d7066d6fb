"""From a prompt to text: sampling, chunked prefill, a compiled decoding loop, conversations."""

from mamba_jax.generation.conversation import Conversation
from mamba_jax.generation.ensemble import Model
from mamba_jax.generation.generate import check_settings, generate_text
from mamba_jax.generation.sampling import Sampling, sample

__all__ = ["Conversation", "Model", "Sampling", "check_settings", "generate_text", "sample"]
