"""Targets outside the loss mask affect neither the loss, its gradients nor the evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mamba_jax.config import DataConfig
from mamba_jax.training.loss import loss_sums, token_nll
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_eval_step
from tests.support.tiny_run import (
    EOT,
    MAMBA,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
    windows,
)

PLAIN = run_config()
MASKED = dataclasses.replace(PLAIN, data=DataConfig(loss_on="answer"))


def hidden_windows():
    """Windows with some tokens inverted, among them a whole row; and what counts."""
    whole = windows()
    mask = np.random.default_rng(1).random(whole.shape) < 0.6
    mask[3] = False
    mask[:, 0] = True
    return whole, np.where(mask, whole, ~whole), mask[:, 1:].astype(np.float32)


def test_loss_and_gradients_are_those_of_the_unmasked_targets():
    """Against the nll of every token of the plain windows, weighted outside; 1e-5: float32 sums."""
    mesh, (whole, hidden, loss_mask_bt) = one_device(), hidden_windows()
    params = init_state(PLAIN, mesh)["params"]

    def masked(params):
        total, (count, _) = loss_sums(params, MASKED, mesh, hidden, jnp.ones(8), EOT)
        return total, count

    def by_hand(params):
        nll_bt, _, _ = token_nll(params, PLAIN, mesh, jnp.asarray(whole), EOT)
        return jnp.sum(nll_bt * loss_mask_bt)

    (total, count), gradients = jax.jit(jax.value_and_grad(masked, has_aux=True))(params)
    expected, expected_gradients = jax.jit(jax.value_and_grad(by_hand))(params)
    assert count == loss_mask_bt.sum() and 0 < count < loss_mask_bt.size
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients,
        expected_gradients,
    )


def test_evaluation_counts_tokens_and_bytes_of_the_unmasked_targets():
    mesh, (whole, hidden, loss_mask_bt) = one_device(), hidden_windows()
    params = init_state(PLAIN, mesh)["params"]
    token_bytes = np.arange(MAMBA.vocab_size, dtype=np.int32)
    weights_b = np.array([1, 0, 1, 1, 1, 1, 1, 0], np.float32)
    sums = make_eval_step(MASKED, mesh, EOT, token_bytes)(params, hidden, weights_b)
    weights_bt = weights_b[:, None] * loss_mask_bt
    nll_bt, _, _ = token_nll(params, PLAIN, mesh, jnp.asarray(whole), EOT)
    assert float(sums["targets"]) == weights_bt.sum()
    assert float(sums["bytes"]) == (weights_bt * token_bytes[whole[:, 1:]]).sum()
    np.testing.assert_allclose(sums["nll"], (weights_bt * np.asarray(nll_bt)).sum(), rtol=1e-5)


def test_plain_concatenation_does_not_reset_at_documents():
    """Only the tokens after a separator inside a window may differ, and they do."""
    mesh, whole = one_device(), jnp.asarray(windows())
    params = init_state(PLAIN, mesh)["params"]
    concat = dataclasses.replace(PLAIN, data=DataConfig(window="concat"))
    reset, carried = (
        np.asarray(token_nll(params, config, mesh, whole, EOT)[0]) for config in (PLAIN, concat)
    )
    inside = whole.shape[1] // 2
    np.testing.assert_allclose(reset[1::2], carried[1::2], rtol=1e-6)
    np.testing.assert_allclose(reset[::2, :inside], carried[::2, :inside], rtol=1e-6)
    assert np.abs(reset[::2, inside:] - carried[::2, inside:]).max() > 1e-5
