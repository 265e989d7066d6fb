"""The loss: next-token cross-entropy inside documents, as sums.

Legend: b sequences, t tokens of a window without its last.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mamba_jax.config import RunConfig
from mamba_jax.models import build
from mamba_jax.ops.cross_entropy import cross_entropy


def token_nll(
    params: build.Params,
    config: RunConfig,
    windows: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns −log p(target) of every token.

    Every document starts with ``eot_id``, so a model never sees across one and every token has a
    target: after a document's last token that is the next document's ``eot_id``.

    Args:
      params: of the model.
      config: its ``model`` and ``training.loss_chunk_tokens`` are used.
      windows: (b, t + 1) int32; the first t tokens are inputs, the last t targets.
      eot_id: the id that starts a document.
      dropout_key: None: no dropout.

    Returns:
      nll_bt: float32, nats.
      aux: as ``models.build.forward`` gives it.
    """
    inputs_bt, targets_bt = windows[:, :-1], windows[:, 1:]
    segment_ids_bt = jnp.cumsum(inputs_bt == eot_id, axis=1, dtype=jnp.int32)
    x_btd, aux, _ = build.forward(
        params, config.model, inputs_bt, segment_ids_bt=segment_ids_bt, dropout_key=dropout_key
    )
    nll_n = cross_entropy(
        x_btd.reshape(-1, x_btd.shape[-1]),
        build.head_weight(params, config.model),
        targets_bt.reshape(-1),
        chunk_tokens=config.training.loss_chunk_tokens,
        dtype=build.matmul_dtype(config.model),
    )
    return nll_n.reshape(targets_bt.shape), aux


def loss_sums(
    params: build.Params,
    config: RunConfig,
    windows: jax.Array,
    weights_b: jax.Array,
    eot_id: int,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:
    """Sums over the target tokens of some sequences: they add up over microbatches, means do not.

    Args:
      params, config, windows, eot_id, dropout_key: as in ``token_nll``.
      weights_b: float32, how much each sequence counts.

    Returns:
      Weighted sum of the nll (float32), then (weighted number of target tokens (float32), aux).
    """
    nll_bt, aux = token_nll(params, config, windows, eot_id, dropout_key)
    return jnp.sum(weights_b[:, None] * nll_bt), (jnp.sum(weights_b) * nll_bt.shape[1], aux)
