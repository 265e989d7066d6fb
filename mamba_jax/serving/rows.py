"""What runs on the device: rows of recurrent states that read, decode, join and leave.

A row is a sequence's whole past, of fixed size. Many rows decode together; a prompt is read by a
row of its own, in pieces of a few lengths, so that few programs are compiled. A prompt that nothing
precedes is padded at its beginning to a multiple of the shortest piece that is scored; what follows
a snapshot cannot be padded, and takes the shortest pieces too.

Legend: b rows, t time, d d_model, v vocabulary, m likeliest tokens told.
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
SCORED_PIECES = (256, 64, 16)
PIECES = (*SCORED_PIECES, 4, 1)


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
    segments_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Rows, Float[Array, "1 t d"]]:
    """Reads the next piece of a prompt; ``row``, which may be shared, stays as it was.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      row: what came before.
      tokens_bt: of a length in ``PIECES``.
      segments_bt: 1 where there is a token; 0 where there is padding, which may only stand before
        the first token of a prompt.
      config: of the model.
      vocab_size: of the tokenizer.

    Returns:
      The row after the piece, and what the head reads at each of its tokens, for ``score``.
    """
    x_btd, _, cache = build.forward(
        params,
        config,
        tokens_bt,
        segment_ids_bt=segments_bt,
        initial_cache=row.cache,
        generating=True,
    )
    return Rows(cache, build.logits(params, config, x_btd[:, -1])[:, :vocab_size]), x_btd


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def score(
    params: build.Params,
    before_bv: Float[Array, "1 v"],
    x_btd: Float[Array, "1 t d"],
    tokens_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> Logprobs:
    """Tells how likely each token of a piece was; the tokens are the "rows" told.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      before_bv: the row's logits before the piece.
      x_btd: by ``read``, of the piece.
      tokens_bt: the piece, of a length in ``SCORED_PIECES``.
      config: of the model.
      vocab_size: of the tokenizer.
    """
    logits_tv = build.logits(params, config, x_btd)[0, :, :vocab_size]
    return _logprobs(jnp.concatenate([before_bv, logits_tv[:-1]]), tokens_bt[0])


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
def copy(rows: Rows, place: Int[Array, ""]) -> Rows:
    """Returns a copy of a single row."""
    one = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, 1)
    return jax.tree.map(one, rows)


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
