"""How much of a corpus repeats itself, and how much of the held-out text is also trained on.

A *span* is a stretch of ``span_tokens`` tokens inside one unit (``data.windows.split``); a shorter
unit is one span. A span begins at every token, so a copy is found at any place. Each span has the
weight of one token, except that the first span of a unit has its length: the weights of a unit's
spans sum to its tokens. A copy shorter than a span, or one with a change in every span, is missed.

One pass over the tokens in bounded memory: if there are more than ``_MOST_SPANS`` different spans,
those with the smallest hashes represent all, with an error of about 0.2%. Shapes: u units,
n positions, s different spans.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mamba_jax.data.cache.store import Flat

_SPAN_BYTES = 64  # about 13 words, the length of overlaps in arXiv 2005.14165, appendix C
_SHORTEST_SPAN_TOKENS = 8
_MOST_SPANS = 1 << 18
_AT_A_TIME = 1 << 17  # positions: each one needs about 100 bytes of working memory
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What the two sides share. Token counts are estimates if not all spans were kept.

    Attributes:
      span_tokens: length of the compared spans.
      different_tokens: tokens of the corpus with repetition counted once: a span with k copies
        counts 1/k.
      held_out_tokens: how many of these are held out.
      share: the share of the held-out text that is also trained on, 0 to 1.
    """

    span_tokens: int
    different_tokens: float
    held_out_tokens: float
    share: float


def span_length(token_count: int, text_bytes: int) -> int:
    """Returns how many tokens of a corpus hold about ``_SPAN_BYTES`` of text."""
    return max(round(_SPAN_BYTES * token_count / max(text_bytes, 1)), _SHORTEST_SPAN_TOKENS)


