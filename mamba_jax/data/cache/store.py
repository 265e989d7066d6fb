"""The token cache: each part is tokenised once, whichever corpora it belongs to.

``<cache_dir>/tokens/<tokenizer>/`` holds ``shards`` (``data.cache.shards``), each of several parts
and named by their content; ``files.json``, by which an unchanged file is recognised without reading
it; and ``plans`` (``data.windows.plan``).
There is no lock: concurrent builds write separate shards, and equal content has equal names. A
killed build loses only the shard it was writing.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mamba_jax.data.cache.shards import (
    Builder,
    Entry,
    Shard,
    open_shards,
    remove_abandoned,
    remove_damaged,
)
from mamba_jax.data.cache.workers import SHARD_BYTES, build_shards
from mamba_jax.data.document import CorpusPart
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.files import write_atomic

# Increase it whenever the same parts would give different files, or the files a different meaning.
_FORMAT = 2
_CHECKED_BLOCKS = 64  # of 1 MiB, over all shards of a corpus
_SETTLED_SECS = 2.0  # a file changed more recently may change again without a new time


class Flat:
    """Several arrays as one: positions count through them in order."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = list(arrays)
        self._offsets = [0, *np.cumsum([len(array) for array in arrays]).tolist()]

    def __len__(self) -> int:
        return self._offsets[-1]

    def __getitem__(self, stretch: slice) -> np.ndarray:
        """Returns positions [start, stop); a view if they are in one array."""
        start, stop, _ = stretch.indices(len(self))
        first = max(bisect.bisect_right(self._offsets, start) - 1, 0)
        pieces = []
        for number in range(first, len(self._arrays)):
            base = self._offsets[number]
            if base >= stop:
                break
            pieces.append(self._arrays[number][max(start - base, 0) : stop - base])
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)

    def release_pages(self) -> None:
        """Releases the pages that were read; the system's page cache keeps them."""
        for array in self._arrays:
            mapped = getattr(array.base, "obj", None)  # numpy wraps it in a memoryview
            if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class DocumentIndex:
    """The documents of a corpus in its order. Shapes: d documents.

    Attributes:
      start_d, end_d: int64, each document with its separator, as positions of ``Store.tokens``.
      digest_dk, lines_dk: uint8 (d, 16), hashes of the text, and of its lines without their ends.
      bytes_d: int64, of the text in UTF-8.
      source_d: int64, number of the source that each comes from.
    """

    start_d: np.ndarray
    end_d: np.ndarray
    digest_dk: np.ndarray
    lines_dk: np.ndarray
    bytes_d: np.ndarray
    source_d: np.ndarray

    @property
    def token_count(self) -> int:
        """Separators included."""
        return int((self.end_d - self.start_d).sum())

    def without_duplicates(self) -> "DocumentIndex":
        """Keeps the first of equal documents; the kind of line end makes no difference."""
        kept = self
        for column in ("digest_dk", "lines_dk"):  # both: an old shard has only the first
            digests = np.ascontiguousarray(getattr(kept, column)).view("V16").ravel()
            kept = kept.chosen(np.sort(np.unique(digests, return_index=True)[1]))
        return kept

    def chosen(self, indices: np.ndarray) -> "DocumentIndex":
        columns = (getattr(self, field.name)[indices] for field in dataclasses.fields(self))
        return DocumentIndex(*columns)

    def identity(self) -> bytes:
        """Returns a hash of the contents in order, independent of their place in the cache."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.digest_dk.tobytes())
        digest.update((self.end_d - self.start_d).astype("<i8").tobytes())
        digest.update(self.source_d.astype("<i8").tobytes())
        return digest.digest()


def cache_folder(cache_root: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the tokens of all tokenizers."""
    return cache_root / "tokens"


def clear(cache_root: pathlib.Path) -> int:
    """Removes all tokens; returns how many bytes they took.

    Raises:
      OSError: if they cannot be removed.
    """
    size = size_bytes(cache_root)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(cache_folder(cache_root))
    return size


def size_bytes(cache_root: pathlib.Path) -> int:
    """Returns the disk space of all tokens."""
    total = 0
    for folder, _, files in os.walk(cache_folder(cache_root)):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_blocks * 512
    return total


