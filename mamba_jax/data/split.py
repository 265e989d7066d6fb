"""Which tokens are trained on and which are held out: by content, never by place.

Documents lie somewhere in the token cache, each as ``<eot> tokens``, and follow one another in the
order of the corpus. A *unit* is what goes to one side as a whole: a document, or a block of one
that is large. A *run* is a stretch (start, end) of the cache that belongs to one side; its first
token counts as the end-of-text marker. Where a run opens a document that is true in the cache;
where it continues one after a hole, its first position is the last token of the hole, covered by
the marker.
So no side sees a token of the other, and nothing is copied. Shapes: u units, r runs.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from mamba_jax.data.store import Documents, Flat
from mamba_jax.data.tokenizer import Tokenizer

# A document above this share of all tokens is cut: a single one would be all or nothing.
_LARGEST_UNIT_SHARE = 0.005
# But never into blocks below this many tokens, which would leave a small corpus in shreds.
_SMALLEST_BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Units:
    """The units in the order of the corpus; together they hold every token but the markers.

    Attributes:
      start_u, end_u: int64, the stretch of each unit in the cache, without a marker.
      digest_ud: uint8 (u, 16), of its text, or of its tokens where it is a block.
      source_u: int, number of the source that each comes from.
    """

    start_u: np.ndarray
    end_u: np.ndarray
    digest_ud: np.ndarray
    source_u: np.ndarray


def cut_into_units(tokens: Flat, documents: Documents, tokenizer: Tokenizer) -> Units:
    """Cuts the documents into units."""
    limit = max(int(_LARGEST_UNIT_SHARE * documents.token_count), _SMALLEST_BLOCK_TOKENS)
    start_u, end_u = documents.start_d + 1, documents.end_d
    digest_ud, source_u = documents.digest_dk, documents.source_d
    for number in reversed(np.flatnonzero(end_u - start_u > limit).tolist()):
        start, end = int(start_u[number]), int(end_u[number])
        edges = [start, *_cuts(tokens, start, end, limit, tokenizer), end]
        digests = []
        for first, last in itertools.pairwise(edges):
            # In one width, so that blocks are equal whatever the cache's.
            block = tokens[first:last].astype("<u4").tobytes()
            digests.append(hashlib.blake2b(block, digest_size=16).digest())
            tokens.forget()
        blocks_ud = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
        around = slice(number), slice(number + 1, None)
        put = lambda old, new: np.concatenate([old[around[0]], new, old[around[1]]])  # noqa: B023
        start_u, end_u = put(start_u, edges[:-1]), put(end_u, edges[1:])
        digest_ud = put(digest_ud, blocks_ud)
        source_u = put(source_u, np.full(len(digests), source_u[number]))
    return Units(start_u, end_u, digest_ud, source_u)


def _cuts(tokens: Flat, start: int, end: int, limit: int, tokenizer: Tokenizer) -> list[int]:
    """Returns places in [start, end) to cut at, so that no block is longer than ``limit``.

    Best before a token that begins with white space, after one that does not end with it: there
    the blocks' texts have exactly these tokens. Else between whole characters, else anywhere.
    """
    size = -(-(end - start) // -(-(end - start) // limit))
    begins_space = np.array([piece[:1].isspace() for piece in tokenizer.pieces])
    ends_space = np.array([piece[-1:].isspace() for piece in tokenizer.pieces])
    begins_inside = np.array(
        [bool(piece) and 0x80 <= piece[0] < 0xC0 for piece in tokenizer.pieces]
    )
    cuts = []
    while end - start > size:
        first = start + size - size // 2
        near = tokens[first - 1 : start + size + 1]
        left, right = near[:-1], near[1:]
        exact = np.flatnonzero(begins_space[right] & ~ends_space[left])
        whole = exact if len(exact) else np.flatnonzero(~begins_inside[right])
        start = first + int(whole[-1]) if len(whole) else start + size
        cuts.append(start)
        tokens.forget()
    return cuts


def split_units(
    units: Units, *, seed: int, fraction: float, window_tokens: int
) -> np.ndarray | None:
    """Holds out about ``fraction`` of the tokens and at least one window.

    Equal units go to the same side. The order in which units are held out is that of their
    digests hashed with the seed: it depends on nothing but their content.

    Args:
      units: from ``cut_into_units``.
      seed: of the choice.
      fraction: of the tokens to hold out, 0 to 1.
      window_tokens: of one window, the target after its last input included.

    Returns:
      bool (u,), what is held out; None if this leaves a side without a whole window.
    """
    rank_u = _ranks(units.digest_ud, seed)
    order_u = np.argsort(rank_u, kind="stable")
    held_tokens_u = np.cumsum((units.end_u - units.start_u)[order_u])
    wanted = max(fraction * held_tokens_u[-1], window_tokens)
    last = min(int(np.searchsorted(held_tokens_u, wanted)), len(order_u) - 1)
    is_eval_u = rank_u <= rank_u[order_u[last]]  # equal units have equal ranks
    sides = runs(units, ~is_eval_u), runs(units, is_eval_u)
    return None if min(map(stream_tokens, sides)) < window_tokens else is_eval_u


def _ranks(digest_ud: np.ndarray, seed: int) -> np.ndarray:
    """Returns uint64 (u,): a hash of each digest with the seed (the finaliser of splitmix64).

    The digests are cryptographic already; a hash of each in Python would take seconds for millions.
    """
    key = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest())
    x_u = np.ascontiguousarray(digest_ud[:, :8]).view("<u8").ravel() ^ np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x_u = (x_u ^ (x_u >> np.uint64(shift))) * np.uint64(factor)
    return x_u ^ (x_u >> np.uint64(31))


def split_by_place(units: Units, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the last window: for a text too small to be split by content."""
    whole = runs(units, np.ones(len(units.end_u), bool))
    offset_r = np.cumsum(whole[:, 1] - whole[:, 0])
    start = int(offset_r[-1]) - window_tokens
    last = int(np.searchsorted(offset_r, start, side="right"))
    cut = int(whole[last, 1]) - (int(offset_r[last]) - start)
    # The token at `cut` is trained on; the held-out run shows the marker in its place.
    train = np.concatenate([whole[:last], [[whole[last, 0], cut + 1]]])
    return train, np.concatenate([[[cut, whole[last, 1]]], whole[last + 1 :]])


def runs(units: Units, mine_u: np.ndarray, *, across_documents: bool = True) -> np.ndarray:
    """Joins units that follow one another in the cache to runs, int64 (r, 2).

    Args:
      units: from ``cut_into_units``.
      mine_u: bool (u,), which of them.
      across_documents: whether a run may hold several documents, or blocks of one alone.
    """
    index = np.flatnonzero(mine_u)
    if not len(index):
        return np.zeros((0, 2), np.int64)
    # Between documents lies a marker, between blocks of one document nothing.
    gap = units.start_u[index[1:]] - units.end_u[index[:-1]]
    joined = (gap == 0) | (gap == 1) if across_documents else gap == 0
    breaks = (np.diff(index) > 1) | ~joined
    first_r = index[np.concatenate([[True], breaks])]
    last_r = index[np.concatenate([breaks, [True]])]
    return np.stack([units.start_u[first_r] - 1, units.end_u[last_r]], axis=1)


def stream_tokens(runs_r2: np.ndarray) -> int:
    """Returns the number of tokens in runs, markers included."""
    return int((runs_r2[:, 1] - runs_r2[:, 0]).sum())
