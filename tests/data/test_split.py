"""Laws of the split: nothing on both sides, nothing lost, the choice a function of content."""

import re
from itertools import pairwise

import numpy as np
import pytest

from mamba_jax.data.cache.store import DocumentIndex, Flat
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.data.windows.split import Units, cut_into_units, runs, split_units, stream_tokens
from mamba_jax.data.windows.windows import Joined, Windows
from mamba_jax.errors import UserError
from tests.data.conftest import BYTES_EOT, words


def stream(windows: Windows) -> np.ndarray:
    """All tokens of a side, also those that fill no window."""
    (alone,) = windows.sources if isinstance(windows, Joined) else (windows,)
    return alone._read(0, alone.stream_tokens)


def documents(windows: Windows) -> list[str]:
    tokens = stream(windows)
    assert tokens[0] == BYTES_EOT
    starts = np.flatnonzero(tokens == BYTES_EOT)
    return [bytes(part[1:].tolist()).decode() for part in np.split(tokens, starts[1:])]


def test_whole_documents_go_to_one_side_and_none_is_lost(make, many_files):
    corpus = make(many_files, eval_fraction=0.2)
    train, held = documents(corpus.train), documents(corpus.eval)
    assert not set(train) & set(held)
    assert sorted(train + held) == sorted(file.read_text() for file in many_files.iterdir())
    share = corpus.eval.stream_tokens / corpus.summary.tokens
    assert 0.2 <= share < 0.2 + 210 / corpus.summary.tokens + 0.01  # up to one document more
    assert any(f"({share:.2%})" in line for line in make.log)


def test_a_large_document_is_cut_and_no_token_leaks(make, tmp_path):
    """Every word occurs once; cut before white space, each is whole and on one side."""
    text = words(30_000)
    (tmp_path / "book.txt").write_text(text)
    corpus = make(tmp_path / "book.txt", eval_fraction=0.05)
    train, held = (" ".join(documents(side)).split() for side in (corpus.train, corpus.eval))
    assert not set(train) & set(held)
    assert sorted(train + held) == text.split()
    # Blocks of 0.5%: about ten are held out. Train blocks that are neighbours stay one document.
    assert 5 <= len(documents(corpus.eval)) <= 11
    assert len(documents(corpus.train)) <= 12
    assert 0.05 <= corpus.eval.stream_tokens / corpus.summary.tokens <= 0.056


def test_the_choice_depends_on_seed_and_content_alone(make, many_files):
    def held(seed):
        return set(documents(make(many_files, seed=seed, eval_fraction=0.2).eval))

    first = held(0)
    assert first == held(0)
    assert first != held(1)
    # With other names, and so in another order, the same documents are held out.
    for file in sorted(many_files.iterdir()):
        file.rename(file.with_name(f"{99 - int(file.stem):02d}.md"))
    assert first == held(0)
    # With one more text, most of the choice stays.
    (many_files / "new.txt").write_text("something new " * 15)
    assert len(first & held(0)) >= len(first) - 1


