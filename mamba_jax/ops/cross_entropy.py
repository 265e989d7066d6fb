"""Cross-entropy from the last hidden layer, without ever storing the logits of all tokens.

Shapes: n rows (tokens), d d_model, v vocabulary, c rows of a chunk, k chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int


def cross_entropy(
    x_nd: Float[Array, "n d"],
    weight_vd: Float[Array, "v d"],
    targets_n: Int[Array, "n"],
    *,
    chunk_tokens: int,
    dtype: DTypeLike,
) -> Float32[Array, "n"]:
    """Returns −log softmax(x Wᵀ)[target] of each row, in nats.

    The logits of ``chunk_tokens`` rows at most exist at any time; the backward makes them again.
    Rows that shall not count are the caller's to weigh by zero.

    Args:
      x_nd: hidden states, any float dtype.
      weight_vd: the head, any float dtype.
      targets_n: the right ids, in [0, v).
      chunk_tokens: rows whose logits are made at a time, at least 1. On CPU 256 are enough for
        efficient matrix products.
      dtype: of the factors of the matrix products; sums, softmax and the gradient of the weight
        are float32.

    Raises:
      ValueError: if chunk_tokens is less than 1 or there is no row.
    """
    n, _ = x_nd.shape
    if chunk_tokens < 1 or n < 1:
        raise ValueError(
            f"cross_entropy needs chunk_tokens and rows of at least 1, got {chunk_tokens} and {n}"
        )
    k = -(-n // chunk_tokens)
    c = -(-n // k)  # chunks of equal size: fewer than k rows are padded

    def split(v):
        # Chunk j takes rows j, j + k, j + 2k …: where rows are sharded over devices, each device
        # then has its share of every chunk. Consecutive rows would leave all but one idle.
        v = jnp.pad(v, [(0, k * c - n)] + [(0, 0)] * (v.ndim - 1))
        return jnp.swapaxes(v.reshape(c, k, *v.shape[1:]), 0, 1)

    with jax.named_scope("cross_entropy"):
        nll_kc: jax.Array = _chunked_nll(dtype, split(x_nd), weight_vd, split(targets_n))
        return jnp.swapaxes(nll_kc, 0, 1).reshape(-1)[:n]


def _logits(dtype, x_cd, weight_vd):
    """In float32; the weight is already in ``dtype``."""
    return jnp.einsum(
        "cd,vd->cv", x_cd.astype(dtype), weight_vd, preferred_element_type=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(dtype, x_kcd, weight_vd, targets_kc):
    return _forward(dtype, x_kcd, weight_vd, targets_kc)[0]


def _forward(dtype, x_kcd, weight_vd, targets_kc):
    narrow_vd = weight_vd.astype(dtype)

    def one_chunk(chunk):
        x_cd, targets_c = chunk
        logits_cv = _logits(dtype, x_cd, narrow_vd)
        log_sum_c = jax.nn.logsumexp(logits_cv, axis=1)
        target_logit_c = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=1)[:, 0]
        return log_sum_c - target_logit_c, log_sum_c

    nll_kc, log_sum_kc = lax.map(one_chunk, (x_kcd, targets_kc))
    return nll_kc, (x_kcd, weight_vd, targets_kc, log_sum_kc)


def _backward(dtype, saved, dnll_kc):
    x_kcd, weight_vd, targets_kc, log_sum_kc = saved
    narrow_vd = weight_vd.astype(dtype)

    def one_chunk(dweight_vd, chunk):
        x_cd, targets_c, log_sum_c, dnll_c = chunk
        probability_cv = jnp.exp(_logits(dtype, x_cd, narrow_vd) - log_sum_c[:, None])
        hit_cv = jnp.arange(weight_vd.shape[0]) == targets_c[:, None]
        dlogits_cv = ((probability_cv - hit_cv) * dnll_c[:, None]).astype(dtype)
        matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dx_cd = matmul("cv,vd->cd", dlogits_cv, narrow_vd)
        dweight_vd += matmul("cv,cd->vd", dlogits_cv, x_cd.astype(dtype))
        return dweight_vd, dx_cd.astype(x_cd.dtype)

    dweight_vd, dx_kcd = lax.scan(
        one_chunk,
        jnp.zeros(weight_vd.shape, jnp.float32),
        (x_kcd, targets_kc, log_sum_kc, dnll_kc),
    )
    return dx_kcd, dweight_vd.astype(weight_vd.dtype), None


_chunked_nll.defvjp(_forward, _backward)
