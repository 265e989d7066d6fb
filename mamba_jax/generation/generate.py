"""Continuing prompts: chunked prefill, then decoding in a compiled loop.

Rows of a batch are padded on the left, which the models treat as packing: padding is a document of
its own (segment 0), and the change to the prompt's segment (1) resets every state. A row's text
therefore does not depend on the rest of its batch. Time and memory per token do not grow with the
text.

Each model of an ensemble has its own cache; the mean of their probabilities chooses the token.

Legend: b batch, t time, v vocabulary, s steps of one dispatch, m models.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import StreamDecoder, Tokenizer
from mamba_jax.errors import UserError
from mamba_jax.generation.ensemble import Model, mean_logits, same_tokenizer
from mamba_jax.generation.sampling import Sampling, sample
from mamba_jax.generation.stops import StopFinder
from mamba_jax.models import build

CHUNK_TOKENS = 1024  # of a prefill chunk: bounds memory and the lengths that are compiled
_SHORTEST_CHUNK = 16
STREAM_TOKENS = 8  # decoded per call to the device: hides its latency, text still streams
WHOLE_TOKENS = 1024  # where nothing is streamed: nearly always the whole text in one call
HEADS = ("exact", "int8")


def generate_text(
    params: build.Params,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int | None = None,
    head: str = "exact",
    suffix: str | None = None,
    stops: Sequence[str] = (),
    others: Sequence[Model] = (),
    on_text: Callable[[int, str | None], None] | None = None,
) -> list[str]:
    """Continues each prompt until the model ends its document or ``max_tokens`` tokens are made.

    A text is a function of (params, prompt, its index, seed, stops and the sampling settings). It
    does not depend on the other prompts or ``batch_size``, up to the rounding of a batched matmul.

    Args:
      params: parameters, as ``models.build`` makes them.
      model_config: the structure they were made with; its vocabulary may be padded.
      tokenizer: the one that the model was trained with.
      prompts: any texts; an empty one starts a new document.
      max_tokens: for each prompt, ≥ 1.
      temperature: as in ``Sampling``, likewise ``top_k`` and ``top_p``.
      seed: 0 … 2³² - 1.
      batch_size: prompts per batch; None: all at once.
      head: "exact", or "int8": with the head's matrix rounded to int8, which is faster for one row
        on a CPU and changes the logits slightly.
      suffix: the text that follows each generated one, for a model that was trained with
        ``data.fim_rate``; None: nothing follows.
      stops: a text ends before the first of them; empty ones are ignored.
      others: further models of an ensemble: tokens are chosen by the mean of the probabilities of
        all, the first's included.
      on_text: called with (index of the prompt, new text) as text is generated, in whole
        characters, and finally with (index, None) when that text is complete.

    Returns:
      The new text of each prompt, without the prompt; all that ``on_text`` received, joined.

    Raises:
      UserError: if a number is out of range, the head unknown or not for this device, or the
        models' tokenizers differ.
    """
    sampling = check_settings(max_tokens, temperature, top_k, top_p, seed, batch_size, head)
    if not prompts:
        return []
    prepared, configs = prepare((Model(params, model_config, tokenizer), *others), head)
    del params  # frees their memory: the prepared ones replace them
    before = np.array([tokenizer.eot_id], np.int32)  # what every document starts with
    after = np.zeros(0, np.int32)
    if suffix is not None:
        prefix_id, suffix_id, middle_id = tokenizer.fim_ids
        before = np.array([tokenizer.eot_id, prefix_id], np.int32)
        after = np.array([suffix_id, *tokenizer.encode(suffix), middle_id], np.int32)
    sequences = [np.concatenate([before, tokenizer.encode(each), after]) for each in prompts]
    batch_size = min(batch_size or len(prompts), len(prompts))
    texts = [""] * len(prompts)
    # Only for texts that have not ended.
    decoders = {index: StreamDecoder(tokenizer) for index in range(len(prompts))}
    finders = [StopFinder(stops) for _ in prompts]
    whole = on_text is None and not any(stops)  # otherwise each new token is looked at

    def emit(index: int, text: str | None) -> None:
        texts[index] += text or ""
        if on_text is not None and text != "":
            on_text(index, text)

    def append(index: int, token: int) -> None:
        if token != tokenizer.eot_id:
            emit(index, finders[index].push(decoders[index].push(token)))
        if token == tokenizer.eot_id or finders[index].found is not None:
            end(index)

    def end(index: int) -> None:
        del decoders[index]
        emit(index, finders[index].flush())
        emit(index, None)

    for first in range(0, len(prompts), batch_size):
        indices = range(first, min(first + batch_size, len(prompts)))
        tokens = generate_tokens(
            prepared,
            configs,
            [sequences[index] for index in indices],
            indices,
            n_rows=batch_size,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            dispatch_tokens=WHOLE_TOKENS if whole else STREAM_TOKENS,
        )
        for step_tokens in tokens:
            for index, token in zip(indices, step_tokens, strict=True):
                if index in decoders:
                    append(index, token)
            if decoders.keys().isdisjoint(indices):
                break  # the device does not know the stops and would continue
        for index in indices:
            if index in decoders:
                end(index)
    return texts


def prepare(
    models: Sequence[Model], head: str = "exact"
) -> tuple[tuple[build.Params, ...], tuple[ModelConfig, ...]]:
    """Puts models on the device, laid out for decoding. Call it once, not at every dispatch.

    The parameters may come from the host, a checkpoint, or the mesh of a training run. Those of a
    checkpoint or a mesh are committed to their devices, and so are all results of a program on
    them, but an empty cache is not. JAX compiles a program once for committed arrays and once more
    for others. So nothing that this returns is committed.

    Args:
      models: one, or the members of an ensemble.
      head: one of ``HEADS``.

    Returns:
      By ``models.build.prepare_for_decoding``, and the structures.

    Raises:
      UserError: if the models' tokenizers differ.
    """
    same_tokenizer([model.tokenizer for model in models])
    uncommitted = lambda params: jax.device_put(jax.tree.map(np.asarray, params))
    return tuple(
        build.prepare_for_decoding(
            uncommitted(model.params), model.config, int8_head=head == "int8"
        )
        for model in models
    ), tuple(model.config for model in models)


def check_settings(
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    batch_size: int | None,
    head: str = "exact",
) -> Sampling:
    """Returns how to sample; see ``generate_text`` for the arguments.

    Raises:
      UserError: if a number is out of range, or the head unknown or not for this device.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens={max_tokens} must be at least 1")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be between 0 and {2**32 - 1}")
    if head not in HEADS:
        raise UserError(f"unknown head={head}: choose one of {', '.join(HEADS)}")
    platform = jax.default_backend()
    if head == "int8" and platform != "cpu":
        raise UserError(f"head=int8 is for a CPU, this is a {platform}; use head=exact")
    return Sampling(temperature, top_k, top_p)


