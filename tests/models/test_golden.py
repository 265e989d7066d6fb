"""Mamba against an independent implementation: Hugging Face ``MambaForCausalLM`` (golden file)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.models import build
from tests.support.golden import CONFIG, as_params, golden_file  # noqa: F401

# float32 rounding over 3 layers; logits go up to about 5.
TOLERANCE = 2e-5


@pytest.mark.parametrize("scan", ["reference", "chunked", "sequential"])
def test_logits_and_gradients_equal_hugging_face(golden, scan):
    import dataclasses

    config = dataclasses.replace(CONFIG, scan=scan)
    params = jax.tree.map(jnp.asarray, as_params(golden, "weight"))
    jax.tree.map(
        lambda ours, ref: np.testing.assert_equal(ours.shape, ref.shape),
        params,
        build.abstract_params(config),
    )
    direction = jnp.asarray(golden["direction"])

    def objective(params):
        logits, _, _ = build.apply(params, config, jnp.asarray(golden["tokens"], jnp.int32))
        return (direction * logits).sum(), logits

    (_, logits), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE, rtol=TOLERANCE)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(gradients),
        jax.tree.leaves(as_params(golden, "gradient")),
        strict=True,
    ):
        # Relative to the tensor's largest entry: entries are sums of cancelling terms.
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < TOLERANCE, f"{jax.tree_util.keystr(path)}: {error}"
