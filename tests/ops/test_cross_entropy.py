"""The chunked cross-entropy against a log-softmax of the whole in float64.

Shapes: n rows (tokens), d d_model, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops.cross_entropy import cross_entropy, weighted_cross_entropy

V, D = 257, 24

# (of nll, of gradients), as a share of the largest value.
TOLERANCES = {
    # Sums of 257 exponentials and of up to 64 rows, each term rounded to 2^-24 = 6e-8.
    "float32": (2e-6, 1e-5),
    # The truth is given the same rounded factors, so the logits are exact but for float32 sums and
    # so is nll; what is rounded to 2^-9 is the gradient of the logits.
    "bfloat16": (2e-6, 2**-8),
}


def make_arguments(n, dtype="float32", v=V, d=D):
    rng = np.random.default_rng(0)
    x_nd = jnp.asarray(rng.normal(size=(n, d)), dtype)
    weight_vd = jnp.asarray(rng.normal(size=(v, d)), jnp.float32)
    targets_n = jnp.asarray(rng.integers(0, v, n), jnp.int32)
    return x_nd, weight_vd, targets_n, jnp.asarray(rng.normal(size=n), jnp.float32)


def float64_nll_and_gradients(x_nd, weight_vd, targets_n, row_weights_n):
    logits_nv = x_nd @ weight_vd.T
    logits_nv -= logits_nv.max(1, keepdims=True)
    log_probability_nv = logits_nv - np.log(np.exp(logits_nv).sum(1, keepdims=True))
    rows = np.arange(len(targets_n))
    dlogits_nv = np.exp(log_probability_nv)
    dlogits_nv[rows, targets_n] -= 1
    dlogits_nv *= row_weights_n[:, None]
    return -log_probability_nv[rows, targets_n], dlogits_nv @ weight_vd, dlogits_nv.T @ x_nd


def summed_rows(x_nd, weight_vd, targets_n, row_weights_n, **how):
    return (cross_entropy(x_nd, weight_vd, targets_n, **how) * row_weights_n).sum()


OPS = {"rows": summed_rows, "sum": weighted_cross_entropy}
both = pytest.mark.parametrize("op", OPS)


@functools.partial(jax.jit, static_argnames=("op", "chunk_tokens", "dtype"))
def run(x_nd, weight_vd, targets_n, row_weights_n, op, chunk_tokens, dtype):
    """The weighted sum, and its gradients by x, head and row weights: the last is the nll."""
    total, gradients = jax.value_and_grad(
        lambda x_nd, weight_vd, row_weights_n: OPS[op](
            x_nd, weight_vd, targets_n, row_weights_n, chunk_tokens=chunk_tokens, dtype=dtype
        ),
        (0, 1, 2),
    )(x_nd, weight_vd, row_weights_n)
    return total, *gradients


def relative_error(actual, expected):
    actual = np.asarray(actual).astype(np.float64)
    return np.abs(actual - expected).max() / np.abs(expected).max()


@both
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize(
    ("n", "chunk_tokens"),
    [(64, 16), (64, 100), (61, 16), (17, 16), (7, 1), (1, 16)],
)
def test_values_and_gradients(n, chunk_tokens, dtype, op):
    arguments = make_arguments(n, dtype)
    x_nd, weight_vd, targets_n, row_weights_n = arguments
    total, dx_nd, dweight_vd, nll_n = run(*arguments, op, chunk_tokens, dtype)
    assert (nll_n.dtype, dx_nd.dtype, dweight_vd.dtype) == (jnp.float32, x_nd.dtype, jnp.float32)
    exact = (np.asarray(v).astype(np.float64) for v in (x_nd, weight_vd.astype(dtype)))
    truth = float64_nll_and_gradients(*exact, np.asarray(targets_n), np.asarray(row_weights_n))
    nll_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert relative_error(nll_n, truth[0]) <= nll_tolerance
    assert relative_error(dx_nd, truth[1]) <= gradient_tolerance
    assert relative_error(dweight_vd, truth[2]) <= gradient_tolerance
    # A sum of terms of both signs: rounding relative to their sizes, not to what is left.
    weighted_n = truth[0] * np.asarray(row_weights_n, np.float64)
    assert abs(total - weighted_n.sum()) <= nll_tolerance * np.abs(weighted_n).sum()


@both
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_padding_rows_change_nothing(op, dtype):
    """Whatever they hold: their logits would be the largest by far."""
    arguments = make_arguments(61, dtype)
    x_nd, weight_vd, targets_n, row_weights_n = arguments
    loud = 1e3 * jnp.sign(x_nd[:63].astype(jnp.float32))
    padded_vd = jnp.concatenate([weight_vd, loud])

    def total(x_nd, weight_vd, row_weights_n):
        how = {"chunk_tokens": 16, "dtype": dtype, "vocab_size": V}
        return OPS[op](x_nd, weight_vd, targets_n, row_weights_n, **how)

    found, gradients = jax.value_and_grad(total, (0, 1, 2))(x_nd, padded_vd, row_weights_n)
    plain, dx_nd, dweight_vd, nll_n = run(*arguments, op, 16, dtype)
    # The same numbers, in sums that the compiler may order otherwise: each is this near the truth.
    tolerance = 2 * TOLERANCES[dtype][1]
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert relative_error(gradients[0], np.asarray(dx_nd).astype(np.float64)) <= tolerance
    assert relative_error(gradients[1][:V], np.asarray(dweight_vd, np.float64)) <= tolerance
    assert relative_error(gradients[2], np.asarray(nll_n, np.float64)) <= tolerance
    np.testing.assert_array_equal(gradients[1][V:], 0)


def test_the_sum_may_be_part_of_a_larger_loss():
    """Its gradients are made before its cotangent is known: here that is −3 · sum²'s 2 · sum."""
    arguments = make_arguments(17)
    x_nd, weight_vd, targets_n, row_weights_n = arguments
    how = {"chunk_tokens": 5, "dtype": "float32"}

    def loss(x_nd, weight_vd, row_weights_n):
        return -3 * weighted_cross_entropy(x_nd, weight_vd, targets_n, row_weights_n, **how) ** 2

    gradients = jax.grad(loss, (0, 1, 2))(x_nd, weight_vd, row_weights_n)
    total, *plain = run(*arguments, "sum", **how)
    for got, want in zip(gradients, plain, strict=True):
        assert relative_error(got, -6 * float(total) * np.asarray(want)) <= 1e-6  # two roundings


