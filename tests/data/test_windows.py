"""PackedWindows against a stream laid out in full."""

import itertools

import numpy as np
import pytest

from mamba_jax.data.cache.store import Flat
from mamba_jax.data.windows.windows import DocumentWindows, PackedWindows

EOT = 99


def laid_out(tokens, runs):
    parts = [np.concatenate([[EOT], tokens[a + 1 : b]]) for a, b in runs.tolist()]
    return np.concatenate(parts)


def targets_of(windows):
    """The targets, in order."""
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


def test_too_few_tokens_give_no_window_and_indices_are_checked():
    runs = np.array([[0, 8]])
    assert len(PackedWindows(Flat([np.arange(8)]), runs, 8, EOT)) == 0
    windows = PackedWindows(Flat([np.arange(8)]), runs, 7, EOT)
    assert len(windows) == 1
    for bad in (-1, 1):
        with pytest.raises(IndexError, match=f"window {bad} of 1"):
            windows[bad]


def test_masked_tokens_are_written_inverted():
    tokens, loss_mask = np.arange(20, dtype=np.uint16), np.ones(20, np.uint8)
    loss_mask[[3, 7]] = 0
    windows = PackedWindows(Flat([tokens]), np.array([[0, 20]]), 9, EOT, Flat([loss_mask]))
    assert windows[0].tolist() == [EOT, 1, 2, ~3, 4, 5, 6, ~7, 8, 9]
    assert targets_of(windows) == [i for i in range(1, 19) if i not in (3, 7)]


# (text, loss mask) of the documents in the cache: answered ones, prompts alone, one without tokens,
# and some that end in a prompt.
CACHED = [
    ([1, 2, 3], [0, 0, 1]), ([4, 5], [0, 0]), ([], []), ([6, 7, 8], [0, 1, 0]),
    ([9, 10, 11, 12, 13, 14], [0, 0, 1, 1, 1, 0]), ([15, 16], [1, 1]), ([17], [0]), ([18], [1]),
]  # fmt: skip
CACHED_TOKENS = np.array([t for text, _ in CACHED for t in (EOT, *text)], np.uint16)
CACHED_LEARN = np.array([x for _, mask in CACHED for x in (1, *mask)], np.uint8)
STARTS = np.cumsum([0] + [len(text) + 1 for text, _ in CACHED]).tolist()


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "chosen",
    [[0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 5, 7], [1, 5, 6], [7, 5], [3, 0, 6, 0, 2, 0]],
    ids=str,
)
def test_a_separator_is_a_target_only_after_an_answer(chosen, seq_len, shards):
    edges = STARTS if shards == 3 else [0, len(CACHED_TOKENS)]
    cut = lambda array: Flat([array[a:b] for a, b in itertools.pairwise(edges)])
    tokens, loss_mask = cut(CACHED_TOKENS), cut(CACHED_LEARN)
    # Documents that follow one another in the cache are one run.
    runs = [[STARTS[number], STARTS[number + 1]] for number in chosen]
    for index in range(len(runs) - 1, 0, -1):
        if runs[index][0] == runs[index - 1][1]:
            runs[index - 1 : index + 1] = [[runs[index - 1][0], runs[index][1]]]
    expected = []
    for number in chosen:
        text, mask = CACHED[number]
        expected += [t for t, is_target in zip(text, mask, strict=True) if is_target]
        expected += [EOT] if mask and mask[-1] else []
    windows = PackedWindows(tokens, np.array(runs), seq_len, EOT, loss_mask)
    total = sum(len(CACHED[number][0]) + 1 for number in chosen)
    left_over = total - 1 - len(windows) * seq_len  # targets that fill no window
    stream = [t for number in chosen for t in (EOT, *CACHED[number][0])]
    mask = [x for n in chosen for x in (*CACHED[n][1], int(CACHED[n][1][-1:] == [1]))][: total - 1]
    kept = zip(stream[1:], mask, strict=True)
    packed = [t for t, is_target in list(kept)[: total - 1 - left_over] if is_target]
    assert targets_of(windows) == packed
    each = np.array([[STARTS[number], STARTS[number + 1]] for number in chosen])
    assert targets_of(DocumentWindows(tokens, each, seq_len, EOT, loss_mask)) == expected


def test_no_separator_is_a_target_where_a_document_is_cut():
    """Although the token before it is one: the answer does not end there."""
    tokens, loss_mask = Flat([np.array([EOT, 1, 2, 3, 4, EOT, 5])]), Flat([np.ones(7, np.uint8)])
    runs = np.array([[0, 3], [5, 7]])
    window = PackedWindows(tokens, runs, 4, EOT, loss_mask)[0]
    assert window.tolist() == [EOT, 1, 2, ~EOT, 5]
    whole = PackedWindows(tokens, runs, 4, EOT)[0]  # every token is a target
    assert whole.tolist() == [EOT, 1, 2, EOT, 5]
    window = DocumentWindows(tokens, runs[:1], 4, EOT, loss_mask)[0]
    assert window.tolist() == [EOT, 1, 2, ~EOT, ~EOT]


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
