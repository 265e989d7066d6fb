"""Writes a tokenizer as Hugging Face's ``tokenizer.json``, with the same ids.

In training, a document follows the end-of-text token of the one before it, so the file puts that
token before every text. Names of special tokens in a text stay text.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mamba_jax.data.tokenizers import chat_opening
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, first_line, need
from mamba_jax.exporting import chat_format

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"  # as transformers calls it
_TIKTOKEN_FILE = "tiktoken.json"
END_OF_TEXT = "<|endoftext|>"
_FIM_NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_PROBES = (
    "Hello world's\n\n  end  ",
    "naïve café 東京 🙂\tx = 12345, it'LL be 3.14!\r\n \n",
    'def f(a):\n    return {"key": [a, 1_000_000]}  # comment',
    " ",
)


def end_name(tokenizer: Tokenizer) -> str:
    """Returns the name of the end-of-text token."""
    if CONFIG_NAME in tokenizer.files:
        return json.loads(tokenizer.files[CONFIG_NAME])["eos_token"]
    return END_OF_TEXT


def special_tokens(tokenizer: Tokenizer, fills_in: bool) -> dict[str, int]:
    """Returns name → id of the special tokens, which encoding a text never gives.

    Args:
      tokenizer: the model's tokenizer.
      fills_in: the model was trained with ``data.fim_rate``, which may have added three ids.
    """
    found = {**tokenizer.special_ids, end_name(tokenizer): tokenizer.eot_id}
    if fills_in:
        known = set(found.values())
        pairs = zip(_FIM_NAMES, tokenizer.fim_ids, strict=True)
        found |= {name: token for name, token in pairs if token not in known}
    return found


def id_count(tokenizer: Tokenizer, fills_in: bool) -> int:
    """Returns the number of ids: the rows of the embedding that are exported."""
    return max(tokenizer.vocab_size, *(i + 1 for i in special_tokens(tokenizer, fills_in).values()))


def record(tokenizer: Tokenizer, fills_in: bool) -> dict[str, Any]:
    """Returns the content of ``tokenizer.json``, checked on a few texts.

    Raises:
      UserError: if the library tokenizers is missing or gives other ids.
    """
    special = special_tokens(tokenizer, fills_in)
    if FILE_NAME in tokenizer.files:
        found = json.loads(tokenizer.files[FILE_NAME])
    else:
        found = _byte_pair_record(tokenizer, special)
    before = _begins_with(end_name(tokenizer), tokenizer)
    found |= {"truncation": None, "padding": None, "post_processor": before}
    present = {word["id"] for word in found["added_tokens"]}
    found["added_tokens"] += [_added(n, i) for n, i in special.items() if i not in present]
    found["added_tokens"].sort(key=lambda word: word["id"])
    theirs = _library(found)
    for text in _PROBES:
        if theirs.encode(text).ids != with_end(tokenizer, text):
            raise UserError(
                f"the tokenizer {tokenizer.name} cannot be written as {FILE_NAME}: {text!r} would "
                "give other ids; use --format safetensors"
            )
    return found


def files(
    tokenizer: Tokenizer, fills_in: bool, chat_template: str = ""
) -> dict[str, dict[str, Any]]:
    """Returns name → content of the tokenizer's JSON files.

    Args:
      tokenizer: the model's tokenizer.
      fills_in: the model was trained with ``data.fim_rate``.
      chat_template: that of a model that was imported with one of its own; "": ours.

    Raises:
      UserError: as in ``record``.
    """
    end, content = end_name(tokenizer), record(tokenizer, fills_in)
    opened = None if chat_template else _opened(content, tokenizer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # the model continues a row's last token
        # Special tokens that a user types are text, but a template of another format may use them.
        "split_special_tokens": not chat_template,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template or chat_format.jinja(begins=opened is not None),
    }
    return {FILE_NAME: opened or content, CONFIG_NAME: config}


def begins_chats(contents: Mapping[str, dict[str, Any]]) -> bool:
    """Returns whether the template of ``files`` begins a chat with the separator."""
    return contents[CONFIG_NAME]["chat_template"] != chat_format.jinja(begins=False)


def is_ours(chat_template: str) -> bool:
    """Returns whether a chat template is the one that exports write."""
    return chat_template in (chat_format.jinja(begins=begins) for begins in (True, False))


def own_template(folder: pathlib.Path) -> str:
    """Returns the chat template of a Hugging Face model; "" if it has none, or ours.

    Args:
      folder: the model's, or that of a checkpoint that it was imported to.

    Raises:
      UserError: if a file is damaged.
    """
    template: Any = ""
    try:
        if (folder / CONFIG_NAME).is_file():
            template = json.loads((folder / CONFIG_NAME).read_text("utf-8-sig")).get(
                "chat_template"
            )
        if isinstance(template, list):  # several, by name
            named = {one["name"]: one["template"] for one in template}
            template = named.get("default")
        if (folder / TEMPLATE_NAME).is_file():  # which transformers prefers
            template = (folder / TEMPLATE_NAME).read_text("utf-8")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: the chat template cannot be read: {first_line(error)}; fix or remove it"
        ) from error
    return template if isinstance(template, str) and not is_ours(template) else ""


def _library(content: dict[str, Any]) -> Any:
    """Returns the library's tokenizer, which keeps typed special tokens as text."""
    theirs = need("tokenizers", "export").Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    return theirs


