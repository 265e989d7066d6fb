"""Hugging Face's ``MambaForCausalLM``: its tensors, logits and gradients, from a file."""

import pathlib

import numpy as np
import pytest

from mamba_jax.config import ModelConfig

CONFIG = ModelConfig(family="mamba", d_model=40, n_layers=3, vocab_size=61, dtype="float32")


def as_params(golden, kind):
    """The golden file's tensors (PyTorch layout) as our tree."""
    layers = range(CONFIG.n_layers)
    stack = lambda name, change=lambda a: a: np.stack(
        [change(golden[f"{kind}/backbone.layers.{i}.{name}"]) for i in layers]
    )
    transposed = lambda a: a.T
    e = CONFIG.d_inner
    beyond = CONFIG.padded_vocab_size - CONFIG.vocab_size  # rows of no id: zeros, gradient too
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


@pytest.fixture(name="golden", scope="module")
def golden_file():
    return np.load(pathlib.Path(__file__).parents[1] / "models" / "golden" / "mamba.npz")