def test_a_sum_needs_three_products_of_the_size_of_the_logits():
    """As many as the gradients of one chunk take by definition; rows by themselves need four."""

    def products(op):
        how = {"op": op, "chunk_tokens": 16, "dtype": "float32"}
        text = run.lower(*make_arguments(64), **how).as_text()  # a loop's body stands there once
        return text.count("stablehlo.dot_general")

    assert {op: products(op) for op in OPS} == {"rows": 4, "sum": 3}


@both
def test_narrow_factors_are_summed_in_float32(op):
    """1,024 chunks add up: in a bfloat16 accumulator a sum of ones would stop at 256."""
    n = 1024
    x_nd, weight_vd = jnp.ones((n, 1), jnp.bfloat16), jnp.zeros((2, 1))
    arguments = (x_nd, weight_vd, jnp.zeros(n, jnp.int32), jnp.ones(n))
    np.testing.assert_array_equal(run(*arguments, op, 1, "bfloat16")[2], [[-n / 2], [n / 2]])


@both
def test_large_logits_stay_finite(op):
    """Logits of ±10,000, far beyond what exp can take: nll is their difference or zero."""
    x_nd, weight_vd = jnp.full((2, 1), 1e2), jnp.array([[1e2], [-1e2]])
    results = run(x_nd, weight_vd, jnp.array([0, 1]), jnp.ones(2), op, 1, "float32")
    np.testing.assert_array_equal(results[3], [0, 2e4])
    assert all(np.isfinite(v).all() for v in results)


@both
def test_padding_rows_get_no_probability_even_at_very_low_logits(op):
    """Two ids share all probability at logits of −10,000 each."""
    weight_vd = jnp.array([[1e2], [1e2], [0.0], [0.0]])
    arguments = jnp.full((3, 1), -1e2), weight_vd, jnp.array([0, 1, 0]), jnp.ones(3)
    total = OPS[op](*arguments, chunk_tokens=2, dtype="float32", vocab_size=2)
    # Each nll is the difference of numbers near 10,000, which float32 has in steps of 2^-10.
    np.testing.assert_allclose(total, 3 * np.log(2), atol=3 * 2.0**-10)


@both
def test_logits_of_one_chunk_at_a_time(op):
    """Neither direction holds more than one chunk's logits, whatever the number of rows."""
    v, d, chunk_tokens = 4096, 16, 32

    def temporary_bytes(n, differentiated):
        def loss(x_nd, weight_vd, targets_n, row_weights_n):
            how = {"chunk_tokens": chunk_tokens, "dtype": "float32"}
            return OPS[op](x_nd, weight_vd, targets_n, row_weights_n, **how)

        function = jax.value_and_grad(loss, (0, 1)) if differentiated else loss
        arguments = jax.eval_shape(lambda: make_arguments(n, v=v, d=d))
        compiled = jax.jit(function).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunk_bytes = 4 * chunk_tokens * v
    for differentiated in (False, True):
        few, many = (temporary_bytes(n, differentiated) for n in (256, 1024))
        # Beside the chunk (and its exponentials, where they serve twice): the gradient of the
        # weight; and per row, copies of x and its gradient.
        n_chunks = 2 if differentiated and op == "sum" else 1
        assert many < 1.2 * n_chunks * chunk_bytes + differentiated * 4 * v * d + 3 * 1024 * 4 * d
        assert many - few <= 3 * (1024 - 256) * 4 * (d + 2)


@both
def test_rows_sharded_over_devices_stay_where_they_are(op):
    """Each of 8 devices computes its share of every chunk: only the sums cross devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.NamedSharding(mesh, jax.P())
    x_nd, weight_vd, targets_n, row_weights_n = make_arguments(128)
    placed = (
        jax.device_put(x_nd, rows),
        jax.device_put(weight_vd, everywhere),
        jax.device_put(targets_n, rows),
        jax.device_put(row_weights_n, rows),
    )
    program = run.lower(*placed, op, chunk_tokens=32, dtype="float32").compile()
    text = program.as_text()
    assert not any(word in text for word in ("all-gather(", "all-to-all(", "collective-permute("))
    expected = run(x_nd, weight_vd, targets_n, row_weights_n, op, 32, "float32")
    for got, want in zip(program(*placed), expected, strict=True):
        assert relative_error(got, np.asarray(want)) <= TOLERANCES["float32"][1]


@both
@pytest.mark.parametrize(("n", "chunk_tokens"), [(4, 0), (0, 4)])
def test_nothing_to_do_is_an_error(n, chunk_tokens, op):
    with pytest.raises(ValueError, match="at least 1"):
        OPS[op](*make_arguments(n), chunk_tokens=chunk_tokens, dtype="float32")
