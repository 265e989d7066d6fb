"""Cross-entropy from the last hidden layer, without ever storing the logits of all tokens.

For evaluation ``cross_entropy`` gives each row's; for training ``weighted_cross_entropy`` gives
their weighted sum, whose gradients are computed with the logits, one chunk at a time: three matrix
products, where a backward that recomputes the logits needs four.

The head may have more rows than there are ids, because whole tiles suit matrix units: the logits of
the rest are −∞, so that they take no probability and get no gradient.

Shapes: n rows (tokens), d d_model, v vocabulary (padded), c rows of a chunk, k chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int


class _Head(NamedTuple):
    """The static settings of the head's matrix product."""

    dtype: DTypeLike
    vocab_size: int | None  # None: all rows of the weight are ids


def cross_entropy(
    x_nd: Float[Array, "n d"],
    weight_vd: Float[Array, "v d"],
    targets_n: Int[Array, "n"],
    *,
    chunk_tokens: int,
    dtype: DTypeLike,
    vocab_size: int | None = None,
) -> Float32[Array, "n"]:
    """Returns −log softmax(x Wᵀ)[target] of each row, in nats.

    The logits of ``chunk_tokens`` rows at most exist at any time; the backward recomputes them.
    The caller gives rows that must not count a weight of zero.

    Args:
      x_nd: hidden states, any float dtype.
      weight_vd: the head, any float dtype.
      targets_n: the right ids, in [0, vocab_size).
      chunk_tokens: rows whose logits are made at a time, at least 1.
      dtype: of the factors of the matrix products; sums, softmax and the gradient of the weight
        are float32.
      vocab_size: ids; rows of the head from here up are padding. None: all are ids.

    Raises:
      ValueError: if chunk_tokens is less than 1 or there is no row.
    """
    n = x_nd.shape[0]
    split = _splitter(n, chunk_tokens)
    with jax.named_scope("cross_entropy"):
        nll_kc: jax.Array = _chunked_nll(
            _Head(dtype, vocab_size), split(x_nd), weight_vd, split(targets_n)
        )
        return _join(nll_kc, n)


def weighted_cross_entropy(
    x_nd: Float[Array, "n d"],
    weight_vd: Float[Array, "v d"],
    targets_n: Int[Array, "n"],
    row_weights_n: Float[Array, "n"],
    *,
    chunk_tokens: int,
    dtype: DTypeLike,
    vocab_size: int | None = None,
) -> Float32[Array, ""]:
    """Returns Σ row_weight · −log softmax(x Wᵀ)[target], in nats: to be differentiated once.

    Its cotangent is one number, so the gradients can be made, up to that factor, while a chunk's
    logits are there. They are kept until the backward: the gradients take that memory anyway.
    Without differentiation they are not made.

    Args:
      x_nd, weight_vd, targets_n, chunk_tokens, dtype, vocab_size: as in ``cross_entropy``.
      row_weights_n: float32, how much each row counts; differentiable too.

    Raises:
      ValueError: if chunk_tokens is less than 1 or there is no row.
    """
    split = _splitter(x_nd.shape[0], chunk_tokens)
    with jax.named_scope("cross_entropy"):
        # Padded rows weigh zero.
        return _weighted_sum(
            _Head(dtype, vocab_size), split(x_nd), weight_vd, split(targets_n), split(row_weights_n)
        )


