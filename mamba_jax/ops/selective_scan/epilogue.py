"""The prologue (bias, softplus) and epilogue (skip, gate) of a scan that does not fuse them.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# For ``jax.checkpoint``: the name of what an implementation's forward makes, y and the states at
# the chunks' starts. Where they are saved, the forward is not run again for the backward.
SAVEABLE = "selective_scan"


def compute_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns float32, or float64 where an array is: of Δ, the decays, the state and all sums."""
    return jnp.result_type(jnp.float32, *arrays)


def start_state(
    initial_state_ben: jax.Array | None, x_bte: jax.Array, A_en: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Returns the state before the first token (b, e, n) in ``dtype``: zeros unless given."""
    if initial_state_ben is None:
        return jnp.zeros((x_bte.shape[0], *A_en.shape), dtype)
    return initial_state_ben.astype(dtype)


def with_epilogue(core: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a core: bias and softplus before it, skip and gate after it.

    Args:
      core: called with (x, dt, A, B, C, initial state, resets or None, signed). dt is positive
        already; dt, A and the initial state have the dtype to compute in, and so have its results
        (y, final state); x, B and C may be narrower.

    Returns:
      A function with the signature of ``selective_scan`` but for ``implementation``, and with
      ``signed`` for ``eigenvalues``.
    """

    @functools.wraps(core, assigned=("__module__", "__name__", "__doc__"))
    def scan(
        x_bte,
        dt_bte,
        A_en,
        B_btn,
        C_btn,
        *,
        D_e=None,
        z_bte=None,
        dt_bias_e=None,
        dt_softplus=False,
        initial_state_ben=None,
        reset_bt=None,
        signed=False,
        interpret=False,  # there is no Pallas in here
    ):
        dtype = compute_dtype(x_bte, dt_bte, A_en, B_btn, C_btn)
        dt_bte, A_en = dt_bte.astype(dtype), A_en.astype(dtype)
        if dt_bias_e is not None:
            dt_bte += dt_bias_e.astype(dtype)
        if dt_softplus:
            dt_bte = jax.nn.softplus(dt_bte)
        state_ben = start_state(initial_state_ben, x_bte, A_en, dtype)
        y_bte, state_ben = core(x_bte, dt_bte, A_en, B_btn, C_btn, state_ben, reset_bt, signed)
        if D_e is not None:
            y_bte += D_e.astype(dtype) * x_bte.astype(dtype)
        if z_bte is not None:
            y_bte *= jax.nn.silu(z_bte.astype(dtype))
        return y_bte.astype(x_bte.dtype), state_ben

    return scan
