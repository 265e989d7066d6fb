"""Microbatches add up to the batch, values and gradients, however unequal their target tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.training.accumulate import accumulate

# Sums of 8 float32 numbers of about 1 in another order.
RTOL = ATOL = 2e-6

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=3), jnp.float32),
}
# Eight sequences whose target tokens are spread most unequally; two microbatches of four have none.
BATCH = {
    "x": jnp.asarray(RNG.normal(size=(8, 7, 5)), jnp.float32),
    "tokens": jnp.asarray([7.0, 0.0, 1.0, 0.0, 2.0, 0.0, 7.0, 0.0], jnp.float32),
}


def sums(params, batch, key):
    """The losses of each sequence's first ``tokens`` positions, summed."""
    loss_bt = jnp.sum(jnp.tanh(batch["x"] @ params["w"] + params["b"]) ** 2, axis=-1)
    counts_bt = jnp.arange(7) < batch["tokens"][:, None]
    return jnp.sum(loss_bt * counts_bt), (
        counts_bt.sum().astype(jnp.float32),
        {"mean": loss_bt.mean()},
    )


def full_batch(params):
    """The mean over target tokens as one sum over everything, without a mask."""
    loss_bt = jnp.sum(jnp.tanh(BATCH["x"] @ params["w"] + params["b"]) ** 2, axis=-1)
    total = sum(loss_bt[i, : int(n)].sum() for i, n in enumerate(BATCH["tokens"]))
    return total / 17


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
def test_equals_the_full_batch(microbatches):
    function = accumulate(jax.value_and_grad(sums, has_aux=True), microbatches)
    (loss, (tokens, aux)), gradients = jax.jit(function)(PARAMS, BATCH, None)
    true_loss, true_gradients = jax.value_and_grad(full_batch)(PARAMS)
    assert float(tokens) == 17
    np.testing.assert_allclose(loss, true_loss, rtol=RTOL)
    for name, truth in true_gradients.items():
        np.testing.assert_allclose(gradients[name], truth, rtol=RTOL, atol=ATOL, err_msg=name)
    every_position = jnp.sum(jnp.tanh(BATCH["x"] @ PARAMS["w"] + PARAMS["b"]) ** 2, axis=-1)
    np.testing.assert_allclose(aux["mean"], every_position.mean(), rtol=RTOL)


def test_every_microbatch_draws_differently():
    def draw(params, batch, key):
        return jax.random.uniform(key), (jnp.ones(()), {})

    function = lambda n: accumulate(lambda *a: (draw(*a), PARAMS), n)
    batch, key = {"x": jnp.zeros((2, 1))}, jax.random.key(3)
    (one, _), _ = function(1)(PARAMS, batch, key)
    (mean_of_two, _), _ = function(2)(PARAMS, batch, key)
    second = 2 * mean_of_two - one
    np.testing.assert_allclose(second, jax.random.uniform(jax.random.fold_in(key, 1)), rtol=1e-6)
    assert abs(float(one - second)) > 1e-3


def test_a_batch_that_does_not_divide_is_an_error():
    function = accumulate(jax.value_and_grad(sums, has_aux=True), 3)
    with pytest.raises(ValueError, match="3 microbatches"):
        function(PARAMS, BATCH, None)