def generate_tokens(
    params: tuple[build.Params, ...],
    configs: tuple[ModelConfig, ...],
    sequences: Sequence[np.ndarray],
    row_ids: Sequence[int],
    *,
    n_rows: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    vocab_size: int,
    eot_id: int,
    dispatch_tokens: int = STREAM_TOKENS,
) -> Iterator[list[int]]:
    """Continues token sequences, step by step.

    Args:
      params: by ``prepare``, of one model or of several.
      configs: configs of the same models.
      sequences: int32 (t,) each, with at least one token.
      row_ids: one per sequence; with ``seed`` they decide its randomness.
      n_rows: rows of the compiled batch, ≥ ``len(sequences)``; the other rows idle, so that a last
        batch that is not full needs no compilation of its own.
      max_tokens: steps at most.
      sampling: how tokens are chosen.
      seed: random seed.
      vocab_size: ids from here up are padding of the vocabulary and are never chosen.
      eot_id: ends a row.
      dispatch_tokens: steps of one call to the device; a call yields its tokens together.

    Yields:
      The next token of each sequence; after its end, ``eot_id``. Stops when all have ended.
    """
    n_idle = n_rows - len(sequences)
    tokens_bt, segments_bt = pad_left([*sequences, *[np.zeros(0, np.int32)] * n_idle])
    row_ids_b = np.array([*row_ids, *[0] * n_idle], np.uint32)
    ended_b = np.arange(n_rows) >= len(sequences)
    logits_mbv, caches = zip(
        *(
            prefill_in_chunks(of_model, config, tokens_bt, segments_bt)
            for of_model, config in zip(params, configs, strict=True)
        ),
        strict=True,
    )
    keys_b = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_ids_b)
    in_flight = None
    for step in range(0, max_tokens, dispatch_tokens):
        tokens_bs, logits_mbv, caches, ended_b, n_made = _decode(
            params,
            caches,
            logits_mbv,
            ended_b,
            keys_b,
            step,
            min(dispatch_tokens, max_tokens - step),
            configs=configs,
            sampling=sampling,
            vocab_size=vocab_size,
            eot_id=eot_id,
            dispatch_tokens=dispatch_tokens,
        )
        # One call ahead of what the host fetches, so that the device never waits for the host.
        # When all rows have ended, the call ahead does nothing.
        if in_flight is not None:
            tokens_before_bs, n_made_before, ended_before_b = in_flight
            yield from _fetch(tokens_before_bs, n_made_before, len(sequences))
            if np.all(ended_before_b):
                return
        in_flight = tokens_bs, n_made, ended_b
    if in_flight is not None:
        yield from _fetch(*in_flight[:2], len(sequences))


