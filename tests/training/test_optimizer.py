"""AdamW against the algorithm written out in float64, and which parameters decay."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamba_jax.config import TrainingConfig
from mamba_jax.models import build
from mamba_jax.training.optimizer import decay_mask, make_optimizer
from tests.support.tiny import VARIANTS

CONFIG = TrainingConfig(gradient_clip=1.0, beta1=0.9, beta2=0.95, adam_eps=1e-8, weight_decay=0.1)
RATES = (3e-3, 1e-2, 2e-3, 5e-3, 1e-3)
DECAYS = {"kernel": True, "A_log": False, "scale": False}


def adamw_float64(params, gradients_by_step):
    """Algorithm 2 of arXiv 1711.05101 with the gradient clipped to the global norm first."""
    p = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    for t, (rate, gradients) in enumerate(zip(RATES, gradients_by_step, strict=True), start=1):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        for name, gradient in gradients.items():
            g = gradient * min(1.0, CONFIG.gradient_clip / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            m_hat, v_hat = m[name] / (1 - 0.9**t), v[name] / (1 - 0.95**t)
            decay = CONFIG.weight_decay * p[name] if DECAYS[name] else 0.0
            p[name] = p[name] - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
    return p


def test_matches_float64_adamw():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 5), "A_log": (4, 2), "scale": (2, 6)}
    draw = lambda scale: {
        name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()
    }
    params = draw(1.0)
    gradients_by_step = [draw(scale) for scale in (2.0, 0.05, 1.0, 0.01, 10.0)]
    norms = [optax.tree.norm(gradients) for gradients in gradients_by_step]
    assert min(norms) < CONFIG.gradient_clip < max(norms)  # both sides of the clip

    optimizer = make_optimizer(CONFIG)
    ours = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(ours)
    for rate, gradients in zip(RATES, gradients_by_step, strict=True):
        updates, state = optimizer.update(gradients, state, ours)
        ours = jax.tree.map(lambda p, u, rate=rate: p - rate * u, ours, updates)

    for name, truth in adamw_float64(params, gradients_by_step).items():
        # Five float32 updates of about 1e-2 on values of about 1: 5 · 2⁻²⁴, doubled twice.
        np.testing.assert_allclose(ours[name], truth, rtol=0, atol=1.2e-6, err_msg=name)


def test_moments_are_float32():
    params = {"kernel": jnp.zeros((2, 2), jnp.float32)}
    leaves = jax.tree.leaves(make_optimizer(CONFIG).init(params))
    assert {leaf.dtype for leaf in leaves if leaf.ndim} == {jnp.dtype("float32")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_matrices_and_embeddings_decay(variant):
    mask = decay_mask(build.abstract_params(VARIANTS[variant]))

    def names(wanted):
        """Without the kind of their stack."""
        paths = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, decays in jax.tree_util.tree_leaves_with_path(mask)
            if decays in wanted
        ]
        return {re.sub("^layers/[MAH]/", "layers/", path) for path in paths}

    matrices = {
        "embed/embedding",
        "lm_head/kernel",
        *(f"layers/mixer/{n}/kernel" for n in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        "layers/mixer/conv1d/kernel",
        *(f"layers/recursion/{n}/kernel" for n in ("up", "down", "gate")),
        *(f"layers/attention/{n}/kernel" for n in ("qkv", "o_proj")),
        "layers/fusion/proj/kernel",
    }
    assert names([True]) == matrices & names([True, False])
    assert not names([False]) & matrices


def test_an_unclassified_parameter_is_an_error():
    with pytest.raises(ValueError, match=r"layers\.mixer\.novelty"):
        decay_mask({"layers": {"mixer": {"novelty": jnp.zeros(3)}}})
