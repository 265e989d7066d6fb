"""The device programs: prefill, insert into the batch, decode, extract, gather.

A slot holds one sequence's recurrent state, which has a fixed size. All slots of the batch decode
together. A prompt is prefilled in a single slot of its own, in chunks of a few lengths, so that few
programs are compiled. A prompt without a cached prefix is padded on the left to a multiple of the
shortest chunk that logprobs are compiled for; the tokens after a cached prefix cannot be padded and
need the shortest chunks.

Legend: b slots, t time, d d_model, v vocabulary, m most likely tokens reported.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mamba_jax.config import ModelConfig
from mamba_jax.generation.generate import empty_cache
from mamba_jax.models import build
from mamba_jax.serving.batched_sampling import BatchedSampling, sample_batch

TOP_LOGPROBS = 20  # at most, for each token
LOGPROB_CHUNKS = (256, 64, 16)
PREFILL_CHUNKS = (*LOGPROB_CHUNKS, 4, 1)


class Slots(NamedTuple):
    """States of sequences on the device: axis 0 of every leaf is the slot."""

    cache: build.Cache
    logits_bv: Float[Array, "b v"]  # of the next token


class Logprobs(NamedTuple):
    """Natural log-probabilities, before temperature, top_k and top_p."""

    chosen_b: Float[Array, " b"]
    top_bm: Float[Array, "b m"]
    top_ids_bm: Int[Array, "b m"]


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "n_slots"))
def empty(config: ModelConfig, vocab_size: int, n_slots: int) -> Slots:
    """Makes slots of zeros, as before a first token."""
    return Slots(empty_cache(config, n_slots), jnp.zeros((n_slots, vocab_size), jnp.float32))


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def prefill(
    params: build.Params,
    state: Slots,
    tokens_bt: Int[Array, "1 t"],
    segments_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Slots, Float[Array, "1 t d"]]:
    """Prefills the next chunk of a prompt; does not modify ``state``, which may be shared.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      state: a single slot, after the tokens before the chunk.
      tokens_bt: the chunk, of a length in ``PREFILL_CHUNKS``.
      segments_bt: 1 for a token, 0 for padding, which is allowed only before the first token
        of a prompt.
      config: the model's config.
      vocab_size: the tokenizer's vocabulary size.

    Returns:
      The state after the chunk, and the head's input at each of its tokens, for ``chunk_logprobs``.
    """
    x_btd, _, cache = build.forward(
        params,
        config,
        tokens_bt,
        segment_ids_bt=segments_bt,
        initial_cache=state.cache,
    )
    return Slots(cache, build.logits(params, config, x_btd[:, -1])[:, :vocab_size]), x_btd


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def chunk_logprobs(
    params: build.Params,
    before_bv: Float[Array, "1 v"],
    x_btd: Float[Array, "1 t d"],
    tokens_bt: Int[Array, "1 t"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> Logprobs:
    """Returns the logprobs of a chunk's tokens; axis b of the result is time.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      before_bv: the logits before the chunk.
      x_btd: by ``prefill``, of the chunk.
      tokens_bt: the chunk, of a length in ``LOGPROB_CHUNKS``.
      config: the model's config.
      vocab_size: the tokenizer's vocabulary size.
    """
    logits_tv = build.logits(params, config, x_btd)[0, :, :vocab_size]
    return _logprobs(jnp.concatenate([before_bv, logits_tv[:-1]]), tokens_bt[0])


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"), donate_argnames="slots")
def step(
    params: build.Params,
    slots: Slots,
    sampling: BatchedSampling,
    with_logprobs: Bool[Array, ""],
    active_b: Bool[Array, " b"],
    *,
    config: ModelConfig,
    vocab_size: int,
) -> tuple[Int[Array, " b"], Logprobs, Slots]:
    """Samples the next token of every slot and decodes it.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      slots: donated.
      sampling: the settings of each slot.
      with_logprobs: whether any slot needs logprobs; if not, they are zeros.
      active_b: slots in use.
      config: the model's config.
      vocab_size: the tokenizer's vocabulary size: ids from here up are never sampled.

    Returns:
      The tokens, int32, their logprobs, and the slots after them.
    """
    token_b = sample_batch(slots.logits_bv, sampling)
    shapes = jax.eval_shape(_logprobs, slots.logits_bv, token_b)
    logprobs = jax.lax.cond(
        with_logprobs,
        lambda: _logprobs(slots.logits_bv, token_b),
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
    )
    logits_bv, cache = build.decode_step(params, config, token_b, slots.cache, active_b)
    return token_b, logprobs, Slots(cache, logits_bv[:, :vocab_size])


@functools.partial(jax.jit, donate_argnames="slots")
def insert(slots: Slots, state: Slots, slot: Int[Array, ""]) -> Slots:
    """Writes a single state into a slot of the batch; ``slots`` is donated."""
    write = lambda batch, one: jax.lax.dynamic_update_index_in_dim(batch, one[0], slot, 0)
    return jax.tree.map(write, slots, state)


@jax.jit
def extract(slots: Slots, slot: Int[Array, ""]) -> Slots:
    """Returns a copy of the state in one slot."""
    one = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, slot, 1)
    return jax.tree.map(one, slots)


@jax.jit
def gather(slots: Slots, slots_b: Int[Array, " b"]) -> Slots:
    """Returns the slots with the given indices: more, fewer, or in another order."""
    return jax.tree.map(lambda leaf: leaf[slots_b], slots)


def state_bytes(state: Slots) -> int:
    """Returns the size of a state on the device."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def _logprobs(logits_bv: Float[Array, "b v"], token_b: Int[Array, " b"]) -> Logprobs:
    logprobs_bv = jax.nn.log_softmax(logits_bv)
    chosen_b = jnp.take_along_axis(logprobs_bv, token_b[:, None], axis=-1)[:, 0]
    top_bm, top_ids_bm = jax.lax.top_k(logprobs_bv, min(TOP_LOGPROBS, logits_bv.shape[-1]))
    return Logprobs(chosen_b, top_bm, top_ids_bm)
