"""Tokenizers of a tokenizer.json against the library's own encoding, and the laws of text."""

import json
import pathlib
import sysconfig
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mamba_jax.config import DataConfig
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.tokenizers import json_tokenizer
from mamba_jax.data.tokenizers.base import StreamDecoder
from mamba_jax.data.tokenizers.load import load_saved, load_tokenizer
from mamba_jax.errors import UserError
from tests.support.small_tokenizers import EXACT, KINDS

from .test_tokenizer import TEXTS

SPECIAL = ["<|endoftext|>", "<|pad|>", "</s>", "<s>", "[SEP]", "[CLS]"]
ANY_TEXT = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([" ", "\n\n", "  def f(", "self.", *SPECIAL])),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """kind → its tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizers")
    made = {}
    for kind, make in KINDS.items():
        (folder / kind).mkdir()
        made[kind] = folder / kind / "tokenizer.json"
        make().save(str(made[kind]))
    return made


@pytest.fixture
def small_windows(monkeypatch):
    """A text of some hundred characters is encoded in several windows."""
    monkeypatch.setattr(json_tokenizer, "_WINDOW_CHARACTERS", 64)
    monkeypatch.setattr(json_tokenizer, "_MARGIN_CHARACTERS", 48)


def library(file: pathlib.Path) -> Tokenizer:
    oracle = Tokenizer.from_file(str(file))
    oracle.encode_special_tokens = True
    return oracle


def library_ids(file: pathlib.Path, text: str) -> list[int]:
    return library(file).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text])
def test_ids_are_the_librarys(files, kind, text):
    ids = load_tokenizer(str(files[kind])).encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == library_ids(files[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_long_text_are_the_librarys(files, kind, small_windows):
    lines = pathlib.Path(sysconfig.get_path("stdlib"), "argparse.py").read_text().splitlines()
    # Longer words than the margin may be cut elsewhere.
    text = "\n".join(" ".join(w for w in line.split(" ") if len(w) < 30) for line in lines[:900])
    assert len(text) > 25_000
    tokenizer = load_tokenizer(str(files[kind]))
    encoder, found = tokenizer.document_encoder(), []
    for start in range(0, len(text), 1_000):
        found.append(encoder.push(text[start : start + 1_000]))
    assert sum(map(len, found)) > 0.9 * len(tokenizer.encode(text))  # it holds back little text
    ids = np.concatenate([*found, encoder.cut()])
    assert ids.tolist() == library_ids(files[kind], text)


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=80, deadline=None)
@given(text=ANY_TEXT, seed=st.integers(0, 9))
def test_any_text_survives_the_round_trip_however_it_is_cut(files, kind, text, seed):
    tokenizer = load_tokenizer(str(files[kind]))
    assert not tokenizer.roundtrip_warning
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_tokenizer, "_WINDOW_CHARACTERS", 16)
        patch.setattr(json_tokenizer, "_MARGIN_CHARACTERS", 16)
        encoder, rng = tokenizer.document_encoder(), np.random.default_rng(seed)
        found, start = [], 0
        while start < len(text):
            end = start + int(rng.integers(1, 40))
            found.append(encoder.push(text[start:end]))
            start = end
        ids = np.concatenate([np.zeros(0, np.int32), *found, encoder.cut()])
    assert tokenizer.eot_id not in ids
    back = tokenizer.decode(ids)
    if kind == "byte_level":
        assert back == text
    else:  # where a window begins inside a word, a space may come before it
        assert back.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_spells_a_special_token(files, kind):
    tokenizer = load_tokenizer(str(files[kind]))
    record = json.loads(files[kind].read_text())
    special = {word["id"] for word in record["added_tokens"] if word["special"]}
    unknown = library(files[kind]).token_to_id(record["model"].get("unk_token") or "")
    forbidden = (special | {tokenizer.eot_id}) - {unknown, 0 if kind == "unigram" else None}
    for text in (*SPECIAL, "a</s>b", "x <|endoftext|>\n", "".join(SPECIAL)):
        ids = tokenizer.encode(text)
        assert len(ids) and not forbidden & set(ids.tolist()), text
    if kind in EXACT:
        text = "a</s>b<|endoftext|><s>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert library(files["unigram"]).token_to_id("</s>") in library_ids(files["unigram"], "</s>")


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_text_is_the_librarys(files, kind):
    text = "def naïve(self, x):\n    return 'b' + x  # 日本 🌍\n"
    tokenizer = load_tokenizer(str(files[kind]))
    ids = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    streamed = "".join(decoder.push(token) for token in ids)
    # Without a decoder the library puts spaces, which no tokenizer of words can tell from none.
    expected = library(files[kind]).decode(ids.tolist())
    assert streamed.removeprefix(" ") == expected.removeprefix(" ")
    assert tokenizer.decode(ids).removeprefix(" ") == expected.removeprefix(" ")
    assert tokenizer.token_bytes[ids].sum() == len(streamed.encode())


@pytest.mark.parametrize("kind", EXACT)
def test_an_answer_is_tokenised_on_its_own(files, kind):
    tokenizer = load_tokenizer(str(files[kind]))
    encoder = tokenizer.document_encoder()
    prompt = np.concatenate([encoder.push("return sel"), encoder.cut()])
    answer = np.concatenate([encoder.push("f.x"), encoder.cut()])
    assert tokenizer.decode(prompt) == "return sel"
    assert b"".join(tokenizer.pieces[token] for token in answer) in (b"f.x", b" f.x")
    prompt = np.concatenate([encoder.push("\nreturn"), encoder.cut()])
    answer = np.concatenate([encoder.push(" x"), encoder.cut()])
    assert b"".join(tokenizer.pieces[token] for token in (*prompt, *answer)) == b"\nreturn x"


def test_the_choice_of_the_separator(files, tmp_path):
    ends = {
        "byte_level": "<|endoftext|>",
        "byte_fallback": "</s>",
        "unigram": "</s>",
        "word_piece": "[SEP]",
    }
    for kind, end in ends.items():
        assert load_tokenizer(str(files[kind])).eot_id == library(files[kind]).token_to_id(end)
    words = load_tokenizer(str(files["word_level"]))
    assert words.eot_id == words.vocab_size - 1 == library(files["word_level"]).get_vocab_size()
    for number, end in enumerate(["<|pad|>", {"content": "<|pad|>"}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        named = load_tokenizer(str(folder))
        assert named.eot_id == library(files["byte_level"]).token_to_id("<|pad|>")
        assert named.identity != load_tokenizer(str(files["byte_level"])).identity


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_carries_its_tokenizer(files, kind, tmp_path):
    original = load_tokenizer(str(files[kind]))
    for name, data in original.files.items():
        (tmp_path / name).write_bytes(data)
    carried = load_saved(tmp_path, "no/longer/there.json")
    assert carried.identity == original.identity
    assert (carried.eot_id, carried.pieces) == (original.eot_id, original.pieces)
    assert carried.files == original.files


def test_a_lossy_tokenizer_has_a_warning(files):
    assert "is lossy: " in load_tokenizer(str(files["word_piece"])).roundtrip_warning


def added(content, **fields):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 400, "content": content} | flags | fields


LOSSY = {
    "left strip": {"added_tokens": [added("<mask>", lstrip=True)]},
    "right strip": {"added_tokens": [added("<mask>", rstrip=True)]},
    "special with strips": {"added_tokens": [added("<m>", lstrip=True, normalized=True)]},
    "Strip": {"normalizer": {"type": "Strip", "strip_left": False, "strip_right": True}},
    "Lowercase": {"normalizer": {"type": "Lowercase"}},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "NFC": {"normalizer": {"type": "NFC"}},
    "Replace": {"normalizer": {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}},
    "spaces": {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
    "StripAccents": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}],
        }
    },
}


@pytest.mark.parametrize("fields", LOSSY.values(), ids=LOSSY.keys())
def test_a_tokenizer_that_changes_texts_has_a_warning(tmp_path, fields):
    record = json.loads(KINDS["byte_level"]().to_str())
    fields = {"added_tokens": []} | fields
    fields["added_tokens"] = record["added_tokens"] + fields["added_tokens"]
    warning = load_tokenizer(write(tmp_path, record | fields)).roundtrip_warning
    assert "is lossy: " in warning and " decodes to " in warning and "\n" not in warning


@pytest.mark.parametrize("fields", [{}, {"single_word": True}, {"normalized": True}])
def test_an_added_token_that_strips_nothing_gives_no_warning(tmp_path, fields):
    record = json.loads(KINDS["byte_level"]().to_str())
    record["added_tokens"] += [added("<mask>", **fields), added("  ", id=401)]
    tokenizer = load_tokenizer(write(tmp_path, record))
    assert tokenizer.roundtrip_warning == tokenizer.remark == ""
    assert 400 in tokenizer.encode("a <mask> b")


def test_dropout_is_disabled_and_reported(files, tmp_path):
    """As subword regularisation (arXiv 1910.13267) leaves it in a file."""
    plain = load_tokenizer(str(files["byte_level"]))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.py").write_bytes(pathlib.Path(json.__file__).read_bytes())
    text = (tmp_path / "data" / "a.py").read_text()
    name = write(tmp_path, changed("byte_level", dropout=0.3))
    assert len({tuple(library_ids(pathlib.Path(name), text)) for _ in range(3)}) == 3
    log = []
    for cache in ("one", "two"):
        config = DataConfig(
            data_dir=str(tmp_path / "data"), tokenizer=name, cache_dir=str(tmp_path / cache)
        )
        log.append(prepare(config, seq_len=32, seed=0, log=log.append).fingerprint)
        load_tokenizer.cache_clear()
    assert log[len(log) // 2 - 1] == log[-1]
    assert sum("has a BPE dropout of 0.3, which is disabled" in line for line in log) == 2
    tokenizer = load_tokenizer(name)
    assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()
    assert json.loads(tokenizer.files["tokenizer.json"])["model"]["dropout"] is None


def test_a_corpus_tokenised_with_it(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "def f%d(self):\n    return '</s> <|endoftext|>'\n"
    texts = [text % number for number in range(40)]
    (tmp_path / "data").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "data" / f"{number:02}.py").write_text(text)
    name = str(files["byte_level"])
    config = DataConfig(data_dir="data", tokenizer=name, cache_dir="cache", eval_fraction=0.1)
    corpus = prepare(config, seq_len=32, seed=0, log=lambda line: None)
    tokenizer = load_tokenizer(name)
    held = [window for side in (*corpus.train.sources, corpus.eval) for window in side]
    stream = b"".join(
        b"\0" if token == tokenizer.eot_id else tokenizer.pieces[token]
        for window in held
        for token in window[:-1]
    ).decode()
    found = {part for part in stream.split("\0") if part in texts}
    assert len(found) >= 30  # the others are at the ends of windows


def test_errors_are_one_line(tmp_path, monkeypatch, files):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"model": {}}')
    (tmp_path / "noise.json").write_bytes(b"\xff\x00")
    for name, words in {
        str(tmp_path / "empty"): "the folder has no tokenizer.json",
        str(tmp_path / "bad.json"): "cannot be used",
        str(tmp_path / "noise.json"): "cannot be used",
        str(tmp_path / "gone.json"): "there is no such file or folder",
        "./gone/folder": "there is no such file or folder",
        "gtp2": 'did you mean "gpt2"',
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def changed(kind, **fields):
    """A file of a kind with other fields of its model."""
    record = json.loads(KINDS[kind]().to_str())
    record["model"] |= fields
    return record


def words_of(vocabulary, **fields):
    """A file of whole words."""
    added = [{"id": vocabulary[word], "content": word, "special": True, "single_word": False,
              "lstrip": False, "rstrip": False, "normalized": False}
             for word in vocabulary if word.startswith("[")]  # fmt: skip
    record = changed("word_level", vocab=vocabulary, **fields)
    return record | {"added_tokens": added}


def write(tmp_path, record):
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    return str(tmp_path / "tokenizer.json")


def test_an_unknown_word_never_ends_a_text(tmp_path):
    """Even if the tokenizer's unknown token is the one that ends texts."""
    tokenizer = load_tokenizer(write(tmp_path, words_of({"[SEP]": 0, "b": 1}, unk_token="[SEP]")))
    assert tokenizer.eot_id == 0 and tokenizer.encode("b zz b").tolist() == [1, 1]


def test_an_unusable_tokenizer_is_one_line(tmp_path):
    gaps = words_of({"a": 0, "b": 1, "[UNK]": 3, "q": 4}, unk_token="[UNK]")
    records = {
        "share one": gaps,
        "ids up to 2000000000": words_of({"a": 0, "[SEP]": 1, "b": 2_000_000_000}),
        "cannot encode unknown text": words_of({"a": 0, "[SEP]": 1}, unk_token="[no]"),
    }
    for number, (words, record) in enumerate(records.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=words) as caught:
            load_tokenizer(write(folder, record)).encode("a z")
        assert "\n" not in str(caught.value)


def test_pieces_of_scripts_without_an_a(tmp_path):
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "привет": 2, "мир": 3, "##ы": 4}
    record = changed("word_piece", vocab=vocabulary)
    record["added_tokens"] = words_of(vocabulary)["added_tokens"]
    name = write(tmp_path, record)
    ids = load_tokenizer(name).encode("привет миры")
    assert ids.tolist() == [2, 3, 4]
    assert load_tokenizer(name).decode(ids) == Tokenizer.from_file(name).decode(ids.tolist())


@pytest.mark.parametrize("text", ['{"eos_token": 5}', '{"eos_token": {"content": 3}}', "{", "[]"])
def test_a_broken_config_beside_it_is_an_error(files, tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(UserError, match=r"cannot be read: .*; repair or remove it"):
        load_tokenizer(str(tmp_path))


def test_a_config_with_a_byte_order_mark_is_read(files, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(files["byte_level"].read_bytes())
    config = json.dumps({"eos_token": "<|pad|>"})
    (tmp_path / "tokenizer_config.json").write_text(config, "utf-8-sig")
    pad = library(files["byte_level"]).token_to_id("<|pad|>")
    assert load_tokenizer(str(tmp_path)).eot_id == pad


JUNK = st.sampled_from([None, -1, 0, 1, 10**6, "", "x", [], {}, True, 1.5, "[UNK]", ["a"]])


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(list(KINDS)), data=st.data())
def test_a_damaged_file_is_one_line_or_still_a_tokenizer(files, tmp_path_factory, kind, data):
    record = json.loads(files[kind].read_text())
    place = record
    while True:
        # The library aborts the whole process on a prefix that does not fit the merges.
        key = data.draw(st.sampled_from(sorted(place.keys() - {"continuing_subword_prefix"})))
        if key in ("vocab", "merges") or not isinstance(place[key], dict) or not place[key]:
            break
        place = place[key]
    place[key] = data.draw(JUNK)
    file = tmp_path_factory.mktemp("damaged") / "tokenizer.json"
    file.write_text(json.dumps(record))
    try:
        tokenizer = json_tokenizer.from_file("damaged", file)
        ids = tokenizer.encode("def f(self): </s> 日本")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.eot_id not in ids
        tokenizer.decode(ids)


def test_an_unreachable_hub_is_reported_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(UserError, match="neither a file here nor in the cache"):
        load_tokenizer("nobody/nothing")
    assert time.monotonic() - begun < 2  # the promise to users


def test_a_missing_library_is_reported(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install 'mamba_jax\[tokenizers\]'"):
        json_tokenizer.load(str(files["byte_level"]))
