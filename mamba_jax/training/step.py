"""One training step and one evaluation step, each a single compiled program.

Legend: b sequences, t tokens of a window without its last.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mamba_jax.config import RunConfig
from mamba_jax.models import build
from mamba_jax.parallel.mesh import batch_sharding, check_batch, replicated
from mamba_jax.training.accumulate import accumulate
from mamba_jax.training.evaluation import OVER_BATCHES
from mamba_jax.training.loss import loss_sums, target_weights, token_nll
from mamba_jax.training.optimizer import make_optimizer
from mamba_jax.training.schedule import learning_rate
from mamba_jax.training.state import DROPOUT, TrainState, abstract_state, stream_key

# Share of its old value that the mean gradient norm keeps at a step: it looks about 100 steps back.
NORM_MEAN_DECAY = 0.99

Metrics = dict[str, Any]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def make_train_step(config: RunConfig, mesh: Mesh, eot_id: int) -> TrainStep:
    """Compiles ``step(state, windows) → (state, metrics)``.

    The state is donated: its arrays are used up by the call. ``windows`` is int32 (effective batch,
    t + 1), from the host or laid out by ``batch_sharding(mesh)``.

    ``step`` always advances. Parameters, moments and the mean gradient norm stay as they
    were, bit for bit, where the update would do harm:

    - the loss or the gradient norm is not finite, or
    - the norm exceeds ``training.max_gradient_norm``, or
    - ``training.skip_spikes`` is not 0 and the norm exceeds it times the mean norm of the steps
      accepted so far. The first one sets that mean, so it cannot itself be a spike.

    Returns:
      The function. Its metrics are device arrays, to be read while the next step runs:
      ``loss``, nats per target token before the update; ``gradient_norm``, global and before
      clipping; ``learning_rate``; ``target_tokens``; ``finite`` (bool); ``skipped`` (bool), the
      update was not made; ``tensor_norms``, gradient norm by parameter (see ``culprits``); ``aux``,
      what the model reports of itself, averaged over the batch.

    Raises:
      UserError: if the microbatch cannot be divided over the devices.
    """
    training = config.training
    check_batch(config.vram.batch_size, mesh)
    optimizer = make_optimizer(training)
    schedule = learning_rate(training)

    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))

    def sums(params: Any, batch: Any, key: jax.Array | None) -> Any:
        windows, weights = batch
        return loss_sums(params, config, mesh, windows, weights, eot_id, key)

    def sums_and_gradients(params: Any, batch: Any, key: jax.Array | None) -> Any:
        result, gradients = jax.value_and_grad(sums, has_aux=True)(params, batch, key)
        # Whole gradients first, so that their sharding does not spread back to the activations.
        gradients = constrain(gradients, replicated(mesh))
        return result, constrain(gradients, state_shardings["params"])

    constrain = jax.lax.with_sharding_constraint
    loss_and_gradients = accumulate(sums_and_gradients, config.vram.accumulation_steps)

    def step(state: TrainState, windows: jax.Array) -> tuple[TrainState, Metrics]:
        params, opt_state, norm_mean = (
            state["params"],
            state["opt_state"],
            state["gradient_norm_mean"],
        )
        key = None
        if config.model.dropout > 0:
            key = jax.random.fold_in(stream_key(config.seed, DROPOUT), state["step"])
        batch = (windows, jnp.ones(windows.shape[0], jnp.float32))
        # By default XLA moves activations, not weights, where a weight is divided. Gathered weights
        # make the model purely data-parallel; only the state, which persists, is divided.
        gathered = constrain(params, replicated(mesh))
        (loss, (target_tokens, aux)), gradients = loss_and_gradients(gathered, batch, key)

        with jax.named_scope("optimizer"):
            tensor_norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.sum(leaf**2)), gradients)
            norm = optax.tree.norm(tensor_norms)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            accepted = finite & (norm <= training.max_gradient_norm)
            if training.skip_spikes:
                accepted &= (norm <= training.skip_spikes * norm_mean) | (norm_mean == 0)

            rate = schedule(state["step"])
            updates, new_opt_state = optimizer.update(gradients, opt_state, params)
            new_params = jax.tree.map(lambda leaf, update: leaf - rate * update, params, updates)
            moved_mean = NORM_MEAN_DECAY * norm_mean + (1 - NORM_MEAN_DECAY) * norm
            new_norm_mean = jnp.where(norm_mean == 0, norm, moved_mean)

            kept = (params, opt_state, norm_mean)
            made = (new_params, new_opt_state, new_norm_mean)
            params, opt_state, norm_mean = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old), made, kept
            )
        new_state = {
            "step": state["step"] + 1,
            "params": params,
            "opt_state": opt_state,
            "gradient_norm_mean": norm_mean,
        }
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "target_tokens": target_tokens,
            "finite": finite,
            "skipped": ~accepted,
            "tensor_norms": tensor_norms,
            "aux": aux,
        }
        return new_state, metrics

    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
        donate_argnums=0,
    )


def culprits(tensor_norms: Any, largest: int = 3) -> list[str]:
    """Names the parameters to blame for a bad gradient.

    Args:
      tensor_norms: tree of gradient norms, as a step's metrics hold it.
      largest: how many to name if all norms are finite.

    Returns:
      Dotted names, e.g. ``layers.mixer.A_log``: those whose norm is not finite, in the tree's
      order, else those with the largest norms, largest first.
    """
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="."): float(norm)
        for path, norm in jax.tree_util.tree_leaves_with_path(tensor_norms)
    }
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return broken or sorted(norms, key=norms.__getitem__, reverse=True)[:largest]


def make_eval_step(
    config: RunConfig, mesh: Mesh, eot_id: int, token_bytes: np.ndarray
) -> Callable[[build.Params, Any, Any], dict[str, Any]]:
    """Compiles ``evaluate(params, windows, weights) → sums``.

    Args:
      config: the run's config; dropout is off here.
      mesh: the number of its devices must divide the batch.
      eot_id: the id that starts a document.
      token_bytes: (vocabulary,) int32, length of each token's text in UTF-8.

    Returns:
      The function. ``windows`` int32 (b, t + 1); ``weights`` float32 (b,), 0 for padding. Its
      weighted float32 sums: ``nll`` in nats, ``targets`` in tokens, ``bytes`` of their text. Under
      ``layers`` what the model reports of Δ and A, padding included.
    """
    bytes_v = np.asarray(token_bytes, np.float32)

    def evaluate(params: Any, windows: jax.Array, weights_b: jax.Array) -> dict[str, Any]:
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))
        nll_bt, aux, _ = token_nll(params, config, mesh, windows, eot_id, observing=True)
        weights_bt = target_weights(config, windows, weights_b)
        targets_bt = jnp.maximum(windows[:, 1:], 0)  # other tokens have weight 0
        return {
            "nll": jnp.sum(weights_bt * nll_bt),
            "targets": jnp.sum(weights_bt),
            "bytes": jnp.sum(weights_bt * jnp.asarray(bytes_v)[targets_bt]),
            "layers": {name: aux[name] for name in OVER_BATCHES},
        }

    params_shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(config, mesh)["params"]
    )
    return jax.jit(
        evaluate,
        in_shardings=(params_shardings, batch_sharding(mesh), batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )
