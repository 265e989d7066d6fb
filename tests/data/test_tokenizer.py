"""The tokenizers against tiktoken's own encoding and the laws of text."""

import hashlib
import itertools
import re
import socket
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext import openai_public

from mamba_jax.data import text_cuts as module
from mamba_jax.data.text_cuts import cut_text, well_formed
from mamba_jax.data.tokenizers import tiktoken_encodings
from mamba_jax.data.tokenizers.base import StreamDecoder
from mamba_jax.data.tokenizers.load import load_saved, load_tokenizer
from mamba_jax.errors import UserError
from tests.support.characters import text_and_owners

TEXTS = [
    "",
    " ",
    "Hello, world!  It's 2024;\n\n\tdon't   panic \n",
    "naïve café — 日本語のテキスト 🌍👩‍👩‍👧 \u3000\xa0 end",
    "for i in range(10):\n        print(f'{i:>3}')\n\n\n",
    "<|endoftext|> is text <|endoftext|>",
    "\x00\x01\x1c\x1d \x85\u2028",
]


@pytest.fixture(scope="module")
def oracle():
    """tiktoken as its authors set it up, except that the ranks come from the packaged file."""
    file = Path(module.__file__).parent / "assets" / "gpt2.tiktoken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # read the file itself
        ranks = load_tiktoken_bpe(str(file))
    return tiktoken.Encoding(
        "oracle", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )


