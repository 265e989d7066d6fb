"""Chooses what is held out, measures what it shares with training, and rejects a bad choice.

The first choice is whole documents and blocks of half a percent of the corpus
(``data.windows.split``). It is used if it holds out little enough, also when repetition is counted
once, and more than copies of training text. Otherwise the corpus is tiny or repeats itself: finer
blocks are cut, and only blocks that are mostly unique text are held out.
"""

import dataclasses
import functools

import numpy as np

from mamba_jax.data.cache.store import DocumentIndex, Flat
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.windows.repetition import Overlap, SpanCounts, span_length
from mamba_jax.data.windows.split import (
    LARGEST_UNIT_SHARE,
    SMALLEST_BLOCK_TOKENS,
    Units,
    cut_into_units,
    split_by_place,
    split_units,
    stream_tokens,
)

# Largest shares of the tokens to hold out, and, less, of those counted once, an estimate.
_MOST_SHARE, _MOST_DIFFERENT_SHARE = 0.02, 0.0175
_MOST_WINDOWS = 1.25  # held out if one window is more than that share
_MOST_OVERLAP = 0.995  # share of held-out text also trained on; above it, its loss measures nothing
_SMALLEST_FINE_BLOCK_TOKENS, _SHORTEST_FINE_SPAN_TOKENS = 16, 8
_FEW_DOCUMENTS = 20
_MOST_FINE_BLOCKS = 1 << 20
_LEAST_OWN_SHARE = 0.5  # unique text in a fine block that is held out
_MOST_FINE_OVERLAP = 0.5


@dataclasses.dataclass(frozen=True)
class Division:
    """What is trained on and what is held out. Shapes: u units, r runs.

    Both ``is_eval_u`` and ``by_place`` are None if the text repeats itself so much that nothing can
    be held out.

    Attributes:
      units: the units that were divided.
      overlap: what the sides share.
      is_eval_u: bool, what is held out.
      by_place: (train, held out), int64 (r, 2), of a text too small to be split by content.
      rule: identifies the way of splitting in fingerprints; "" for the coarse units.
    """

    units: Units
    overlap: Overlap
    is_eval_u: np.ndarray | None = None
    by_place: tuple[np.ndarray, np.ndarray] | None = None
    rule: str = ""


