"""Tiny models of every variant, with weights away from their initialisation's special points."""

import dataclasses

import jax
import jax.numpy as jnp

from mamba_jax.config import ModelConfig
from mamba_jax.models import build

MAMBA = ModelConfig(family="mamba", d_model=32, n_layers=2, vocab_size=64, dtype="float32")
# The window is shorter than the rows of the tests, so that keys leave it.
HYBRID = dataclasses.replace(
    MAMBA, family="hybrid", attention_window=4, attention_head_size=8, recursion_depth=2
)
# Plans with one to three kinds, with and without a part that repeats.
PLANS = {
    plan: dataclasses.replace(HYBRID, plan=plan, n_layers=n_layers)
    for plan, n_layers in {
        "M*3": 3,
        "H*3": 3,
        "M,H,M": 3,
        "A,M": 2,
        "(M,A)*2": 4,
        "A,M,H": 3,
        "(M,M,H)*2": 6,
        "A,(M,M,H)*2,A": 8,
    }.items()
}
VARIANTS = {
    "mamba": MAMBA,
    "hybrid": HYBRID,
    "hybrid, attention after recursion": dataclasses.replace(
        HYBRID, recursion_reads_attention=False
    ),
    "hybrid, scale 2, shared gate": dataclasses.replace(
        HYBRID, attention_scales=(2,), attention_window=3, shared_gate=True
    ),
    "hybrid, scale 4, channel gate, pass embedding": dataclasses.replace(
        HYBRID, attention_scales=(4,), attention_window=3, gate="channel", pass_embedding=True
    ),
    "hybrid, no recursion": dataclasses.replace(HYBRID, recursion_depth=0, fusion="sum"),
    "hybrid, no attention": dataclasses.replace(
        HYBRID, attention_scales=(), fusion="norm", tie_embeddings=False
    ),
    "plan A,M,H,M, signed": dataclasses.replace(
        HYBRID,
        plan="A,M,H,M",
        n_layers=4,
        attention_scales=(1, 4),
        fusion="residual_zero",
        eigenvalues="signed",
    ),
    "plan (M,M,H)*2, global attention": dataclasses.replace(
        PLANS["(M,M,H)*2"], attention_scales=(2,), attention_window=0, max_seq_len=32
    ),
}
TOKENS = jax.random.randint(jax.random.key(7), (2, 29), 0, MAMBA.vocab_size)


def params_of(config, seed=0):
    """Initialised weights plus N(0, 0.1) noise: no gate, norm or output stays at its start."""
    params = build.init(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def assert_close(ours, truth, tolerance):
    """Largest difference relative to the truth's largest entry, leaf by leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(truth), strict=True
    ):
        a, b = jnp.asarray(a), jnp.asarray(b)
        assert a.shape == b.shape, (jax.tree_util.keystr(path), a.shape, b.shape)
        error = float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-3))
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance}"