@pytest.fixture(scope="module")
def library_text():
    """About a megabyte of real source."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-h]*.py"))
    return "\n".join(file.read_text("utf-8") for file in files)


@pytest.fixture(params=["gpt2", "bytes"])
def tokenizer(request):
    return load_tokenizer(request.param)


def test_vocabularies():
    gpt2, plain = load_tokenizer("gpt2"), load_tokenizer("bytes")
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot_id) == ("gpt2", 50257, 50256)
    assert (plain.name, plain.vocab_size, plain.eot_id) == ("bytes", 257, 256)
    assert gpt2.identity != plain.identity
    assert load_tokenizer("gpt2") is gpt2


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_equals_tiktoken(oracle, text):
    assert load_tokenizer("gpt2").encode(text).tolist() == oracle.encode_ordinary(text)


def test_gpt2_equals_tiktoken_on_real_text_beyond_one_piece(oracle, library_text):
    text = library_text
    while len(text) < 2.2 * module._PIECE_CHARACTERS:
        text += library_text
    assert len(list(cut_text(text))) == 3
    assert load_tokenizer("gpt2").encode(text).tolist() == oracle.encode_ordinary(text)


@pytest.mark.parametrize("characters", [97, 1_000])
def test_cuts_are_exact_on_real_text(oracle, library_text, monkeypatch, characters):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", characters)
    # Lines without a space or with long runs of either kind would be cut elsewhere.
    text = "\n".join(
        line for line in library_text[:200_000].split("\n") if not re.search(r"\S{60}|\s{30}", line)
    )
    text = re.sub(r"\n{20,}", "\n", text)
    assert load_tokenizer("gpt2").encode(text).tolist() == oracle.encode_ordinary(text)


_WORD = st.text("abzÄ日🌍's9.,;(\x1c\u200b", min_size=1, max_size=20)
_SPACE = st.sampled_from([" ", "\n", "  ", "\n\n   ", " \t", "\u3000 ", "\r\n", "\n\x85", " \xa0"])


@settings(max_examples=150, deadline=None)
@example([("a", "\u3000 ")] * 40)
@given(st.lists(st.tuples(_WORD, _SPACE), max_size=40))
def test_cuts_are_exact_on_any_text(oracle, parts):
    text = "".join(word + space for word, space in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_PIECE_CHARACTERS", 64
        )  # contains two words: there is a place to cut
        pieces = list(cut_text(text))
        assert "".join(pieces) == text
        # Words between nothing but "\u3000 ", say, have no place to cut at.
        is_word = lambda character: character not in module.WHITE_SPACE
        assume(all(is_word(a[-1]) and b[0] in " \n" for a, b in itertools.pairwise(pieces)))
        assert load_tokenizer("gpt2").encode(text).tolist() == oracle.encode_ordinary(text)


def test_no_cut_is_inside_white_space(monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 64)
    text = "".join("word" + run * 30 for run in (" ", " \n", "\n\t", "\n ")) + "end"
    pieces = list(cut_text(text))
    assert "".join(pieces) == text and len(pieces) > 3
    for piece, after in itertools.pairwise(pieces):
        assert not piece[-1].isspace() and after[0] in " \n"


@pytest.mark.parametrize("unit", [" ", "\n", " \t\n"])
@pytest.mark.parametrize("around", [("", "x"), ("a" * 12_345, "x y")])
def test_a_million_white_spaces(unit, around):
    run = (unit * 1_000_000)[:1_000_000]
    text = around[0] + run + around[1]
    # tiktoken panics at 999,999 of them; half of that is a wide margin.
    assert max(len(found) for piece in cut_text(text) for found in re.findall(r"\s+", piece)) < 5e5
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.decode(gpt2.encode(text)) == text


def test_a_long_text_without_any_white_space():
    text = "日本" * module._PIECE_CHARACTERS
    assert "".join(cut_text(text)) == text
    assert max(map(len, cut_text(text))) <= module._PIECE_CHARACTERS


def test_special_text_is_ordinary(oracle, tokenizer):
    text = "a<|endoftext|>b"
    assert tokenizer.eot_id not in tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.eot_id]) == ""


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert well_formed("\ud83c\udf0d") == "🌍"


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"{bad} is outside"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match=f"{bad} is outside"):
            StreamDecoder(tokenizer).push(bad)


def test_stream_decoder_never_breaks_a_character(tokenizer):
    text = "héllo 🌍 日本語 👩‍👩‍👧 end"
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in tokenizer.encode(text)]
    assert "" in parts  # some character really did take several tokens
    assert "".join(parts) == text
    assert decoder.n_chars == len(text)
    assert not decoder.holds_back


def test_stream_decoder_holds_half_a_character_back():
    decoder = StreamDecoder(load_tokenizer("bytes"))
    assert decoder.push("é".encode()[0]) == ""
    assert decoder.holds_back
    assert decoder.push(ord("a")) == "\ufffda"  # it was not half a character


def test_stream_decoder_knows_where_each_token_begins():
    """Random bytes in pieces of 0 to 3: some characters are whole, some cut, some broken."""
    rng = np.random.default_rng(0)
    parts = [*(char.encode() for char in "aé日😀"), b"\xe6", b"\xf0\x9f", b"\x80", b"\xff"]
    for _ in range(200):
        data = b"".join(parts[i] for i in rng.integers(len(parts), size=12))
        cuts = np.minimum(np.cumsum([0, *rng.integers(4, size=len(data))]), len(data))
        pieces = [data[a:b] for a, b in itertools.pairwise([*cuts.tolist(), len(data)])]
        text, owners = text_and_owners(data)
        decoder = StreamDecoder(types.SimpleNamespace(piece=pieces.__getitem__))
        streamed, starts = "", []
        for token in range(len(pieces)):
            streamed += decoder.push(token)
            starts.append(decoder.start)
        first_bytes = np.cumsum([0, *map(len, pieces)])
        for piece, start, first_byte in zip(pieces, starts, first_bytes, strict=False):
            assert not piece or start == owners[first_byte]
        assert streamed == text
        assert starts == sorted(starts)
        assert starts[-1] <= len(streamed)


def test_building_opens_no_socket(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert tiktoken_encodings.packaged_gpt2().vocab_size == 50257


def packaged_ranks():
    """Where tiktoken looks for the ranks of r50k_base that were downloaded from this address."""
    address = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    file = Path(tiktoken_encodings.__file__).parents[1] / "assets" / "gpt2.tiktoken"
    return hashlib.sha1(address.encode()).hexdigest(), file.read_bytes()


@pytest.fixture
def r50k(monkeypatch, tmp_path):
    """An encoding of tiktoken in its cache."""
    name, data = packaged_ranks()
    (tmp_path / name).write_bytes(data)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "r50k_base", None)
    del tiktoken.registry.ENCODINGS["r50k_base"]
    return tiktoken_encodings.load("r50k_base")


def test_an_encoding_of_tiktoken(r50k, oracle, library_text):
    assert (r50k.name, r50k.vocab_size, r50k.eot_id) == ("r50k_base", 50257, 50256)
    assert r50k.encode(library_text).tolist() == oracle.encode_ordinary(library_text)
    assert r50k.decode(r50k.encode("<|endoftext|>")) == "<|endoftext|>"
    assert r50k.pieces == load_tokenizer("gpt2").pieces


def test_a_checkpoint_carries_an_encoding(r50k, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    for name, data in r50k.files.items():
        (tmp_path / name).write_bytes(data)
    carried = load_saved(tmp_path, "r50k_base")
    assert (carried.identity, carried.pieces) == (r50k.identity, r50k.pieces)
    assert carried.eot_id == r50k.eot_id
    assert load_tokenizer(str(tmp_path)).identity == r50k.identity  # its folder names it too
    for text in TEXTS:
        assert carried.encode(text).tolist() == r50k.encode(text).tolist()
    (tmp_path / tiktoken_encodings.FILE_NAME).write_bytes(b'{"ranks": "0 IQ== 1"}')
    with pytest.raises(UserError, match="is damaged"):
        load_saved(tmp_path, "r50k_base")


def test_an_encoding_out_of_reach(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    with pytest.raises(UserError, match=r"cannot be downloaded .no network.; go online") as caught:
        tiktoken_encodings.load("cl100k_base")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", params=["p50k_base", "cl100k_base", "o200k_base"])
def other_pattern(request, oracle):
    """Another encoding's pattern; GPT-2's ranks stand in for its own, which are not here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: oracle._mergeable_ranks)
        pattern = getattr(openai_public, request.param)()["pat_str"]
    return tiktoken.Encoding(
        "other", pat_str=pattern, mergeable_ranks=oracle._mergeable_ranks, special_tokens={}
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(_WORD, _SPACE), max_size=40))
def test_cuts_are_exact_for_other_patterns(other_pattern, parts):
    text = "".join(word + space for word, space in parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 64)
        pieces = list(cut_text(text))
    # The pattern of GPT-2 can be cut before a line feed after a mark, the others cannot.
    good = [
        piece
        for piece, after in itertools.pairwise([*pieces, ""])
        if not after or after[0] == " " or (after[0] == "\n" and piece[-1].isalnum())
    ]
    if len(good) == len(pieces):
        joined = [token for piece in pieces for token in other_pattern.encode_ordinary(piece)]
        assert joined == other_pattern.encode_ordinary(text)


def test_damaged_missing_and_unknown(monkeypatch, tmp_path):
    with pytest.raises(
        UserError, match=r'"gpt3" is not one of bytes, gpt2,.*; did you mean "gpt2"'
    ):
        load_tokenizer("gpt3")
    monkeypatch.setattr(tiktoken_encodings.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match=r"cannot read .*No such file.*install"):
        tiktoken_encodings.packaged_gpt2()
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"is damaged \(sha256"):
        tiktoken_encodings.packaged_gpt2()
