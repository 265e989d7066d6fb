"""``lax.dot_general`` on rows: one axis for all the tokens, whatever their batch and time axes.

The gradient of a kernel contracts batch and time. XLA's CPU backend contracts a single axis in
place, but copies both factors to bring two axes together.
"""

from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float


def dot_by_rows(
    x: Float[Array, "*tokens d"],
    kernel: Float[Array, "d *columns"],
    dimension_numbers: Any = None,
    *args: Any,
    **options: Any,
) -> jax.Array:
    """Contracts x's last axis with the kernel's first; ``dot_general`` of a Flax layer that does.

    Returns (*tokens, *columns).

    Args:
      x: the input.
      kernel: the weights.
      dimension_numbers: what the layer requests, which is this.
      args, options: the others of ``lax.dot_general``.
    """
    last = x.ndim - 1
    assert dimension_numbers in (None, (((last,), (0,)), ((), ()))), dimension_numbers
    rows = x.reshape(-1, x.shape[-1])
    y = lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), *args, **options)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])
