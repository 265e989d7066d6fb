"""Gradient accumulation as a function wrapper."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (params, batch, key or None) -> ((loss, (target tokens, aux)), gradients)
LossAndGradients = Callable[[Any, Any, Any], tuple[tuple[jax.Array, tuple[jax.Array, Any]], Any]]


def accumulate(sums_and_gradients: LossAndGradients, microbatches: int) -> LossAndGradients:
    """Turns sums over a microbatch into means per target token over a batch of several.

    Losses, token counts and gradients are summed over the microbatches and divided once, at the
    end, by the tokens of all. The result equals that of the whole batch, up to rounding, however
    unevenly the target tokens are spread; a mean of the microbatches' means would not. Only one
    microbatch's activations exist at a time; ``microbatches`` = 1 costs nothing.

    Args:
      sums_and_gradients: returns ((sum of losses, (number of target tokens, aux)), gradients of the
        sum), all float32, as ``jax.value_and_grad(…, has_aux=True)`` does. aux is a tree of means
        over positions.
      microbatches: into how many parts the leading axis of every array of a batch is cut.

    Returns:
      A function of the same form: ((mean loss, (number of target tokens, mean of the aux)),
      gradients of the mean loss). Microbatch i gets ``fold_in(key, i)``. It raises ValueError if
      ``microbatches`` does not divide the batch.

    Source: the idea of levanter's ``grad_accum.py``, as a plain scan.
    """

    def split(array: jax.Array) -> jax.Array:
        if array.shape[0] % microbatches:
            raise ValueError(f"{microbatches} microbatches do not divide a batch {array.shape}")
        # Rows i, i + m, i + 2m … make microbatch i of m: where the batch is divided over devices
        # in runs of rows, each device then has its share of every microbatch already.
        return array.reshape(-1, microbatches, *array.shape[1:]).swapaxes(0, 1)

    def means_and_gradients(params: Any, batch: Any, key: jax.Array | None) -> Any:
        def add(sums: Any, microbatch_and_index: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            microbatch, index = microbatch_and_index
            own_key = None if key is None else jax.random.fold_in(key, index)
            (loss, (tokens, aux)), gradients = sums_and_gradients(params, microbatch, own_key)
            return jax.tree.map(jnp.add, sums, (loss, tokens, gradients)), aux

        zero = jnp.zeros((), jnp.float32)
        nothing = (zero, zero, jax.tree.map(jnp.zeros_like, params))
        parts = (jax.tree.map(split, batch), jnp.arange(microbatches))
        (loss, tokens, gradients), aux = jax.lax.scan(add, nothing, parts)
        tokens = jnp.maximum(
            tokens, 1.0
        )  # the loss mask may exclude a whole batch: nothing to divide
        gradients = jax.tree.map(lambda leaf: leaf / tokens, gradients)
        aux = jax.tree.map(lambda leaf: leaf.mean(axis=0), aux)
        return (loss / tokens, (tokens, aux)), gradients

    return means_and_gradients