class Store:
    """The cached tokens of one tokenizer."""

    def __init__(self, cache_root: pathlib.Path, tokenizer: Tokenizer, log: Callable[[str], None]):
        """Opens the shards that exist.

        Raises:
          OSError: if it cannot be read.
        """
        identity = f"{_FORMAT}\n{tokenizer.identity}".encode()
        name = pathlib.PurePath(tokenizer.name).name  # readable: the last part of a path
        name = f"{name}-{hashlib.blake2b(identity, digest_size=8).hexdigest()}"
        self.root = cache_folder(cache_root) / name
        self._shard_root = self.root / "shards"
        self._tokenizer, self._log = tokenizer, log
        self._shards: dict[str, Shard] = {}  # by name
        self._places: dict[str, str] = {}  # key of a part → name of the shard
        self._files = _read_files(self.root)
        self._new_files: dict[str, list[Any]] = {}
        self._look()

    def _look(self) -> None:
        for shard in open_shards(self._shard_root, self._log):
            self._shards[shard.folder.name] = shard
            for key in shard.keys:
                self._places.setdefault(key, shard.folder.name)

    def tokenise(self, parts: Iterable[CorpusPart], workers: int) -> list[tuple[str, str]]:
        """Tokenises the parts that are not cached; returns (key, name) of all parts in order.

        Args:
          parts: in the order of the corpus; one that is not ``parallel`` is tokenised before the
            next one is requested.
          workers: processes; 0 for one per processor, and fewer for little text.

        Raises:
          OSError: if the folder cannot be written.
          UserError: if a file changed while it was read.
        """
        taken: list[tuple[str, str]] = []
        waiting: dict[str, CorpusPart] = {}
        with contextlib.ExitStack() as stack:
            builder: Builder | None = None
            for part in parts:
                key = self._key(part)
                taken.append((key, part.name))
                if key in self._places or key in waiting:
                    continue
                if part.parallel:
                    waiting[key] = part
                    continue
                if builder is None:
                    self._begin(part.name)
                    builder = stack.enter_context(Builder(self._shard_root, self._tokenizer))
                builder.add(part, key, lambda _: None)
                if builder.text_bytes >= SHARD_BYTES:
                    builder.seal()
                    builder = None
            if builder is not None:
                builder.seal()
        if waiting:
            self._begin(f"{sum(part.size_bytes for part in waiting.values()) / 1e6:,.2f} MB")
            build_shards(self._shard_root, self._tokenizer, list(waiting.items()), workers)
        self._look()
        self._write_files()
        return taken

    def _begin(self, what: str) -> None:
        self._shard_root.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._shard_root)
        self._log(f"tokenising {what} into {self.root} (only once)")

    def _key(self, part: CorpusPart) -> str:
        stat = part.stat
        if stat is None:
            return part.key()
        path, *rest = stat
        known = self._files.get(path)
        if known and known[:-1] == rest:
            return known[-1]
        key = part.key()
        if time.time() - rest[0] / 1e9 > _SETTLED_SECS:
            self._new_files[path] = [*rest, key]
        return key

    def _write_files(self) -> None:
        """Saves the times of the files. A concurrent build can overwrite entries; those files are
        then read again."""
        if not self._new_files or not self.root.is_dir():
            return
        self._files = _read_files(self.root) | self._new_files
        self._new_files = {}
        write_best_effort(self.root / "files.json", json.dumps(self._files).encode())

    def entries(self, taken: Sequence[tuple[str, str]]) -> list[tuple[str, Entry]]:
        """Returns (name of the shard, entry) of parts, with their present paths."""
        found = []
        for key, name in taken:
            entry = self._shards[self._places[key]].entry(key)
            examples = entry.summary.examples
            for reason, paths in examples.items():
                examples[reason] = [path.replace(entry.name, name, 1) for path in paths]
            found.append((self._places[key], entry))
        return found

    def cached(self, parts: Iterable[CorpusPart]) -> tuple[int, DocumentIndex | None]:
        """Returns how many parts are cached, and their documents; tokenises nothing."""
        keys = ((self._key(part), part.name) for part in parts if self._places)
        taken = [(key, name) for key, name in keys if key in self._places]
        entries = self.entries(taken)
        names = list(dict.fromkeys(name for name, _ in entries))
        return len(taken), self.documents(entries, names) if taken else None

    def has(self, names: Sequence[str]) -> bool:
        """Returns whether the shards exist; tokens that were rebuilt can be in other shards."""
        return all(name in self._shards for name in names)

    def check(self, names: Sequence[str]) -> bool:
        """Returns whether the shards are intact; damaged ones are reported and removed."""
        sound = True
        for name in names:
            shard = self._shards.get(name)
            why = shard.damage(-(-_CHECKED_BLOCKS // len(names))) if shard else "it is missing"
            if why:
                remove_damaged(self._shard_root / name, why, self._log)
                sound = False
        return sound

    def documents(
        self,
        entries: Sequence[tuple[str, Entry]],
        names: Sequence[str],
        sources: Sequence[int] = (),
    ) -> DocumentIndex:
        """Returns the documents of parts; positions count through the named shards.

        Args:
          entries: from ``entries``.
          names: of the shards.
          sources: number of the source that each part belongs to; (): 0.
        """
        offsets, offset = {}, 0
        for name in names:
            offsets[name] = offset
            offset += self._shards[name].token_count
        indices = {name: self._shards[name].documents() for name in names}
        columns: dict[str, list[np.ndarray]] = {
            name: [] for name in ("start_d", "end_d", "digest_dk", "lines_dk", "bytes_d")
        }
        for name, entry in entries:
            for column, arrays in columns.items():
                values = indices[name][column][entry.first : entry.first + entry.count]
                at = offsets[name] if column in ("start_d", "end_d") else None
                arrays.append(values if at is None else values + at)
        counts = [entry.count for _, entry in entries]
        return DocumentIndex(
            **{column: np.concatenate(arrays) for column, arrays in columns.items()},
            source_d=np.repeat(np.array(sources or [0] * len(entries), np.int64), counts),
        )

    def tokens(self, names: Sequence[str]) -> Flat:
        """Returns the tokens of shards, mapped."""
        return Flat([self._shards[name].tokens() for name in names])

    def loss_mask(self, names: Sequence[str]) -> Flat | None:
        """Returns 1 where a token of the shards is a target; None if every token is one."""
        masks = {name: self._shards[name].loss_mask() for name in names}
        if all(mask is None for mask in masks.values()):
            return None
        whole = lambda name: np.broadcast_to(np.uint8(1), self._shards[name].token_count)
        return Flat([whole(name) if mask is None else mask for name, mask in masks.items()])


def _read_files(root: pathlib.Path) -> dict[str, list[Any]]:
    with contextlib.suppress(OSError, ValueError):
        files = json.loads((root / "files.json").read_bytes())
        return files if isinstance(files, dict) else {}
    return {}


def write_best_effort(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically, or not at all if that fails, since a cache can be read-only.

    Only for files that save time.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
