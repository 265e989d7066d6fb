"""Documents tokenised once into a flat memory-mapped file, in a folder named by their content.

A folder ``<cache_dir>/tokens/<key>`` holds ``tokens.bin`` (uint16 where the vocabulary fits, else
uint32), ``units.npz`` and ``meta.json`` with sizes and hashes. It is written aside and renamed, so
a folder of that name is complete: a build that was killed leaves only an abandoned folder, which
a later one removes; of two builds at once the faster wins and both get the same tokens.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

from mamba_jax.data.sources import Source
from mamba_jax.data.split import Units, cut_into_units
from mamba_jax.data.summary import shown
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import UserError

# Raise it whenever the same documents would give other files, or the files another meaning.
_FORMAT = 1
_FILES = ("tokens.bin", "units.npz")
_HASHED_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
_ABANDONED_SECS = 3_600


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Tokens of a corpus: ``<eot> document <eot> document …``.

    Attributes:
      key: hash of the documents, the tokenizer and the format.
      folder: where it lies.
      tokens: uint16 or uint32 (t,), memory-mapped for reading.
      units: what the split deals out.
    """

    key: str
    folder: pathlib.Path
    tokens: np.ndarray
    units: Units


def load_or_build(
    source: Source,
    digests: Sequence[bytes],
    text_bytes: int,
    tokenizer: Tokenizer,
    cache_dir: str,
    log: Callable[[str], None],
) -> TokenCache:
    """Returns the tokens of a source, tokenising only if the cache does not have them.

    Args:
      source: gives the documents.
      digests: of its documents, in order, from ``source.read()``.
      text_bytes: of all of them, for the progress bar.
      tokenizer: makes the tokens.
      cache_dir: the root; "" for ``$XDG_CACHE_HOME/mamba_jax`` or ``~/.cache/mamba_jax``.
      log: takes lines for people.

    Raises:
      UserError: if the folder cannot be read or written, or a file changed meanwhile.
    """
    root = _root(cache_dir)
    identity = f"{_FORMAT}\n{tokenizer.identity}\n".encode()
    key = hashlib.blake2b(identity + b"".join(digests), digest_size=16).hexdigest()
    folder = root / key
    try:
        for _ in range(3):  # another run may replace a damaged folder between two looks
            cache = _open(folder, key, log)
            if cache is not None:
                return cache
            _build(folder, source, digests, text_bytes, tokenizer, log)
        raise OSError(None, "what was written there does not read back")
    except OSError as error:
        raise UserError(
            f"cannot use the token cache {shown(str(root))}: {error.strerror}; set data.cache_dir "
            "to a writable folder with enough space"
        ) from error


def _root(cache_dir: str) -> pathlib.Path:
    if not cache_dir:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        cache_dir = os.path.join(caches, "mamba_jax")
    return pathlib.Path(os.path.expanduser(cache_dir)) / "tokens"


def _open(folder: pathlib.Path, key: str, log: Callable[[str], None]) -> TokenCache | None:
    """Returns what is in ``folder``; None if it does not exist or was damaged and so removed."""
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for name in _FILES:
            if meta["files"][name] != _size_and_hash(folder / name):
                raise ValueError(f"{name} has another size or hash than when it was written")
        with np.load(folder / "units.npz") as arrays:
            units = Units(arrays["start_u"], arrays["end_u"], arrays["digest_ud"])
        return TokenCache(key, folder, _map(folder / "tokens.bin", meta["dtype"]), units)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        log(f"the token cache {shown(str(folder))} is damaged ({error}); tokenising again")
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _map(path: pathlib.Path, dtype: str) -> np.ndarray:
    """Maps a file for reading at random places.

    Without the advice the kernel reads ahead: 60 times the bytes that the windows need.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _size_and_hash(path: pathlib.Path) -> list:
    """Returns [bytes, hash]; of a file above 64 MiB, 64 blocks spread evenly are hashed.

    So opening stays a matter of milliseconds; a flipped bit elsewhere in a large file, unlike a
    missing part of it, is not noticed.
    """
    size = path.stat().st_size
    blocks = -(-size // _BLOCK_BYTES)
    chosen = range(blocks)
    if blocks > _HASHED_BLOCKS:
        chosen = [i * (blocks - 1) // (_HASHED_BLOCKS - 1) for i in range(_HASHED_BLOCKS)]
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for block in chosen:
            file.seek(block * _BLOCK_BYTES)
            digest.update(file.read(_BLOCK_BYTES))
    return [size, digest.hexdigest()]


def _build(
    folder: pathlib.Path,
    source: Source,
    digests: Sequence[bytes],
    text_bytes: int,
    tokenizer: Tokenizer,
    log: Callable[[str], None],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    log(f"tokenising {text_bytes / 1e6:,.2f} MB into {shown(str(folder))}, this once")
    aside = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        starts = _tokenise(aside / "tokens.bin", dtype, source, digests, text_bytes, tokenizer)
        units = cut_into_units(_map(aside / "tokens.bin", dtype.name), starts, tokenizer)
        np.savez(aside / "units.npz", **dataclasses.asdict(units))
        files = {name: _size_and_hash(aside / name) for name in _FILES}
        meta = {"tokenizer": tokenizer.name, "dtype": dtype.name, "files": files}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1))
        for path in (*aside.iterdir(), aside):
            _sync(path)
        os.chmod(aside, 0o755)  # mkdtemp's 0700 would shut out whom a shared cache is for
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.exists():
                raise
            # Another run was faster; its folder has the same content.
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenise(
    path: pathlib.Path,
    dtype: np.dtype,
    source: Source,
    digests: Sequence[bytes],
    text_bytes: int,
    tokenizer: Tokenizer,
) -> np.ndarray:
    """Writes all documents, each behind its marker; returns the markers' positions, int64 (n,)."""
    from tqdm import tqdm

    starts, position = [], 0
    # disable=None: no bar where standard error is not a terminal.
    bar = tqdm(total=text_bytes, desc="tokenising", unit="B", unit_scale=True, disable=None)
    with open(path, "wb") as file, bar:
        for number, (digest, text) in enumerate(source.documents()):
            if number >= len(digests) or digest != digests[number]:
                raise _changed(source)
            tokens = tokenizer.encode(text)
            file.write(dtype.type(tokenizer.eot_id).tobytes())
            file.write(tokens.astype(dtype).tobytes())
            starts.append(position)
            position += 1 + len(tokens)
            bar.update(len(text.encode("utf-8")))
    if len(starts) != len(digests):
        raise _changed(source)
    return np.array(starts, np.int64)


def _changed(source: Source) -> UserError:
    return UserError(f"files in {source.origin} changed while they were read; start again")


def _sync(path: pathlib.Path) -> None:
    """Forces a file or folder to the disk, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_abandoned(root: pathlib.Path) -> None:
    """Removes what killed builds left behind: unfinished folders that no one writes to any more."""
    for aside in root.glob(".*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (aside, *aside.iterdir()))
            if time.time() - newest > _ABANDONED_SECS:
                shutil.rmtree(aside)
