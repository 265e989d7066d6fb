"""The selective scan for GPU and TPU through XLA: parallel within a chunk, chunk after chunk.

Within a chunk the recurrence h_t = a_t h_{t-1} + u_t is an associative scan over pairs (a, u).
Each chunk is made again in the backward (`jax.checkpoint`), so that a gradient keeps the inputs and
one state per chunk, O(B·L·D), beside one chunk's worth of states: the full associative scan would
keep all B·L·D·N of them, several times over.

Shapes: b batch, t time, e d_inner, n d_state, c chunk length, k chunks.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

CHUNK_TOKENS = 64


def scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    initial_state_ben: Float[Array, "b e n"],
    reset_bt: Bool[Array, "b t"] | None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """See ``reference.scan``: the same contract and, to rounding, the same results."""
    b, t, e = x_bte.shape
    k = -(-t // CHUNK_TOKENS)
    c = -(-t // k)  # chunks of equal length: 65 tokens are 2 × 33, not 2 × 64

    def split(v):  # (b, t, ·) -> (k, b, c, ·). A padded token has dt = 0: it leaves the state be.
        v = jnp.pad(v, [(0, 0), (0, k * c - t)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(b, k, c, *v.shape[2:]), 1, 0)

    def one_chunk(state_ben, inputs):
        x_bce, dt_bce, B_bcn, C_bcn, reset_bc = inputs
        x_bce, B_bcn, C_bcn = (v.astype(state_ben.dtype) for v in (x_bce, B_bcn, C_bcn))
        decay_bcen = jnp.exp(dt_bce[..., None] * A_en)
        if reset_bc is not None:
            decay_bcen = jnp.where(reset_bc[:, :, None, None], 0, decay_bcen)
        u_bcen = (dt_bce * x_bce)[..., None] * B_bcn[:, :, None, :]
        u_bcen = u_bcen.at[:, 0].add(decay_bcen[:, 0] * state_ben)
        _, state_bcen = lax.associative_scan(_then, (decay_bcen, u_bcen), axis=1)
        # A sum, not a dot, which would be rounded to TF32 or bfloat16 on GPU and TPU.
        y_bce = (state_bcen * C_bcn[:, :, None, :]).sum(-1)
        return state_bcen[:, -1], y_bce

    inputs = jax.tree.map(split, (x_bte, dt_bte, B_btn, C_btn, reset_bt))
    # prevent_cse guards against what cannot happen inside a scan, and costs speed.
    final_state_ben, y_kbce = lax.scan(
        jax.checkpoint(one_chunk, prevent_cse=False), initial_state_ben, inputs
    )
    return jnp.moveaxis(y_kbce, 0, 1).reshape(b, k * c, e)[:, :t], final_state_ben


def _then(first, second):
    """Composes two affine maps h → a h + u."""
    a_first, u_first = first
    a_second, u_second = second
    return a_first * a_second, a_second * u_first + u_second
