"""A long document over several windows: the state is carried, and the loss is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.models import build
from mamba_jax.training.loss import token_nll
from tests.support.tiny_run import (
    EOT,
    HYBRID,
    MAMBA,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
    windows,
)


@pytest.mark.parametrize("model", [MAMBA, HYBRID], ids=["mamba", "hybrid"])
def test_two_windows_with_carried_state_equal_one_long_window(model):
    config, mesh = run_config(model), one_device()
    params = build.init(model, jax.random.key(0))
    # Token 7 of each row starts or continues a document; so does the cut, at token 9.
    long = jnp.asarray(windows(batch=4, tokens=18))
    run = jax.jit(lambda w, cache=None: token_nll(params, config, mesh, w, EOT, None, cache))
    whole, _, _ = run(long)
    first, _, cache = run(long[:, :10])
    second, _, _ = run(long[:, 9:], cache)
    both = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(both, whole, atol=1e-5)  # float32 rounding at values near 3
    fresh, _, _ = run(long[:, 9:])
    assert float(jnp.abs(fresh - second).max()) > 1e-3, "the state made no difference"
