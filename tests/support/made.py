"""A checkpoint to export, and random parameters."""

import dataclasses

import jax
import numpy as np

from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.models import build
from tests.support import tiny

# Untied: the greedy text of a random tied model is one token again and again. The epsilon is
# not a default, so that a missing one is noticed.
UNTIED = dataclasses.replace(tiny.MAMBA, vocab_size=257, tie_embeddings=False, norm_eps=3e-4)


def metadata_of(model, **data):
    """The metadata of a run of this model."""
    config = RunConfig(name="tiny", model=model, data=DataConfig(data_dir="poems", **data))
    return Metadata(config, 3, 24, "x", metrics={"eval_loss": 1.5})


def write_checkpoint(folder, model, params, tokenizer="bytes"):
    """Writes ``folder/final``."""
    state = {"step": jax.numpy.int32(3), "params": params}
    files = load_tokenizer(tokenizer).files
    with CheckpointWriter(
        folder, keep_last=1, keep_every=0, log=lambda line: None, files=files
    ) as writer:
        writer.save("final", state, metadata_of(model, tokenizer=tokenizer))


def random_params(config, seed=0):
    """Float32 everywhere but in the rows of no token, without compiling anything."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
        build.abstract_params(config),
    )
    for part, name in (("embed", "embedding"), ("lm_head", "kernel")):
        if part in params:
            params[part][name][config.vocab_size :] = 0
    return params