def keeps_text(tokenizer: Tokenizer, contents: Mapping[str, dict[str, Any]]) -> bool:
    """Returns whether the library can keep a typed separator as text.

    The vocabulary of a Unigram model may hold it as an ordinary word, which text can spell.

    Args:
      tokenizer: the model's tokenizer.
      contents: what ``files`` returned.
    """
    text = spelled(tokenizer)
    return _library(contents[FILE_NAME]).encode(text).ids == with_end(tokenizer, text)


def spelled(tokenizer: Tokenizer) -> str:
    """Returns a text that spells the separator, at its start and further on."""
    end = end_name(tokenizer)
    return f"{end} closes a text, {end} begins the next"


def with_end(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text after the separator, as in training."""
    return [tokenizer.eot_id, *tokenizer.encode(text).tolist()]


def _opened(content: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Returns the record with a chat's opening; None if adding one would change other texts."""
    end = end_name(tokenizer)
    found = chat_opening.add(content, end, tokenizer.eot_id)
    if found is None:
        return None
    before, after = _library(content), _library(found)
    added = {word["content"] for word in content["added_tokens"]}
    if not content["model"].get("ignore_merges"):
        words = content["model"]["vocab"].keys() - added
        if any(len(before.model.tokenize(word)) > 1 for word in words):
            return None
    texts = [*added, *_PROBES]
    ids = lambda library: [library.encode(text).ids for text in texts]
    turn = "user: hi"
    opened = after.encode(end + turn, add_special_tokens=False).ids
    same = ids(before) == ids(after)
    return found if same and opened == with_end(tokenizer, turn) else None


def _begins_with(end: str, tokenizer: Tokenizer) -> dict[str, Any]:
    special = {"SpecialToken": {"id": end, "type_id": 0}}
    text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text("A")],
        "pair": [special, text("A"), text("B")],
        "special_tokens": {end: {"id": end, "ids": [tokenizer.eot_id], "tokens": [end]}},
    }


def _added(name: str, token: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": name, **plain, "special": True}


def _byte_pair_record(tokenizer: Tokenizer, special: Mapping[str, int]) -> dict[str, Any]:
    """The record of tiktoken's encodings and of plain bytes."""
    vocabulary = {spell(piece): i for i, piece in enumerate(tokenizer.pieces) if piece}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    before: dict[str, Any] = {**byte_level, "use_regex": True}  # GPT-2's pattern is built in
    if _TIKTOKEN_FILE in tokenizer.files:
        pattern = json.loads(tokenizer.files[_TIKTOKEN_FILE])["pattern"]
        # In tiktoken's engine {1,3}+ is possessive, in the library's it is a repetition of it.
        pattern = pattern.replace("}+", "}")
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        before = {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        }
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": before,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a word that is a token is that token
            "vocab": vocabulary | dict(special),
            "merges": [[spell(a), spell(b)] for a, b in merges(tokenizer.pieces)],
        },
    }


def merges(pieces: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the merges of byte-pair encoding, in order, from its tokens in order of rank.

    A token's last merge joins the two pieces that the earlier merges make of it. A token that they
    do not reach has no merge: it only matches a whole word.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces) if piece}
    found = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            if min(joined) >= rank:
                break
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def spell(piece: bytes) -> str:
    """Writes bytes in GPT-2's alphabet."""
    return "".join(_LETTERS[byte] for byte in piece)


def _letters() -> list[str]:
    """A printable letter for each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _letters()
