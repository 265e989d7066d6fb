"""Which tokens are trained on and which are held out: by content, never by place.

The tokens lie in one flat array ``<eot> document <eot> document …``. A *unit* is what goes to one
side as a whole: a document, or a block of one that is large. A *run* is a stretch (start, end) of
the array that belongs to one side; its first token counts as the end-of-text marker. Where a run
opens a document that is true in the array; where it continues one after a hole, its first
position is the last token of the hole, covered by the marker. So no side sees a token of the
other, and nothing is copied. Shapes: u units, r runs.
"""

import dataclasses
import hashlib
import itertools

import numpy as np

from mamba_jax.data.tokenizer import Tokenizer

# A document above this share of all tokens is cut: a single one would be all or nothing.
_LARGEST_UNIT_SHARE = 0.005
# But never into blocks below this many tokens, which would leave a small corpus in shreds.
_SMALLEST_BLOCK_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Units:
    """The units in the order of the array; together they hold every token but the markers.

    Attributes:
      start_u, end_u: int64, the stretch of each unit, without a marker.
      digest_ud: uint8 (u, 16), the hash of its tokens.
    """

    start_u: np.ndarray
    end_u: np.ndarray
    digest_ud: np.ndarray


def cut_into_units(tokens: np.ndarray, document_starts: np.ndarray, tokenizer: Tokenizer) -> Units:
    """Cuts the documents, whose markers stand at ``document_starts``, into units."""
    limit = max(int(_LARGEST_UNIT_SHARE * len(tokens)), _SMALLEST_BLOCK_TOKENS)
    document_ends = np.append(document_starts[1:], len(tokens))
    bounds = []
    for start, end in zip((document_starts + 1).tolist(), document_ends.tolist(), strict=True):
        cuts = _cuts(tokens[start:end], limit, tokenizer) if end - start > limit else []
        edges = [start, *(start + cut for cut in cuts), end]
        bounds += itertools.pairwise(edges)
    # In one width, so that units are equal whatever the array's.
    digests = [
        hashlib.blake2b(tokens[start:end].astype("<u4").tobytes(), digest_size=16).digest()
        for start, end in bounds
    ]
    start_u, end_u = np.array(bounds, np.int64).reshape(-1, 2).T.copy()
    return Units(start_u, end_u, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16))


def _cuts(tokens: np.ndarray, limit: int, tokenizer: Tokenizer) -> list[int]:
    """Returns places to cut at, so that no block is longer than ``limit``.

    Best before a token that begins with white space, after one that does not end with it: there
    the blocks' texts have exactly these tokens. Else between whole characters, else anywhere.
    """
    size = -(-len(tokens) // -(-len(tokens) // limit))
    begins_space = np.array([piece[:1].isspace() for piece in tokenizer.pieces])
    ends_space = np.array([piece[-1:].isspace() for piece in tokenizer.pieces])
    begins_inside = np.array(
        [bool(piece) and 0x80 <= piece[0] < 0xC0 for piece in tokenizer.pieces]
    )
    cuts, start = [], 0
    while len(tokens) - start > size:
        first = start + size - size // 2
        left, right = tokens[first - 1 : start + size], tokens[first : start + size + 1]
        exact = np.flatnonzero(begins_space[right] & ~ends_space[left])
        whole = exact if len(exact) else np.flatnonzero(~begins_inside[right])
        start = first + int(whole[-1]) if len(whole) else start + size
        cuts.append(start)
    return cuts


def split_units(
    units: Units, *, seed: int, fraction: float, window_tokens: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Holds out about ``fraction`` of the tokens and at least one window.

    Equal units go to the same side. The order in which units are held out is that of their
    digests hashed with the seed: it depends on nothing but their content.

    Args:
      units: from ``cut_into_units``.
      seed: of the choice.
      fraction: of the tokens to hold out, 0 to 1.
      window_tokens: of one window, the target after its last input included.

    Returns:
      (train, eval) runs, int64 (r, 2) each; None if this leaves a side without a whole window.
    """
    key = hashlib.blake2b(str(seed).encode()).digest()
    rank_u = np.array(
        [
            int.from_bytes(hashlib.blake2b(digest.tobytes(), key=key, digest_size=8).digest())
            for digest in units.digest_ud
        ],
        np.uint64,
    )
    order_u = np.argsort(rank_u, kind="stable")
    held_tokens_u = np.cumsum((units.end_u - units.start_u)[order_u])
    wanted = max(fraction * held_tokens_u[-1], window_tokens)
    last = min(int(np.searchsorted(held_tokens_u, wanted)), len(order_u) - 1)
    is_eval_u = rank_u <= rank_u[order_u[last]]  # equal units have equal ranks
    train, evaluation = _runs(units, ~is_eval_u), _runs(units, is_eval_u)
    if min(stream_tokens(train), stream_tokens(evaluation)) < window_tokens:
        return None
    return train, evaluation


def split_by_place(total_tokens: int, window_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out the last window: for a text too small to be split by content."""
    start = total_tokens - window_tokens
    # The token at `start` is trained on; the held-out run shows the marker in its place.
    return np.array([[0, start + 1]], np.int64), np.array([[start, total_tokens]], np.int64)


def _runs(units: Units, mine_u: np.ndarray) -> np.ndarray:
    """Joins neighbouring units of one side to runs, int64 (r, 2)."""
    change = np.diff(np.concatenate([[0], mine_u.astype(np.int8), [0]]))
    first_r, last_r = np.flatnonzero(change == 1), np.flatnonzero(change == -1) - 1
    return np.stack([units.start_u[first_r] - 1, units.end_u[last_r]], axis=1)


def stream_tokens(runs: np.ndarray) -> int:
    """Returns the number of tokens in runs, markers included."""
    return int((runs[:, 1] - runs[:, 0]).sum())
