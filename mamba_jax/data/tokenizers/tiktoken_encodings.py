"""The byte-pair encodings of tiktoken: GPT-2's from a packaged file, others from its cache."""

import base64
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_jax.data.text_cuts import cut_text, well_formed
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, first_line

GPT2 = "gpt2"
FILE_NAME = "tiktoken.json"
_END_OF_TEXT = "<|endoftext|>"
# r50k_base of tiktoken; tiktoken itself would download the ranks, and its cache may delete them.
_GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class _BytePair(Tokenizer):
    """Gives the same tokens as tiktoken's ``encode_ordinary``."""

    def __init__(self, name: str, identity: str, encoding: Any, files: Mapping[str, bytes]):
        self._encoding = encoding
        pieces = [b""] * encoding.n_vocab  # some ids have no token
        for piece, token in encoding._mergeable_ranks.items():
            pieces[token] = piece
        eot_id = encoding._special_tokens[_END_OF_TEXT]
        special = encoding._special_tokens
        super().__init__(name, identity, eot_id, pieces, files=files, special_ids=special)

    def encode(self, text: str) -> np.ndarray:
        # disallowed_special=(): "<|endoftext|>" in a text is ordinary text, not an error.
        pieces = [
            self._encoding.encode_to_numpy(piece, disallowed_special=())
            for piece in cut_text(well_formed(text))
        ]
        return np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, np.int32)


def packaged_gpt2() -> Tokenizer:
    """Loads GPT-2's tokenizer without network access.

    Raises:
      UserError: if the packaged file is missing or damaged.
    """
    ranks = _gpt2_ranks()
    encoding = _encoding(GPT2, _GPT2_PATTERN, ranks, {_END_OF_TEXT: len(ranks)})
    return _BytePair(GPT2, f"gpt2 {_GPT2_RANKS_SHA256}", encoding, {})


def names() -> list[str]:
    """Returns the encodings of the installed tiktoken, those of its plugins included."""
    import tiktoken

    return tiktoken.list_encoding_names()


def load(name: str) -> Tokenizer:
    """Loads the tokenizer of a name in ``names()``; tiktoken downloads it once.

    Raises:
      UserError: if it can neither be downloaded nor found in tiktoken's cache.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, of the disk, of a damaged download
        folder = os.environ.get("TIKTOKEN_CACHE_DIR")
        hint = f"the folder {folder} (TIKTOKEN_CACHE_DIR)" if folder else "TIKTOKEN_CACHE_DIR"
        raise UserError(
            f'data.tokenizer="{name}" cannot be downloaded ({first_line(error)}); go online once, '
            f"put tiktoken's file of it into {hint}, or use gpt2, which is included"
        ) from error
    if _END_OF_TEXT not in encoding._special_tokens:
        raise UserError(
            f'data.tokenizer="{name}" has no {_END_OF_TEXT}, which begins every document; use '
            "another encoding"
        )
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    in_order = b" ".join(
        b"%d %s" % (rank, base64.b64encode(piece)) for piece, rank in sorted(ranks.items())
    )
    record = {
        "pattern": encoding._pat_str,
        "special_tokens": dict(sorted(special.items())),
        "ranks": in_order.decode("ascii"),
    }
    data = json.dumps(record).encode("ascii")
    return _BytePair(name, _identity(data), encoding, {FILE_NAME: data})


def from_file(name: str, path: pathlib.Path) -> Tokenizer:
    """Loads the tokenizer in a checkpoint.

    Raises:
      UserError: if the file is damaged.
    """
    try:
        data = path.read_bytes()
        record = json.loads(data)
        words = record["ranks"].split(" ")
        ranks = {
            base64.b64decode(piece): int(rank)
            for rank, piece in zip(words[::2], words[1::2], strict=True)
        }
        encoding = _encoding(name, record["pattern"], ranks, record["special_tokens"])
        return _BytePair(name, _identity(data), encoding, {FILE_NAME: data})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the tokenizer's file {path} is damaged: {first_line(error)}") from error


def _identity(data: bytes) -> str:
    return f"tiktoken {hashlib.blake2b(data, digest_size=16).hexdigest()}"


def _encoding(name: str, pattern: str, ranks: dict[bytes, int], special: Mapping[str, int]) -> Any:
    import tiktoken  # not needed by --help

    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special)
    )


def _gpt2_ranks() -> dict[bytes, int]:
    file = importlib.resources.files("mamba_jax.data").joinpath("assets/gpt2.tiktoken")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer's file {file}: {error.strerror}; reinstall mamba_jax"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != _GPT2_RANKS_SHA256:
        raise UserError(
            f"the tokenizer's file {file} is damaged (sha256 {found[:12]}…, expected "
            f"{_GPT2_RANKS_SHA256[:12]}…); reinstall mamba_jax"
        )
    lines = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}