def _splitter(n, chunk_tokens):
    """Returns a function that cuts (n, …) into (k, c, …) chunks of equal size, padded with 0."""
    if chunk_tokens < 1 or n < 1:
        raise ValueError(
            f"cross_entropy needs chunk_tokens and rows of at least 1, got {chunk_tokens} and {n}"
        )
    k = -(-n // chunk_tokens)
    c = -(-n // k)  # fewer than k rows are padded

    def split(v):
        # Chunk j takes rows j, j + k, j + 2k …: where rows are sharded over devices, each device
        # then has its share of every chunk. Consecutive rows would leave all but one idle.
        v = jnp.pad(v, [(0, k * c - n)] + [(0, 0)] * (v.ndim - 1))
        return jnp.swapaxes(v.reshape(c, k, *v.shape[1:]), 0, 1)

    return split


def _join(v_kc, n):
    """Undoes the split of n rows."""
    return jnp.swapaxes(v_kc, 0, 1).reshape(-1)[:n]


def _logits(head, x_cd, weight_vd):
    """In float32; the weight is already in the head's dtype."""
    logits_cv = jnp.einsum(
        "cd,vd->cv", x_cd.astype(head.dtype), weight_vd, preferred_element_type=jnp.float32
    )
    if head.vocab_size is None or head.vocab_size == len(weight_vd):
        return logits_cv
    return jnp.where(jnp.arange(len(weight_vd)) < head.vocab_size, logits_cv, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_nll(head, x_kcd, weight_vd, targets_kc):
    return _forward(head, x_kcd, weight_vd, targets_kc)[0]


def _forward(head, x_kcd, weight_vd, targets_kc):
    narrow_vd = weight_vd.astype(head.dtype)

    def one_chunk(chunk):
        x_cd, targets_c = chunk
        logits_cv = _logits(head, x_cd, narrow_vd)
        log_sum_c = jax.nn.logsumexp(logits_cv, axis=1)
        target_logit_c = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=1)[:, 0]
        return log_sum_c - target_logit_c, log_sum_c

    nll_kc, log_sum_kc = lax.map(one_chunk, (x_kcd, targets_kc))
    return nll_kc, (x_kcd, weight_vd, targets_kc, log_sum_kc)


def _backward(head, saved, dnll_kc):
    x_kcd, weight_vd, targets_kc, log_sum_kc = saved
    narrow_vd = weight_vd.astype(head.dtype)

    def one_chunk(dweight_vd, chunk):
        x_cd, targets_c, log_sum_c, dnll_c = chunk
        probability_cv = jnp.exp(_logits(head, x_cd, narrow_vd) - log_sum_c[:, None])
        hit_cv = jnp.arange(weight_vd.shape[0]) == targets_c[:, None]
        dlogits_cv = ((probability_cv - hit_cv) * dnll_c[:, None]).astype(head.dtype)
        dx_cd, dweight_chunk_vd = _factor_gradients(dlogits_cv, x_cd, narrow_vd)
        return dweight_vd + dweight_chunk_vd, dx_cd

    dweight_vd, dx_kcd = lax.scan(
        one_chunk,
        jnp.zeros(weight_vd.shape, jnp.float32),
        (x_kcd, targets_kc, log_sum_kc, dnll_kc),
    )
    return dx_kcd, dweight_vd.astype(weight_vd.dtype), None


_chunked_nll.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted_sum(head, x_kcd, weight_vd, targets_kc, row_weights_kc):
    nll_kc, _ = _forward(head, x_kcd, weight_vd, targets_kc)
    return jnp.sum(nll_kc * row_weights_kc)


def _sum_and_gradients(head, x_kcd, weight_vd, targets_kc, row_weights_kc):
    narrow_vd = weight_vd.astype(head.dtype)

    def one_chunk(dweight_vd, chunk):
        x_cd, targets_c, row_weights_c = chunk
        logits_cv = _logits(head, x_cd, narrow_vd)
        target_logit_c = jnp.take_along_axis(logits_cv, targets_c[:, None], axis=1)[:, 0]
        # Not by logsumexp: the gradient uses the exponentials too.
        largest_c = logits_cv.max(axis=1)
        exp_cv = jnp.exp(logits_cv - largest_c[:, None])
        sum_c = exp_cv.sum(axis=1)
        hit_cv = jnp.arange(weight_vd.shape[0]) == targets_c[:, None]
        dlogits_cv = exp_cv * (row_weights_c / sum_c)[:, None] - hit_cv * row_weights_c[:, None]
        dx_cd, dweight_chunk_vd = _factor_gradients(dlogits_cv.astype(head.dtype), x_cd, narrow_vd)
        nll_c = jnp.log(sum_c) + largest_c - target_logit_c
        return dweight_vd + dweight_chunk_vd, (nll_c, dx_cd)

    dweight_vd, (nll_kc, dx_kcd) = lax.scan(
        one_chunk,
        jnp.zeros(weight_vd.shape, jnp.float32),
        (x_kcd, targets_kc, row_weights_kc),
    )
    dweight_vd = dweight_vd.astype(weight_vd.dtype)
    return jnp.sum(nll_kc * row_weights_kc), (dx_kcd, dweight_vd, nll_kc)


def _scale_gradients(head, saved, dsum):
    dx_kcd, dweight_vd, nll_kc = saved
    scale = lambda v: (v * dsum).astype(v.dtype)
    return scale(dx_kcd), scale(dweight_vd), None, scale(nll_kc)


_weighted_sum.defvjp(_sum_and_gradients, _scale_gradients)


def _factor_gradients(dlogits_cv, x_cd, narrow_vd):
    """Returns (dx_cd in x's dtype, float32 dweight_vd)."""
    matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx_cd = matmul("cv,vd->cd", dlogits_cv, narrow_vd)
    dweight_vd = matmul("cv,cd->vd", dlogits_cv, x_cd.astype(dlogits_cv.dtype))
    return dx_cd.astype(x_cd.dtype), dweight_vd
