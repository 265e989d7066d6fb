"""The selective scan, one token after another: the reference for every other implementation.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan.decay import decay
from mamba_jax.ops.selective_scan.epilogue import with_epilogue


@with_epilogue
def scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    initial_state_ben: Float[Array, "b e n"],
    reset_bt: Bool[Array, "b t"] | None,
    signed: bool,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """Runs ``advance`` over the tokens. Its gradient stores every state: O(B·L·D·N) memory.

    See ``epilogue.with_epilogue`` for the arguments.
    """

    def step(state_ben, token):
        x_be, dt_be, B_bn, C_bn, reset_b = token
        y_be, state_ben = advance(state_ben, x_be, dt_be, A_en, B_bn, C_bn, reset_b, signed)
        return state_ben, y_be

    tokens = (x_bte, dt_bte, B_btn, C_btn, reset_bt)
    time_first = [None if v is None else jnp.moveaxis(v, 1, 0) for v in tokens]
    final_state_ben, y_tbe = lax.scan(step, initial_state_ben, time_first)
    return jnp.moveaxis(y_tbe, 0, 1), final_state_ben


@with_epilogue
def one_token(x_bte, dt_bte, A_en, B_btn, C_btn, initial_state_ben, reset_bt, signed):
    """The scan of a single token (t = 1), without a loop: a decoding step of every implementation.

    See ``epilogue.with_epilogue`` for the arguments.
    """
    reset_b = None if reset_bt is None else reset_bt[:, 0]
    token = (x_bte[:, 0], dt_bte[:, 0], A_en, B_btn[:, 0], C_btn[:, 0])
    y_be, state_ben = advance(initial_state_ben, *token, reset_b, signed)
    return y_be[:, None], state_ben


def advance(
    state_ben: Float[Array, "b e n"],
    x_be: Float[Array, "b e"],
    dt_be: Float[Array, "b e"],
    A_en: Float[Array, "e n"],
    B_bn: Float[Array, "b n"],
    C_bn: Float[Array, "b n"],
    reset_b: Bool[Array, "b"] | None,
    signed: bool,
) -> tuple[Float[Array, "b e"], Float[Array, "b e n"]]:
    """One token: h ← a h + (dt x) B, y = C·h, with h ← 0 before it where reset.

    Returns:
      y_be and the new state, in the dtype of the old one.
    """
    x_be, B_bn, C_bn = (v.astype(state_ben.dtype) for v in (x_be, B_bn, C_bn))
    if reset_b is not None:
        state_ben = jnp.where(reset_b[:, None, None], 0, state_ben)
    decay_ben = decay(jnp.exp(dt_be[:, :, None] * A_en), signed)
    state_ben = decay_ben * state_ben + (dt_be * x_be)[:, :, None] * B_bn[:, None, :]
    # A dot, not a sum: XLA's CPU backend may make a sum in a loop a library call of 70 µs. And
    # "highest": a dot of float32 arrays is otherwise rounded to TF32 or bfloat16 on GPU and TPU.
    return jnp.einsum("ben,bn->be", state_ben, C_bn, precision="highest"), state_ben
