"""Log-probabilities and greedy continuations of token sequences, by one model or several averaged.

A sequence is processed in chunks, each starting from the recurrent state of the one before: every
token depends on all tokens before it, however long the sequence. A prefix that all sequences share
is processed once and its state is copied; in a recurrent model that costs the same at any length.

Legend: b batch, t time, v vocabulary, m models.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import StreamDecoder
from mamba_jax.errors import UserError
from mamba_jax.generation.ensemble import Model, mean_probability
from mamba_jax.generation.generate import empty_cache, prepare
from mamba_jax.generation.stops import StopFinder
from mamba_jax.models import build

_SHORTEST_CHUNK = 16  # of scored tokens; shorter ones would save less than their compilation costs
_STEP = 4  # from one length of chunks to the next: few lengths to compile, few calls
Caches = tuple[build.Cache, ...]  # of each model
_NOT_FINITE = (
    "the model's probabilities are not finite: its training diverged; give an earlier checkpoint"
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a sequence's tokens.

    Attributes:
      nlls: float64 (t,), -ln of each token's probability.
      greedy: bool (t,), whether each was the most likely.
    """

    nlls: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Scores and continues sequences by the mean of the models' probabilities.

    Attributes:
      tokenizer: the tokenizer of all models.
      tokens_processed: by each model so far, padding not counted.
    """

    def __init__(self, models: Sequence[Model], *, batch_size: int, chunk_tokens: int):
        """Takes the models, with ``batch_size`` sequences of ``chunk_tokens`` tokens a call.

        Raises:
          UserError: if a number is below 1, or the models' tokenizers differ.
        """
        for name, value in (("batch_size", batch_size), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self._params, self._configs = prepare(models)
        self.tokenizer = models[0].tokenizer
        self.tokens_processed = 0
        self._batch_size = batch_size
        self._chunk_tokens = chunk_tokens

    def scores(
        self, sequences: Sequence[np.ndarray], starts: Sequence[int] | None = None
    ) -> list[Scores]:
        """Scores each sequence from its start on, independently of the others and their order.

        Tokens before a start are processed once for all sequences that share them, and so is a
        prefix that all sequences share.

        Args:
          sequences: int32 (t,), t ≥ 1.
          starts: for each, its first token to be scored, ≥ 1; None: 1.

        Raises:
          UserError: if a probability is not a number.
        """
        starts = [1] * len(sequences) if starts is None else starts
        # The last token before a start is processed with those after it, because it predicts them.
        of_context: dict[bytes, list[int]] = {}
        for i, start in enumerate(starts):
            of_context.setdefault(sequences[i][: start - 1].tobytes(), []).append(i)
        groups = list(of_context.values())
        contexts = [sequences[i][: starts[i] - 1] for i, *_ in groups]
        result: list[Scores | None] = [None] * len(sequences)
        for rows, caches in self._prefill_in_batches(contexts):
            slots = [(row, i) for row, context in enumerate(rows) for i in groups[context]]
            rest = lambda slot: sequences[slot[1]][starts[slot[1]] - 1 :]
            slots.sort(key=lambda slot: -len(rest(slot)))
            for first in range(0, len(slots), self._batch_size):
                batch = slots[first : first + self._batch_size]
                copied = self._copied(caches, [row for row, _ in batch])
                scored = self._score([rest(slot) for slot in batch], copied)
                for (_, i), scores in zip(batch, scored, strict=True):
                    result[i] = scores
        return [scores for scores in result if scores is not None]

    def continuations(
        self,
        sequences: Sequence[np.ndarray],
        max_tokens: int,
        is_complete: Callable[[int, int], bool],
    ) -> list[list[int]]:
        """Continues each sequence greedily, with the most likely token each time.

        Args:
          sequences: int32 (t,), t ≥ 1; a prefix that all share is processed once.
          max_tokens: new tokens of each at most.
          is_complete: called with a sequence's index and each of its new tokens; whether that
            sequence ends with it.

        Returns:
          The new tokens of each, without the end-of-text token.

        Raises:
          UserError: if a probability is not a number.
        """
        result: list[list[int]] = [[] for _ in sequences]
        contexts = [sequence[:-1] for sequence in sequences]
        for rows, caches in self._prefill_in_batches(contexts):
            last_tokens = [int(sequences[i][-1]) for i in rows]
            made = self._continue(rows, last_tokens, caches, max_tokens, is_complete)
            for i, tokens in zip(rows, made, strict=True):
                result[i] = tokens
        return result

    def _prefill_in_batches(self, contexts: list[np.ndarray]) -> Iterator[tuple[list[int], Caches]]:
        """Yields indices of at most ``batch_size`` contexts, and the caches after them."""
        n_common = _common_length(contexts)
        common = [contexts[0][:n_common]] if contexts else []
        empty = tuple(empty_cache(config, self._batch_size) for config in self._configs)
        after_common = self._prefill(empty, common)
        by_length = sorted(range(len(contexts)), key=lambda i: -len(contexts[i]))
        for first in range(0, len(contexts), self._batch_size):
            rows = by_length[first : first + self._batch_size]
            caches = self._copied(after_common, [0] * len(rows))
            yield rows, self._prefill(caches, [contexts[i][n_common:] for i in rows])

    def _prefill(self, caches: Caches, sequences: list[np.ndarray]) -> Caches:
        """Processes a sequence (t,), t ≥ 0, in each row; the caches are donated.

        A row takes part in a chunk if at least that many tokens are left in it. Otherwise its
        caches stay unchanged, because padding would alter them.
        """
        lengths_b = np.array([len(sequence) for sequence in sequences])
        done_b = np.zeros_like(lengths_b)
        for length in _lengths(self._chunk_tokens):
            while (active_b := lengths_b - done_b >= length).any():
                tokens_bt = np.zeros((self._batch_size, length), np.int32)
                for row in np.flatnonzero(active_b):
                    tokens_bt[row] = sequences[row][done_b[row] :][:length]
                mask_b = np.pad(active_b, (0, self._batch_size - len(sequences)))
                caches = _advance(self._params, tokens_bt, mask_b, caches, configs=self._configs)
                done_b += length * active_b
        self.tokens_processed += int(lengths_b.sum())
        return caches

    def _score(self, sequences: list[np.ndarray], caches: Caches) -> Iterator[Scores]:
        """Scores all but the first token of each sequence; the longest sequence comes first.

        Padding at the end cannot affect the tokens before it; the caches are donated.
        """
        n_targets = len(sequences[0]) - 1
        lengths = [self._chunk_tokens] * (n_targets // self._chunk_tokens)
        if rest := n_targets % self._chunk_tokens:
            fitting = [n for n in _lengths(self._chunk_tokens) if n >= max(rest, _SHORTEST_CHUNK)]
            lengths.append(min(fitting, default=self._chunk_tokens))
        tokens_bt = np.zeros((self._batch_size, sum(lengths) + 1), np.int32)
        for row, sequence in enumerate(sequences):
            tokens_bt[row, : len(sequence)] = sequence
        start, in_flight = 0, []
        for length in lengths:
            *found, caches = _score(
                self._params,
                tokens_bt[:, start : start + length],
                tokens_bt[:, start + 1 : start + length + 1],
                caches,
                configs=self._configs,
                vocab_size=self.tokenizer.vocab_size,
            )
            in_flight.append(found)
            start += length
        empty = [np.zeros((self._batch_size, 0)), np.zeros((self._batch_size, 0), bool)]
        read = [[np.asarray(part) for part in found] for found in in_flight] or [empty]
        nlls_bt, greedy_bt = (np.concatenate(part, axis=1) for part in zip(*read, strict=True))
        for row, sequence in enumerate(sequences):
            nlls_t = nlls_bt[row, : len(sequence) - 1].astype(np.float64)
            if not np.isfinite(nlls_t).all():
                raise UserError(_NOT_FINITE)
            self.tokens_processed += len(nlls_t)
            yield Scores(nlls_t, greedy_bt[row, : len(nlls_t)])

    def _continue(
        self,
        indices: list[int],
        last_tokens: list[int],
        caches: Caches,
        max_tokens: int,
        is_complete: Callable[[int, int], bool],
    ) -> list[list[int]]:
        token_b = np.pad(np.array(last_tokens, np.int32), (0, self._batch_size - len(last_tokens)))
        made: list[list[int]] = [[] for _ in last_tokens]
        active = set(range(len(last_tokens)))
        for _ in range(max_tokens):
            self.tokens_processed += len(active)
            token_b, caches = _most_likely(
                self._params,
                token_b,
                caches,
                configs=self._configs,
                vocab_size=self.tokenizer.vocab_size,
            )
            tokens = np.asarray(token_b).tolist()
            for row in sorted(active):
                if tokens[row] < 0:
                    raise UserError(_NOT_FINITE)
                if tokens[row] == self.tokenizer.eot_id:
                    active.discard(row)
                    continue
                made[row].append(tokens[row])
                if is_complete(indices[row], tokens[row]):
                    active.discard(row)
            if not active:
                break
        return made

    def _copied(self, caches: Caches, rows: list[int]) -> Caches:
        """Returns caches whose first rows are copies of these, and the others of some."""
        return _rows_of(caches, np.pad(np.array(rows), (0, self._batch_size - len(rows))))


def continue_texts(
    scorer: Scorer, contexts: Sequence[str], max_tokens: int, stops: Sequence[str]
) -> list[str]:
    """Returns the greedy continuation of each context, up to the first of the stops."""
    begin = np.array([scorer.tokenizer.eot_id], np.int32)
    sequences = [np.concatenate([begin, scorer.tokenizer.encode(text)]) for text in contexts]
    # As texts are generated: without half a character at the end.
    decoders = [StreamDecoder(scorer.tokenizer) for _ in contexts]
    finders = [StopFinder(stops) for _ in contexts]
    texts = [""] * len(contexts)

    def is_complete(index: int, token: int) -> bool:
        texts[index] += finders[index].push(decoders[index].push(token))
        return finders[index].found is not None

    scorer.continuations(sequences, max_tokens, is_complete)
    return [text + finder.flush() for text, finder in zip(texts, finders, strict=True)]


def _common_length(sequences: list[np.ndarray]) -> int:
    """Returns the length of the prefix that all sequences share."""
    n = min(map(len, sequences), default=0)
    for sequence in sequences:
        differs_t = sequence[:n] != sequences[0][:n]
        n = int(differs_t.argmax()) if differs_t.any() else n
    return n


def _lengths(chunk_tokens: int) -> list[int]:
    """Returns the lengths of chunks: ``chunk_tokens``, then shorter ones down to 1."""
    shorter = [_STEP**i for i in range(chunk_tokens.bit_length()) if _STEP**i < chunk_tokens]
    return [chunk_tokens, *reversed(shorter)]


@jax.jit
def _rows_of(caches: Caches, rows_b: Int[Array, " b"]) -> Caches:
    return jax.tree.map(lambda leaf: leaf[rows_b], caches)


@functools.partial(jax.jit, static_argnames="configs", donate_argnames=("caches",))
def _advance(
    params: tuple[build.Params, ...],
    tokens_bt: Int[Array, "b t"],
    active_b: Bool[Array, " b"],
    caches: Caches,
    *,
    configs: tuple[ModelConfig, ...],
) -> Caches:
    """Returns the caches after the tokens in active rows, and unchanged ones in the others."""
    new_caches = tuple(
        build.forward(of_model, config, tokens_bt, initial_cache=cache, active_b=active_b)[2]
        for of_model, config, cache in zip(params, configs, caches, strict=True)
    )
    kept = lambda new, old: jnp.where(jnp.expand_dims(active_b, range(1, new.ndim)), new, old)
    return jax.tree.map(kept, new_caches, caches)


@functools.partial(jax.jit, static_argnames=("configs", "vocab_size"), donate_argnames=("caches",))
def _score(
    params: tuple[build.Params, ...],
    tokens_bt: Int[Array, "b t"],
    targets_bt: Int[Array, "b t"],
    caches: Caches,
    *,
    configs: tuple[ModelConfig, ...],
    vocab_size: int,
) -> tuple[jax.Array, jax.Array, Caches]:
    """Returns float32 nlls_bt, bool greedy_bt, and the caches after the chunk."""
    each_mbtv, new_caches = [], []
    for of_model, config, cache in zip(params, configs, caches, strict=True):
        logits_btv, _, cache = build.apply(of_model, config, tokens_bt, initial_cache=cache)
        each_mbtv.append(jax.nn.log_softmax(logits_btv[..., :vocab_size]))
        new_caches.append(cache)
    log_probs_btv = mean_probability(each_mbtv)
    target_bt = jnp.take_along_axis(log_probs_btv, targets_bt[..., None], axis=-1)[..., 0]
    greedy_bt = log_probs_btv.argmax(-1) == targets_bt
    return -target_bt, greedy_bt, tuple(new_caches)


@functools.partial(jax.jit, static_argnames=("configs", "vocab_size"), donate_argnames=("caches",))
def _most_likely(
    params: tuple[build.Params, ...],
    token_b: Int[Array, " b"],
    caches: Caches,
    *,
    configs: tuple[ModelConfig, ...],
    vocab_size: int,
) -> tuple[Int[Array, " b"], Caches]:
    """Returns the most likely next token of each row, -1 if not finite, and the caches."""
    each_mbv, new_caches = [], []
    for of_model, config, cache in zip(params, configs, caches, strict=True):
        logits_bv, cache = build.decode_step(of_model, config, token_b, cache)
        each_mbv.append(jax.nn.log_softmax(logits_bv[:, :vocab_size]))
        new_caches.append(cache)
    log_probs_bv = mean_probability(each_mbv)
    most_likely_b = log_probs_bv.argmax(-1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(log_probs_bv.max(-1)), most_likely_b, -1), tuple(new_caches)
