"""Order and resume: the window at sample i is a function of (fingerprint, seed, i) alone.

The state of the iteration is one integer, so it survives JSON and any other storage as it is.
"""

import math
import threading
from itertools import islice

import numpy as np
import pytest

from mamba_jax.checkpoints.folder import Metadata, read_metadata, write_metadata
from mamba_jax.config import RunConfig
from mamba_jax.data import pipeline
from tests.data.conftest import words


@pytest.fixture
def corpus(make, tmp_path):
    """About sixty training windows, all different."""
    (tmp_path / "book.txt").write_text(words(400))
    corpus = make(tmp_path / "book.txt", seq_len=33, eval_fraction=0.2)
    size = len(corpus.train)
    assert 60 < size < 70
    assert len({corpus.train[i].tobytes() for i in range(size)}) == size
    return corpus


def samples(corpus, count, batch_size=1, seed=0, start=0):
    """Returns `count` windows as bytes, whatever the batch size."""
    batches = corpus.train_batches(batch_size, seed, start)
    windows = [
        window.tobytes() for batch in islice(batches, -(-count // batch_size)) for window in batch
    ]
    return windows[:count]


def test_batches_are_stacked_windows(corpus):
    batch = next(corpus.train_batches(4, 0))
    assert batch.shape == (4, 34) and batch.dtype == np.int32


def test_one_epoch_has_every_window_exactly_once(corpus):
    size = len(corpus.train)
    everything = sorted(corpus.train[i].tobytes() for i in range(size))
    drawn = samples(corpus, 3 * size, batch_size=8)
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == everything


def test_a_sample_does_not_depend_on_the_batch_size(corpus):
    expected = samples(corpus, 150)
    for batch_size in (2, 7, 64, 100):
        assert samples(corpus, 150, batch_size) == expected


@pytest.mark.parametrize("start", [1, 60, 61, 62, 1_000])
@pytest.mark.parametrize("batch_size", [1, 6])
def test_resume_continues_the_uninterrupted_run(corpus, start, batch_size):
    expected = samples(corpus, start + 130)[start:]
    assert samples(corpus, 130, batch_size, start=start) == expected


def test_a_new_process_state_gives_the_same_order(corpus, make, tmp_path):
    again = make(tmp_path / "book.txt", seq_len=33, eval_fraction=0.2)
    assert again.fingerprint == corpus.fingerprint
    assert samples(again, 150, seed=5) == samples(corpus, 150, seed=5)


def test_epochs_and_seeds_reshuffle_independently(corpus):
    size = len(corpus.train)
    epochs = {
        (seed, epoch): tuple(samples(corpus, size, 8, seed=seed, start=epoch * size))
        for seed in (*range(6), 2**40)
        for epoch in range(3)
    }
    # All differ: in particular seed s at epoch 1 is not seed s + 1 at epoch 0.
    assert len(set(epochs.values())) == len(epochs)
    unshuffled = tuple(corpus.train[i].tobytes() for i in range(size))
    assert unshuffled not in epochs.values()


def test_a_single_training_window_repeats(make, tmp_path):
    (tmp_path / "a.txt").write_text(words(100)[:67])
    corpus = make(tmp_path / "a.txt")
    assert len(corpus.train) == 1
    assert len(set(samples(corpus, 5, batch_size=2))) == 1


def test_bad_arguments_fail_at_once(corpus):
    for batch_size, start in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"batch by {batch_size} from sample {start}"):
            corpus.train_batches(batch_size, 0, start)


def test_no_thread_is_left_behind(corpus):
    before = threading.active_count()
    batches = corpus.train_batches(4, 0)
    next(batches)
    assert threading.active_count() == before


def test_a_checkpoints_json_holds_all_that_resuming_needs(corpus, tmp_path):
    """An iterator state changed by JSON would skip a window after the round trip."""
    whole = [batch.tobytes() for batch in islice(corpus.train_batches(5, 3), 40)]  # > 2 epochs
    for done in range(40):
        metadata = Metadata(RunConfig(), done, 5 * done, corpus.fingerprint)
        write_metadata(tmp_path, metadata)
        start = read_metadata(tmp_path).samples_seen
        rest = islice(corpus.train_batches(5, 3, start), 40 - done)
        assert [batch.tobytes() for batch in rest] == whole[done:]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_eval_batches_hold_every_window_once_padded_with_weight_0(corpus, batch_size):
    seen = []
    for windows, weights in corpus.eval_batches(batch_size):
        assert windows.shape == (batch_size, 34) and windows.dtype == np.int32
        assert weights.shape == (batch_size,) and weights.dtype == np.float32
        assert set(weights) <= {0.0, 1.0} and weights[0] == 1
        seen += [w.tobytes() for w, weight in zip(windows, weights, strict=True) if weight]
    assert seen == [corpus.eval[i].tobytes() for i in range(len(corpus.eval))]


def test_eval_batches_can_be_limited_to_an_even_choice(corpus):
    def chosen(max_windows):
        batches = corpus.eval_batches(2, max_windows)
        return [w.tobytes() for ws, ks in batches for w, k in zip(ws, ks, strict=True) if k]

    everything = [corpus.eval[i].tobytes() for i in range(len(corpus.eval))]
    assert len(everything) > 9
    assert chosen(3) == chosen(3) == [everything[i * len(everything) // 3] for i in range(3)]
    assert chosen(10_000) == chosen(0) == everything


def test_unigram_nll_equals_its_definition(corpus):
    """Counted one target at a time; 1e-12 relative is float64 rounding over 500 terms."""
    counts = [1] * 257
    for i in range(len(corpus.train)):
        for token in corpus.train[i][1:].tolist():
            counts[token] += 1
    terms = [
        -math.log(counts[token] / sum(counts))
        for i in range(len(corpus.eval))
        for token in corpus.eval[i][1:].tolist()
    ]
    assert corpus.unigram_nll == pytest.approx(math.fsum(terms) / len(terms), rel=1e-12)


def test_an_even_sample_of_many_windows_is_counted(corpus, monkeypatch):
    monkeypatch.setattr(pipeline, "_COUNTED_TOKENS", 5 * len(corpus.eval[0]))
    monkeypatch.setattr(pipeline, "_COUNTED_AT_ONCE", 2)
    counts, n = np.ones(257), len(corpus.train)
    for i in (0, n // 5, 2 * n // 5, 3 * n // 5, 4 * n // 5):
        np.add.at(counts, corpus.train[i][1:], 1)
    k = min(5, len(corpus.eval))
    held = [corpus.eval[i * len(corpus.eval) // k][1:] for i in range(k)]
    expected = -np.log(counts / counts.sum())[np.concatenate(held)].mean()
    assert n > 10
    assert corpus.unigram_nll == pytest.approx(expected, rel=1e-12)


def test_the_log_reports_the_tokens(corpus, make):
    assert corpus.summary.tokens == 2_800  # 400 words of 6 letters, 399 spaces and the separator
    assert any("2,800 tokens" in line for line in make.log)
