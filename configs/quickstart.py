"""Quick start: a small Hybrid Recursive Mamba, trained on the Python standard library's own source.

    ./launch/quickstart.sh        or        python -m mamba_jax.train --config=configs/quickstart.py

Parameters: 1,158,436 with the byte vocabulary, 1,125,540 of them outside the embedding.

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
    config.sample_prompt = "def "
    config.data.tokenizer = "bytes"
    config.model.update(
        family="hybrid", d_model=128, n_layers=4, max_seq_len=256, attention_window=64
    )
    config.training.update(
        learning_rate=2e-3,
        warmup_steps=40,
        max_steps=600,
        eval_steps=200,
        save_steps=200,
        eval_windows=64,
    )
    config.vram.update(effective_batch_size=8, batch_size=8)
    return config
