"""The selective scan for CPU: sequential in time, with a hand-written adjoint.

On a CPU core an associative scan makes log(c) extra passes over the states, autodiff of `lax.scan`
stores every state and reads it back, and an XLA `reduce` inside a time loop may become a library
call of 70 µs. Hence one small step per iteration, with the states laid out (b, n, e), e in the
vector lanes; sums over n or e are dots or trees of additions, never `reduce`; and only the state at
each chunk's start is kept, the others are recomputed in the backward: O(B·L·D) memory.

The adjoint, with g_t the gradient of the state h_t by all that comes after (and y_t):
  g_t = C_t dy_t + a_{t+1} g_{t+1},   q_t = g_t a'_t h_{t-1}  (of the exponent dt_t A)
  dC_t = h_t·dy_t,   dB_t = g_t·(dt_t x_t),   d(dt x)_t = g_t·B_t,   dA = Σ q_t dt_t
with a_t the decay and a'_t its slope (see ``decay``). A reset at t makes both zero.

Shapes: b batch, t time, e d_inner, n d_state, c chunk length, k chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan.decay import adjoint, decay
from mamba_jax.ops.selective_scan.epilogue import SAVEABLE, with_epilogue

CHUNK_TOKENS = 32  # 16 to 64 are equally fast


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
    """See ``epilogue.with_epilogue``."""
    b, t, e = x_bte.shape
    k = -(-t // CHUNK_TOKENS)
    c = -(-t // k)  # chunks of equal length: 33 tokens are 2 × 17, not 2 × 32

    def split(
        v,
    ):  # (b, t, ·) -> (k, c, b, ·). A padded token has dt = 0, which leaves the state unchanged.
        v = jnp.pad(v, [(0, 0), (0, k * c - t)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v, 1, 0).reshape(k, c, b, *v.shape[2:])

    inputs = jax.tree.map(split, (x_bte, dt_bte, B_btn, C_btn, reset_bt))
    initial_bne = jnp.swapaxes(initial_state_ben, 1, 2)
    results: tuple[jax.Array, jax.Array] = _scan(signed, A_en.T, initial_bne, *inputs)
    y_kcbe, final_bne = results
    y_bte = jnp.moveaxis(y_kcbe.reshape(k * c, b, e)[:t], 0, 1)
    return y_bte, jnp.swapaxes(final_bne, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    signed, A_ne, initial_bne, x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb
) -> tuple[jax.Array, jax.Array]:
    return _forward(signed, A_ne, initial_bne, x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb)[0]


def _forward(signed, A_ne, initial_bne, x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb):
    def step(h_bne, token):
        x_be, dt_be, B_bn, C_bn, reset_b = token
        h_bne = _advance(h_bne, A_ne, x_be, dt_be, B_bn, reset_b, signed)
        return h_bne, _dot("bne,bn->be", h_bne, C_bn.astype(h_bne.dtype))

    def one_chunk(start_bne, inputs):
        end_bne, y_cbe = lax.scan(step, start_bne, inputs)
        return end_bne, (y_cbe, start_bne)

    inputs = (x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb)
    final_bne, (y_kcbe, start_kbne) = lax.scan(one_chunk, initial_bne, inputs)
    y_kcbe, start_kbne = checkpoint_name((y_kcbe, start_kbne), SAVEABLE)
    return (y_kcbe, final_bne), (A_ne, start_kbne, *inputs)


def _backward(signed, saved, cotangents):
    A_ne, start_kbne, x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb = saved
    dy_kcbe, dfinal_bne = cotangents

    def redo(h_bne, token):
        x_be, dt_be, B_bn, reset_b = token
        return _advance(h_bne, A_ne, x_be, dt_be, B_bn, reset_b, signed), h_bne

    def step_back(carry, token):
        g_bne, dA_bne, h_bne = carry
        x_be, dt_be, B_bn, C_bn, reset_b, dy_be, previous_bne = token
        x_be, B_bn, C_bn = (v.astype(h_bne.dtype) for v in (x_be, B_bn, C_bn))
        dC_bn = _dot("bne,be->bn", h_bne, dy_be)
        g_bne = g_bne + dy_be[:, None, :] * C_bn[:, :, None]
        du_be = _dot("bne,bn->be", g_bne, B_bn)
        dB_bn = _dot("bne,be->bn", g_bne, dt_be * x_be)
        by_state_bne, by_exponent_bne = adjoint(g_bne, _power(A_ne, dt_be), signed)
        g_bne = _drop(by_state_bne, reset_b)
        q_bne = _drop(by_exponent_bne, reset_b) * previous_bne
        dA_bne = dA_bne + q_bne * dt_be[:, None, :]  # summed over b after the loop
        ddt_be = _sum_states(q_bne * A_ne) + du_be * x_be
        return (g_bne, dA_bne, previous_bne), (du_be * dt_be, ddt_be, dB_bn, dC_bn)

    def one_chunk(carry, inputs):
        x_cbe, dt_cbe, B_cbn, C_cbn, reset_cb, dy_cbe, start_bne = inputs
        end_bne, previous_cbne = lax.scan(redo, start_bne, (x_cbe, dt_cbe, B_cbn, reset_cb))
        tokens = (x_cbe, dt_cbe, B_cbn, C_cbn, reset_cb, dy_cbe, previous_cbne)
        (g_bne, dA_bne, _), out = lax.scan(step_back, (*carry, end_bne), tokens, reverse=True)
        return (g_bne, dA_bne), out

    (dinitial_bne, dA_bne), (dx_kcbe, ddt_kcbe, dB_kcbn, dC_kcbn) = lax.scan(
        one_chunk,
        (dfinal_bne, jnp.zeros_like(dfinal_bne)),
        (x_kcbe, dt_kcbe, B_kcbn, C_kcbn, reset_kcb, dy_kcbe, start_kbne),
        reverse=True,
    )
    return (
        dA_bne.sum(0),
        dinitial_bne,
        dx_kcbe.astype(x_kcbe.dtype),
        ddt_kcbe,
        dB_kcbn.astype(B_kcbn.dtype),
        dC_kcbn.astype(C_kcbn.dtype),
        None,  # resets are boolean: they have no gradient
    )


_scan.defvjp(_forward, _backward)


def _advance(h_bne, A_ne, x_be, dt_be, B_bn, reset_b, signed):
    u_be = dt_be * x_be.astype(h_bne.dtype)
    added_bne = u_be[:, None, :] * B_bn.astype(h_bne.dtype)[:, :, None]
    return decay(_power(A_ne, dt_be), signed) * _drop(h_bne, reset_b) + added_bne


def _power(A_ne, dt_be):
    return jnp.exp(dt_be[:, None, :] * A_ne)


def _drop(v_bne, reset_b):
    return v_bne if reset_b is None else jnp.where(reset_b[:, None, None], 0, v_bne)


def _dot(subscripts, first, second):
    # "highest": a dot of float32 arrays is otherwise rounded to TF32 or bfloat16 on GPU and TPU.
    return jnp.einsum(subscripts, first, second, precision="highest")


def _sum_states(v_bne):
    """Sums over n by halving: additions that XLA fuses into the loop's body."""
    while v_bne.shape[1] > 1:
        half = v_bne.shape[1] // 2
        odd_bne = v_bne[:, 2 * half :]
        v_bne = v_bne[:, :half] + v_bne[:, half : 2 * half]
        if odd_bne.shape[1]:
            v_bne = v_bne.at[:, :1].add(odd_bne)
    return v_bne[:, 0]
