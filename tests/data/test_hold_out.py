"""How much is held out of repetitive and of tiny text, against counts of words."""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_jax.config import DataConfig
from mamba_jax.data.cache.store import Flat
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.windows import repetition
from mamba_jax.data.windows.repetition import SpanCounts
from mamba_jax.errors import UserError
from tests.data.conftest import BYTES_EOT, words


def whole_words(tokens: np.ndarray) -> list[str]:
    """The words of a stretch, which may begin or end inside one."""
    text = bytes(np.where(tokens == BYTES_EOT, ord("\n"), tokens).tolist()).decode()
    return [word for word in text.split() if len(word) == 7]


def sides(corpus) -> list[collections.Counter]:
    """The words trained on and those held out."""
    return [
        collections.Counter(whole_words(side._read(0, side.stream_tokens)))
        for side in (corpus.train.sources[0], corpus.eval)
    ]


def sentence(number: int) -> str:
    """120 bytes, none of whose words is in another sentence."""
    return " ".join(f"w{15 * number + i:06d}" for i in range(15))


@dataclasses.dataclass(frozen=True)
class Repetitive:
    """A corpus of sentences: ``single`` occur once, the others ``copies`` times each."""

    single: int
    copies: tuple[int, ...]
    shuffle_seed: int | None
    sentences_per_file: int
    between: str
    seed: int

    def texts(self) -> list[str]:
        numbers = [*range(self.single)]
        for number, count in enumerate(self.copies, self.single):
            numbers += [number] * count
        if self.shuffle_seed is not None:
            random.Random(self.shuffle_seed).shuffle(numbers)
        lines = [sentence(number) for number in numbers]
        starts = range(0, len(lines), self.sentences_per_file)
        return [self.between.join(lines[i : i + self.sentences_per_file]) for i in starts]


corpora = st.builds(
    Repetitive,
    single=st.integers(300, 1_500),
    copies=st.lists(st.integers(2, 600), max_size=4).map(tuple),
    shuffle_seed=st.none() | st.integers(0, 9),
    sentences_per_file=st.sampled_from([3, 40, 10_000]),
    between=st.sampled_from([" ", "\n", "\n\n", "   "]),
    seed=st.integers(0, 99),
)


@settings(max_examples=60, deadline=None)
@given(corpus=corpora)
def test_the_share_of_any_text_with_repetition_counted_once(tmp_path_factory, corpus):
    texts = corpus.texts()
    folder, log, seq_len = tmp_path_factory.mktemp("corpus"), [], 32
    (folder / "in").mkdir()
    for number, text in enumerate(texts):
        (folder / "in" / f"{number}.txt").write_text(text)
    config = DataConfig(
        data_dir=str(folder / "in"),
        tokenizer="bytes",
        cache_dir=str(folder / "cache"),
        tokenise_workers=1,
    )
    different = len({word for text in texts for word in text.split()})
    made = prepare(config, seq_len=seq_len, seed=corpus.seed, log=log.append)
    train, held = sides(made)
    share = sum(count / (count + train[word]) for word, count in held.items()) / different
    # Words and stretches of 64 bytes give equal counts except at the borders of sentences: 10%.
    window, block = seq_len / 8 / different, 16 / 8 / different
    assert 0.9 * min(0.005, window) <= share <= max(0.022, 1.3 * window + 2 * block)
    window, block = seq_len / made.summary.tokens, 16 / made.summary.tokens
    assert made.eval.stream_tokens / made.summary.tokens <= max(0.021, 1.3 * window + 2 * block)

    # A whole held-out word that is also trained on is reported if the stretch around it is as long
    # as those that are compared; shorter ones are what a cut leaves of a sentence.
    reported = [line for line in log if "also occurs in the training text" in line]
    span = int(reported[0].split("in stretches of ")[1].split()[0]) if reported else 64
    total = long = short = 0
    for start, end in made.eval._runs:
        held_words = whole_words(made.eval._cache._tokens[start + 1 : end])
        total += len(held_words)
        for is_trained_on, stretch in itertools.groupby(held_words, key=train.__contains__):
            count = len([*stretch]) * is_trained_on
            if 8 * count - 1 >= span:
                long += count
            else:
                short += count
    warned = any(line.startswith("warning: ") for line in reported)
    # The program compares inside blocks, so that it misses stretches across their borders.
    assert warned or long / total < 0.3
    assert not warned or (long + short) / total > 0.03


REPEATED = {
    "spaces": " " * 1_000_000 + "x",
    "a line": "2024-01-01,alpha,3.5,beta\n" * 20_000,
    "a line of words": "one, two, three, four\n" * 20_000,
    "a line of no white space": "abcdefg;" * 20_000,
}


@pytest.mark.parametrize("text", REPEATED.values(), ids=REPEATED.keys())
@pytest.mark.parametrize("seq_len", [32, 128])
def test_nothing_but_repetition_is_refused(make, tmp_path, text, seq_len):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=r"repeats itself: about .* of its .* tokens are left"):
        make(tmp_path / "a.txt", seq_len=seq_len)


def test_a_paragraph_a_thousand_times_beside_other_text(make, tmp_path):
    """Wherever the blocks begin, what is held out is other text, chosen by the seed."""
    paragraph = words(61, "p") + "\n"
    (tmp_path / "a.txt").write_text(words(6_000) + "\n" + paragraph * 1_000)
    held_by_seed = []
    for seed in range(4):
        corpus = make(tmp_path / "a.txt", seed=seed)
        tokens = corpus.eval._read(0, corpus.eval.stream_tokens)
        held = bytes(np.where(tokens == BYTES_EOT, ord(" "), tokens).tolist()).decode()
        assert "p000" not in held
        assert 0.01 <= len(held) / len(words(6_000)) <= 0.02
        held_by_seed.append(held)
    assert len(set(held_by_seed)) == 4
    assert not any("also occurs" in line for line in make.log)


