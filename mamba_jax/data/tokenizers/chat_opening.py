"""A chat's first token in a ``tokenizer.json`` that otherwise keeps typed special tokens as text.

Engines render a chat with a template, whose text begins with the separator's name, and encode that
text without adding tokens. A tokenizer that reads special tokens as text would read this name as
text too. So the pre-tokenizer of an exported file isolates the name at the very start of a text
where a role follows (``<|endoftext|>user: ``), and the vocabulary maps that word to the
separator's id. Anywhere else the name is text.
"""

import json
import re
from typing import Any

# How ``ByteLevel`` splits by default: GPT-2's pattern, as the library tokenizers has it built in.
_BUILT_IN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_START, _BEFORE_A_ROLE = r"\A", r"(?=\w+: )|"


def add(record: dict[str, Any], name: str, token: int) -> dict[str, Any] | None:
    """Returns the record with the opening; None if the tokenizer has no place for one.

    It needs byte-level byte-pair encoding with one splitting pattern, as in GPT-2, tiktoken, NeoX,
    Llama 3 and Qwen.

    Args:
      record: the content of a ``tokenizer.json``, without an opening.
      name: the separator's name.
      token: its id.
    """
    stages = _stages(record)
    vocabulary = record["model"].get("vocab")
    if stages is None or not name.isascii() or vocabulary.get(name, token) != token:
        return None
    split, byte_level = stages
    pattern = f"{_START}{re.escape(name)}{_BEFORE_A_ROLE}{split['pattern']['Regex']}"
    before = [split | {"pattern": {"Regex": pattern}}, byte_level]
    return record | {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": before},
        # A word that is a token is that token, whatever the merges would give.
        "model": record["model"] | {"vocab": vocabulary | {name: token}, "ignore_merges": True},
    }


def remove(source: bytes) -> bytes:
    """Returns a ``tokenizer.json`` without the opening of ``add``.

    The separator's name stays in the vocabulary, where no text reaches it without the opening.
    """
    if _BEFORE_A_ROLE.encode() not in source.replace(rb"\\", b"\\"):
        return source
    record = json.loads(source)
    split, byte_level = record["pre_tokenizer"]["pretokenizers"]
    pattern = split["pattern"]["Regex"].partition(_BEFORE_A_ROLE)[2]
    if pattern == _BUILT_IN:
        record["pre_tokenizer"] = byte_level | {"use_regex": True}
    else:
        split["pattern"]["Regex"] = pattern
    return json.dumps(record).encode()


def _stages(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Returns the two stages of a pre-tokenizer: a split by one pattern, then bytes to letters."""
    before = record["pre_tokenizer"] or {}
    if before.get("type") == "ByteLevel" and before.get("use_regex", True):
        split = {"type": "Split", "pattern": {"Regex": _BUILT_IN}}
        split |= {"behavior": "Isolated", "invert": False}
        stages = [split, before | {"use_regex": False}]
    else:
        stages = before.get("pretokenizers", [])
    plain = (
        record["model"]["type"] == "BPE"
        and [stage["type"] for stage in stages] == ["Split", "ByteLevel"]
        and "Regex" in stages[0]["pattern"]
        and stages[0]["behavior"] == "Isolated"
        and not stages[0]["invert"]
        and not stages[1]["add_prefix_space"]
        and not stages[1]["use_regex"]
        and (record["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    )
    return (stages[0], stages[1]) if plain else None
