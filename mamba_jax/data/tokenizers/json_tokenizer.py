"""Any ``tokenizer.json`` of the Hugging Face library ``tokenizers``: a file, a folder or the Hub.

Ids are those of ``tokenizers.Tokenizer.encode(text, add_special_tokens=False)``, with two
exceptions: text that spells a special token stays text, and BPE dropout, which produces different
ids each time, is disabled. The separator is, in this order: the ``eos_token`` of the
``tokenizer_config.json`` beside the file; the first of ``_USUAL_ENDS`` among the special tokens;
otherwise ``<|endoftext|>``, added as the last id.
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mamba_jax.data.sources import hub_access
from mamba_jax.data.text_cuts import well_formed
from mamba_jax.data.tokenizers import chat_opening
from mamba_jax.data.tokenizers.base import DocumentEncoder, Tokenizer
from mamba_jax.errors import UserError, first_line, need

FILE_NAME = "tokenizer.json"
_CONFIG_NAME = "tokenizer_config.json"
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]", "[EOS]")
# Characters encoded at once: an encoding keeps about 150 bytes a token besides the ids.
_WINDOW_CHARACTERS = 1 << 16
# Characters around a cut within which the tokens on its sides must be settled. Tokens depend on
# their word alone in most tokenizers, and few words are longer.
_MARGIN_CHARACTERS = 1 << 10
_BYTE_WORD = re.compile("<0x[0-9A-Fa-f]{2}>")
_MOST_IDS_A_WORD = 100  # a file with more is damaged: the model would have a row for each
_PREFIX_PROBES = 100  # words tried
_PROBES = (
    'A probe: naïve café,\n\n  x = 日本語 ["🌍"]  <b>It\'s</b> 3.14!',
    "  spaces around  ",
    "\n\tother white space\u00a0\r\n\u2003\n",
    "``quotes'' … – \u201cothers\u201d ﬁ ½ ① Ａ e\u0301 \u1e9b\u0323",
)
# Around each added token: some strip the white space beside them.
_ADDED_PROBES = ("a {} b", "a  {}\n\nb", "a{}b", "\t{}\t")
_SHOWN_CHARACTERS = 12  # of a text that changes, on each side of the change


class _Json(Tokenizer):
    """Encodes with the library; pieces come from the vocabulary and the decoder."""

    def __init__(self, name: str, encoding: Any, source: bytes, end: str | None, remark: str = ""):
        """
        Args:
          name: for ``load_tokenizer``.
          encoding: ``tokenizers.Tokenizer``.
          source: the file it was loaded from; what the library writes changes with its version.
          end: content of the separator; None: the usual one.
          remark: as of ``Tokenizer``.
        """
        self._encoding = encoding
        end = end or _usual_end(encoding)
        if encoding.token_to_id(end) is None:
            encoding.add_special_tokens([end])
        eot_id = encoding.token_to_id(end)
        ids = list(encoding.get_vocab(with_added_tokens=True).values())
        if ids.count(eot_id) > 1:
            raise ValueError(f"its ids have gaps, and {end} would share one: add it to the file")
        if max(ids) > _MOST_IDS_A_WORD * len(ids):
            raise ValueError(f"it has {len(ids)} words, and ids up to {max(ids)}")
        record = json.loads(encoding.to_str())
        named = {word["content"]: word["id"] for word in record["added_tokens"] if word["special"]}
        special = {*named.values(), eot_id}
        # The unknown token stands for what the vocabulary lacks: it is not a control token.
        model = record["model"]
        unknown = model.get("unk_id", encoding.token_to_id(model.get("unk_token") or ""))
        self._forbidden = np.array(sorted(special - ({unknown} - {eot_id})))
        _make_plain(encoding)
        super().__init__(
            name,
            f"{FILE_NAME} {hashlib.blake2b(source, digest_size=16).hexdigest()} {end}",
            eot_id,
            _pieces(encoding, record, special),
            special_ids=named,
            files={FILE_NAME: source, _CONFIG_NAME: json.dumps({"eos_token": end}).encode()},
            remark=remark,
        )
        self._prefix = self._found_prefix()
        self.roundtrip_warning = self._find_roundtrip_warning(
            [word["content"] for word in record["added_tokens"]]
        )

    def _find_roundtrip_warning(self, added: Sequence[str]) -> str:
        """Tries probes, alone and with each added token; names the first one that changes."""
        texts = [*_PROBES]
        for probe in _ADDED_PROBES:
            each = [probe.format(word) for word in added]
            # All at once, since there can be thousands; one by one only if that changes.
            if self._change("".join(each)):
                texts += [*each, "".join(each)]
        change = next(filter(None, map(self._change, texts)), None)
        if change is None:
            return ""
        return (
            f"the tokenizer {self.name} is lossy: {change[0]} decodes to "
            f"{change[1]}; bits per byte count the decoded text"
        )

    def _change(self, text: str) -> tuple[str, str] | None:
        """Returns a stretch of the text and what it decodes to; None if nothing changes."""
        back = self.decode(self.encode(text))
        if back == text:
            return None
        pairs = enumerate(zip(text, back, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
        around = slice(max(place - _SHOWN_CHARACTERS, 0), place + _SHOWN_CHARACTERS)
        return ascii(text[around]), ascii(back[around])

    def _found_prefix(self) -> str:
        """Returns what the tokenizer adds before every text, often a space."""
        words = (piece.decode("utf-8", "replace").strip() for piece in self.pieces)
        for word in itertools.islice(filter(str.isalnum, words), _PREFIX_PROBES):
            text = b"".join(self.pieces[token] for token in self.encode(word)).decode("utf-8")
            if text.endswith(word):
                return text.removesuffix(word)
        return ""

    def encode(self, text: str) -> np.ndarray:
        encoder = self.document_encoder()
        return np.concatenate([encoder.push(text), encoder.cut()])

    def document_encoder(self) -> DocumentEncoder:
        return _ContextEncoder(self)

    def decode(self, ids: Iterable[int]) -> str:
        """Like the base class, but without what the tokenizer itself put before the text."""
        text = super().decode(ids)
        return text.removeprefix(self._prefix)

    def encode_whole(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids int32 (n,) and their stretches of characters int64 (n, 2)."""
        encoding = self._encoded(text)
        ids_n = np.array(encoding.ids, np.int32)
        offsets_n2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if np.isin(ids_n, self._forbidden).any():
            ids_n, offsets_n2 = self._spelt_out(text, ids_n, offsets_n2)
        return ids_n, offsets_n2

    def _encoded(self, text: str) -> Any:
        try:
            return self._encoding.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises Exception itself
            raise UserError(
                f"the tokenizer {self.name} cannot encode unknown text "
                f"({first_line(error)}): give it an unknown token, or use another tokenizer"
            ) from error

    def _spelt_out(
        self, text: str, ids_n: np.ndarray, offsets_n2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Re-encodes text that became a special token, character by character: some vocabularies
        have the spelling of one as an ordinary word."""
        ids, offsets = [], []
        for token, (start, end) in zip(ids_n.tolist(), offsets_n2.tolist(), strict=True):
            if token not in self._forbidden:
                ids.append(token)
                offsets.append((start, end))
                continue
            for place in range(start, end):
                for one in self._encoded(text[place]).ids:
                    if one not in self._forbidden:
                        ids.append(one)
                        offsets.append((place, place + 1))
        return np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)


class _ContextEncoder(DocumentEncoder):
    """Encodes a long text window by window, each with the end of the one before it.

    The tokens of a window are used up to a place so far from its end that later text cannot change
    them; the next window begins so far before that place that its tokens there are the same. The
    result is therefore that of encoding the whole text, unless a "word" is longer than the margin.
    Then a token can end elsewhere, and a tokenizer that adds a space before every text can add one
    there too; otherwise the text still decodes exactly.
    """

    def __init__(self, tokenizer: _Json):
        self._json = tokenizer
        self._text = ""
        self._done = 0  # characters of _text whose ids were returned

    def push(self, text: str) -> np.ndarray:
        text, found = well_formed(text), []
        for start in range(0, len(text), _WINDOW_CHARACTERS):
            self._text += text[start : start + _WINDOW_CHARACTERS]
            if len(self._text) - self._done > _WINDOW_CHARACTERS + _MARGIN_CHARACTERS:
                found.append(self._take(final=False))
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def cut(self) -> np.ndarray:
        return self._take(final=True)

    def _take(self, *, final: bool) -> np.ndarray:
        if self._done == len(self._text):
            return np.zeros(0, np.int32)
        ids_n, offsets_n2 = self._json.encode_whole(self._text)
        first = _token_after(offsets_n2, self._done) if self._done else 0
        if first is None:  # a token reaches across the cut
            self._text, self._done = self._text[self._done :], 0
            ids_n, offsets_n2 = self._json.encode_whole(self._text)
            first = 0
        last, done = len(ids_n), len(self._text)
        if not final:
            place = _last_cut(offsets_n2, done - _MARGIN_CHARACTERS)
            if place > first:
                last, done = place, int(offsets_n2[place - 1, 1])
        drop = max(done - _MARGIN_CHARACTERS, 0)
        self._text, self._done = self._text[drop:], done - drop
        return ids_n[first:last]


def _clean_cuts(offsets_n2: np.ndarray) -> np.ndarray:
    """Returns the indices of tokens before which a cut splits no character."""
    start_n, end_n = offsets_n2[:, 0], offsets_n2[:, 1]
    solid_n = end_n > start_n
    return 1 + np.flatnonzero((end_n[:-1] <= start_n[1:]) & solid_n[:-1] & solid_n[1:])


def _token_after(offsets_n2: np.ndarray, place: int) -> int | None:
    """Returns the first token after a cut at ``place``; None if the tokens cannot be cut there."""
    cuts = _clean_cuts(offsets_n2)
    found = cuts[offsets_n2[cuts - 1, 1] == place]
    return int(found[0]) if len(found) else None


def _last_cut(offsets_n2: np.ndarray, limit: int) -> int:
    """Returns the last token before which one can cut within ``limit`` characters; 0 if none."""
    cuts = _clean_cuts(offsets_n2)
    cuts = cuts[offsets_n2[cuts - 1, 1] <= limit]
    return int(cuts[-1]) if len(cuts) else 0


def load(name: str) -> Tokenizer:
    """Loads the tokenizer of a file or of a Hub id.

    Raises:
      UserError: if it does not exist, cannot be reached, or is damaged.
    """
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_dir():
        raise UserError(f'data.tokenizer="{name}": the folder has no {FILE_NAME}')
    if path.is_file():
        return from_file(name, path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(".json"):
        raise UserError(f'data.tokenizer="{name}": there is no such file or folder')
    return from_file(name, hub_access.tokenizer_file(name, FILE_NAME, _CONFIG_NAME))


def from_file(name: str, path: pathlib.Path) -> Tokenizer:
    """Loads the tokenizer of a file, such as the one in a checkpoint.

    Raises:
      UserError: if it cannot be read, or the library that reads it is missing.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we have processes of our own
    tokenizers = need("tokenizers", "tokenizers")
    end = _named_end(path.with_name(_CONFIG_NAME))
    try:
        source = chat_opening.remove(path.read_bytes())
        encoding = tokenizers.Tokenizer.from_str(source.decode("utf-8"))
        remark, record = "", json.loads(source)
        if rate := record["model"].get("dropout"):
            record["model"]["dropout"] = None
            source = json.dumps(record, ensure_ascii=False).encode()
            encoding = tokenizers.Tokenizer.from_str(source.decode("utf-8"))
            remark = (
                f"the tokenizer {name} has a BPE dropout of {rate}, which is disabled: the same "
                "text always gives the same tokens"
            )
        return _Json(name, encoding, source, end, remark)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises Exception itself, and panics beside it
        raise UserError(
            f'data.tokenizer="{name}": {path} cannot be used: {first_line(error)}'
        ) from error


def _named_end(path: pathlib.Path) -> str | None:
    """Returns the ``eos_token`` of a ``tokenizer_config.json``; None where neither is there.

    Raises:
      UserError: if it cannot be read: with another separator it would be another tokenizer.
    """
    try:
        end = json.loads(path.read_text("utf-8-sig")).get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if end is not None and not isinstance(end, str):
            raise ValueError(f"eos_token is {end!r}")
        return end or None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {first_line(error)}; repair or remove it"
        ) from error


