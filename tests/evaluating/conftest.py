"""What the commands evaluate."""

import jax.numpy as jnp
import pytest

from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from tests.support.tiny_models import CONFIGS, model_of
from tests.support.tiny_run import quick_compiles  # noqa: F401


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose last checkpoint holds the tiny Mamba."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(name="tiny", model=CONFIGS["mamba"], data=DataConfig(tokenizer="bytes"))
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": model_of("mamba").params, "step": jnp.int32(1)}
        writer.save("final", state, Metadata(config, 1, 0, "none"))
    return str(folder)
