"""Targets that are not learnt: the loss, its gradients and the evaluation know nothing of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.training.loss import loss_sums, token_nll
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_eval_step, make_train_step
from tests.training.tiny_run import EOT, tiny_run, windows_of


@pytest.fixture(scope="module")
def setting():
    config = tiny_run()
    mesh = make_mesh(config.parallel)
    with_data = lambda **fields: dataclasses.replace(
        config, data=dataclasses.replace(config.data, **fields)
    )
    return with_data, mesh, init_state(config, mesh)["params"]


def hide(windows, rng):
    hidden = rng.random(windows.shape) < 0.4
    hidden[:, 0] = False
    return np.where(hidden, ~windows, windows), ~hidden[:, 1:]
