"""Text ↔ token ids: GPT-2's byte-pair encoding from a packaged file, or plain bytes. No network.

User text never becomes a control token: ``encode`` does not emit the end-of-text id, whatever the
text spells, so that document boundaries can be found again in the token stream alone.
"""

import abc
import base64
import codecs
import dataclasses
import functools
import hashlib
import importlib.resources
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError, did_you_mean

# r50k_base of tiktoken; tiktoken itself would download the ranks, and its cache may delete them.
_GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# White space as the pattern's \s knows it (Unicode White_Space); str.isspace() has \x1c-\x1f too.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Characters given to tiktoken at once: bounds memory to about 90 MB more than the result.
_PIECE_CHARACTERS = 1 << 20
# tiktoken panics (a BaseException) on a run of 999,999 white-space characters before another one.
_LONGEST_WHITE_SPACE = 100_000


class Tokenizer(abc.ABC):
    """Text ↔ ids.

    Attributes:
      name: what ``load_tokenizer`` was asked for.
      identity: changes whenever the same text might give other tokens; part of cache keys.
      eot_id: begins every document and ends it when sampled. Never made by ``encode``.
      pieces: the bytes of each token, by id; those of ``eot_id`` are empty.
      token_bytes: int32 (vocab_size,), the lengths of ``pieces``.
    """

    def __init__(self, name: str, identity: str, eot_id: int, pieces: list[bytes]):
        self.name = name
        self.identity = identity
        self.eot_id = eot_id
        self.pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of ``text``, int32 (tokens,). Lone surrogates become U+FFFD."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids``; end-of-text is empty, bytes that are not UTF-8 are U+FFFD.

        Raises:
          ValueError: on an id outside the vocabulary.
        """
        return b"".join(self.piece(token) for token in ids).decode("utf-8", "replace")

    def piece(self, token: int) -> bytes:
        """Returns the bytes of one token, checked: a negative id would index from the end."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside 0 … {self.vocab_size - 1} ({self.name})")
        return self.pieces[int(token)]


class StreamDecoder:
    """Decodes token by token, holding back bytes until they form whole characters."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Returns the text that became complete with ``token``; may be empty."""
        return self._decoder.decode(self._tokenizer.piece(token))

    def flush(self) -> str:
        """Ends the text: what was held back is not a character and comes out as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called ``name``, built once per process.

    Raises:
      UserError: if the name is unknown or the packaged file is missing or damaged.
    """
    if name not in _MAKERS:
        raise UserError(
            f'data.tokenizer="{name}" is not one of {", ".join(_MAKERS)}'
            f"{did_you_mean(name, _MAKERS)}"
        )
    return _MAKERS[name]()


def well_formed(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which UTF-8 cannot express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _Bytes(Tokenizer):
    """One token per UTF-8 byte."""

    def __init__(self):
        pieces = [bytes([value]) for value in range(256)]
        super().__init__("bytes", identity="bytes", eot_id=256, pieces=[*pieces, b""])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(well_formed(text).encode("utf-8"), np.uint8).astype(np.int32)


class _Gpt2(Tokenizer):
    """GPT-2's byte-pair encoding, token for token as tiktoken's ``encode_ordinary``."""

    def __init__(self):
        import tiktoken  # not needed by --help nor by the bytes tokenizer

        ranks = _gpt2_ranks()
        eot_id = len(ranks)
        self._encoding: Any = tiktoken.Encoding(
            "gpt2",
            pat_str=_GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": eot_id},
            explicit_n_vocab=eot_id + 1,
        )
        pieces = sorted(ranks, key=ranks.__getitem__)
        identity = f"gpt2 {_GPT2_RANKS_SHA256}"
        super().__init__("gpt2", identity=identity, eot_id=eot_id, pieces=[*pieces, b""])

    def encode(self, text: str) -> np.ndarray:
        # disallowed_special=(): "<|endoftext|>" in a text is ordinary text, not an error.
        pieces = [
            self._encoding.encode_to_numpy(piece, disallowed_special=())
            for piece in cut_text(well_formed(text))
        ]
        return np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, np.int32)


def _gpt2_ranks() -> dict[bytes, int]:
    file = importlib.resources.files("mamba_jax.data").joinpath("assets/gpt2.tiktoken")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer's file {file}: {error.strerror}; install mamba_jax again"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != _GPT2_RANKS_SHA256:
        raise UserError(
            f"the tokenizer's file {file} is damaged (sha256 {found[:12]}…, expected "
            f"{_GPT2_RANKS_SHA256[:12]}…); install mamba_jax again"
        )
    lines = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


_MAKERS: dict[str, Callable[[], Tokenizer]] = {"gpt2": _Gpt2, "bytes": _Bytes}


def cut_text(text: str) -> Iterator[str]:
    """Cuts text into pieces whose tokens, joined, are the tokens of the whole.

    No token of the pattern reaches from a non-space into a following white space, so a cut there
    is exact. Only two freaks are cut elsewhere: more than a million characters without a space or
    line feed after a non-space, and a run of more than 100,000 white-space characters (on which
    tiktoken may panic). Their text still survives the round trip.
    """
    start = 0
    while start < len(text):
        end = min(start + _PIECE_CHARACTERS, len(text))
        if end < len(text):
            end = _last_exact_cut(text, start, end)
        yield from _chop_white_space(text[start:end])
        start = end


def _last_exact_cut(text: str, start: int, limit: int) -> int:
    """Returns the last place in (start, limit] before a white space that follows a non-space."""
    cut = max(text.rfind(" ", start, limit), text.rfind("\n", start, limit))
    while cut > start and text[cut - 1] in WHITE_SPACE:
        cut -= 1
    return cut if cut > start else limit


def _chop_white_space(text: str) -> Iterator[str]:
    """Chops the runs of white space that are too long for tiktoken; mostly there is none."""
    start, step = 0, _LONGEST_WHITE_SPACE
    # A run longer than 2 steps covers a whole stretch between two multiples of the step: looking
    # at those is enough, and costs nothing on ordinary text.
    for probe in range(0, len(text) - step + 1, step):
        if text[probe] in WHITE_SPACE and not text[probe : probe + step].strip(WHITE_SPACE):
            if probe > start:
                yield text[start:probe]
            yield text[probe : probe + step]
            start = probe + step
    yield text[start:]


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Gives the model as many embeddings as the tokenizer has ids, if the config leaves it open.

    Raises:
      UserError: if the config names fewer.
    """
    wanted = config.model.vocab_size
    if wanted and wanted < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size={wanted} is below the {tokenizer.vocab_size} ids of "
            f'data.tokenizer="{tokenizer.name}"; give 0 for exactly as many'
        )
    model = dataclasses.replace(config.model, vocab_size=wanted or tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)
