"""The loss: next-token cross-entropy inside documents, as sums.

Legend: b sequences, t tokens of a window without its last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mamba_jax.config import RunConfig
from mamba_jax.models import build
from mamba_jax.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from mamba_jax.parallel.mesh import batch_sharding


def token_nll(
    params: build.Params,
    config: RunConfig,
    mesh: Mesh,
    windows: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None = None,
    initial_cache: build.Cache | None = None,
    observing: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], build.Cache]:
    """Returns −log p(target) of every token.

    Every document starts with ``eot_id``, so a model never sees across one and every token has a
    target: after a document's last token that is the next document's ``eot_id``.

    Args:
      params: the model's parameters.
      config: its ``model`` and ``training.loss_chunk_tokens`` are used.
      mesh: the devices that the batch is divided over.
      windows: (b, t + 1) int32; the first t tokens are inputs, the last t targets. Under
        ``data.has_loss_mask`` a token outside the loss mask is stored as ``~token``.
      eot_id: the id that starts a document.
      dropout_key: None: no dropout.
      initial_cache: the final one of the windows before these, to train long documents over
        several windows; None: nothing precedes each window.
      observing: as in ``models.build.forward``.

    Returns:
      nll_bt: float32, nats.
      aux: as ``models.build.forward`` gives it.
      final_cache: the state after the windows.
    """
    windows = _tokens(config, windows)
    x_btd, aux, final_cache = _hidden(
        params, config, windows, eot_id, dropout_key, initial_cache, observing
    )

    def head_nll(x_btd: jax.Array, weight_vd: jax.Array, targets_bt: jax.Array) -> jax.Array:
        nll_n = cross_entropy(_rows(x_btd), weight_vd, targets_bt.reshape(-1), **_head(config))
        return nll_n.reshape(targets_bt.shape)

    batch = batch_sharding(mesh).spec
    nll_bt = _per_device(head_nll, mesh, (batch, PartitionSpec(), batch))(
        x_btd, build.head_weight(params, config.model), windows[:, 1:]
    )
    return nll_bt, aux, final_cache


def loss_sums(
    params: build.Params,
    config: RunConfig,
    mesh: Mesh,
    windows: jax.Array,
    weights_b: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:
    """Sums over the target tokens of some sequences: they add up over microbatches, means do not.

    Args:
      params, config, mesh, windows, eot_id, dropout_key: as in ``token_nll``.
      weights_b: float32, how much each sequence counts.

    Returns:
      Weighted sum of the nll (float32), then (weighted number of target tokens (float32), aux).
    """
    masked = config.data.has_loss_mask
    weights = target_weights(config, windows, weights_b) if masked else weights_b
    windows = _tokens(config, windows)
    x_btd, aux, _ = _hidden(params, config, windows, eot_id, dropout_key, None)

    def head_sum(
        x_btd: jax.Array, weight_vd: jax.Array, targets_bt: jax.Array, weights: jax.Array
    ) -> jax.Array:
        row_weights_n = weights.reshape(-1) if masked else jnp.repeat(weights, targets_bt.shape[1])
        return weighted_cross_entropy(
            _rows(x_btd), weight_vd, targets_bt.reshape(-1), row_weights_n, **_head(config)
        )[None]

    batch, targets_bt = batch_sharding(mesh).spec, windows[:, 1:]
    sum_per_device = _per_device(head_sum, mesh, (batch, PartitionSpec(), batch, batch))(
        x_btd, build.head_weight(params, config.model), targets_bt, weights
    )
    count = jnp.sum(weights) if masked else jnp.sum(weights) * targets_bt.shape[1]
    return sum_per_device.sum(), (count, aux)


def target_weights(config: RunConfig, windows: jax.Array, weights_b: jax.Array) -> jax.Array:
    """Returns how much each target counts, float32 (b, t)."""
    loss_mask_bt = (
        windows[:, 1:] >= 0 if config.data.has_loss_mask else jnp.ones_like(windows[:, 1:])
    )
    return weights_b[:, None] * loss_mask_bt.astype(jnp.float32)


def _tokens(config: RunConfig, windows: jax.Array) -> jax.Array:
    """Returns the windows' tokens, including those that the loss mask excludes."""
    return jnp.where(windows < 0, ~windows, windows) if config.data.has_loss_mask else windows


def _hidden(
    params: build.Params,
    config: RunConfig,
    windows: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None,
    initial_cache: build.Cache | None,
    observing: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array], build.Cache]:
    """Runs the model up to its head on the windows' inputs; see ``token_nll``."""
    inputs_bt = windows[:, :-1]
    begins_bt = inputs_bt == eot_id
    if config.data.window == "concat":
        begins_bt = jnp.zeros_like(begins_bt)
    segment_ids_bt = jnp.cumsum(begins_bt, axis=1, dtype=jnp.int32)
    if (
        initial_cache is not None
    ):  # ids continue, so that only a separator ends the carried document
        segment_ids_bt += initial_cache["segment"][:, None]
    # Training never skips a recursion step, and neither do its evaluations.
    return build.forward(
        params,
        dataclasses.replace(config.model, gate_skip_threshold=0.0),
        inputs_bt,
        segment_ids_bt=segment_ids_bt,
        initial_cache=initial_cache,
        dropout_key=dropout_key,
        observing=observing,
    )


def _head(config: RunConfig) -> dict[str, Any]:
    """Returns the settings of the head's matrix products."""
    return {
        "chunk_tokens": config.training.loss_chunk_tokens or default_chunk_tokens(),
        "dtype": build.matmul_dtype(config.model),
        "vocab_size": config.model.vocab_size,
    }


def default_chunk_tokens() -> int:
    """Returns how many tokens' logits to compute at a time where the config does not say.

    On one CPU core (d 384, v 50,257) the loss and its gradients took 1,134, 1,038 and 1,155 ms for
    1,024 tokens in chunks of 256, 512 and 1,024. A GPU needs larger products.
    """
    return 512 if jax.default_backend() == "cpu" else 1_024


def _rows(x_btd: jax.Array) -> jax.Array:
    return x_btd.reshape(-1, x_btd.shape[-1])


def _per_device(function: Callable[..., jax.Array], mesh: Mesh, in_specs: Any) -> Any:
    """Makes each device process its own tokens in chunks; results are divided along the batch.

    The head's gradient is then summed over devices once. XLA by itself would sum that (v, d)
    matrix over devices after every chunk.
    """
    if mesh.size == 1:  # no copy of that matrix
        return function
    batch = batch_sharding(mesh).spec
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=batch, check_vma=False)