def hold_out(
    tokens: Flat,
    documents: DocumentIndex,
    tokenizer: Tokenizer,
    *,
    seed: int,
    fraction: float,
    window_tokens: int,
) -> Division:
    """Divides documents.

    Args:
      tokens, documents: the corpus, of at least two windows.
      tokenizer: the tokenizer that made the tokens.
      seed: random seed of the choice.
      fraction: share of the tokens to hold out, 0 to 1.
      window_tokens: tokens of one window, the target after its last input included; at least one
        window is held out.
    """
    total = documents.token_count
    divider = _Divider(tokens, documents, tokenizer)
    choose = functools.partial(
        split_units, seed=seed, fraction=fraction, window_tokens=window_tokens
    )
    is_good = functools.partial(_is_good, fraction=fraction, window_tokens=window_tokens)
    span = span_length(total, int(documents.bytes_d.sum()))
    large = max(int(LARGEST_UNIT_SHARE * total), SMALLEST_BLOCK_TOKENS)
    units = divider.units(large, large)
    is_eval_u = choose(units)
    by_place = split_by_place(units, window_tokens) if is_eval_u is None else None
    if by_place:  # one window is held out: copies of a part of it must be found
        span = min(span, max(window_tokens // 4, _SHORTEST_FINE_SPAN_TOKENS))
    coarse = divider.measured(units, is_eval_u, by_place, span)
    different = coarse.overlap.different_tokens
    if different < min(2 * window_tokens, total / 2):
        return Division(units, coarse.overlap)
    if is_good(coarse) or (by_place and total < 4 * window_tokens):
        return coarse

    least = min(SMALLEST_BLOCK_TOKENS, max(window_tokens // 4, _SMALLEST_FINE_BLOCK_TOKENS))
    least = max(least, total // _MOST_FINE_BLOCKS)
    limit = min(large, max(int(LARGEST_UNIT_SHARE * different), least))
    span = min(span, max(limit // 2, _SHORTEST_FINE_SPAN_TOKENS))
    most_copies_tokens = max(LARGEST_UNIT_SHARE * total, limit)
    # Short documents can be records and stay whole, even if that holds out up to one document more
    # than needed. Only if there are few documents, they are cut.
    ways = [(large, large)]
    if len(documents.end_d) < _FEW_DOCUMENTS:
        ways = [(large, max(window_tokens, limit)), (limit, limit)]
    for cut_above, surplus in ways:
        units = divider.units(limit, cut_above)
        own_u, is_free_u = divider.own(units, span, most_copies_tokens)
        is_eval_u = choose(units, own_tokens_u=own_u, is_free_u=is_free_u)
        if is_eval_u is not None:
            fine = divider.measured(units, is_eval_u, None, span)
            if is_good(fine, surplus_tokens=surplus, most_overlap=_MOST_FINE_OVERLAP):
                rule = f"blocks of {limit} of documents above {cut_above}, spans of {span}"
                return dataclasses.replace(fine, rule=rule)
    is_usable = max(coarse.overlap.share, _held_share(coarse)) <= _MOST_FINE_OVERLAP
    return coarse if is_usable else Division(coarse.units, coarse.overlap)


@dataclasses.dataclass(frozen=True)
class _Divider:
    """Cuts a corpus into units and counts its spans."""

    tokens: Flat
    documents: DocumentIndex
    tokenizer: Tokenizer

    def units(self, limit: int, cut_above: int) -> Units:
        return cut_into_units(self.tokens, self.documents, self.tokenizer, limit, cut_above)

    def _counts(self, span: int) -> SpanCounts:
        return SpanCounts(self.tokens, self.tokenizer.vocab_size, span)

    def measured(
        self,
        units: Units,
        is_eval_u: np.ndarray | None,
        by_place: tuple[np.ndarray, np.ndarray] | None,
        span: int,
    ) -> Division:
        """Returns the division with what its sides share."""
        counts = self._counts(span)
        if is_eval_u is not None:
            counts.add(units.start_u, units.end_u, is_eval_u)
        for is_eval, side in enumerate(by_place or ()):
            counts.add(side[:, 0] + 1, side[:, 1], np.full(len(side), bool(is_eval)))
        return Division(units, counts.overlap(), is_eval_u, by_place)

    def own(self, units: Units, span: int, most_tokens: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns float (u,), the tokens of units with repetition counted once, and bool (u,),
        which units are mostly unique and, with their copies, no longer than ``most_tokens``."""
        _, group_u, copies_g = np.unique(
            units.digest_ud, axis=0, return_inverse=True, return_counts=True
        )
        counts, copies_u = self._counts(span), copies_g[group_u]
        counts.add(units.start_u, units.end_u, np.zeros(len(copies_u), bool))
        own_u, length_u = counts.own_tokens(units.start_u, units.end_u), units.end_u - units.start_u
        is_free_u = copies_u * own_u >= _LEAST_OWN_SHARE * length_u
        return own_u, is_free_u & (copies_u * length_u <= most_tokens)


def _held_share(division: Division) -> float:
    units = division.units
    length_u = units.end_u - units.start_u
    if division.by_place:
        held = stream_tokens(division.by_place[1])
    else:
        held = int(length_u[division.is_eval_u].sum())
    return held / int(length_u.sum())


def _is_good(
    division: Division,
    *,
    fraction: float,
    window_tokens: int,
    surplus_tokens: int = 0,
    most_overlap: float = _MOST_OVERLAP,
) -> bool:
    """Returns whether little enough is held out, and more than copies of training text."""

    def most(tokens: float, share: float) -> float:
        needed = max(window_tokens, fraction * tokens)
        return max(
            share * max(1.0, 100 * fraction) * tokens,  # twice the fraction, above 1%
            _MOST_WINDOWS * window_tokens,
            needed + surplus_tokens,
        )

    overlap, units = division.overlap, division.units
    total, different = int((units.end_u - units.start_u).sum()), overlap.different_tokens
    return (
        _held_share(division) * total <= most(total, _MOST_SHARE)
        and 0.5 * fraction * different
        <= overlap.held_out_tokens
        <= most(different, _MOST_DIFFERENT_SHARE)
        and overlap.share <= most_overlap
    )
