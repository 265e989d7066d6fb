"""Quick start: a small Hybrid Recursive Mamba, trained on the Python standard library's own source.

    ./launch/quickstart.sh        or        mamba-jax train --config=configs/quickstart.py

Parameters: 7,282,712 with the GPT-2 vocabulary, 843,800 of them outside the embedding.

What to expect: a run of minutes on two CPU cores that ends with losses, a sample that looks like
Python, a loss curve and the commands to try next. It shows that everything works; it is not a model
to keep.
"""

from ml_collections import ConfigDict

from mamba_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the configuration of the quick start."""
    config = default_config()
    config.name = "quickstart"
    config.output_dir = "checkpoints/quickstart"
    # The default seed happens to hold out two files that are mostly white space.
    config.seed = 0
    config.sample_prompt = "import os\n\n\ndef read_file(path):"
    config.model.update(
        family="hybrid",
        d_model=128,
        n_layers=3,
        recursion_depth=2,
        max_seq_len=256,
        attention_window=64,
    )
    # Few tokens fit into minutes: small batches make many steps of them, at a high learning rate.
    config.training.update(
        learning_rate=3e-3,
        warmup_steps=30,
        max_steps=450,
        eval_steps=150,
        save_steps=150,
        eval_windows=64,
    )
    config.vram.update(effective_batch_size=4, batch_size=4)
    return config
