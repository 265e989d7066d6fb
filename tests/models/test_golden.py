"""Mamba against an independent implementation: Hugging Face ``MambaForCausalLM`` (golden file)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import ModelConfig
from mamba_jax.models import build

CONFIG = ModelConfig(family="mamba", d_model=40, n_layers=3, vocab_size=61, dtype="float32")
# float32 rounding over 3 layers; logits go up to about 5.
TOLERANCE = 2e-5


def as_params(golden, kind):
    """The golden file's tensors (PyTorch layout) as our tree."""
    layers = range(CONFIG.n_layers)
    stack = lambda name, change=lambda a: a: np.stack(
        [change(golden[f"{kind}/backbone.layers.{i}.{name}"]) for i in layers]
    )
    transposed = lambda a: a.T
    e = CONFIG.d_inner
    beyond = CONFIG.padded_vocab_size - CONFIG.vocab_size  # rows without an id: zeros, gradient too
    assert beyond == 3
    return {
        "embed": {
            "embedding": np.pad(golden[f"{kind}/backbone.embeddings.weight"], ((0, beyond), (0, 0)))
        },
        "layers": {
            "norm": {"scale": stack("norm.weight")},
            "mixer": {
                "in_proj": {
                    "kernel": stack("mixer.in_proj.weight", lambda a: a.T.reshape(-1, 2, e))
                },
                "conv1d": {
                    "kernel": stack("mixer.conv1d.weight", lambda a: a[:, 0].T),
                    "bias": stack("mixer.conv1d.bias"),
                },
                "x_proj": {"kernel": stack("mixer.x_proj.weight", transposed)},
                "dt_proj": {
                    "kernel": stack("mixer.dt_proj.weight", transposed),
                    "bias": stack("mixer.dt_proj.bias"),
                },
                "A_log": stack("mixer.A_log"),
                "D": stack("mixer.D"),
                "out_proj": {"kernel": stack("mixer.out_proj.weight", transposed)},
            },
        },
        "norm_f": {"scale": golden[f"{kind}/backbone.norm_f.weight"]},
    }


@pytest.fixture(scope="module")
def golden():
    return np.load(pathlib.Path(__file__).parent / "golden" / "mamba.npz")


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