def _usual_end(encoding: Any) -> str:
    special = {token.content for token in encoding.get_added_tokens_decoder().values()}
    return next((end for end in _USUAL_ENDS if end in special), _USUAL_ENDS[0])


def _make_plain(encoding: Any) -> None:
    """Disables what is not encoding: special tokens in texts, truncation, padding."""
    encoding.encode_special_tokens = True
    encoding.no_truncation()
    encoding.no_padding()


def _pieces(encoding: Any, record: dict[str, Any], special: set[int]) -> list[bytes]:
    """Returns each token's bytes as the decoder would give them inside a text."""
    contents = {token: word for word, token in encoding.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token["content"] for token in record["added_tokens"]}
    kinds = _kinds(record.get("decoder"))
    exact: Callable[[str], bytes | None] = lambda word: None
    if "ByteLevel" in kinds:
        exact = _byte_level
    elif "ByteFallback" in kinds:
        exact = _byte_fallback
    pieces = [b""] * (max(contents) + 1)
    unsure = []
    for token, word in contents.items():
        if token in special:
            continue
        piece = added[token].encode() if token in added else exact(word)
        if piece is None:
            unsure.append(token)
        else:
            pieces[token] = piece
    # After another token, since a decoder may treat the first token of a text specially.
    first = next((token for token in sorted(unsure) if encoding.decode([token]).strip()), None)
    before = [] if first is None else [first]
    prefix = encoding.decode(before)
    texts = encoding.decode_batch([[*before, token] for token in unsure])
    for token, text in zip(unsure, texts, strict=True):
        pieces[token] = text.removeprefix(prefix).encode()
    return pieces


def _kinds(decoder: dict[str, Any] | None) -> Sequence[str]:
    """Returns the types of a decoder and of those it consists of."""
    if decoder is None:
        return ()
    inner = [kind for one in decoder.get("decoders", ()) for kind in _kinds(one)]
    return (decoder["type"], *inner)


def _byte_fallback(word: str) -> bytes | None:
    """``<0x0A>`` stands for a byte; all others for text."""
    return bytes([int(word[3:5], 16)]) if _BYTE_WORD.fullmatch(word) else None


def _byte_level(word: str) -> bytes | None:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others from U+0100 on."""
    try:
        return bytes(_BYTE_OF[character] for character in word)
    except KeyError:
        return None  # an ordinary word that was put into the vocabulary by hand


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _alphabet()
