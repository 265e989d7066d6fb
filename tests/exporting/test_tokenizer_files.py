"""Exported tokenizers give the ids that the model was trained on."""

import json

import pytest
import tokenizers

from mamba_jax.data.tokenizers import json_tokenizer, tiktoken_encodings
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.exporting import tokenizer_files
from mamba_jax.generation.chat import prompt_of
from tests.support import small_tokenizers

TEXTS = ("Hello world's\n\n  end  ", "naïve 東京 🙂\tx = 12345", "", " ", "'LL 100,000\r\n\n")


def json_file(folder, kind):
    path = folder / "tokenizer.json"
    small_tokenizers.KINDS[kind]().save(str(path))
    return json_tokenizer.from_file(kind, path)


def other_encoding(folder):
    """An encoding with another pattern, ids of no token and tokens that no merge makes."""
    pieces = [bytes([byte]) for byte in range(256)] + [b"12", b" x", b"nowhere"]
    import base64

    ranks = " ".join(f"{i} {base64.b64encode(p).decode()}" for i, p in enumerate(pieces))
    record = {
        "pattern": r"(?i:'ll)|\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++|\s++",
        "special_tokens": {"<|endoftext|>": 262, "<|fim_prefix|>": 264},
        "ranks": ranks,
    }
    path = folder / "tiktoken.json"
    path.write_text(json.dumps(record))
    return tiktoken_encodings.from_file("other", path)


def same_ids(ours, fills_in=False):
    theirs = tokenizers.Tokenizer.from_str(
        json.dumps(tokenizer_files.files(ours, fills_in)["tokenizer.json"])
    )
    for text in TEXTS:
        assert theirs.encode(text).ids == [ours.eot_id, *ours.encode(text)]
    return theirs


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_packaged_ones(name):
    ours = load_tokenizer(name)
    theirs = same_ids(ours)
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in TEXTS:
        assert theirs.decode(theirs.encode(text).ids) == text


@pytest.mark.parametrize("kind", small_tokenizers.KINDS)
def test_those_of_a_tokenizer_json(kind, tmp_path):
    same_ids(json_file(tmp_path, kind))


def test_dropout_is_not_exported(tmp_path):
    record = json.loads(small_tokenizers.byte_level().to_str())
    record["model"]["dropout"] = 0.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(record))
    theirs = same_ids(json_tokenizer.from_file("dropped", path))
    assert theirs.model.dropout is None


def test_an_encoding_of_tiktoken(tmp_path):
    ours = other_encoding(tmp_path)
    assert ours.encode("nowhere 1234").tolist()[0] == 258
    same_ids(ours)
    assert tokenizer_files.id_count(ours, False) == 265


def test_the_ids_of_filling_in_are_named():
    ours = load_tokenizer("bytes")
    theirs = same_ids(ours, fills_in=True)
    assert [theirs.token_to_id(f"<|fim_{part}|>") for part in ("prefix", "suffix", "middle")] == [
        257,
        258,
        259,
    ]
    assert tokenizer_files.id_count(ours, True) == theirs.get_vocab_size() == 260


@pytest.fixture(params=["gpt2", "bytes", "tiktoken", *small_tokenizers.KINDS])
def ours(request, tmp_path):
    if request.param == "tiktoken":
        return other_encoding(tmp_path)
    if request.param in small_tokenizers.KINDS:
        return json_file(tmp_path, request.param)
    return load_tokenizer(request.param)


# The others split texts in a way that has no place for a chat's opening.
OPENED = ("gpt2", "bytes", "other", "byte_level")


def test_typed_special_tokens_stay_text_and_chats_begin_with_the_separator(ours, tmp_path):
    contents = tokenizer_files.files(ours, False)
    config = contents["tokenizer_config.json"]
    assert config["split_special_tokens"] and config["padding_side"] == "left"
    assert config["pad_token"] == config["eos_token"] == tokenizer_files.end_name(ours)
    assert tokenizer_files.begins_chats(contents) == (ours.name in OPENED)
    end, chat = config["eos_token"], "user: hi\n\nassistant:"
    theirs = tokenizers.Tokenizer.from_str(json.dumps(contents["tokenizer.json"]))
    theirs.encode_special_tokens = True
    with_end = lambda text: [ours.eot_id, *ours.encode(text).tolist()]
    texts = (end, f"a {end} b", f"{end} user: a", f"{end}Hello", f"x {end}user: a\n\n{end}b: c")
    assert tokenizer_files.keeps_text(ours, contents) == (ours.name != "unigram")
    if ours.name != "unigram":
        for text in texts:
            assert theirs.encode(text).ids == with_end(text)
    if ours.name in OPENED:
        assert theirs.encode(end + chat, add_special_tokens=False).ids == with_end(chat)
    # What a folder's tokenizer is read as: the same, opening or not.
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    again = json_tokenizer.from_file("again", tmp_path / "tokenizer.json")
    for text in (*TEXTS, *texts, end + chat):
        assert again.encode(text).tolist() == ours.encode(text).tolist()
    assert tokenizer_files.files(again, False) == contents
    assert "\\w+" not in again.files["tokenizer.json"].decode()


def test_transformers_reads_typed_tokens_chats_and_batches_as_training(ours, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    contents = tokenizer_files.files(ours, False) | {"config.json": {"model_type": "mamba"}}
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    messages = [{"role": "user", "content": " a"}, {"role": "assistant", "content": "b <x> "}]
    end = tokenizer_files.end_name(ours)
    if ours.name != "unigram":
        messages.append({"role": "user", "content": f"{end} c"})
    text = prompt_of(messages)
    wanted = [ours.eot_id, *ours.encode(text).tolist()]
    load = transformers.AutoTokenizer.from_pretrained
    load(tmp_path).save_pretrained(tmp_path / "again")
    for theirs in (load(tmp_path), load(tmp_path / "again")):
        assert theirs(text)["input_ids"] == wanted
        found = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == wanted[ours.name not in OPENED :]
        batch = theirs(["a", text], padding=True)
        n_padded = len(wanted) - len(theirs("a")["input_ids"])
        assert batch["input_ids"][0][: n_padded + 1] == [ours.eot_id] * (n_padded + 1)
        assert batch["attention_mask"][0][: n_padded + 1] == [0] * n_padded + [1]
        assert batch["input_ids"][1] == wanted


def test_merges_are_gpt2s_own():
    pieces = load_tokenizer("gpt2").pieces
    merges = tokenizer_files.merges(pieces)
    assert merges[0] == (b" ", b"t") and merges[1] == (b" ", b"a")
    assert [a + b for a, b in merges] == [piece for piece in pieces if len(piece) > 1]


def test_a_file_that_would_give_other_ids_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer_files, "merges", lambda pieces: [])
    with pytest.raises(UserError, match="gpt2 cannot be written as"):
        tokenizer_files.files(load_tokenizer("gpt2"), False)
