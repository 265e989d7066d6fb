"""The selective scan for GPU and TPU through XLA: parallel within a chunk, chunk after chunk.

Within a chunk the recurrence is an associative scan over pairs (a, u). Bias, softplus, skip and
gate happen inside the chunk as well, and chunks are sliced from the arrays in place: besides
inputs and outputs, a forward needs only one chunk's states. The gradient keeps the inputs and the
state at each chunk's start, recomputes the others, and finds the adjoint by a second associative
scan, backwards in time: O(B·L·D) memory.

The adjoint, with s_t = C_t·h_t + D x_t, y_t = s_t silu(z_t), and g_t the gradient of the state h_t
by all that comes after (and y_t):
  ds_t = dy_t silu(z_t),   dz_t = dy_t s_t silu'(z_t),   dD = Σ ds_t x_t
  g_t = C_t ds_t + a_{t+1} g_{t+1},   q_t = g_t a'_t h_{t-1}  (of the exponent Δ_t A)
  dC_t = h_t·ds_t,   dB_t = g_t·(Δ_t x_t),   dΔ_t = q_t·A + (g_t·B_t) x_t,   dA = Σ q_t Δ_t
with a_t the decay and a'_t its slope (see ``decay``). A reset at t makes both zero.

Shapes: b batch, t time, e d_inner, n d_state, c chunk length, k chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mamba_jax.ops.selective_scan.associative import then
from mamba_jax.ops.selective_scan.decay import adjoint, decay
from mamba_jax.ops.selective_scan.epilogue import SAVEABLE, compute_dtype, start_state

CHUNK_TOKENS = 64  # 32 and 128 need 0.7 and 1.8 times the memory, for twice and half the launches


def scan(
    x_bte: Float[Array, "b t e"],
    dt_bte: Float[Array, "b t e"],
    A_en: Float[Array, "e n"],
    B_btn: Float[Array, "b t n"],
    C_btn: Float[Array, "b t n"],
    *,
    D_e: Float[Array, "e"] | None = None,
    z_bte: Float[Array, "b t e"] | None = None,
    dt_bias_e: Float[Array, "e"] | None = None,
    dt_softplus: bool = False,
    initial_state_ben: Float[Array, "b e n"] | None = None,
    reset_bt: Bool[Array, "b t"] | None = None,
    signed: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "b t e"], Float[Array, "b e n"]]:
    """See ``selective_scan``."""
    del interpret  # there is no Pallas in here
    dtype = compute_dtype(x_bte, dt_bte, A_en, B_btn, C_btn)
    state_ben = start_state(initial_state_ben, x_bte, A_en, dtype)
    c, weights, tokens = prepare(
        (x_bte, dt_bte, z_bte, B_btn, C_btn, reset_bt), (A_en, D_e, dt_bias_e), dtype
    )
    t = x_bte.shape[1]
    results: tuple[jax.Array, jax.Array] = _scan(
        c, t, dt_softplus, signed, weights, state_ben, tokens
    )
    y_bte, final_ben = results
    return y_bte[:, :t], final_ben


def prepare(tokens, weights, dtype):
    """Chooses the length of a chunk, pads the tokens to whole chunks and widens the weights.

    Returns:
      c, weights and tokens as ``forward`` takes them.
    """
    b, t, _ = tokens[0].shape
    k = -(-t // CHUNK_TOKENS)
    c = -(-t // k)  # chunks of equal length: 65 tokens are 2 × 33, not 2 × 64

    def per_row(v):  # so that a gradient is summed over the rows (and devices) once, at the end
        return jnp.broadcast_to(v.astype(dtype), (b, *v.shape))

    def pad(v):
        return jnp.pad(v, [(0, 0), (0, k * c - t)] + [(0, 0)] * (v.ndim - 2))

    return c, jax.tree.map(per_row, weights), jax.tree.map(pad, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _scan(c, t, dt_softplus, signed, weights, initial_ben, tokens) -> tuple[jax.Array, jax.Array]:
    return forward(c, t, dt_softplus, signed, weights, initial_ben, tokens)[0]


def forward(c, t, dt_softplus, signed, weights, initial_ben, tokens):
    """Runs chunk after chunk.

    Args:
      c: the length of a chunk; divides the number of tokens.
      t: tokens that count: later ones are padding, which leaves the state as it is.
      dt_softplus: as in ``selective_scan``.
      signed: as in ``decay``.
      weights: A_ben, D_be and dt_bias_be, of each row, in the dtype to compute in; the last two may
        be None.
      initial_ben: the state before the first token, in that dtype.
      tokens: x, dt, z, B, C and resets, of any dtypes; z and resets may be None.

    Returns:
      (y, final state), and what ``backward`` needs.
    """
    A_ben, D_be, _ = weights

    def one_chunk(carry, start):
        state_ben, y_bte = carry
        chunk = _cut(tokens, start, c)
        dt_bce, _, _, decay_bcen = _steps(chunk, weights, start, t, dt_softplus, signed)
        x_bce, z_bce, B_bcn, C_bcn = _widen(chunk, A_ben.dtype)
        state_bcen = _states(decay_bcen, dt_bce * x_bce, B_bcn, state_ben)
        y_bce = _read(state_bcen, C_bcn, D_be, x_bce)
        if z_bce is not None:
            y_bce *= jax.nn.silu(z_bce)
        return (state_bcen[:, -1], _put(y_bte, y_bce, start)), state_ben

    y_bte = jnp.zeros_like(tokens[0])
    starts_k = jnp.arange(0, y_bte.shape[1], c)
    (final_ben, y_bte), start_kben = lax.scan(one_chunk, (initial_ben, y_bte), starts_k)
    return (y_bte, final_ben), (weights, start_kben, tokens)


def backward(c, t, dt_softplus, signed, saved, cotangents):
    """Returns the gradients by weights, initial state and tokens, from the last chunk to the first.

    Args:
      c, t, dt_softplus, signed: as in ``forward``.
      saved: the weights, the state at each chunk's start (k, b, e, n), and the tokens.
      cotangents: of y and of the final state.
    """
    weights, start_kben, tokens = saved
    dy_bte, dfinal_ben = cotangents
    A_ben, D_be, dt_bias_be = weights

    def one_chunk(carry, inputs):
        g_ben, dweights, dtokens = carry
        start, state_ben = inputs
        chunk = _cut(tokens, start, c)
        steps = _steps(chunk, weights, start, t, dt_softplus, signed)
        dt_bce, slope_bce, power_bcen, decay_bcen = steps
        x_bce, z_bce, B_bcn, C_bcn = _widen(chunk, A_ben.dtype)
        state_bcen = _states(decay_bcen, dt_bce * x_bce, B_bcn, state_ben)

        # Back through the gate and the skip.
        ds_bce, dz_bce = _cut(dy_bte, start, c).astype(A_ben.dtype), None
        if z_bce is not None:
            sigmoid_bce = jax.nn.sigmoid(z_bce)
            silu_bce = z_bce * sigmoid_bce
            s_bce = _read(state_bcen, C_bcn, D_be, x_bce)
            dz_bce = ds_bce * s_bce * (sigmoid_bce + silu_bce * (1 - sigmoid_bce))
            ds_bce *= silu_bce

        # Back through time: g_t = (C_t ds_t) + decay_{t+1} g_{t+1}, the last one given by g_ben.
        later_bcen = jnp.concatenate([decay_bcen[:, 1:], jnp.ones_like(decay_bcen[:, :1])], 1)
        v_bcen = ds_bce[..., None] * C_bcn[:, :, None, :]
        v_bcen = v_bcen.at[:, -1].add(g_ben)
        _, g_bcen = lax.associative_scan(then, (later_bcen, v_bcen), axis=1, reverse=True)
        g_ben = decay_bcen[:, 0] * g_bcen[:, 0]

        before_bcen = jnp.concatenate([state_ben[:, None], state_bcen[:, :-1]], 1)
        q_bcen = adjoint(g_bcen, power_bcen, signed)[1] * before_bcen
        du_bce = (g_bcen * B_bcn[:, :, None, :]).sum(-1)
        ddt_bce = (q_bcen * A_ben[:, None]).sum(-1) + du_bce * x_bce
        ddt_bce *= slope_bce
        dx_bce = du_bce * dt_bce
        dB_bcn = (g_bcen * (dt_bce * x_bce)[..., None]).sum(2)
        dC_bcn = (state_bcen * ds_bce[..., None]).sum(2)
        dA_ben = (q_bcen * dt_bce[..., None]).sum(1)
        dD_be = None
        if D_be is not None:
            dx_bce += ds_bce * D_be[:, None]
            dD_be = (ds_bce * x_bce).sum(1)
        dbias_be = None if dt_bias_be is None else ddt_bce.sum(1)

        dweights = jax.tree.map(jnp.add, dweights, (dA_ben, dD_be, dbias_be))
        dchunk = (dx_bce, ddt_bce, dz_bce, dB_bcn, dC_bcn)
        dtokens = jax.tree.map(functools.partial(_put, start=start), dtokens, dchunk)
        return (g_ben, dweights, dtokens), None

    starts_k = jnp.arange(0, dy_bte.shape[1], c)
    zeros = jax.tree.map(jnp.zeros_like, (weights, tokens[:-1]))
    (dinitial_ben, dweights, dtokens), _ = lax.scan(
        one_chunk, (dfinal_ben, *zeros), (starts_k, start_kben), reverse=True
    )
    return dweights, dinitial_ben, (*dtokens, None)  # resets are boolean: they have no gradient


def _saveable_forward(*arguments):
    (y_bte, final_ben), (weights, start_kben, tokens) = forward(*arguments)
    y_bte, start_kben = checkpoint_name((y_bte, start_kben), SAVEABLE)
    return (y_bte, final_ben), (weights, start_kben, tokens)


_scan.defvjp(_saveable_forward, backward)


def _cut(tokens, start, c):
    return jax.tree.map(lambda v: lax.dynamic_slice_in_dim(v, start, c, axis=1), tokens)


def _put(whole_bt, chunk_bc, start):
    chunk_bc = chunk_bc.astype(whole_bt.dtype)
    return lax.dynamic_update_slice_in_dim(whole_bt, chunk_bc, start, axis=1)


def _widen(chunk, dtype):
    """Returns x, z, B and C of a chunk in the dtype to compute in."""
    x_bce, _, z_bce, B_bcn, C_bcn, _ = chunk
    return jax.tree.map(lambda v: v.astype(dtype), (x_bce, z_bce, B_bcn, C_bcn))


def _steps(chunk, weights, start, t, dt_softplus, signed):
    """Returns Δ, its slope by dt, exp(Δ A), and the decays; the last two are 0 at a reset."""
    _, dt_bce, _, _, _, reset_bc = chunk
    A_ben, _, dt_bias_be = weights
    dt_bce = dt_bce.astype(A_ben.dtype)
    slope_bce = jnp.ones_like(dt_bce)
    if dt_bias_be is not None:
        dt_bce += dt_bias_be[:, None]
    if dt_softplus:
        slope_bce = jax.nn.sigmoid(dt_bce)
        dt_bce = jax.nn.softplus(dt_bce)
    c = dt_bce.shape[1]
    if t % c:  # there is padding: Δ = 0 leaves the state as it is
        counts_c1 = (start + jnp.arange(c) < t)[:, None]
        dt_bce, slope_bce = jnp.where(counts_c1, dt_bce, 0), jnp.where(counts_c1, slope_bce, 0)
    power_bcen, reset_bc11 = jnp.exp(dt_bce[..., None] * A_ben[:, None]), None
    if reset_bc is not None:
        reset_bc11 = reset_bc[:, :, None, None]
        power_bcen = jnp.where(reset_bc11, 0, power_bcen)
    return dt_bce, slope_bce, power_bcen, decay(power_bcen, signed, reset_bc11)


def _states(decay_bcen, u_bce, B_bcn, state_ben):
    """Returns the state after each token of a chunk that starts from ``state_ben``."""
    u_bcen = u_bce[..., None] * B_bcn[:, :, None, :]
    u_bcen = u_bcen.at[:, 0].add(decay_bcen[:, 0] * state_ben)
    return lax.associative_scan(then, (decay_bcen, u_bcen), axis=1)[1]


def _read(state_bcen, C_bcn, D_be, x_bce):
    # A sum, not a dot, which would be rounded to TF32 or bfloat16 on GPU and TPU.
    s_bce = (state_bcen * C_bcn[:, :, None, :]).sum(-1)
    return s_bce if D_be is None else s_bce + D_be[:, None] * x_bce
