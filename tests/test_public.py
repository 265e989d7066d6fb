"""The public interface: names, laziness, and that a loaded model gives what the commands print."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mamba_jax
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.generation import generate_text
from tests.support import naive
from tests.support.made import random_params
from tests.support.tiny_models import CONFIGS
from tests.support.tiny_run import quick_compiles  # noqa: F401

SETTINGS = {"max_tokens": 9, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module", params=["mamba", "hybrid"])
def saved(request, tmp_path_factory):
    """(folder of a run, its config, its parameters)."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(model=CONFIGS[request.param], data=DataConfig(tokenizer="bytes"))
    params = random_params(config.model, 5)
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": params, "step": jnp.int32(2)}
        writer.save("step_2", jax.tree.map(jnp.asarray, state), Metadata(config, 2, 0, "none"))
    return folder, config, params


def test_generate_equals_the_command(saved):
    folder, config, params = saved
    model = mamba_jax.load_model(folder)
    expected = generate_text(
        params, config.model, load_tokenizer("bytes"), ["def ", "x"], **SETTINGS
    )
    assert model.generate(["def ", "x"], **SETTINGS) == expected
    assert model.generate("def ", **SETTINGS) == expected[0]
    assert model.config == config and model.tokenizer.name == "bytes"
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def test_logits_follow_the_separator_and_each_token(saved):
    folder, config, params = saved
    logits_tv = mamba_jax.load_model(folder).logits("abc")
    expected = naive.logits(params, config.model, np.array([256, *b"abc"]))
    expected = expected[:, : config.model.vocab_size]  # not the rows that pad the table
    # float32 sums in another order.
    np.testing.assert_allclose(logits_tv, expected, rtol=2e-4, atol=2e-4)


def test_a_folder_without_a_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        mamba_jax.load_model(tmp_path / "nowhere")


def test_every_public_name_exists_and_nothing_is_imported_before():
    program = """
import sys
import mamba_jax
assert "jax" not in sys.modules
for name in mamba_jax.__all__:
    assert callable(getattr(mamba_jax, name)), name
assert set(mamba_jax.__all__) <= set(dir(mamba_jax))
try:
    mamba_jax.load_modle
except AttributeError as error:
    assert "load_modle" in str(error)
else:
    raise AssertionError
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
