"""Nearly equal documents, by MinHash of their tokens: ``data.deduplicate="near"``."""

from typing import Any

import numpy as np

from mamba_jax.data.cache.store import DocumentIndex, Flat
from mamba_jax.errors import need

_SIMILARITY = (
    0.8  # a document whose shingles have at least this Jaccard similarity counts as a copy
)
_SHINGLE_TOKENS = 5
_PERMUTATIONS = 128
_AT_A_TIME = 20_000  # shingles: each takes 1 kB temporarily


def first_of_similar(tokens: Flat, documents: DocumentIndex) -> np.ndarray:
    """Returns the ascending indices of documents that are not similar to an earlier kept one.

    Documents shorter than a shingle are all kept.

    Raises:
      UserError: if the library is not installed.
    """
    datasketch = need("datasketch", "dedup")
    seen = datasketch.MinHashLSH(threshold=_SIMILARITY, num_perm=_PERMUTATIONS)
    empty = datasketch.MinHash(num_perm=_PERMUTATIONS, hashfunc=lambda shingle: shingle)
    signatures: dict[Any, Any] = {}  # by the number of their document
    kept = []
    for number, (start, end) in enumerate(zip(documents.start_d, documents.end_d, strict=True)):
        shingles = _shingles(tokens[int(start) + 1 : int(end)])
        tokens.release_pages()
        if len(shingles):
            signature = empty.copy()
            for at in range(0, len(shingles), _AT_A_TIME):
                signature.update_batch(shingles[at : at + _AT_A_TIME])
            # The index gives candidates; the signatures decide.
            if any(
                signature.jaccard(signatures[other]) >= _SIMILARITY
                for other in seen.query(signature)
            ):
                continue
            seen.insert(number, signature)
            signatures[number] = signature
        kept.append(number)
    return np.array(kept, np.int64)


def _shingles(tokens: np.ndarray) -> np.ndarray:
    """Returns uint64, below 2**32: a hash of each different run of tokens."""
    count = len(tokens) - _SHINGLE_TOKENS + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    hash_ = np.zeros(count, np.uint64)
    for i in range(_SHINGLE_TOKENS):
        hash_ = (hash_ ^ tokens[i : i + count].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hash_ ^= hash_ >> np.uint64(32)
    return np.unique(hash_ & np.uint64(0xFFFFFFFF))
