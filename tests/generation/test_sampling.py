"""Sampling against a distribution worked out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.errors import UserError
from mamba_jax.generation import Sampling, sample

LOGITS = np.random.default_rng(3).normal(size=(3, 12)).astype(np.float32) * 2
N_DRAWS = 4000


def oracle(logits, temperature, top_k, top_p):
    """The exact distribution of one row, by sorting in float64."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)[order]
    if top_k:
        weights[top_k:] = 0
    weights /= weights.sum()
    kept = 1  # the fewest that reach top_p
    while kept < len(weights) and weights[:kept].sum() < top_p:
        kept += 1
    weights[kept:] = 0
    probabilities = np.zeros_like(weights)
    probabilities[order] = weights / weights.sum()
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.6, 0, 1.0),
        (1.0, 5, 1.0),
        (1.0, 0, 0.8),
        (1.5, 0, 0.8),
        (1.3, 7, 0.6),
        (1.0, 100, 0.9),
    ],
)
def test_distribution(temperature, top_k, top_p):
    keys = jax.random.split(jax.random.key(0), N_DRAWS)
    for row in LOGITS:
        expected = oracle(row, temperature, top_k, top_p)
        tokens = sample(jnp.tile(row, (N_DRAWS, 1)), keys, Sampling(temperature, top_k, top_p))
        shares = np.bincount(tokens, minlength=len(row)) / N_DRAWS
        assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
        # Five standard deviations of a binomial share: one in a million, and the seed is fixed.
        tolerance = 5 * np.sqrt(expected * (1 - expected) / N_DRAWS)
        assert np.all(np.abs(shares - expected) <= tolerance)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0), Sampling(0, top_k=3), Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(1e-20)],
)
def test_limits_are_greedy(sampling):
    keys = jax.random.split(jax.random.key(1), len(LOGITS))
    assert np.array_equal(sample(jnp.asarray(LOGITS), keys, sampling), LOGITS.argmax(-1))


def test_top_k_keeps_exactly_k_of_equals():
    keys = jax.random.split(jax.random.key(2), 500)
    tokens = sample(jnp.zeros((500, 12)), keys, Sampling(top_k=4))
    assert set(np.asarray(tokens)) == {0, 1, 2, 3}


def test_rows_depend_on_their_own_key_and_logits_alone():
    keys = jax.random.split(jax.random.key(3), len(LOGITS))
    sampling = Sampling(1.0, 8, 0.95)
    together = sample(jnp.asarray(LOGITS), keys, sampling)
    alone = [
        int(sample(jnp.asarray(LOGITS[i : i + 1]), keys[i : i + 1], sampling)[0]) for i in range(3)
    ]
    assert together.tolist() == alone
    assert together.dtype == jnp.int32


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_errors_name_the_value(values, named):
    with pytest.raises(UserError, match=named):
        Sampling(**values)