def _fetch(tokens_bs: jax.Array, n_made: jax.Array, n_sequences: int) -> list[list[int]]:
    """Waits for a call's tokens; returns them step by step."""
    return np.asarray(tokens_bs).T[: int(n_made), :n_sequences].tolist()


def pad_left(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Makes a batch of sequences that all end at the same place.

    Args:
      sequences: int32 (t,) each; the longest is not empty.

    Returns:
      tokens_bt and segments_bt (0 padding, 1 sequence), int32, of a length that
      ``chunk_lengths`` cuts into chunks.
    """
    n_tokens = sum(chunk_lengths(max(len(sequence) for sequence in sequences)))
    tokens_bt, segments_bt = np.zeros((2, len(sequences), n_tokens), np.int32)
    for row, sequence in enumerate(sequences):
        tokens_bt[row, n_tokens - len(sequence) :] = sequence
        segments_bt[row, n_tokens - len(sequence) :] = 1
    return tokens_bt, segments_bt


def chunk_lengths(n_tokens: int) -> list[int]:
    """Cuts ``n_tokens`` into chunks of few lengths, each compiled once: full ones after a first
    one that is rounded up to a power of two."""
    n_whole, rest = divmod(n_tokens, CHUNK_TOKENS)
    first = [max(_SHORTEST_CHUNK, 1 << (rest - 1).bit_length())] if rest else []
    return first + [CHUNK_TOKENS] * n_whole


def prefill_in_chunks(
    params: build.Params, config: ModelConfig, tokens_bt: np.ndarray, segments_bt: np.ndarray
) -> tuple[Float[Array, "b v"], build.Cache]:
    """Prefills padded prompts.

    Args:
      params: by ``models.build.prepare_for_decoding``.
      config: the model's config.
      tokens_bt, segments_bt: as ``pad_left`` makes them.

    Returns:
      As ``models.build.prefill``.
    """
    cache = empty_cache(config, len(tokens_bt))
    logits_bv, start = None, 0
    for length in chunk_lengths(tokens_bt.shape[1]):
        chunk = slice(start, start + length)
        logits_bv, cache = prefill(
            params, config, tokens_bt[:, chunk], cache, segments_bt[:, chunk]
        )
        start += length
    assert logits_bv is not None
    return logits_bv, cache


@functools.partial(jax.jit, static_argnames=("config", "n_rows"))
def empty_cache(config: ModelConfig, n_rows: int) -> build.Cache:
    """Makes the cache of empty rows, for prepared parameters."""
    return build.unstack_cache(build.init_cache(config, n_rows), config)


prefill = jax.jit(build.prefill, static_argnames="config", donate_argnames="cache")


@functools.partial(
    jax.jit,
    static_argnames=("configs", "sampling", "vocab_size", "eot_id", "dispatch_tokens"),
    donate_argnames=("caches", "logits_mbv"),
)
def _decode(
    params: tuple[build.Params, ...],
    caches: tuple[build.Cache, ...],
    logits_mbv: tuple[Float[Array, "b v"], ...],
    ended_b: Bool[Array, " b"],
    keys_b: PRNGKeyArray,
    first_step: Int[Array, ""],
    n_steps: Int[Array, ""],
    *,
    configs: tuple[ModelConfig, ...],
    sampling: Sampling,
    vocab_size: int,
    eot_id: int,
    dispatch_tokens: int,
) -> tuple[Any, ...]:
    """Decodes up to ``n_steps`` tokens, fewer when all rows have ended.

    Returns:
      tokens_bs int32 (b, dispatch_tokens), then the next logits, caches and ended_b, and how many
      columns of tokens_bs were made.
    """

    def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
        made, *_, ended_b = carry
        return (made < n_steps) & ~jnp.all(ended_b)

    def one_token(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        made, tokens_bs, logits_mbv, caches, ended_b = carry
        # By step, not by splitting: a row's randomness then needs no state.
        step_keys_b = jax.vmap(jax.random.fold_in, (0, None))(keys_b, first_step + made)
        token_b = sample(mean_logits(logits_mbv, vocab_size), step_keys_b, sampling)
        token_b = jnp.where(ended_b, eot_id, token_b)
        tokens_bs = tokens_bs.at[:, made].set(token_b)
        logits_mbv, caches = zip(
            *(
                build.decode_step(of_model, config, token_b, cache, ~ended_b)
                for of_model, config, cache in zip(params, configs, caches, strict=True)
            ),
            strict=True,
        )
        return made + 1, tokens_bs, logits_mbv, caches, ended_b | (token_b == eot_id)

    tokens_bs = jnp.full((len(ended_b), dispatch_tokens), eot_id, jnp.int32)
    made, tokens_bs, logits_mbv, caches, ended_b = jax.lax.while_loop(
        unfinished, one_token, (jnp.int32(0), tokens_bs, logits_mbv, caches, ended_b)
    )
    return tokens_bs, logits_mbv, caches, ended_b, made
