"""Windows against a stream laid out in full."""

import numpy as np
import pytest

from mamba_jax.data.windows import Windows

EOT = 99


def laid_out(tokens, runs):
    parts = [np.concatenate([[EOT], tokens[a + 1 : b]]) for a, b in runs.tolist()]
    return np.concatenate(parts)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("seq_len", [1, 5, 64])
def test_windows_are_slices_of_the_stream_that_share_one_token(seed, seq_len):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 90, 1_000).astype(np.uint16)
    edges = np.sort(rng.choice(1_000, 2 * rng.integers(1, 40), replace=False))
    runs = edges.reshape(-1, 2)
    windows, stream = Windows(tokens, runs, seq_len, EOT), laid_out(tokens, runs)
    assert windows.stream_tokens == len(stream)
    assert len(windows) == (len(stream) - 1) // seq_len
    for i in range(len(windows)):
        assert windows[i].dtype == np.int32
        np.testing.assert_array_equal(windows[i], stream[i * seq_len :][: seq_len + 1])
    targets = np.concatenate(list(windows.targets()) or [np.zeros(0)])
    np.testing.assert_array_equal(targets, stream[1 : len(windows) * seq_len + 1])


def test_targets_in_several_chunks(monkeypatch):
    monkeypatch.setattr("mamba_jax.data.windows._CHUNK_TOKENS", 7)
    windows = Windows(np.arange(100, dtype=np.uint16), np.array([[0, 100]]), 9, EOT)
    assert [len(chunk) for chunk in windows.targets()] == [7] * 14 + [1]
    np.testing.assert_array_equal(np.concatenate(list(windows.targets())), np.arange(1, 100))


def test_no_window_of_too_few_tokens_and_no_index_beyond():
    runs = np.array([[0, 8]])
    assert len(Windows(np.arange(8), runs, 8, EOT)) == 0
    windows = Windows(np.arange(8), runs, 7, EOT)
    assert len(windows) == 1
    for bad in (-1, 1):
        with pytest.raises(IndexError, match=f"window {bad} of 1"):
            windows[bad]
