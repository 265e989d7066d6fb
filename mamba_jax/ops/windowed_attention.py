"""Causal attention over a moving window of keys, in memory linear in time.

Legend: b batch, t queries in time, j keys, h heads, p head size, c queries of a chunk, u chunks,
w keys of a chunk's band or of a ring.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.checkpoint, static_argnums=(5, 6))
@jax.named_scope("windowed_attention")
def windowed_attention(
    q_bthp: Float[Array, "b t h p"],
    k_bjhp: Float[Array, "b j h p"],
    v_bjhp: Float[Array, "b j h p"],
    low_bt: Int[Array, "b t"],
    high_bt: Int[Array, "b t"],
    window: int,
    stride: int,
) -> Float[Array, "b t h p"]:
    """Each query t reads the keys ``low_bt … high_bt``; without any, the result is zero.

    A chunk of consecutive queries reads one band of keys, so that scores take
    O(t · (window + chunk / stride)) memory; the backward recomputes them.

    Args:
      q_bthp: queries, scaled here by 1/√p.
      k_bjhp: keys; j may be 0.
      v_bjhp: values.
      low_bt: first key that a query reads, ``> high_bt - window``; above ``high_bt``: none.
      high_bt: last key that a query reads; may be -1. It never falls with t, and rises by at most
        one per ``stride`` queries.
      window: the most keys that a query reads.
      stride: see ``high_bt``.

    Returns:
      The attention outputs in the dtype of v; softmax in float32.
    """
    b, t, h, p = q_bthp.shape
    n_keys = k_bjhp.shape[1]
    if n_keys == 0:
        return jnp.zeros_like(q_bthp, v_bjhp.dtype)
    chunk = min(window, t)
    band = min(window + -(-chunk // stride), n_keys)
    pad = -t % chunk
    # Padded queries repeat the last one's range: `high` stays monotone.
    chunked = lambda x, mode: jnp.pad(
        x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2), mode=mode
    ).reshape((b, -1, chunk, *x.shape[2:]))
    q_buchp = chunked(q_bthp, "constant")
    low_buc, high_buc = chunked(low_bt, "edge"), chunked(high_bt, "edge")
    start_bu = jnp.clip(high_buc[..., 0] - window + 1, 0, n_keys - band)
    key_buw = start_bu[..., None] + jnp.arange(band)
    take_band = jax.vmap(lambda x_jhp, index_uw: x_jhp[index_uw])
    k_buwhp, v_buwhp = take_band(k_bjhp, key_buw), take_band(v_bjhp, key_buw)
    key = key_buw[:, :, None]
    seen_bucw = (low_buc[..., None] <= key) & (key <= high_buc[..., None])
    scores = jnp.einsum(
        "buchp,buwhp->buhcw", q_buchp, k_buwhp, preferred_element_type=jnp.float32
    ) * (p**-0.5)
    seen = seen_bucw[:, :, None]
    # A finite stand-in for -inf: a query without keys gives equal weights, masked to zero below,
    # where -inf would give NaN in the gradient.
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1), 0.0)
    y_buchp = jnp.einsum("buhcw,buwhp->buchp", weights.astype(v_bjhp.dtype), v_buwhp)
    return y_buchp.reshape(b, -1, h, p)[:, :t]


@jax.named_scope("ring_attention")
def ring_attention(
    q_bhp: Float[Array, "b h p"],
    k_bhwp: Float[Array, "b h w p"],
    v_bhwp: Float[Array, "b h w p"],
    newest_b: Int[Array, " b"],
) -> Float[Array, "b h p"]:
    """One query per row reads the newest w keys, kept in a ring: key number i in slot i mod w.

    Heads come before slots: with slots first XLA copied both rings into this order for every token
    (on a CPU core that took 5 to 9 times as long as the reading).

    Args:
      q_bhp: queries, scaled here by 1/√p.
      k_bhwp: keys.
      v_bhwp: values.
      newest_b: the number of the newest key, -1: there is none and the result is zero.

    Returns:
      The attention outputs in the dtype of v; softmax in float32.
    """
    w, p = k_bhwp.shape[2], q_bhp.shape[-1]
    seen_bw = ring_numbers(newest_b, w) >= 0
    scores_bhw = jnp.einsum("bhp,bhwp->bhw", q_bhp, k_bhwp, preferred_element_type=jnp.float32) * (
        p**-0.5
    )
    seen = seen_bw[:, None]
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores_bhw, -1e30), axis=-1), 0.0)
    return jnp.einsum("bhw,bhwp->bhp", weights.astype(v_bhwp.dtype), v_bhwp)


def ring_numbers(newest_b: Int[Array, " b"], w: int) -> Int[Array, "b w"]:
    """Returns the number of the key in each slot of a ring; negative: the slot holds none."""
    return newest_b[:, None] - (newest_b[:, None] - jnp.arange(w)) % w
