"""The training state: everything a run must keep to resume as if it had never stopped."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mamba_jax.config import RunConfig
from mamba_jax.models import build
from mamba_jax.parallel.rules import param_shardings
from mamba_jax.training.optimizer import make_optimizer

# ``step`` int32 scalar, steps taken, skipped ones included; ``params``, ``opt_state``: trees of
# float32 arrays; ``gradient_norm_mean`` float32 scalar, 0 before the first accepted step.
TrainState = dict[str, Any]

# The run's one seed is split into streams by these numbers; never change them: a run is a function
# of its seed. (Data order and split draw from the seed by streams of their own, off the device.)
WEIGHTS, DROPOUT = 0, 1


def stream_key(seed: int, stream: int) -> jax.Array:
    """Returns the random key of one stream (``WEIGHTS`` or ``DROPOUT``) of a run."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def init_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Makes the state of step 0, every array on its own devices.

    Shapes come first, then shardings, and only then bytes: no device ever holds more
    than its share. The numbers do not depend on the mesh.
    """
    shardings = param_shardings(jax.eval_shape(lambda: _make_state(config)), mesh)
    return jax.jit(lambda: _make_state(config), out_shardings=shardings)()


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Returns the state as ``jax.ShapeDtypeStruct`` with shardings, e.g. to restore into."""
    shapes = jax.eval_shape(lambda: _make_state(config))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        param_shardings(shapes, mesh),
    )


def _make_state(config: RunConfig) -> TrainState:
    return state_of(build.init(config.model, stream_key(config.seed, WEIGHTS)), config)


def state_of(params: build.Params, config: RunConfig) -> TrainState:
    """Makes the state of step 0 of given parameters."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": make_optimizer(config.training).init(params),
        "gradient_norm_mean": jnp.zeros((), jnp.float32),
    }