@pytest.mark.parametrize(("single", "copies"), [(40, [600]), (100, [20] * 10)])
def test_few_different_documents_with_copies_kept(make, tmp_path, single, copies):
    """At most one document more than 1% of the different ones, none of which is trained on."""
    (tmp_path / "in").mkdir()
    counts = [1] * single + copies
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    for place, number in enumerate(numbers):
        (tmp_path / "in" / f"{place}.txt").write_text(sentence(number))
    for seed in range(4):
        train, held = sides(make(tmp_path / "in", seed=seed, deduplicate="none"))
        assert not train.keys() & held.keys()
        assert 1 <= len(held) / 15 <= 1 + 0.01 * len(counts)
        assert held.total() / (held.total() + train.total()) <= 0.02


def test_text_shared_by_near_copies_is_a_warning(make, tmp_path):
    """Each document has 10 words of its own among 90 that all share."""
    (tmp_path / "in").mkdir()
    for number in range(200):
        own = words(10, f"d{number:03d}")
        text = f"{words(45, 'abc')} {own} {words(45, 'xyz')}"
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    corpus = make(tmp_path / "in")
    assert 0.005 <= corpus.eval.stream_tokens / corpus.summary.tokens <= 0.02
    (line,) = (line for line in make.log if "also occurs in the training text" in line)
    assert line.startswith("warning: ")
    share = float(line.removeprefix("warning: ").split("%")[0])
    # Words of 9 bytes and a space; a stretch of 64 bytes with a byte of its own is its own.
    assert share == pytest.approx(100 * (900 - 64) / 1_000, abs=2)


@pytest.mark.parametrize("size", [300, 512, 600, 1_000, 2_000, 5_000, 20_000])
@pytest.mark.parametrize("seq_len", [32, 127])
def test_tiny_text_loses_little(make, tmp_path, size, seq_len):
    """At most 2%, or about one window; another seed holds out other text."""
    (tmp_path / "a.txt").write_text(words(3_000)[:size])
    if size < 4 * seq_len:
        return
    corpora = [make(tmp_path / "a.txt", seq_len=seq_len, seed=seed) for seed in range(4)]
    for corpus in corpora:
        held = corpus.eval.stream_tokens
        assert seq_len < held <= max(0.02 * size, 1.35 * seq_len + 16)
    assert len({corpus.eval[0].tobytes() for corpus in corpora}) >= 3


def test_finer_blocks_have_a_fingerprint_of_their_own(make, tmp_path, monkeypatch):
    """A run of an earlier version, which held out other text, does not resume on this text."""
    from mamba_jax.data.windows import hold_out

    (tmp_path / "a.txt").write_text(words(100))
    fine = make(tmp_path / "a.txt").fingerprint
    monkeypatch.setattr(hold_out, "_is_good", lambda *_, **__: True)
    assert make(tmp_path / "a.txt", cache_dir=str(tmp_path / "other")).fingerprint != fine


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spans_are_counted_as_by_a_dictionary(data):
    token = st.integers(0, data.draw(st.sampled_from([1, 5, 60_000])))
    units = data.draw(st.lists(st.lists(token, max_size=40), min_size=1, max_size=12))
    is_eval_u = np.array(data.draw(st.lists(st.booleans(), min_size=12, max_size=12)))[: len(units)]
    span = data.draw(st.integers(2, 12))
    copies, train, held = (collections.Counter() for _ in range(3))
    weight: dict = collections.defaultdict(lambda: [0, 0])
    for unit, is_eval in zip(units, is_eval_u.tolist(), strict=True):
        for start in range(max(len(unit) - span + 1, min(len(unit), 1))):
            key = tuple(unit[start : start + span])
            copies[key] += 1
            (held if is_eval else train)[key] += 1
            weight[key][is_eval] += 1 if start else len(key)
    end_u = np.cumsum([len(unit) for unit in units])
    start_u = end_u - [len(unit) for unit in units]
    tokens = np.array([*itertools.chain(*units)], np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repetition, "_AT_A_TIME", data.draw(st.integers(1, 60)))
        counts = SpanCounts(Flat([tokens]), 60_001, span)
        counts.add(start_u, end_u, is_eval_u)
        own_u = counts.own_tokens(start_u, end_u)
    overlap = counts.overlap()
    different = sum(sum(both) / copies[key] for key, both in weight.items())
    assert overlap.different_tokens == pytest.approx(different)
    assert own_u.sum() == pytest.approx(different)
    assert overlap.held_out_tokens == pytest.approx(
        sum(both[1] / copies[key] for key, both in weight.items())
    )
    all_held = sum(both[1] for both in weight.values())
    shared = sum(both[1] for key, both in weight.items() if train[key])
    assert overlap.share == pytest.approx(shared / all_held if all_held else 0.0)


def test_a_sample_of_many_spans_represents_all(monkeypatch):
    monkeypatch.setattr(repetition, "_MOST_SPANS", 4_000)
    tokens = np.random.default_rng(0).integers(0, 60_000, 200_000).astype(np.uint16)
    tokens[100_000:] = tokens[:100_000]
    end_u = np.arange(1, 201) * 1_000
    counts = SpanCounts(Flat([tokens]), 60_000, 8)
    counts.add(end_u - 1_000, end_u, np.arange(200) >= 195)  # all of it has a copy in training
    overlap = counts.overlap()
    # 2,000 to 4,000 are kept: 2% of noise, with a margin of 5 times.
    assert overlap.different_tokens == pytest.approx(100_000, rel=0.1)
    assert overlap.held_out_tokens == pytest.approx(2_500, rel=0.5)
    assert overlap.share == 1
