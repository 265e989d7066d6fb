"""Size "medium-lite": Mamba, 512 wide, 8 layers.

    mamba-jax train --config=configs/medium_lite.py

Parameters: 39,318,016 with the GPT-2 vocabulary, 13,562,368 of them outside the embedding;
known as "90M", which is a label, not a count.

What to expect: 100,000 steps of 32 windows of 2,048 tokens, 6.6 billion tokens in all. Weights and
the optimizer's two moments take 0.5 GB, a gradient 0.2 GB more, activations come on top:
the microbatch is chosen so that they fit `--vram` (`mamba-jax memory` shows the plan).
"""

from ml_collections import ConfigDict

from mamba_jax.config import preset_config


def get_config() -> ConfigDict:
    """Returns the size with the training preset "default"; "fast" and "careful" exist too."""
    return preset_config("medium-lite")
