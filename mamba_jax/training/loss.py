"""The loss: next-token cross-entropy inside documents, as sums.

Legend: b sequences, t tokens of a window without its last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mamba_jax.config import RunConfig
from mamba_jax.models import build
from mamba_jax.ops.cross_entropy import cross_entropy
from mamba_jax.parallel.mesh import batch_sharding


def token_nll(
    params: build.Params,
    config: RunConfig,
    mesh: Mesh,
    windows: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None = None,
    initial_cache: build.Cache | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], build.Cache]:
    """Returns −log p(target) of every token.

    Every document starts with ``eot_id``, so a model never sees across one and every token has a
    target: after a document's last token that is the next document's ``eot_id``.

    Args:
      params: of the model.
      config: its ``model`` and ``training.loss_chunk_tokens`` are used.
      mesh: the devices that the batch is divided over.
      windows: (b, t + 1) int32; the first t tokens are inputs, the last t targets.
      eot_id: the id that starts a document.
      dropout_key: None: no dropout.
      initial_cache: the final one of the windows before these, to train long documents over
        several windows; None: each window begins with nothing before it.

    Returns:
      nll_bt: float32, nats.
      aux: as ``models.build.forward`` gives it.
      final_cache: the state after the windows.
    """
    inputs_bt, targets_bt = windows[:, :-1], windows[:, 1:]
    segment_ids_bt = jnp.cumsum(inputs_bt == eot_id, axis=1, dtype=jnp.int32)
    if initial_cache is not None:  # ids go on, so that only a marker ends the carried document
        segment_ids_bt += initial_cache["segment"][:, None]
    x_btd, aux, final_cache = build.forward(
        params,
        config.model,
        inputs_bt,
        segment_ids_bt=segment_ids_bt,
        initial_cache=initial_cache,
        dropout_key=dropout_key,
    )

    def head_nll(x_btd: jax.Array, weight_vd: jax.Array, targets_bt: jax.Array) -> jax.Array:
        nll_n = cross_entropy(
            x_btd.reshape(-1, x_btd.shape[-1]),
            weight_vd,
            targets_bt.reshape(-1),
            chunk_tokens=config.training.loss_chunk_tokens,
            dtype=build.matmul_dtype(config.model),
        )
        return nll_n.reshape(targets_bt.shape)

    # Each device goes through its own tokens in chunks, and the head's gradient is summed over
    # devices once. XLA by itself would sum that (v, d) matrix over devices after every chunk.
    batch, whole = batch_sharding(mesh).spec, PartitionSpec()
    nll_bt = jax.shard_map(
        head_nll, mesh=mesh, in_specs=(batch, whole, batch), out_specs=batch, check_vma=False
    )(x_btd, build.head_weight(params, config.model), targets_bt)
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
    nll_bt, aux, _ = token_nll(params, config, mesh, windows, eot_id, dropout_key)
    return jnp.sum(weights_b[:, None] * nll_bt), (jnp.sum(weights_b) * nll_bt.shape[1], aux)
