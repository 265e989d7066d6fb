"""Text ↔ token ids: what every tokenizer does, and the door to all of them.

User text never becomes a control token: ``encode`` emits neither the end-of-text id nor any other
special one, whatever the text spells, so that document boundaries can be found again in the token
stream alone.
"""

import abc
import codecs
import dataclasses
import functools
import os
import pathlib
import types
from collections.abc import Iterable, Mapping

import numpy as np

from mamba_jax.config import RunConfig
from mamba_jax.data.text_cuts import well_formed
from mamba_jax.errors import UserError, did_you_mean

# Of prefix, suffix and middle, as those of OpenAI, of StarCoder and their kin name them.
_FIM_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


class Tokenizer(abc.ABC):
    """Text ↔ ids.

    Attributes:
      name: what ``load_tokenizer`` was asked for.
      identity: changes whenever the same text might give other tokens; part of cache keys.
      eot_id: begins every document and ends it when sampled. Never made by ``encode``.
      pieces: the bytes of each token, by id; those of special tokens and of gaps are empty.
      token_bytes: int32 (vocab_size,), the lengths of ``pieces``.
      files: name → content of what a checkpoint carries, to need neither network nor the user's
        files; empty if the name is enough.
      special_ids: name → id of tokens that no text spells.
      doubt: why texts may not come back as they were; "" if they do.
      remark: what was changed about it when it was loaded; "" if nothing was.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        eot_id: int,
        pieces: list[bytes],
        *,
        files: Mapping[str, bytes] = types.MappingProxyType({}),
        special_ids: Mapping[str, int] = types.MappingProxyType({}),
        doubt: str = "",
        remark: str = "",
    ):
        self.name = name
        self.identity = identity
        self.eot_id = eot_id
        self.pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self.files = files
        self.special_ids = special_ids
        self.doubt = doubt
        self.remark = remark

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids that stand before prefix, suffix and middle: the tokenizer's own where it has them,
        else the three after its last, which the model's tables then need."""
        for names in _FIM_NAMES:
            if self.special_ids.keys() >= set(names):
                prefix_id, suffix_id, middle_id = (self.special_ids[name] for name in names)
                return prefix_id, suffix_id, middle_id
        return self.vocab_size, self.vocab_size + 1, self.vocab_size + 2

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of ``text``, int32 (tokens,). Lone surrogates become U+FFFD."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids``; special ones are empty, bytes that are not UTF-8 are U+FFFD.

        Raises:
          ValueError: on an id outside the vocabulary.
        """
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Returns the bytes of one token, checked: a negative id would index from the end."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside 0 … {self.vocab_size - 1} ({self.name})")
        return self.pieces[int(token)]

    def document_encoder(self) -> "DocumentEncoder":
        """Returns what encodes one document that comes in pieces."""
        return DocumentEncoder(self)


class DocumentEncoder:
    """Encodes a document piece by piece; this one where tokens never cross from piece to piece."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def push(self, text: str) -> np.ndarray:
        """Returns ids that are certain by now, int32 (tokens,); ``text`` may be held back."""
        return self._tokenizer.encode(text)

    def cut(self) -> np.ndarray:
        """Returns the ids of what is held back: a token ends here. More text may come."""
        return np.zeros(0, np.int32)


class StreamDecoder:
    """Decodes token by token, holding back bytes until they form whole characters.

    A character that is still incomplete when the text ends is not part of it.

    Attributes:
      n_chars: characters returned so far.
      start: index of the character that the first byte of the last token belongs to.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.n_chars = self.start = 0

    @property
    def holds_back(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """Returns the text that became complete with ``token``; may be empty."""
        piece = self._tokenizer.piece(token)
        # The first byte alone: it may also show that the bytes before it are no character.
        text = self._decoder.decode(piece[:1])
        self.start = self.n_chars + len(text) - (text != "" and not self.holds_back)
        text += self._decoder.decode(piece[1:])
        self.n_chars += len(text)
        return text


class _Bytes(Tokenizer):
    """One token per UTF-8 byte."""

    def __init__(self):
        pieces = [bytes([value]) for value in range(256)]
        super().__init__("bytes", identity="bytes", eot_id=256, pieces=[*pieces, b""])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(well_formed(text).encode("utf-8"), np.uint8).astype(np.int32)


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called ``name``, built once per process.

    Args:
      name: "gpt2", "bytes", an encoding of tiktoken such as "cl100k_base", a ``tokenizer.json`` or
        a folder with one, or an id of the Hugging Face Hub such as "EleutherAI/pythia-160m".

    Raises:
      UserError: if there is no such tokenizer, it is out of reach, or its file is damaged.
    """
    if name == "bytes":
        return _Bytes()
    from mamba_jax.data import tiktoken_encodings  # tiktoken is not needed by the bytes tokenizer

    if name == tiktoken_encodings.GPT2:
        return tiktoken_encodings.packaged_gpt2()
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_dir() and (found := _in_folder(path, name)):  # a checkpoint's folder as well
        return found
    if os.path.sep in name or name.endswith(".json") or path.exists():
        from mamba_jax.data import json_tokenizer

        return json_tokenizer.load(name)
    known = ("bytes", *tiktoken_encodings.names())
    if name in known:
        return tiktoken_encodings.load(name)
    hint = did_you_mean(name, known)
    raise UserError(
        f'data.tokenizer="{name}" is not one of {", ".join(known)}, nor a tokenizer.json or a '
        f"folder with one, nor an id of the Hugging Face Hub (OWNER/NAME){hint}"
    )


def load_saved(folder: pathlib.Path, name: str) -> Tokenizer:
    """Returns a checkpoint's tokenizer: that of the file in its folder, else the one of the name.

    Args:
      folder: of the checkpoint.
      name: ``data.tokenizer`` of its run.

    Raises:
      UserError: as in ``load_tokenizer``.
    """
    return _in_folder(folder, name) or load_tokenizer(name)


def _in_folder(folder: pathlib.Path, name: str) -> Tokenizer | None:
    from mamba_jax.data import json_tokenizer, tiktoken_encodings

    for module in (json_tokenizer, tiktoken_encodings):
        if (folder / module.FILE_NAME).is_file():
            return module.from_file(name, folder / module.FILE_NAME)
    return None


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Gives the model as many ids as the tokenizer has, if the config leaves it open; those that
    fill-in-the-middle adds included.

    Raises:
      UserError: if the config names fewer.
    """
    wanted, needed = config.model.vocab_size, tokenizer.vocab_size
    if config.data.fim_rate:
        needed = max(needed, *(token + 1 for token in tokenizer.fim_ids))
    if wanted and wanted < needed:
        raise UserError(
            f"model.vocab_size={wanted} is below the {needed} ids of "
            f'data.tokenizer="{tokenizer.name}"; give 0 for exactly as many'
        )
    model = dataclasses.replace(config.model, vocab_size=wanted or needed)
    return dataclasses.replace(config, model=model)
