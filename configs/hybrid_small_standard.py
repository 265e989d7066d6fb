"""Size "hybrid-small-standard": Hybrid Recursive Mamba, depth 3, 608 wide, 10 layers.

    mamba-jax train --config=configs/hybrid_small_standard.py

Parameters: 91,368,440 with the GPT-2 vocabulary, 60,783,608 of them outside the embedding;
known as "112M", which is a label, not a count.

What to expect: 100,000 steps of 32 windows of 2,048 tokens, 6.6 billion tokens in all. Weights and
the optimizer's two moments take 1.1 GB, a gradient 0.4 GB more, activations come on top:
the microbatch is chosen so that they fit `--vram` (`mamba-jax memory` shows the plan).
"""

from ml_collections import ConfigDict

from mamba_jax.config import preset_config


def get_config() -> ConfigDict:
    """Returns the size with the training preset "default"; "fast" and "careful" exist too."""
    return preset_config("hybrid-small-standard")
