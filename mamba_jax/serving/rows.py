"""What runs on the device: rows of recurrent states that read, decode, join and leave.

A row is a sequence's whole past, of fixed size. Many rows decode together; a prompt is read by a
row of its own, in pieces of a few lengths, so that few programs are compiled and nothing is padded.

Legend: b rows, t time, v vocabulary, m likeliest tokens told.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mamba_jax.config import ModelConfig
from mamba_jax.generation.generate import empty_cache
from mamba_jax.models import build
from mamba_jax.serving.row_sampling import Choosing, sample_rows

TOP_LOGPROBS = 20  # at most told of a token


class Rows(NamedTuple):
    """Sequences as the device holds them: axis 0 of every leaf is theirs."""

    cache: build.Cache
    logits_bv: Float[Array, "b v"]  # of the next token


class Logprobs(NamedTuple):
    """ln probabilities, before temperature and limits."""

    chosen_b: Float[Array, " b"]
    top_bm: Float[Array, "b m"]
    top_ids_bm: Int[Array, "b m"]


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "n_rows"))
def empty(config: ModelConfig, vocab_size: int, n_rows: int) -> Rows:
    """Makes rows that hold nothing yet."""
    return Rows(empty_cache(config, n_rows), jnp.zeros((n_rows, vocab_size), jnp.float32))


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def read(
    params: build.Params,
    row: Rows,
    tokens_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> Rows:
    """Reads the next piece of a prompt; ``row``, which may be shared, stays as it was."""
    logits_bv, cache = build.prefill(params, config, tokens_bt, row.cache)
    return Rows(cache, logits_bv[:, :vocab_size])


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def read_and_score(
    params: build.Params,
    row: Rows,
    tokens_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Rows, Logprobs]:
    """Reads likewise, and tells how likely each of the tokens was; those are the "rows" told."""
    x_btd, _, cache = build.forward(
        params, config, tokens_bt, initial_cache=row.cache, generating=True
    )
    logits_tv = build.logits(params, config, x_btd)[0, :, :vocab_size]
    before_tv = jnp.concatenate([row.logits_bv, logits_tv[:-1]])
    return Rows(cache, logits_tv[-1:]), _logprobs(before_tv, tokens_bt[0])


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="rows")
def step(
    params: build.Params,
    rows: Rows,
    choosing: Choosing,
    tell: Bool[Array, ""],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Int[Array, " b"], Logprobs, Rows]:
    """Chooses the next token of every row and reads it.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      rows: given up.
      choosing: how.
      tell: whether any row wants log-probabilities; without it they are zeros.
      config: of the model.
      vocab_size: of the tokenizer: ids from here up are never chosen.

    Returns:
      The tokens, int32, their log-probabilities, and the rows after them.
    """
    token_b = sample_rows(rows.logits_bv, choosing)
    shapes = jax.eval_shape(_logprobs, rows.logits_bv, token_b)
    told = jax.lax.cond(
        tell,
        lambda: _logprobs(rows.logits_bv, token_b),
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    )
    logits_bv, cache = build.decode_step(params, config, token_b, rows.cache)
    return token_b, told, Rows(cache, logits_bv[:, :vocab_size])


@functools.partial(jax.jit, donate_argnames="rows")
def put(rows: Rows, row: Rows, place: Int[Array, ""]) -> Rows:
    """Lays a single row at a place among the rows, which are given up."""
    lay = lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one[0], place, 0)
    return jax.tree.map(lay, rows, row)


@jax.jit
def take(rows: Rows, places_b: Int[Array, " b"]) -> Rows:
    """Returns the rows of some places: more, fewer, or in another order."""
    return jax.tree.map(lambda leaf: leaf[places_b], rows)


def row_bytes(row: Rows) -> int:
    """Returns what a row takes on the device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(row))


def _logprobs(logits_bv: Float[Array, "b v"], token_b: Int[Array, " b"]) -> Logprobs:
    logprobs_bv = jax.nn.log_softmax(logits_bv)
    chosen_b = jnp.take_along_axis(logprobs_bv, token_b[:, None], axis=-1)[:, 0]
    top_bm, top_ids_bm = jax.lax.top_k(logprobs_bv, min(TOP_LOGPROBS, logits_bv.shape[-1]))
    return Logprobs(chosen_b, top_bm, top_ids_bm)
