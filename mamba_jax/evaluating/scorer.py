"""Log-probabilities of token sequences of any length under one model, or several averaged.

A sequence is read in chunks of fixed length, each beginning with the recurrent state that the last
one left: every token sees all that came before it, however long the sequence, and nothing is read
twice. Rows of a batch are padded on the right, where padding cannot reach what comes before.

Legend: b batch, t time, v vocabulary, m models.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mamba_jax.config import ModelConfig
from mamba_jax.errors import UserError
from mamba_jax.generation.ensemble import Model, mean_probability, same_tokenizer
from mamba_jax.generation.generate import pad_left, piece_lengths
from mamba_jax.models import build


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of the tokens of a sequence after its first.

    Attributes:
      nlls: float64 (t - 1,), -ln of each token's probability.
      greedy: bool (t - 1,), whether each was the likeliest.
    """

    nlls: np.ndarray
    greedy: np.ndarray


class Scorer:
    """Scores sequences under the mean of the models' probabilities."""

    def __init__(self, models: Sequence[Model], *, batch_size: int, chunk_tokens: int):
        """Takes the models, with ``batch_size`` sequences of ``chunk_tokens`` tokens a call.

        Raises:
          UserError: if a number is below 1, or the models' tokenizers differ.
        """
        for name, value in (("batch_size", batch_size), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self.tokenizer = same_tokenizer([model.tokenizer for model in models])
        self._params = tuple(jax.device_put(model.params) for model in models)
        self._configs = tuple(model.config for model in models)
        self._batch_size = batch_size
        self._chunk_tokens = chunk_tokens

    def scores(self, sequences: Sequence[np.ndarray]) -> list[Scores]:
        """Scores each sequence: int32 (t,), t ≥ 1. The order and the others have no say."""
        longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        result: list[Scores | None] = [None] * len(sequences)
        for first in range(0, len(sequences), self._batch_size):
            indices = longest_first[first : first + self._batch_size]
            batch = self._batch([sequences[index] for index in indices])
            for index, scores in zip(indices, batch, strict=True):
                result[index] = scores
        return [scores for scores in result if scores is not None]

    def continuations(
        self,
        sequences: Sequence[np.ndarray],
        max_tokens: int,
        is_complete: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        """Continues each sequence with the likeliest token again and again.

        Args:
          sequences: int32 (t,), t ≥ 1.
          max_tokens: new tokens of each at most.
          is_complete: asked of each one's new tokens after every token.

        Returns:
          The new tokens of each, without the end-of-text token.
        """
        shortest_first = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        result: list[list[int]] = [[] for _ in sequences]
        for first in range(0, len(sequences), self._batch_size):
            indices = shortest_first[first : first + self._batch_size]
            made = self._continue([sequences[index] for index in indices], max_tokens, is_complete)
            for index, tokens in zip(indices, made, strict=True):
                result[index] = tokens
        return result

    def _continue(
        self,
        sequences: list[np.ndarray],
        max_tokens: int,
        is_complete: Callable[[list[int]], bool],
    ) -> list[list[int]]:
        idle = [np.zeros(0, np.int32)] * (self._batch_size - len(sequences))
        tokens_bt, segments_bt = pad_left([*sequences, *idle])
        caches = tuple(build.init_cache(config, self._batch_size) for config in self._configs)
        how = {"configs": self._configs, "vocab_size": self.tokenizer.vocab_size}
        start, token_b = 0, None
        for length in piece_lengths(tokens_bt.shape[1]):
            piece = slice(start, start + length)
            token_b, caches = _likeliest(
                self._params, tokens_bt[:, piece], segments_bt[:, piece], caches, **how
            )
            start += length
        made: list[list[int]] = [[] for _ in sequences]
        going = set(range(len(sequences)))
        ones_b1 = np.ones((self._batch_size, 1), np.int32)
        for step in range(max_tokens):
            for row in sorted(going):
                token = int(np.asarray(token_b)[row])
                if token == self.tokenizer.eot_id:
                    going.discard(row)
                    continue
                made[row].append(token)
                if is_complete(made[row]):
                    going.discard(row)
            if not going or step == max_tokens - 1:
                break
            token_b, caches = _likeliest(
                self._params, np.asarray(token_b)[:, None], ones_b1, caches, **how
            )
        return made

    def _batch(self, sequences: list[np.ndarray]) -> Iterator[Scores]:
        n_targets = max(len(sequence) for sequence in sequences) - 1
        n_chunks = math.ceil(n_targets / self._chunk_tokens)
        tokens_bt = np.zeros((self._batch_size, n_chunks * self._chunk_tokens + 1), np.int32)
        for row, sequence in enumerate(sequences):
            tokens_bt[row, : len(sequence)] = sequence
        caches = tuple(build.init_cache(config, self._batch_size) for config in self._configs)
        under_way = []
        for start in range(0, n_chunks * self._chunk_tokens, self._chunk_tokens):
            stop = start + self._chunk_tokens
            nlls_bt, greedy_bt, caches = _score(
                self._params,
                tokens_bt[:, start:stop],
                tokens_bt[:, start + 1 : stop + 1],
                caches,
                configs=self._configs,
                vocab_size=self.tokenizer.vocab_size,
            )
            under_way.append((nlls_bt, greedy_bt))
        empty = (np.zeros((self._batch_size, 0)), np.zeros((self._batch_size, 0), bool))
        read = [(np.asarray(nlls), np.asarray(greedy)) for nlls, greedy in under_way] or [empty]
        nlls_bt, greedy_bt = (np.concatenate(part, axis=1) for part in zip(*read, strict=True))
        for row, sequence in enumerate(sequences):
            scored = slice(0, len(sequence) - 1)
            yield Scores(nlls_bt[row, scored].astype(np.float64), greedy_bt[row, scored])


def continue_texts(
    scorer: Scorer, contexts: Sequence[str], max_tokens: int, stops: Sequence[str]
) -> list[str]:
    """Returns the greedy continuation of each context, up to the first of the stops."""
    decode = scorer.tokenizer.decode
    begin = np.array([scorer.tokenizer.eot_id], np.int32)
    sequences = [np.concatenate([begin, scorer.tokenizer.encode(text)]) for text in contexts]
    stopped = lambda tokens: any(stop in decode(tokens) for stop in stops)
    texts = map(decode, scorer.continuations(sequences, max_tokens, stopped))
    cut = lambda text: text[: min((text.find(s) for s in stops if s in text), default=len(text))]
    return [cut(text) for text in texts]


@functools.partial(jax.jit, static_argnames=("configs", "vocab_size"), donate_argnames=("caches",))
def _score(
    params: tuple[build.Params, ...],
    tokens_bt: Int[Array, "b t"],
    targets_bt: Int[Array, "b t"],
    caches: tuple[build.Cache, ...],
    *,
    configs: tuple[ModelConfig, ...],
    vocab_size: int,
) -> tuple[jax.Array, jax.Array, tuple[build.Cache, ...]]:
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
def _likeliest(
    params: tuple[build.Params, ...],
    tokens_bt: Int[Array, "b t"],
    segments_bt: Int[Array, "b t"],
    caches: tuple[build.Cache, ...],
    *,
    configs: tuple[ModelConfig, ...],
    vocab_size: int,
) -> tuple[Int[Array, " b"], tuple[build.Cache, ...]]:
    """Returns the likeliest token after each row, and the caches after it."""
    each_mbv, new_caches = [], []
    for of_model, config, cache in zip(params, configs, caches, strict=True):
        logits_bv, cache = build.prefill(of_model, config, tokens_bt, cache, segments_bt)
        each_mbv.append(jax.nn.log_softmax(logits_bv[:, :vocab_size]))
        new_caches.append(cache)
    return mean_probability(each_mbv).argmax(-1).astype(jnp.int32), tuple(new_caches)