class SpanCounts:
    """Counts the spans of units on two sides, train (0) and eval (1)."""

    def __init__(self, tokens: Flat, vocab_size: int, span_tokens: int):
        self._tokens, self._span_tokens = tokens, span_tokens
        self._limit = np.uint64(2**64 - 1)  # hashes up to here are kept
        self._hash_s = np.zeros(0, np.uint64)
        self._count_s2 = np.zeros((0, 2))
        self._weight_s2 = np.zeros((0, 2))
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # The largest batch of positions; a longer unit is processed in pieces.
        powers = np.full(_AT_A_TIME + span_tokens, _BASE, np.uint64)
        powers[0] = 1
        self._power_n = np.cumprod(powers)
        powers[1:] = pow(_BASE, -1, 2**64)
        self._inverse_n = np.cumprod(powers)
        # Each id as a random number: sums of small ones would collide.
        self._value_v = mix(np.arange(1, vocab_size + 1, dtype=np.uint64))

    def add(self, start_u: np.ndarray, end_u: np.ndarray, is_eval_u: np.ndarray) -> None:
        """Counts the spans of more units: stretches of the cache, without separators."""
        for numbers_n, hash_n, weight_n in self._spans(start_u, end_u):
            kept = hash_n <= self._limit
            side_n = is_eval_u[numbers_n[kept]].astype(np.intp)
            self._waiting.append((hash_n[kept], side_n, weight_n[kept]))
            if sum(len(one) for one, *_ in self._waiting) >= _MOST_SPANS:
                self._merge()
        self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        hash_n, side_n, weight_n = map(np.concatenate, zip(*self._waiting, strict=True))
        self._waiting = []
        hash_s, place = np.unique(np.concatenate([self._hash_s, hash_n]), return_inverse=True)
        old, new = place[: len(self._hash_s)], place[len(self._hash_s) :]
        size = 2 * len(hash_s)
        counts = np.bincount(2 * new + side_n, minlength=size).reshape(-1, 2).astype(float)
        weights = (
            np.bincount(2 * new + side_n, weight_n, minlength=size).reshape(-1, 2).astype(float)
        )
        counts[old] += self._count_s2
        weights[old] += self._weight_s2
        if len(hash_s) > _MOST_SPANS:
            self._limit = hash_s[_MOST_SPANS // 2]
        kept = slice(int(np.searchsorted(hash_s, self._limit, side="right")))
        self._hash_s, self._count_s2, self._weight_s2 = hash_s[kept], counts[kept], weights[kept]

    def overlap(self) -> Overlap:
        """Returns what the two sides share."""
        scale = 2.0**64 / (float(self._limit) + 1)
        copies_s = self._count_s2.sum(1)
        train_s, held_s = self._count_s2[:, 0], self._weight_s2[:, 1]
        held = held_s.sum()
        return Overlap(
            span_tokens=self._span_tokens,
            different_tokens=float((self._weight_s2.sum(1) / copies_s).sum()) * scale,
            held_out_tokens=float((held_s / copies_s).sum()) * scale,
            share=float(held_s[train_s > 0].sum() / held) if held else 0.0,
        )

    def own_tokens(self, start_u: np.ndarray, end_u: np.ndarray) -> np.ndarray:
        """Returns float (u,): the tokens of units that were counted, repetition counted once.

        A unit none of whose spans was kept counts in full.
        """
        found_u, own_u = np.zeros(len(start_u)), np.zeros(len(start_u))
        copies_s = self._count_s2.sum(1)
        for numbers_n, hash_n, weight_n in self._spans(start_u, end_u):
            kept = hash_n <= self._limit
            numbers_n, weight_n = numbers_n[kept], weight_n[kept]
            copies_n = copies_s[np.searchsorted(self._hash_s, hash_n[kept])]
            found_u += np.bincount(numbers_n, weight_n, minlength=len(start_u))
            own_u += np.bincount(numbers_n, weight_n / copies_n, minlength=len(start_u))
        share_u = np.divide(own_u, found_u, out=np.ones(len(start_u)), where=found_u > 0)
        return share_u * (end_u - start_u)

    def _spans(
        self, start_u: np.ndarray, end_u: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (number of the unit, hash, weight) of spans, up to ``_AT_A_TIME`` at once."""
        span = self._span_tokens
        for first, last, skip, stop in _batches(end_u - start_u):
            begin_u, close_u = start_u[first:last], end_u[first:last]
            whole = last - first > 1 or (not skip and stop == close_u[0] - begin_u[0])
            if not whole:  # a piece of one long unit, and the tokens that its last spans reach
                begin_u = start_u[first:last] + skip
                close_u = np.minimum(begin_u + (stop - skip) + span - 1, close_u)
            length_u = close_u - begin_u
            values = np.concatenate(
                [self._tokens[a:b] for a, b in zip(begin_u.tolist(), close_u.tolist(), strict=True)]
            )
            self._tokens.release_pages()
            offset_u = np.cumsum(length_u) - length_u
            number_n = np.repeat(np.arange(last - first), length_u)
            place_n = np.arange(len(values)) - offset_u[number_n]  # inside its unit
            end_n = np.minimum(place_n + span, length_u[number_n])
            is_first_n = (place_n == 0) & (skip == 0)
            chosen = np.flatnonzero((place_n + span <= end_n) | is_first_n)
            terms = self._value_v[values] * self._power_n[: len(values)]
            sum_n = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
            ends = (offset_u[number_n] + end_n)[chosen]
            hash_n = mix((sum_n[ends] - sum_n[chosen]) * self._inverse_n[chosen])
            weight_n = np.where(is_first_n[chosen], ends - chosen, 1.0)
            yield number_n[chosen] + first, hash_n, weight_n


def _batches(length_u: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """Yields (first unit, end of the units, skip, stop): units that are processed at once, or
    positions ``skip`` to ``stop`` of a long unit."""
    first, end_u = 0, np.cumsum(length_u)
    while first < len(length_u):
        before = int(end_u[first - 1]) if first else 0
        last = int(np.searchsorted(end_u, before + _AT_A_TIME, side="right"))
        if last > first:
            yield first, last, 0, int(length_u[first])
        else:
            last, length = first + 1, int(length_u[first])
            for skip in range(0, length, _AT_A_TIME):
                yield first, last, skip, min(skip + _AT_A_TIME, length)
        first = last


def mix(x: np.ndarray) -> np.ndarray:
    """Returns uint64 of the same shape: the finaliser of splitmix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
