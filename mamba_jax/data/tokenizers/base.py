"""Text ↔ token ids: what every tokenizer does.

User text never becomes a control token: whatever the text spells, ``encode`` returns neither the
separator nor any other special id, so that document boundaries can be found in the token stream
alone.
"""

import abc
import codecs
import types
from collections.abc import Iterable, Mapping

import numpy as np

# The tokens of prefix, suffix and middle in the tokenizers of OpenAI, and of StarCoder and others.
_FIM_NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


class Tokenizer(abc.ABC):
    """Text ↔ ids.

    Attributes:
      name: the argument of ``load_tokenizer``.
      identity: changes whenever the same text could give other tokens; part of cache keys.
      eot_id: the separator, which begins every document and, when sampled, ends it. ``encode``
        never returns it.
      pieces: the bytes of each token, by id; those of special tokens and of gaps are empty.
      token_bytes: int32 (vocab_size,), the lengths of ``pieces``.
      files: name → content of the files in a checkpoint, which make it independent of the network
        and of the user's files; empty if the name is enough.
      special_ids: name → id of the tokens that no text can spell.
      roundtrip_warning: why a text may change in encoding and decoding; "" if none does.
      remark: what loading changed about the tokenizer; "" if nothing.
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
        roundtrip_warning: str = "",
        remark: str = "",
    ):
        self.name = name
        self.identity = identity
        self.eot_id = eot_id
        self.pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self.files = files
        self.special_ids = special_ids
        self.roundtrip_warning = roundtrip_warning
        self.remark = remark

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """The ids before prefix, suffix and middle: the tokenizer's own if it has them, else the
        three ids after its last, which the model's embeddings then need."""
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
        """Returns the bytes of one token; checks the id, since a negative one would index from the
        end."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside 0 … {self.vocab_size - 1} ({self.name})")
        return self.pieces[int(token)]

    def document_encoder(self) -> "DocumentEncoder":
        """Returns an encoder for one document that arrives in pieces."""
        return DocumentEncoder(self)


class DocumentEncoder:
    """Encodes a document piece by piece; this class assumes that no token crosses pieces."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def push(self, text: str) -> np.ndarray:
        """Returns the ids that later text cannot change, int32 (tokens,); can hold text back."""
        return self._tokenizer.encode(text)

    def cut(self) -> np.ndarray:
        """Returns the ids of the text held back: a token ends here. More text can follow."""
        return np.zeros(0, np.int32)


class StreamDecoder:
    """Decodes token by token; holds bytes back until they form whole characters.

    A character that is incomplete when the text ends is not part of it.

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
        # The first byte alone: it can show that the bytes before it are not a character.
        text = self._decoder.decode(piece[:1])
        self.start = self.n_chars + len(text) - (text != "" and not self.holds_back)
        text += self._decoder.decode(piece[1:])
        self.n_chars += len(text)
        return text
