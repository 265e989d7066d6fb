"""Similar documents against the Jaccard similarity of their shingles, counted as sets."""

import random
import sys

import numpy as np
import pytest

from mamba_jax.data.cache.store import DocumentIndex, Flat
from mamba_jax.data.windows.near_duplicates import first_of_similar
from mamba_jax.errors import UserError


def documents_of(texts):
    ends = np.cumsum([len(text) + 1 for text in texts])
    starts = ends - [len(text) + 1 for text in texts]
    tokens = np.concatenate([[999, *text] for text in texts]).astype(np.uint16)
    nothing = np.zeros((len(texts), 16), np.uint8)
    return Flat([tokens[:777], tokens[777:]]), DocumentIndex(
        starts, ends, nothing, nothing, ends, 0 * ends
    )


def similarity(a, b):
    sets = [{tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_only_the_first_of_similar_documents_is_kept():
    rng = random.Random(0)
    base = [rng.randrange(500) for _ in range(400)]
    close = [*base[:200], 501, *base[200:]]
    far = [rng.randrange(500) if i % 8 == 0 else token for i, token in enumerate(base)]
    other = [rng.randrange(500) for _ in range(400)]
    texts = [base, other, close, far, [1, 2], [1, 2, 3], other[5:]]
    assert similarity(base, close) > 0.95 and similarity(other, other[5:]) > 0.95
    assert similarity(base, far) < 0.4
    assert first_of_similar(*documents_of(texts)).tolist() == [0, 1, 3, 4, 5]


def test_in_a_corpus(make, many_files):
    text = (many_files / "30.txt").read_text()
    (many_files / "like.txt").write_text(text + "!")
    (many_files / "same.txt").write_text(text)
    exact, near = make(many_files), make(many_files, deduplicate="near")
    assert (exact.summary.documents, exact.summary.duplicates) == (61, 1)
    assert near.summary.duplicates == 1 and near.summary.near_duplicates >= 1
    assert near.summary.documents == 61 - near.summary.near_duplicates
    assert "near duplicates left out" in near.summary.lines()[0]
    assert near.fingerprint != exact.fingerprint


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"mamba_jax\[dedup\]"):
        first_of_similar(*documents_of([[1] * 9]))
