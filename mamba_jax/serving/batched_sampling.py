"""Sampling the next token of every slot, each with its own settings, in one compiled step.

The rule is that of ``generation.sampling``; here temperature, ``top_k`` and ``top_p`` are arrays.
Nothing is sorted: a slot keeps the tokens above a threshold, found bit by bit among the ordered
integers that float32 maps to. Equally likely tokens are therefore kept or dropped together.

Legend: b slots, v vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt


class BatchedSampling(NamedTuple):
    """How each slot samples its next token."""

    temperature_b: Float[Array, " b"]  # 0: greedy
    top_k_b: Int[Array, " b"]  # 0: no limit
    top_p_b: Float[Array, " b"]  # 1: no limit
    seed_b: UInt[Array, " b"]
    position_b: Int[
        Array, " b"
    ]  # tokens sampled so far; with the seed, the only source of randomness


def batch_sampling(requests: Sequence[Any], positions: Sequence[int]) -> BatchedSampling:
    """Collects the settings of each slot's request (None: a free slot), and its tokens so far."""

    def column(name: str, dtype: Any, idle: float) -> Any:
        return np.array([idle if one is None else getattr(one, name) for one in requests], dtype)

    return BatchedSampling(
        column("temperature", np.float32, 0.0),
        column("top_k", np.int32, 0),
        column("top_p", np.float32, 1.0),
        column("seed", np.uint32, 0),
        cast(Any, np.array(positions, np.int32)),
    )


def sample_batch(logits_bv: Float[Array, "b v"], sampling: BatchedSampling) -> Int[Array, " b"]:
    """Samples one token per slot, int32, independently of the other slots."""
    greedy_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, " b"]:
        keys_b = jax.vmap(
            lambda seed, position: jax.random.fold_in(jax.random.key(seed), position)
        )(sampling.seed_b, sampling.position_b)
        # Greedy slots are divided by a harmless number. The largest becomes 0 first: a tiny
        # temperature then cannot overflow to infinity.
        temperature_b = jnp.where(sampling.temperature_b > 0, sampling.temperature_b, 1.0)
        scaled_bv = (logits_bv - logits_bv.max(-1, keepdims=True)) / temperature_b[:, None]
        scaled_bv = _where_any(sampling.top_k_b > 0, _keep_top_k, scaled_bv, sampling.top_k_b)
        scaled_bv = _where_any(sampling.top_p_b < 1, _keep_top_p, scaled_bv, sampling.top_p_b)
        return jax.vmap(jax.random.categorical)(keys_b, scaled_bv).astype(jnp.int32)

    drawn_b = jax.lax.cond(jnp.any(sampling.temperature_b > 0), draw, lambda: greedy_b)
    return jnp.where(sampling.temperature_b > 0, drawn_b, greedy_b)


def _where_any(
    limited_b: Bool[Array, " b"], keep: Callable, scaled_bv: Float[Array, "b v"], limit_b: Array
) -> Float[Array, "b v"]:
    """Applies ``keep`` to the slots with a limit; costs nothing if there are none."""
    limited = lambda: jnp.where(limited_b[:, None], keep(scaled_bv, limit_b), scaled_bv)
    return jax.lax.cond(jnp.any(limited_b), limited, lambda: scaled_bv)


def _keep_top_k(scaled_bv: Float[Array, "b v"], top_k_b: Int[Array, " b"]) -> Float[Array, "b v"]:
    order_bv = _order(scaled_bv)
    reached = lambda least_b: (order_bv >= least_b[:, None]).sum(-1) >= top_k_b
    # Where k exceeds the vocabulary nothing is ever reached: the threshold stays 0.
    return jnp.where(order_bv >= _largest(reached, len(top_k_b))[:, None], scaled_bv, -jnp.inf)


def _keep_top_p(scaled_bv: Float[Array, "b v"], top_p_b: Float[Array, " b"]) -> Float[Array, "b v"]:
    order_bv = _order(scaled_bv)
    probability_bv = jax.nn.softmax(scaled_bv)

    def reached(limit_b: UInt[Array, " b"]) -> Bool[Array, " b"]:
        likelier_bv = order_bv > limit_b[:, None]
        return jnp.where(likelier_bv, probability_bv, 0.0).sum(-1) >= top_p_b

    # A token stays if the more likely ones hold less than top_p. Rounding may leave the sum of
    # all below top_p: the limit is then 0, and all stay.
    limit_b = _largest(reached, len(top_p_b))
    return jnp.where(order_bv > limit_b[:, None], scaled_bv, -jnp.inf)


def _order(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Returns uint32 in the order of float32, above 0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(reached: Callable, n_slots: int) -> UInt[Array, " b"]:
    """Returns the largest uint32 of each slot for which ``reached`` holds; 0 if there is none.

    ``reached`` must hold for all smaller ones as well.
    """

    def with_bit(i: Int[Array, ""], found_b: UInt[Array, " b"]) -> UInt[Array, " b"]:
        larger_b = found_b | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(reached(larger_b), larger_b, found_b)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros(n_slots, jnp.uint32))
