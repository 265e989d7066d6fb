"""Fill-in-the-middle: undoing it restores the window, except its end."""

import dataclasses
import itertools

import numpy as np
import pytest

from mamba_jax.config import DataConfig, ModelConfig, RunConfig, default_config, freeze
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary
from mamba_jax.data.windows.fill_in_the_middle import FillInTheMiddle
from mamba_jax.errors import UserError

EOT, IDS = 256, (257, 258, 259)
PREFIX, SUFFIX, MIDDLE = IDS


def made_window(rng, tokens=200, documents=6, begins=True):
    """Distinct neighbours, so that no two pieces look alike."""
    window = np.arange(tokens, dtype=np.int32) % 251
    window[np.sort(rng.choice(np.arange(1, tokens), documents, replace=False))] = EOT
    if begins:
        window[0] = EOT
    return window


def turned_back(window):
    """(tokens in the order of the text, how many documents had been turned around)."""
    tokens, count, out = window.tolist(), 0, []
    edges = sorted({0, len(tokens), *(i for i, token in enumerate(tokens) if token == EOT)})
    for start, end in itertools.pairwise(edges):
        document = tokens[start:end]
        if PREFIX not in document:
            assert SUFFIX not in document and MIDDLE not in document
            out += document
            continue
        count += 1
        one, two, three = (document.index(token) for token in IDS)
        assert one == (document[0] == EOT) and one < two < three
        assert sum(document.count(token) for token in IDS) == 3
        out += document[:one] + document[one + 1 : two]
        out += document[three + 1 :] + document[two + 1 : three]
    return out, count


@pytest.mark.parametrize("begins", [True, False])
def test_undoing_the_reordering_gives_the_window_without_its_end(begins):
    rng = np.random.default_rng(0)
    counts = []
    for sample in range(300):
        window = made_window(rng, begins=begins)
        found = FillInTheMiddle(0.5, EOT, IDS)(window, 7, sample)
        assert found.dtype == np.int32 and found.shape == window.shape
        text, count = turned_back(found)
        assert text == window[: len(text)].tolist()
        assert len(text) == len(window) - 3 * count
        counts.append(count)
    # About half of the documents that are long enough.
    assert 1.5 < np.mean(counts) < 3.5 and min(counts) == 0


def test_cuts_are_everywhere_and_depend_on_seed_and_sample():
    window = np.array([EOT, *range(100)], np.int32)
    fill = FillInTheMiddle(1.0, EOT, IDS)
    starts, lengths = [], []
    for sample in range(400):
        found = fill(window, 3, sample)
        one, two, three = (found.tolist().index(token) for token in IDS)
        starts.append(two - one - 1)
        lengths.append(len(found) - three - 1)
        np.testing.assert_array_equal(found, fill(window, 3, sample))
    # Two uniform points: the lower has mean 1/3, the part between them too (97 tokens; 400 draws).
    assert abs(np.mean(starts) - 97 / 3) < 4 and abs(np.mean(lengths) - 97 / 3) < 4
    assert min(starts) == 0 and min(lengths) <= 1
    assert any((fill(window, 3, n) != fill(window, 4, n)).any() for n in range(3))


def test_padding_and_masked_tokens_stay():
    window = np.concatenate([[EOT], np.arange(50), [EOT], np.full(30, ~EOT)]).astype(np.int32)
    found = FillInTheMiddle(1.0, EOT, IDS)(window, 0, 0)
    text, count = turned_back(found)
    assert count == 1 and text == window[:-3].tolist()
    window[10] = ~window[10]
    np.testing.assert_array_equal(FillInTheMiddle(1.0, EOT, IDS)(window, 0, 0), window)


@pytest.fixture
def corpus_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.py").write_text(f"def f{number}(x):\n    return x\n" * 9)

    def make(**fields):
        config = DataConfig(data_dir="texts", tokenizer="bytes", cache_dir="cache", **fields)
        return prepare(config, seq_len=128, seed=5, log=lambda line: None)

    return make


def test_only_training_windows_are_reordered(corpus_of):
    plain, filled = corpus_of(), corpus_of(fim_rate=0.9)
    assert filled.fingerprint != plain.fingerprint
    pairs = zip(plain.eval_batches(4), filled.eval_batches(4), strict=True)
    assert all(np.array_equal(one, other) for (one, _), (other, _) in pairs)
    steps = range(6)
    before = [w for _, b in zip(steps, plain.train_batches(4, 1), strict=False) for w in b]
    after = [w for _, b in zip(steps, filled.train_batches(4, 1), strict=False) for w in b]
    turned = 0
    for one, other in zip(before, after, strict=True):
        text, count = turned_back(other)
        assert text == one[: len(text)].tolist()
        turned += count
    assert turned > 10
    # The window at a sample does not depend on batches.
    resumed = next(filled.train_batches(3, 1, 9))
    np.testing.assert_array_equal(resumed, after[9:12])


def test_the_model_gets_ids_for_it_and_the_tokenizer_does_not():
    tokenizer = load_tokenizer("bytes")
    run = RunConfig(data=DataConfig(tokenizer="bytes", fim_rate=0.5))
    assert with_vocabulary(run, tokenizer).model.vocab_size == 260
    assert tokenizer.vocab_size == 257 and tokenizer.fim_ids == IDS
    small = dataclasses.replace(run, model=ModelConfig(vocab_size=259))
    with pytest.raises(UserError, match="259 is below the 260 ids"):
        with_vocabulary(small, tokenizer)


def test_settings_that_make_no_sense_are_refused():
    config = default_config()
    config.data.fim_rate = 1.5
    with pytest.raises(UserError, match=r"fim_rate=1\.5 must be between 0 and 1"):
        freeze(config)
    config.data.update(fim_rate=0.5, loss_on="answer")
    with pytest.raises(UserError, match="separates answers from their prompts"):
        freeze(config)
