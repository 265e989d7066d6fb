"""Windowed attention against dense masked attention, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops.windowed_attention import ring_attention, windowed_attention
from tests.support.tiny_run import quick_compiles  # noqa: F401


def dense(q_bthp, k_bjhp, v_bjhp, low_bt, high_bt):
    """Every query against every key; a query without keys gives zero."""
    scores = jnp.einsum("bthp,bjhp->bthj", q_bthp, k_bjhp) / np.sqrt(q_bthp.shape[-1])
    key_j = jnp.arange(k_bjhp.shape[1])
    seen = (low_bt[..., None] <= key_j) & (key_j <= high_bt[..., None])
    weights = jnp.where(seen[:, :, None], jnp.exp(scores), 0)
    total = jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return jnp.einsum("bthj,bjhp->bthp", weights / total, v_bjhp)


def ranges(b, t, stride, window, seed):
    """Ranges as packed rows give them: ``high`` rises at least ``stride`` queries apart, and
    ``low`` jumps to a document's first key."""
    rng = np.random.default_rng(seed)
    low, high = np.zeros((b, t), np.int32), np.zeros((b, t), np.int32)
    for row in range(b):
        newest, first, since = -1, 0, rng.integers(0, stride)
        for i in range(t):
            if rng.random() < 0.1:  # a document starts: its blocks are counted anew
                first, since = newest + 1, 0
            since += 1
            if since == stride:
                newest, since = newest + 1, 0
            high[row, i] = newest
            low[row, i] = max(first, newest - window + 1)
    return jnp.asarray(low), jnp.asarray(high), high.max() + 1


@pytest.mark.parametrize(
    ("t", "stride", "window"), [(1, 1, 4), (29, 1, 4), (29, 2, 5), (40, 4, 3), (16, 1, 64)]
)
def test_equals_dense_attention(t, stride, window):
    low, high, n_keys = ranges(2, t, stride, window, seed=t + stride)
    n_keys = max(int(n_keys), 1)
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, t, 3, 8))
    k, v = (jax.random.normal(key, (2, n_keys, 3, 8)) for key in keys[1:3])
    direction = jax.random.normal(keys[3], q.shape)

    def run(attend):
        total = lambda q, k, v: (attend(q, k, v) * direction).sum()
        return attend(q, k, v), *jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

    ours = run(lambda q, k, v: windowed_attention(q, k, v, low, high, window, stride))
    truth = run(lambda q, k, v: dense(q, k, v, low, high))
    for a, b in zip(ours, truth, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # float32, sums of up to 64 terms
    assert (high < low).any() == (np.asarray(ours[0]) == 0).all((-1, -2)).any()


def test_without_keys_the_result_is_zero():
    q = jnp.ones((2, 3, 1, 4))
    none = jnp.zeros((2, 0, 1, 4))
    low, high = jnp.zeros((2, 3), jnp.int32), jnp.full((2, 3), -1)
    assert (windowed_attention(q, none, none, low, high, 4, 2) == 0).all()


def test_memory_grows_linearly_with_time():
    """Four times the length takes about four times the memory of a gradient; dense takes 16."""

    def temporary_bytes(t):
        shape = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)
        index = jax.ShapeDtypeStruct((1, t), jnp.int32)
        loss = lambda q, k, v, low, high: windowed_attention(q, k, v, low, high, 64, 1).sum()
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
            shape, shape, shape, index, index
        )
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 5 * temporary_bytes(1024)


@pytest.mark.parametrize("window", [1, 5])
def test_ring_equals_dense_attention(window):
    """Keys come one by one; two rows are at different places, one wraps around while the other
    is still empty. The truth is float64 over the whole history."""
    rng = np.random.default_rng(window)
    steps, b, h, p = 3 * window + 2, 2, 3, 8
    k_bjhp, v_bjhp, q_bjhp = rng.normal(size=(3, b, steps, h, p))
    late = window + 1  # the second row's first key comes so many steps after the first row's
    rings = np.full((2, b, h, window, p), 7.0)  # what lies in a free slot must not be read
    for step in range(steps):
        newest = np.array([step, max(step - late, -1)])
        for row, number in enumerate(newest):
            if number >= 0:
                rings[0, row, :, number % window] = k_bjhp[row, number]
                rings[1, row, :, number % window] = v_bjhp[row, number]
        q_bhp = q_bjhp[:, step]
        ours = ring_attention(
            *(jnp.asarray(x, jnp.float32) for x in (q_bhp, *rings)), jnp.asarray(newest)
        )
        for row, number in enumerate(newest):
            seen = slice(max(0, number - window + 1), number + 1)
            scores_hj = np.einsum("hp,jhp->hj", q_bhp[row], k_bjhp[row, seen]) / np.sqrt(p)
            weights_hj = np.exp(scores_hj) / np.exp(scores_hj).sum(-1, keepdims=True)
            truth = np.einsum("hj,jhp->hp", weights_hj, v_bjhp[row, seen])
            # Values of order 1 in float32, sums of up to 8 terms; without a key exactly zero.
            np.testing.assert_allclose(ours[row], truth, atol=5e-6 if number >= 0 else 0)
