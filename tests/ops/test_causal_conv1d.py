"""The causal conv against a literal loop, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.ops.causal_conv1d import causal_conv1d

# Two rows: one continues a document of 2 tokens and holds two more, one starts fresh.
POSITION = np.asarray([[2, 3, 0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8]])


def literal(x, weight, bias, state, position):
    """One token at a time, by the definition."""
    k = len(weight)
    rows = []
    for b in range(len(x)):
        history = jnp.concatenate([state[b], x[b]])
        rows.append(
            jnp.stack(
                [
                    bias
                    + sum(
                        weight[k - 1 - back] * history[k - 1 + t - back]
                        for back in range(k)
                        if position[b, t] >= back
                    )
                    for t in range(x.shape[1])
                ]
            )
        )
    return jnp.stack(rows)


@pytest.mark.parametrize("t", [1, 2, 9])
def test_equals_the_definition_within_documents(t):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (2, t, 5))
    weight, bias = jax.random.normal(keys[1], (4, 5)), jax.random.normal(keys[2], (5,))
    state = jax.random.normal(keys[3], (2, 3, 5))
    direction = jax.random.normal(keys[4], x.shape)
    position = POSITION[:, :t]

    def run(conv):
        total = lambda *arguments: (conv(*arguments) * direction).sum()
        arguments = (x, weight, bias, state)
        return conv(*arguments), *jax.grad(total, argnums=(0, 1, 2, 3))(*arguments)

    ours = run(
        lambda x, weight, bias, state: causal_conv1d(
            x, weight, bias, initial_state_bje=state, position_bt=jnp.asarray(position)
        )[0]
    )
    truth = run(lambda *arguments: literal(*arguments, position))
    for a, b in zip(ours, truth, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)  # float32, sums of at most 18 terms


def test_the_final_state_holds_the_last_inputs_of_the_document():
    x = jnp.arange(18.0).reshape(2, 9, 1) + 1
    state = causal_conv1d(x, jnp.ones((4, 1)), jnp.zeros(1), position_bt=jnp.asarray(POSITION))[1]
    # The first row's last document has two tokens: nothing before it remains.
    np.testing.assert_array_equal(state[..., 0], [[0, 8, 9], [16, 17, 18]])


def test_a_wrong_initial_state_is_refused():
    with pytest.raises(ValueError, match="initial state"):
        causal_conv1d(
            jnp.ones((2, 3, 5)),
            jnp.ones((4, 5)),
            jnp.ones(5),
            initial_state_bje=jnp.ones((2, 2, 5)),
        )
