"""From a file's bytes to its text, a megabyte at a time: compression, encoding, binary files.

A file is read twice. The first pass (``probe``) determines what it is and whether all of it can be
read, so that a file that is cut off in its last line is skipped as a whole. The second pass yields
the text. Both take a fraction of the time of tokenising.
"""

import codecs
import dataclasses
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any

COMPRESSED = (".gz", ".zst")
_BLOCK_BYTES = 1 << 20
_PROBE_BYTES = 8_192  # of a file's start decide whether it is binary
_MOST_CONTROL_SHARE = 0.01  # compressed data has about 10% control characters, text has none
# A compressed file that expands more is not ordinary text, which compresses 3 to 50 times.
_MOST_BYTES_UNASKED, _MOST_EXPANSION = 1 << 28, 200
_BOMS = (  # UTF-32's begins with UTF-16's, so it comes first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Skip(Exception):
    """A file is skipped.

    Attributes:
      reason: in a few words, the same for all files with this fault.
      line: the line of the fault, from 1; 0 if there is none.
    """

    def __init__(self, reason: str, line: int = 0):
        super().__init__(reason)
        self.reason = reason
        self.line = line


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How to decode a file.

    Attributes:
      name: the codec's.
      bom_bytes: length of the byte order mark before the text.
      warning: why the text may differ from what was written; "" if it does not.
    """

    name: str
    bom_bytes: int = 0
    warning: str = ""


def split_extension(path: str) -> tuple[str, str]:
    """Returns (".jsonl", ".gz") of ``a.JSONL.gz``; the second is "" if it is not compressed."""
    stem, extension = os.path.splitext(path.lower())
    if extension in COMPRESSED:
        return os.path.splitext(stem)[1], extension
    return extension, ""


def probe(path: str) -> Encoding:
    """Reads a file to its end and says how to decode it.

    Raises:
      Skip: if it holds no text, or cannot be read to its end.
    """
    blocks = _blocks(path)
    first = next(blocks, b"")
    for bom, name in _BOMS:
        if first.startswith(bom):
            census = _Census(name, first[len(bom) :])
            census.read(blocks)
            warning = f"damaged {name.upper()}, bad parts replaced" if census.damaged else ""
            return Encoding(name, len(bom), warning)
    head = first[:_PROBE_BYTES]
    if b"\0" in head:
        raise Skip("binary")
    census = _Census("utf-8", first)
    try:
        census.read(blocks)
    except Skip:
        if census.damaged and _is_noise(head):
            raise Skip("binary") from None
        raise
    if not census.damaged:
        return Encoding("utf-8")
    if _is_noise(head):
        raise Skip("binary")  # compressed data without a NUL in its first 8 KB
    if census.not_ascii > 2 * census.replaced:  # most of what is not ASCII is sound UTF-8
        return Encoding("utf-8", warning="damaged UTF-8, bad parts replaced")
    return Encoding("cp1252", warning="not UTF-8, read as cp1252")


def _is_noise(head: bytes) -> bool:
    control = sum(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in head)
    return control > _MOST_CONTROL_SHARE * len(head)


class _Census:
    """Counts the characters of a file while it is decoded block by block.

    Attributes:
      damaged: some bytes are not of this encoding.
      replaced, not_ascii: characters U+FFFD, and all above U+007F.
    """

    def __init__(self, encoding: str, first: bytes):
        self.damaged = False
        self.replaced = self.not_ascii = 0
        self._first = first
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._lenient = codecs.getincrementaldecoder(encoding)("replace")

    def read(self, blocks: Iterator[bytes]) -> None:
        """Raises Skip on white space alone."""
        empty = True
        for block in itertools.chain([self._first], blocks, [b""]):
            text = self._decode(block)
            empty = empty and not text.strip()
            self.replaced += text.count("\ufffd")
            if not text.isascii():
                self.not_ascii += len(text) - len(text.encode("ascii", "ignore"))
        if empty:
            raise Skip("empty")

    def _decode(self, block: bytes) -> str:
        # Only the end, and a file without a byte, give an empty block.
        if not self.damaged:
            state = self._decoder.getstate()
            try:
                return self._decoder.decode(block, final=not block)
            except UnicodeDecodeError:
                self.damaged = True
                self._lenient.setstate(state)
        return self._lenient.decode(block, final=not block)


def read_text(path: str, encoding: Encoding) -> Iterator[str]:
    """Yields the text of a file that was probed, about a million characters at a time."""
    decoder = codecs.getincrementaldecoder(encoding.name)("replace")
    to_drop = encoding.bom_bytes
    for block in _blocks(path):
        yield decoder.decode(block[to_drop:])
        to_drop = 0
    yield decoder.decode(b"", final=True)


def _blocks(path: str) -> Iterator[bytes]:
    """Yields a file's bytes, decompressed once: what is compressed inside stays so.

    Raises:
      Skip: if the file cannot be read, or its compression is damaged, cut off or a bomb.
    """
    compression = split_extension(path)[1]
    try:
        with open(path, "rb") as file:
            most = max(_MOST_BYTES_UNASKED, _MOST_EXPANSION * os.fstat(file.fileno()).st_size)
            stream, size = _decompressed(file, compression), 0
            while block := _read(stream, compression):
                yield block
                size += len(block)
                if compression and size > most:
                    raise Skip(f"grows more than {_MOST_EXPANSION} times when decompressed")
    except OSError as error:
        raise Skip(f"unreadable ({error.strerror or error})") from error


def _decompressed(file: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".zst":
        import pyarrow  # there anyhow, for the library datasets

        return pyarrow.CompressedInputStream(file, "zstd")
    return file


def _read(stream: Any, compression: str) -> bytes:
    try:
        return stream.read(_BLOCK_BYTES)
    except (EOFError, zlib.error, OSError) as error:
        # An errno is the disk's; a stream that does not decompress has none.
        if compression and getattr(error, "errno", None) is None:
            raise Skip(f"damaged or cut off {compression}") from error
        raise