def test_equal_units_stay_on_one_side():
    digest_ud = np.repeat(np.arange(20, dtype=np.uint8)[:, None], 16, axis=1)[np.arange(100) % 20]
    start_u = np.arange(100) * 11 + 1
    units = Units(start_u, start_u + 10, digest_ud, np.zeros(100, int))
    for seed in range(20):
        is_eval_u = split_units(units, seed=seed, fraction=0.33, window_tokens=11)
        assert is_eval_u is not None
        train, held = (
            {digest_ud[at // 11, 0] for a, b in runs(units, side).tolist() for at in range(a, b)}
            for side in (~is_eval_u, is_eval_u)
        )
        assert not train & held
        assert len(held) == 7  # 33% of 20 contents, all five copies of each


def cut(tokens, tokenizer) -> Units:
    """Cuts one document, separator included."""
    whole = DocumentIndex(
        start_d=np.array([0]),
        end_d=np.array([len(tokens)]),
        digest_dk=np.zeros((1, 16), np.uint8),
        lines_dk=np.zeros((1, 16), np.uint8),
        bytes_d=np.array([0]),
        source_d=np.array([0]),
    )
    limit = max(int(0.005 * len(tokens)), 256)
    return cut_into_units(Flat([tokens]), whole, tokenizer, limit, limit)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_cuts_are_exact(name):
    """The text of a block has exactly the block's tokens, and whole characters."""
    tokenizer = load_tokenizer(name)
    text = "".join(f"naïve-{i}日本{' ' * (i % 5 + 1)}x = {i}\n\n" for i in range(3_000))
    tokens = np.concatenate([[tokenizer.eot_id], tokenizer.encode(text)]).astype(np.uint16)
    units = cut(tokens, tokenizer)
    blocks = [tokens[a:b] for a, b in zip(units.start_u, units.end_u, strict=True)]
    assert len(blocks) >= 100 and max(map(len, blocks)) <= max(0.005 * len(tokens), 256)
    assert "".join(map(tokenizer.decode, blocks)) == text
    for left, right in pairwise(map(tokenizer.decode, blocks)):
        assert right[0].isspace() and not left[-1].isspace()
    for block in blocks:
        assert tokenizer.encode(tokenizer.decode(block)).tolist() == block.tolist()


@pytest.mark.parametrize("text", ["日" * 5_000, "xx" + "日" * 5_000, "x" * 5_000])
def test_text_without_white_space_is_cut_between_characters(text):
    tokenizer = load_tokenizer("bytes")
    tokens = np.concatenate([[BYTES_EOT], tokenizer.encode(text)]).astype(np.uint16)
    units = cut(tokens, tokenizer)
    assert len(units.start_u) > 10
    parts = [tokenizer.decode(tokens[a:b]) for a, b in zip(units.start_u, units.end_u, strict=True)]
    assert "".join(parts) == text


def test_bytes_that_never_begin_a_character_are_still_cut():
    tokens = np.array([BYTES_EOT] + [0x80] * 5_000, np.uint16)
    units = cut(tokens, load_tokenizer("bytes"))
    assert (units.end_u - units.start_u).max() <= 256
    assert (units.end_u - units.start_u).sum() == 5_000


def test_small_shares_still_hold_out_one_window(make, many_files):
    for fraction in (0.0, 1e-9):
        corpus = make(many_files, seq_len=300, eval_fraction=fraction)
        assert len(corpus.eval) == 1
        assert len(corpus.train) > 20
    assert not any("holding out the last window" in line for line in make.log)


@pytest.mark.parametrize("seq_len", [7, 100, 511])
def test_the_smallest_text_that_works(make, tmp_path, seq_len):
    """2 · (seq_len + 1) tokens, one of them the separator, as the error promises."""
    enough = 2 * (seq_len + 1)
    file = tmp_path / "a.txt"
    file.write_text(words(1_000)[: enough - 1])
    corpus = make(file, seq_len=seq_len)
    assert (len(corpus.train), len(corpus.eval)) == (1, 1)
    assert corpus.train[0][0] == corpus.eval[0][0] == BYTES_EOT
    assert any("holding out the last window" in line for line in make.log)
    scored = bytes(corpus.eval[0][1:].tolist()).decode()
    assert scored not in bytes(stream(corpus.train)[1:].tolist()).decode()
    assert file.read_text().endswith(scored)

    file.write_text(words(1_000)[: enough - 2])
    expected = (
        f"{file} holds {enough - 1} tokens; need ≥ {enough} for seq_len {seq_len} (one window to "
        "train on, one held out): add text to data.data_dir or lower model.max_seq_len"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        make(file, seq_len=seq_len)


def test_any_size_above_the_smallest_works(make, tmp_path):
    for size in range(65, 1_200, 63):
        file = tmp_path / f"{size}.txt"
        file.write_text(words(1_000)[:size])
        corpus = make(file, eval_fraction=0.5)
        assert len(corpus.train) >= 1 and len(corpus.eval) >= 1


def test_runs_show_the_separator_in_place_of_a_hole():
    """Two documents of one block each and one of three; the middle block is held out."""
    digest_ud = np.arange(5, dtype=np.uint8)[:, None].repeat(16, axis=1)
    start_u, end_u = np.array([1, 5, 8, 11, 15]), np.array([4, 8, 11, 14, 18])
    for seed in range(100):
        units = Units(start_u, end_u, digest_ud, np.zeros(5, int))
        is_eval_u = split_units(units, seed=seed, fraction=0.01, window_tokens=3)
        assert is_eval_u is not None
        train, held = runs(units, ~is_eval_u), runs(units, is_eval_u)
        if held.tolist() == [[7, 11]]:
            assert train.tolist() == [[0, 8], [10, 18]]
            assert stream_tokens(train) == 16
            return
    raise AssertionError("no seed held out the middle block")
