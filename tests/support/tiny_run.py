"""A run so small that a test can afford to compile its step."""

import dataclasses

import jax
import numpy as np
import pytest

from mamba_jax.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig, VramConfig
from mamba_jax.parallel.mesh import make_mesh

EOT = 0
MAMBA = ModelConfig(family="mamba", d_model=16, n_layers=2, d_state=4, vocab_size=32)
HYBRID = dataclasses.replace(
    MAMBA, family="hybrid", recursion_depth=2, attention_scales=(2,), attention_window=4
)


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Compiles twice as fast, at the price of slower programs; import it to have it in a module."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def run_config(model=MAMBA, *, batch=8, microbatch=8, fsdp=1, seed=42, **training):
    """A run of ``batch`` sequences a step, in microbatches, with these fields of training."""
    defaults = {"learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 100, "loss_chunk_tokens": 32}
    return RunConfig(
        seed=seed,
        model=model,
        training=TrainingConfig(**(defaults | training)),
        vram=VramConfig(effective_batch_size=batch, batch_size=microbatch),
        parallel=ParallelConfig(fsdp=fsdp),
    )


def one_device():
    """The mesh of a machine with a single device."""
    return make_mesh(ParallelConfig(), jax.devices()[:1])


def windows(batch=8, tokens=12, seed=0, vocabulary=MAMBA.vocab_size):
    """Random tokens with a document's start at the front and, now and then, inside."""
    w = np.random.default_rng(seed).integers(1, vocabulary, (batch, tokens + 1), dtype=np.int32)
    w[:, 0] = EOT
    w[::2, tokens // 2] = EOT
    return w


def to_host(tree):
    """A copy that outlives the donation of the tree's arrays."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same_bits(a, b):
    """Equal leaf by leaf, NaN equal to NaN."""
    jax.tree.map(np.testing.assert_array_equal, to_host(a), to_host(b))
