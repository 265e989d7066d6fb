"""Choosing the next token from its logits.

Legend: b batch, v vocabulary, c candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mamba_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Hashable, so that each choice is compiled to its own code.

    Raises:
      UserError: if a value cannot work.
    """

    temperature: float = 1.0  # divides the logits; 0: always the most likely token
    top_k: int = 0  # keep only this many of the most likely tokens; 0: all
    top_p: float = 1.0  # then keep the fewest of them that together have this probability

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature={self.temperature} must be a finite number ≥ 0 (0: no randomness)"
            )
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative (0: no limit)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (1: no limit)")


def sample(
    logits_bv: Float[Array, "b v"], keys_b: PRNGKeyArray, sampling: Sampling
) -> Int[Array, " b"]:
    """Draws one token per row, each with its own key.

    The order is the usual one: temperature, then ``top_k``, then ``top_p`` on what is left,
    renormalised: a token stays if the more likely ones together have less than ``top_p``.

    Args:
      logits_bv: float32.
      keys_b: typed keys (b,). A row's token depends on its own key and logits alone.
      sampling: static under jit.

    Returns:
      Token ids, int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    # The largest becomes 0 first: a tiny temperature then cannot overflow to infinity.
    logits_bv = (logits_bv - logits_bv.max(-1, keepdims=True)) / sampling.temperature
    draw = jax.vmap(jax.random.categorical)
    n_candidates = min(sampling.top_k or logits_bv.shape[-1], logits_bv.shape[-1])
    if n_candidates == logits_bv.shape[-1] and sampling.top_p == 1:
        return draw(keys_b, logits_bv).astype(jnp.int32)
    logits_bc, tokens_bc = jax.lax.top_k(logits_bv, n_candidates)
    if sampling.top_p < 1:
        probabilities_bc = jax.nn.softmax(logits_bc)
        likelier_bc = jnp.cumsum(probabilities_bc, axis=-1) - probabilities_bc
        logits_bc = jnp.where(likelier_bc < sampling.top_p, logits_bc, -jnp.inf)
    choice_b = draw(keys_b, logits_bc)
    return jnp.take_along_axis(tokens_bc, choice_b[:, None], axis=-1)[:, 0].astype(jnp.int32)
