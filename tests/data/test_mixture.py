"""Several sources: shares, one split over all, and reproducible batches."""

import hashlib
import itertools
import json
from itertools import islice

import numpy as np
import pytest

from mamba_jax.config import (
    DataConfig,
    PhaseConfig,
    RunConfig,
    SourceConfig,
    apply_overrides,
    default_config,
    freeze,
    from_json,
    merge,
    to_dict,
)
from mamba_jax.errors import UserError
from tests.data.conftest import words


@pytest.fixture
def folders(tmp_path):
    """Two folders of texts in lower and in upper case; one text is in both."""
    for name in ("low", "up"):
        (tmp_path / name).mkdir()
    for i in range(20):
        (tmp_path / "low" / f"{i:02d}.txt").write_text(words(30, f"d{i}-"))
        (tmp_path / "up" / f"{i:02d}.txt").write_text(words(60, f"d{100 + i}-").upper())
    (tmp_path / "up" / "same.txt").write_text(words(30, f"d{0}-"))
    return tmp_path / "low", tmp_path / "up"


@pytest.fixture
def mixed(make, folders):
    def mix(weights=(3.0, 1.0), **fields):
        pairs = zip(folders, weights, strict=True)
        sources = tuple(SourceConfig(str(path), weight=weight) for path, weight in pairs)
        return make("", mixture=sources, **fields)

    return mix


def is_upper(window):
    return bool(((window >= 65) & (window <= 90)).any())


def hashed(batches, count):
    digest = hashlib.blake2b()
    for batch in islice(batches, count):
        digest.update(batch.tobytes())
    return digest.hexdigest()


def test_shares_are_as_requested_and_logged(mixed):
    corpus = mixed()
    batch = np.concatenate(list(islice(corpus.train_batches(8, 0), 20)))
    assert sum(map(is_upper, batch)) == 40
    text = corpus.shares_text(160, 8)
    assert "120 windows, 75.00%" in text and "40 windows, 25.00%" in text


def test_each_source_gives_its_own_windows_once_an_epoch(mixed):
    corpus = mixed()
    low, up = corpus.train.sources
    batches = islice(corpus.train_batches(4, 0), 3 * len(low))
    drawn = [window for batch in batches for window in batch]
    for source, upper in ((low, False), (up, True)):
        mine = [window.tobytes() for window in drawn if is_upper(window) == upper]
        everything = sorted(source[i].tobytes() for i in range(len(source)))
        assert sorted(mine[: len(source)]) == everything


def test_shared_documents_are_read_once_and_nothing_is_on_both_sides(mixed):
    corpus = mixed(eval_fraction=0.3, window="document", seq_len=2_000)
    assert corpus.summary.duplicates == 1
    text = lambda windows: [
        bytes(t for t in windows[i].tolist() if 0 <= t < 256) for i in range(len(windows))
    ]
    train, held = text(corpus.train), text(corpus.eval)
    assert not set(train) & set(held)
    assert len(train) + len(held) == len(set(train + held))
    assert sum(map(len, train + held)) == corpus.summary.text_bytes
    assert any(map(bytes.isupper, held)) and any(map(bytes.islower, held))


def test_a_curriculum_changes_weights_at_its_step_and_resumes_exactly(mixed):
    phases = (PhaseConfig(0, (1.0, 0.0)), PhaseConfig(5, (0.0, 1.0)))
    corpus = mixed(curriculum=phases)
    batches = [batch for batch in islice(corpus.train_batches(4, 0), 10)]
    assert [sum(map(is_upper, batch)) for batch in batches] == [0] * 5 + [4] * 5
    for step in (3, 5, 7):
        again = islice(corpus.train_batches(4, 0, step * 4), 10 - step)
        np.testing.assert_array_equal(np.concatenate(batches[step:]), np.concatenate(list(again)))
    assert corpus.fingerprint != mixed().fingerprint


