"""Which tokens are trained on and which are held out: by content, never by position.

The token cache holds each document as ``<separator> tokens``; the documents of a corpus have an
order. A *unit* goes to one side as a whole: a document, or a block of a large one. A *run* is a
stretch (start, end) of the cache that belongs to one side; its first token counts as the separator.
If the run begins a document, that token is the separator in the cache. If it continues a document
after a hole, that token is the last one of the hole, and windows show the separator instead. So no
side sees a token of the other, and nothing is copied. Shapes: u units, r runs.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from mamba_jax.data.cache.store import DocumentIndex, Flat
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.windows.repetition import mix

# A larger document is cut: whole, it would hold out too much or nothing.
LARGEST_UNIT_SHARE = 0.005
# Smaller blocks are only cut if necessary, since they would fragment a small corpus.
SMALLEST_BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Units:
    """The units in the order of the corpus; together they hold every token but the separators.

    Attributes:
      start_u, end_u: int64, the stretch of each unit in the cache, without a separator.
      digest_ud: uint8 (u, 16), hash of its text, or of its tokens if it is a block.
      source_u: int, number of the source that each comes from.
    """

    start_u: np.ndarray
    end_u: np.ndarray
    digest_ud: np.ndarray
    source_u: np.ndarray


def cut_into_units(
    tokens: Flat, documents: DocumentIndex, tokenizer: Tokenizer, limit: int, cut_above: int
) -> Units:
    """Cuts documents of more than ``cut_above`` tokens into units of at most ``limit`` tokens."""
    start_u, end_u = documents.start_d + 1, documents.end_d
    digest_ud, source_u = documents.digest_dk, documents.source_d
    cutter = _BlockCutter(tokens, tokenizer, limit)
    large = np.flatnonzero(end_u - start_u > cut_above)
    counts_d = np.ones(len(start_u), np.int64)
    starts, ends, digests = [], [], []
    for number in large.tolist():
        edges = cutter.edges(int(start_u[number]), int(end_u[number]))
        counts_d[number] = len(edges) - 1
        starts.append(edges[:-1])
        ends.append(edges[1:])
        for first, last in itertools.pairwise(edges):
            # In one integer width, so that digests do not depend on that of the cache.
            block = tokens[first:last].astype("<u4").tobytes()
            digests.append(hashlib.blake2b(block, digest_size=16).digest())
            tokens.release_pages()
    if not len(large):
        return Units(start_u, end_u, digest_ud, source_u)
    of_large_u = np.repeat(np.isin(np.arange(len(counts_d)), large), counts_d)
    spread = lambda values_d: np.repeat(values_d, counts_d, axis=0)
    start_u, end_u, digest_ud = spread(start_u), spread(end_u), spread(digest_ud)
    start_u[of_large_u], end_u[of_large_u] = np.concatenate(starts), np.concatenate(ends)
    digest_ud[of_large_u] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return Units(start_u, end_u, digest_ud, spread(source_u))


class _BlockCutter:
    """Finds places to cut a large document, so that no block is longer than ``limit``.

    The best place is before a token that begins with white space and after one that does not end
    with it: the texts of the blocks then have exactly these tokens. The next best is between whole
    characters, then anywhere.
    """

    def __init__(self, tokens: Flat, tokenizer: Tokenizer, limit: int):
        pieces = tokenizer.pieces
        self._tokens, self._limit = tokens, limit
        self._begins_space = np.array([piece[:1].isspace() for piece in pieces])
        self._ends_space = np.array([piece[-1:].isspace() for piece in pieces])
        self._begins_inside = np.array(
            [bool(piece) and 0x80 <= piece[0] < 0xC0 for piece in pieces]
        )

    def edges(self, start: int, end: int) -> list[int]:
        """Returns the start, the cuts and the end of [start, end)."""
        size = -(-(end - start) // -(-(end - start) // self._limit))
        edges = [start]
        while end - start > size:
            first = start + size - size // 2
            near = self._tokens[first - 1 : start + size + 1]
            left, right = near[:-1], near[1:]
            exact = np.flatnonzero(self._begins_space[right] & ~self._ends_space[left])
            whole = exact if len(exact) else np.flatnonzero(~self._begins_inside[right])
            start = first + int(whole[-1]) if len(whole) else start + size
            edges.append(start)
            self._tokens.release_pages()
        return [*edges, end]


def split_units(
    units: Units,
    *,
    seed: int,
    fraction: float,
    window_tokens: int,
    own_tokens_u: np.ndarray | None = None,
    is_free_u: np.ndarray | None = None,
) -> np.ndarray | None:
    """Holds out about ``fraction`` of the tokens and at least one window.

    Equal units go to the same side. Units are held out in the order of their digests hashed with
    the seed, which depends only on their content.

    Args:
      units: from ``cut_into_units``.
      seed: random seed of the choice.
      fraction: share of the tokens to hold out, 0 to 1.
      window_tokens: tokens of one window, the target after its last input included.
      own_tokens_u: float (u,), the tokens of each unit that count; None: all of them.
      is_free_u: bool (u,), which units can be held out; None: all.

    Returns:
      bool (u,), what is held out; None if this leaves a side without a whole window.
    """
    rank_u = _ranks(units.digest_ud, seed)
    order_u = np.argsort(rank_u, kind="stable")
    count_u = units.end_u - units.start_u if own_tokens_u is None else own_tokens_u
    free_u = np.ones(len(rank_u), bool) if is_free_u is None else is_free_u
    wanted = max(fraction * count_u.sum(), window_tokens)
    held_tokens_u = np.cumsum((count_u * free_u)[order_u])
    last = min(int(np.searchsorted(held_tokens_u, wanted)), len(order_u) - 1)
    is_eval_u = free_u & (rank_u <= rank_u[order_u[last]])  # equal units have equal ranks
    sides = runs(units, ~is_eval_u), runs(units, is_eval_u)
    return None if min(map(stream_tokens, sides)) < window_tokens else is_eval_u


def _ranks(digest_ud: np.ndarray, seed: int) -> np.ndarray:
    """Returns uint64 (u,): a hash of each digest with the seed.

    The digests are cryptographic already; a hash of each in Python would take seconds for millions.
    """
    key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
    return mix(np.ascontiguousarray(digest_ud[:, :8]).view("<u8").ravel() ^ np.uint64(key))


def split_by_place(units: Units, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the last window of a text that is too small to be split by content."""
    whole = runs(units, np.ones(len(units.end_u), bool))
    offset_r = np.cumsum(whole[:, 1] - whole[:, 0])
    start = int(offset_r[-1]) - window_tokens
    last = int(np.searchsorted(offset_r, start, side="right"))
    cut = int(whole[last, 1]) - (int(offset_r[last]) - start)
    # The token at `cut` is trained on; the held-out run shows the separator in its place.
    train = np.concatenate([whole[:last], [[whole[last, 0], cut + 1]]])
    return train, np.concatenate([[[cut, whole[last, 1]]], whole[last + 1 :]])


def runs(units: Units, mine_u: np.ndarray, *, across_documents: bool = True) -> np.ndarray:
    """Joins units that are adjacent in the cache to runs, int64 (r, 2).

    Args:
      units: from ``cut_into_units``.
      mine_u: bool (u,), which units to join.
      across_documents: whether a run can hold several documents; otherwise only blocks of one.
    """
    index = np.flatnonzero(mine_u)
    if not len(index):
        return np.zeros((0, 2), np.int64)
    # There is a separator between documents, and nothing between blocks of one document.
    gap = units.start_u[index[1:]] - units.end_u[index[:-1]]
    joined = (gap == 0) | (gap == 1) if across_documents else gap == 0
    breaks = (np.diff(index) > 1) | ~joined
    first_r = index[np.concatenate([[True], breaks])]
    last_r = index[np.concatenate([breaks, [True]])]
    return np.stack([units.start_u[first_r] - 1, units.end_u[last_r]], axis=1)


def stream_tokens(runs_r2: np.ndarray) -> int:
    """Returns the number of tokens in runs, separators included."""
    return int((runs_r2[:, 1] - runs_r2[:, 0]).sum())
