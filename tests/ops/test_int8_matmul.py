"""The int8 matrix: how far it may be from the float32 one, and products with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops import int8_matmul

# One block that is not full, several blocks with a rest, several without, rows wider than a block.
SHAPES = [(5, 3), (3001, 200), (4096, 64), (3, int8_matmul._BLOCK_BYTES)]


def weight_of(shape):
    """Rows of very different sizes, so that a scale that is not the row's own is seen."""
    size = jnp.exp(3 * jax.random.normal(jax.random.key(0), (shape[0], 1)))
    return size * jax.random.normal(jax.random.key(1), shape)


def as_float64(matrix):
    """The matrix that the int8 one represents, (v, d)."""
    scales = np.asarray(matrix.scales_v, np.float64)
    blocks = np.asarray(matrix.blocks_krd, np.float64)
    rows = blocks.reshape(-1, blocks.shape[-1])
    assert not rows[len(scales) :].any()
    return rows[: len(scales)] * scales[:, None]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_is_off_by_half_a_scale_at_most(shape):
    weight = weight_of(shape)
    matrix = int8_matmul.quantise(weight)
    assert matrix.blocks_krd.dtype == jnp.int8
    error = np.abs(as_float64(matrix) - np.asarray(weight, np.float64))
    scales = np.asarray(matrix.scales_v, np.float64)[:, None]
    # The division before rounding is float32's: 127 of its steps at most.
    assert (error <= scales * (0.5 + 127 * 2**-23)).all()
    # And the scale is no larger than it has to be: the row's largest number takes all of int8.
    largest = np.abs(np.asarray(weight)).max(axis=1)
    np.testing.assert_allclose(scales[:, 0], largest / 127, rtol=1e-6)


def test_a_block_stays_small():
    blocks = int8_matmul.quantise(weight_of((3001, 200))).blocks_krd
    assert blocks.shape[0] > 1 and 4 * blocks[0].size <= int8_matmul._BLOCK_BYTES


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_matrix_it_holds(shape, n):
    matrix = int8_matmul.quantise(weight_of(shape))
    x = jax.random.normal(jax.random.key(2), (n, shape[1]))
    held = as_float64(matrix)
    ours = np.asarray(jax.jit(int8_matmul.matmul)(x, matrix), np.float64)
    assert ours.shape == (n, shape[0])
    # float32 sums: relative to the sum of the terms' sizes, a few units of rounding (2^-24) and
    # more the longer the sum; in any order the square root of d of them is generous.
    sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(held).T
    bound = sizes * 2**-24 * (4 + np.sqrt(shape[1]))
    assert (np.abs(ours - np.asarray(x, np.float64) @ held.T) <= bound).all()


def test_a_row_of_zeros_is_zero_and_a_row_that_is_not_finite_shows():
    weight = weight_of((6, 8)).at[1].set(0.0).at[2, 3].set(jnp.nan).at[4, 5].set(jnp.inf)
    matrix = int8_matmul.quantise(weight)
    assert matrix.scales_v[1] > 0  # 0/0 as an integer depends on the device
    logits = int8_matmul.matmul(jnp.ones((2, 8)), matrix)
    assert (logits[:, 1] == 0).all()
    assert jnp.isfinite(logits).all(axis=0).tolist() == [True, True, False, True, False, True]
