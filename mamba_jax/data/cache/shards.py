"""Shards of tokens: written to a temporary folder, renamed when complete, opened lazily.

A shard is a folder with ``tokens.bin`` (uint16 if the vocabulary fits, else uint32), ``index.npz``
(its documents), ``meta.json`` (its parts, sizes and hashes; the second line is the hash of the
first), and, if some token is not a target under ``data.loss_on="answer"``, the loss mask
``learn.bin`` (uint8, one byte per token). A document is stored as ``<separator> tokens``.
Shapes: t tokens of a shard, d its documents.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import xxhash

from mamba_jax.data.document import CorpusPart
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError
from mamba_jax.files import fsync

_BLOCK_BYTES = 1 << 20  # hashed as a whole
_ABANDONED_SECS = 3_600


@dataclasses.dataclass(frozen=True)
class Entry:
    """A part in a shard.

    Attributes:
      first, count: its documents in the shard.
      summary: the result of reading it.
      name: the part's name when it was tokenised.
    """

    first: int
    count: int
    summary: DataSummary
    name: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard; its arrays are mapped or read on demand."""

    folder: pathlib.Path
    meta: dict[str, Any]

    @property
    def token_count(self) -> int:
        return self.meta["tokens"]

    @property
    def keys(self) -> Iterable[str]:
        """The keys of its parts."""
        return self.meta["parts"]

    def entry(self, key: str) -> Entry:
        first, count, summary, name = self.meta["parts"][key]
        return Entry(first, count, DataSummary.from_json(summary), name)

    def tokens(self) -> np.ndarray:
        """Returns uint16 or uint32 (t,), mapped."""
        return _map(self.folder / "tokens.bin", self.meta["dtype"])

    def loss_mask(self) -> np.ndarray | None:
        """Returns uint8 (t,), mapped: 1 where a token is a target; None: everywhere."""
        has_mask = "learn.bin" in self.meta["files"]
        return _map(self.folder / "learn.bin", "uint8") if has_mask else None

    def documents(self) -> dict[str, np.ndarray]:
        """Returns ``start_d`` (of the separators), ``end_d``, ``bytes_d``: int64; ``digest_dk`` of
        the text and ``lines_dk`` of its lines (``_Lines``): uint8 (d, 16)."""
        with np.load(self.folder / "index.npz") as arrays:
            index = dict(arrays)
        # Shards of earlier versions have only the hash of the text.
        return {"lines_dk": index["digest_dk"]} | index

    def damage(self, blocks: int) -> str:
        """Returns what is wrong with the shard; "" if nothing is.

        Checks all sizes, the hash of the index, and the hashes of ``blocks`` evenly spread blocks
        of tokens, so that opening a large corpus takes milliseconds.
        """
        try:
            for name, size in self.meta["files"].items():
                if (self.folder / name).stat().st_size != size:
                    return f"{name} differs in size from what was written"
            hashes = self.meta["hashes"]
            chosen = {i * (len(hashes) - 1) // max(blocks - 1, 1) for i in range(blocks)}
            chosen = chosen if hashes else set()
            with open(self.folder / "tokens.bin", "rb") as file:
                for block in chosen:
                    file.seek(block * _BLOCK_BYTES)
                    if xxhash.xxh3_64_hexdigest(file.read(_BLOCK_BYTES)) != hashes[block]:
                        return f"block {block} of tokens.bin has a wrong hash"
            index = (self.folder / "index.npz").read_bytes()
            if xxhash.xxh3_64_hexdigest(index) != self.meta["index_hash"]:
                return "index.npz has a wrong hash"
        except FileNotFoundError as error:
            return f"{pathlib.Path(error.filename).name} is missing"
        return ""


def open_shards(root: pathlib.Path, log: Callable[[str], None]) -> list[Shard]:
    """Returns the complete shards in a folder, in the order of their names.

    A shard whose ``meta.json`` cannot be read is reported and removed.
    """
    shards = []
    for folder in sorted(root.glob("[!.]*")) if root.is_dir() else ():
        try:
            text, _, found = (folder / "meta.json").read_bytes().partition(b"\n")
            if xxhash.xxh3_64_hexdigest(text).encode() != found:
                raise ValueError
            shards.append(Shard(folder, json.loads(text)))
        except FileNotFoundError as error:
            if folder.is_dir():
                remove_damaged(folder, f"{pathlib.Path(error.filename).name} is missing", log)
        except ValueError:
            remove_damaged(folder, "meta.json has a wrong hash", log)
    return shards


def remove_damaged(folder: pathlib.Path, why: str, log: Callable[[str], None]) -> None:
    """Reports and removes a damaged shard."""
    log(f"the token cache {folder} is damaged ({why}): tokenising again")
    shutil.rmtree(folder, ignore_errors=True)


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    """Maps a file for random access.

    Without ``madvise`` the kernel reads ahead: 60 times the bytes that the windows need.
    """
    if not path.stat().st_size:  # the parts of the shard have no text
        return np.zeros(0, dtype)
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


class _Lines:
    """Hashes the lines of a document; CRLF, CR and LF are equal, final line ends are ignored."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)
        self._ends = io.IncrementalNewlineDecoder(None, translate=True)
        self._held = 0  # line ends that are hashed only if more text follows

    def update(self, text: str) -> None:
        self._add(self._ends.decode(text))

    def _add(self, text: str) -> None:
        if lines := text.rstrip("\n"):
            self._digest.update(b"\n" * self._held)
            self._digest.update(lines.encode("utf-8", "surrogatepass"))
            self._held = 0
        self._held += len(text) - len(lines)

    def digest(self) -> bytes:
        self._add(self._ends.decode("", final=True))
        return self._digest.digest()


class Builder:
    """Writes one shard, part by part; a context manager that leaves nothing half-written."""

    def __init__(self, root: pathlib.Path, tokenizer: Tokenizer):
        """Creates the folder ``root`` if it is missing.

        Raises:
          OSError: if it cannot be written.
        """
        root.mkdir(parents=True, exist_ok=True)
        self._root, self._tokenizer = root, tokenizer
        self._aside = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=root))
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self._eot = self._dtype.type(tokenizer.eot_id).tobytes()
        self._tokens = open(self._aside / "tokens.bin", "wb")  # noqa: SIM115  # closed by __exit__
        self._loss_mask_file: Any = None  # opened at the first token that is not a target
        self._parts: dict[str, tuple[int, int, dict[str, Any], str]] = {}
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._bytes: list[int] = []
        self._digests: list[bytes] = []
        self._lines: list[bytes] = []
        self._position = 0
        self.text_bytes = 0  # of all documents

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_: object) -> None:
        # On a full disk, closing fails again; the first error was raised already.
        for file in (self._tokens, self._loss_mask_file):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        shutil.rmtree(self._aside, ignore_errors=True)

    def add(self, part: CorpusPart, key: str, progress: Callable[[int], None]) -> None:
        """Tokenises a part.

        Args:
          part: to read.
          key: the key of its content.
          progress: called with the number of UTF-8 bytes of each finished piece.

        Raises:
          OSError: if the disk is full.
          UserError: if the part changed while it was read.
        """
        first, summary, digest, lines = len(self._starts), DataSummary(""), None, _Lines()
        encoder, is_target = self._tokenizer.document_encoder(), True
        for piece in part.pieces(summary):
            if piece.begins or piece.is_target != is_target:
                self._write_tokens(encoder.cut(), is_target)
                is_target = piece.is_target
            if piece.begins:
                self._end_document(digest, lines)
                encoder = self._tokenizer.document_encoder()
                digest, lines = hashlib.blake2b(digest_size=16), _Lines()
                self._starts.append(self._position)
                self._bytes.append(0)
                self._write(self._eot, 1, True)
            assert digest is not None, f"{part.name}: its first piece does not begin a document"
            encoded = piece.text.encode("utf-8", "surrogatepass")
            digest.update(encoded)
            lines.update(piece.text)
            self._bytes[-1] += len(encoded)
            self._write_tokens(encoder.push(piece.text), is_target)
            self.text_bytes += len(encoded)
            progress(len(encoded))
        self._write_tokens(encoder.cut(), is_target)
        self._end_document(digest, lines)
        if part.key() != key:
            raise UserError(f"{part.name} changed while it was being read; run the command again")
        count = len(self._starts) - first
        self._parts[key] = (first, count, summary.to_json(), part.name)

    def _end_document(self, digest: Any, lines: "_Lines") -> None:
        if digest is not None:
            self._ends.append(self._position)
            self._digests.append(digest.digest())
            self._lines.append(lines.digest())

    def _write_tokens(self, tokens: np.ndarray, is_target: bool) -> None:
        self._write(tokens.astype(self._dtype).tobytes(), len(tokens), is_target)

    def _write(self, data: bytes, count: int, is_target: bool) -> None:
        if not is_target and self._loss_mask_file is None:
            self._loss_mask_file = open(self._aside / "learn.bin", "wb")  # noqa: SIM115
            for start in range(0, self._position, _BLOCK_BYTES):
                self._loss_mask_file.write(b"\1" * min(_BLOCK_BYTES, self._position - start))
        if self._loss_mask_file is not None:
            self._loss_mask_file.write((b"\1" if is_target else b"\0") * count)
        self._tokens.write(data)
        self._position += count

    def seal(self) -> pathlib.Path:
        """Makes the shard visible and returns its folder, which is named by its content.

        If two builders have the same content, the first to finish wins.

        Raises:
          OSError: if the disk is full.
        """
        self._tokens.close()
        if self._loss_mask_file is not None:
            self._loss_mask_file.close()
        columns = {
            "start_d": np.array(self._starts, np.int64),
            "end_d": np.array(self._ends, np.int64),
            "bytes_d": np.array(self._bytes, np.int64),
            "digest_dk": np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, 16),
            "lines_dk": np.frombuffer(b"".join(self._lines), np.uint8).reshape(-1, 16),
        }
        np.savez(self._aside / "index.npz", **columns)
        index_hash = xxhash.xxh3_64_hexdigest((self._aside / "index.npz").read_bytes())
        hashes = []
        with open(self._aside / "tokens.bin", "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                hashes.append(xxhash.xxh3_64_hexdigest(block))
        meta = {
            "tokenizer": self._tokenizer.name,
            "dtype": self._dtype.name,
            "tokens": self._position,
            "files": {path.name: path.stat().st_size for path in self._aside.iterdir()},
            "hashes": hashes,
            "index_hash": index_hash,
            "parts": self._parts,
        }
        text = json.dumps(meta)
        text_hash = xxhash.xxh3_64_hexdigest(text.encode())
        (self._aside / "meta.json").write_text(f"{text}\n{text_hash}")
        for path in (*self._aside.iterdir(), self._aside):
            fsync(path)  # a rename must never outlive its content
        os.chmod(self._aside, 0o755)  # mkdtemp's 0700 would lock out others who share the cache
        name = hashlib.blake2b("\n".join(self._parts).encode(), digest_size=12).hexdigest()
        folder = self._root / name
        try:
            os.rename(self._aside, folder)
        except OSError:
            if not folder.exists():
                raise
            # Another run finished first; its folder has the same content.
        return folder


def remove_abandoned(root: pathlib.Path) -> None:
    """Removes the unfinished folders of killed builds, which no process has written to lately."""
    for aside in root.glob(".*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (aside, *aside.iterdir()))
            if time.time() - newest > _ABANDONED_SECS:
                shutil.rmtree(aside)
