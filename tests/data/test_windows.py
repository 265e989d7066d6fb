"""PackedWindows against a stream laid out in full."""

import numpy as np
import pytest

from mamba_jax.data.store import Flat
from mamba_jax.data.windows import DocumentWindows, PackedWindows

EOT = 99


def laid_out(tokens, runs):
    parts = [np.concatenate([[EOT], tokens[a + 1 : b]]) for a, b in runs.tolist()]
    return np.concatenate(parts)


def targets_of(windows):
    """Those that are learnt, in order."""
    return [target for window in windows for target in window[1:].tolist() if target >= 0]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("seq_len", [1, 5, 64])
def test_windows_are_slices_of_the_stream_that_share_one_token(seed, seq_len):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 90, 1_000).astype(np.uint16)
    edges = np.sort(rng.choice(1_000, 2 * rng.integers(1, 40), replace=False))
    runs = edges.reshape(-1, 2)
    windows, stream = PackedWindows(Flat([tokens]), runs, seq_len, EOT), laid_out(tokens, runs)
    assert windows.stream_tokens == len(stream)
    assert len(windows) == (len(stream) - 1) // seq_len
    for i in range(len(windows)):
        assert windows[i].dtype == np.int32
        np.testing.assert_array_equal(windows[i], stream[i * seq_len :][: seq_len + 1])
    assert targets_of(windows) == stream[1 : len(windows) * seq_len + 1].tolist()


def test_no_window_of_too_few_tokens_and_no_index_beyond():
    runs = np.array([[0, 8]])
    assert len(PackedWindows(Flat([np.arange(8)]), runs, 8, EOT)) == 0
    windows = PackedWindows(Flat([np.arange(8)]), runs, 7, EOT)
    assert len(windows) == 1
    for bad in (-1, 1):
        with pytest.raises(IndexError, match=f"window {bad} of 1"):
            windows[bad]


def test_targets_that_are_not_learnt_are_written_inverted():
    tokens, learn = np.arange(20, dtype=np.uint16), np.ones(20, np.uint8)
    learn[[3, 7]] = 0
    windows = PackedWindows(Flat([tokens]), np.array([[0, 20]]), 9, EOT, Flat([learn]))
    assert windows[0].tolist() == [EOT, 1, 2, ~3, 4, 5, 6, ~7, 8, 9]
    assert targets_of(windows) == [i for i in range(1, 19) if i not in (3, 7)]


@pytest.mark.parametrize("seq_len", [1, 4, 5, 6, 50])
def test_document_windows_hold_each_document_once_and_its_end(seq_len):
    tokens = np.arange(30, dtype=np.uint16)
    runs = np.array([[0, 6], [6, 8], [10, 21], [25, 26]])
    windows = DocumentWindows(Flat([tokens]), runs, seq_len, EOT)
    at = 0
    for start, end in runs.tolist():
        document = [EOT, *range(start + 1, end), EOT]
        for first in range(0, len(document) - 1, seq_len):
            part = document[first : first + seq_len + 1]
            assert windows[at].tolist() == part + [~EOT] * (seq_len + 1 - len(part))
            at += 1
    assert at == len(windows)
    expected = [t for a, b in runs.tolist() for t in (*range(a + 1, b), EOT)]
    assert targets_of(windows) == expected