@pytest.mark.parametrize("window", ["packed", "concat", "document"])
def test_batches_over_two_epochs_are_the_same_however_they_are_reached(mixed, window):
    """A killed run resumes from one integer; more processes take parts of each batch."""
    corpus = mixed(window=window)
    samples = 2 * len(corpus.train) // 24 * 24
    whole = hashed(corpus.train_batches(8, 5), samples // 8)
    assert hashed(mixed(window=window).train_batches(8, 5), samples // 8) == whole

    def killed():
        for start in range(0, samples, 24):
            yield from islice(corpus.train_batches(8, 5, start), 3)

    assert hashed(killed(), samples // 8) == whole
    assert hashed(corpus.train_batches(24, 5), samples // 24) == whole
    shares = [corpus.train_batches(8, 5) for _ in range(4)]  # of four processes, two rows each
    rows = (
        np.concatenate([batch[2 * k : 2 * k + 2] for k, batch in enumerate(batches)])
        for batches in zip(*shares, strict=True)
    )
    assert hashed(rows, samples // 8) == whole


def test_a_source_without_a_window_is_named(make, folders, tmp_path):
    (tmp_path / "tiny.txt").write_text("abc")
    sources = (SourceConfig(str(folders[0])), SourceConfig(str(tmp_path / "tiny.txt")))
    with pytest.raises(UserError, match=r"tiny.txt has no window of 32 tokens"):
        make("", mixture=sources)


def test_answers_alone_need_prompts(make, folders):
    with pytest.raises(UserError, match="has a prompt"):
        make(folders[0], loss_on="answer")


def test_held_out_windows_without_an_answer_are_refused(make, tmp_path):
    """Otherwise the evaluation would divide by zero."""
    lines = (f'{{"prompt": "{words(40, f"d{i}-")}", "completion": "Z"}}' for i in range(40))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"raise data\.eval_fraction"):
        make(tmp_path / "a.jsonl", loss_on="answer", seq_len=8, eval_fraction=0.0)


def test_only_answers_are_targets(make, tmp_path):
    lines = (f'{{"prompt": "{words(5, f"d{i}-")}", "completion": "{"Z" * 20}"}}' for i in range(40))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = make(tmp_path / "a.jsonl", loss_on="answer", deduplicate="none")
    targets = [t for window in corpus.train for t in window[1:].tolist() if t >= 0]
    assert {ord("Z"), 256} <= set(targets)
    assert not any(97 <= target <= 122 for target in targets)
    hidden = [t for i in range(len(corpus.train)) for t in corpus.train[i].tolist() if t < 0]
    assert len(hidden) > 100 and not any(~t == ord("Z") for t in hidden)


@pytest.mark.parametrize("window", ["packed", "concat", "document"])
def test_nothing_after_a_document_without_an_answer_is_a_target(make, tmp_path, window):
    """Not even the separator: the model would learn to stop after a prompt."""
    row = lambda i: {"prompt": words(5, f"d{i}-"), "completion": "Z" * 9 if i % 4 == 0 else ""}
    lines = [json.dumps(row(i)) for i in range(80)]
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "ZZ"}]
    lines += [
        json.dumps({"messages": [*turns, {"role": "user", "content": f"{i}"}]}) for i in range(9)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = make(tmp_path / "a.jsonl", loss_on="answer", window=window, eval_fraction=0.3)
    kept = 0
    for one in (*corpus.train, *(corpus.eval[i] for i in range(len(corpus.eval)))):
        for before, target in itertools.pairwise(one.tolist()):
            assert target != 256 or before in (ord("Z"), ~ord("Z"))
            kept += target == 256
            if target == ~256 and before in (ord("Z"), 256):
                assert window == "document" and before == 256  # padding
    assert 15 <= kept <= 20
    warning = next(line for line in make.log if line.startswith("warning:"))
    assert warning.startswith(
        'warning: 60 × record without an answer: no target with loss_on="answ'
    )


def test_records_without_any_answer_are_refused(make, tmp_path):
    lines = (f'{{"prompt": "{words(40, f"d{i}-")}", "completion": null}}' for i in range(40))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"no training record of .* has an answer \(warning: 40 × record with"
    ):
        make(tmp_path / "a.jsonl", loss_on="answer", seq_len=8)


def test_a_config_with_a_mixture_survives_json_and_the_command_line():
    run = RunConfig(
        data=DataConfig(
            mixture=(SourceConfig("a", weight=2.0), SourceConfig(dataset="b", text_column="x,y")),
            curriculum=(PhaseConfig(0, (1.0, 0.0)), PhaseConfig(9, (0.5, 1.0))),
        )
    )
    assert from_json(json.dumps(to_dict(run))) == run
    config = default_config()
    values = to_dict(run)["data"]
    given = {f"data.{name}": repr(values[name]) for name in ("mixture", "curriculum")}
    apply_overrides(config, given)
    assert freeze(config) == run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"curriculum": [{"weights": [1]}]}, "no effect without a data.mixture"),
        ({"mixture": [{"weight": 1}]}, r"data.mixture\[0\] needs a data_dir, a dataset or tasks"),
        ({"mixture": [{"data_dri": "a"}]}, r'"data.mixture\[0\].data_dri".*did you mean.*data_dir'),
        ({"mixture": [3]}, r"data.mixture\[0\] must contain fields"),
        ({"mixture": [{"data_dir": "a", "weight": -1}]}, r"weights \(-1.0,\): none may be neg"),
        ({"mixture": [{"data_dir": "a", "weight": 0}]}, "not all may be 0"),
        ({"mixture": [{"data_dir": "a", "text_column": "x"}]}, "no effect without a data.dataset"),
        ({"mixture": [{"data_dir": "a"}], "data_dir": "b"}, "make it a source of the mixture"),
        (
            {"mixture": [{"data_dir": "a"}], "curriculum": [{"step": 1, "weights": [1]}]},
            "must start at 0",
        ),
        (
            {"mixture": [{"data_dir": "a"}], "curriculum": [{"weights": [1, 2]}]},
            "2 weights for 1 sources",
        ),
    ],
)
def test_mistakes_in_a_mixture_are_named(fields, message):
    config = default_config()
    merge(config, {"data": fields})
    with pytest.raises(UserError, match=message):
        freeze(config)
