"""From a file to pieces of documents: the door to ``decode``, ``json_records`` and ``records``."""

import contextlib
import os
from collections.abc import Iterable, Iterator

from mamba_jax.data.decode import Skip, probe, read_text, split_extension
from mamba_jax.data.document import Piece
from mamba_jax.data.json_records import read_values
from mamba_jax.data.records import (
    TEMPLATE,
    Parts,
    columns_with_strings,
    is_blank,
    parts_of_record,
    parts_of_row,
    usual_columns,
)
from mamba_jax.data.summary import Summary, shown
from mamba_jax.data.text_cuts import cut_text
from mamba_jax.errors import UserError

# Raise it whenever the same file would give other pieces.
VERSION = f"3 {TEMPLATE}"
_TEXT, _JSON = (".txt", ".py", ".md"), (".json", ".jsonl")
EXTENSIONS = (*_TEXT, *_JSON, ".parquet")
_ROWS_AT_A_TIME = 1_000
_MOST_HELD_CHARACTERS = 1 << 21


def is_readable(path: str) -> bool:
    """Says whether a file's name is one of those that ``pieces`` reads."""
    extension, compression = split_extension(path)
    return extension in (EXTENSIONS if not compression else (*_TEXT, *_JSON))


def pieces(path: str, summary: Summary) -> Iterator[Piece]:
    """Yields the documents of a file in pieces; none, and a line in the summary, if it has no text.

    Plain text is one document; JSON is one per record, parquet one per row.

    Raises:
      UserError: if the file changed between the reading that examined it and this one.
    """
    begun = False
    try:
        for piece in _pieces(path, summary):
            begun = True
            yield piece
    except Skip as skip:
        if begun:
            raise UserError(f"{shown(path)} changed while it was read; start again") from skip
        size_bytes = 0
        with contextlib.suppress(OSError):
            size_bytes = os.path.getsize(path)
        summary.skip(skip.reason, f"{path}:{skip.line}" if skip.line else path, size_bytes)
    summary.files += begun


def _pieces(path: str, summary: Summary) -> Iterator[Piece]:
    extension = split_extension(path)[0]
    if extension == ".parquet":
        yield from _pieces_of(_parquet(path), "parquet without text")
        return
    encoding = probe(path)
    open_text = lambda: read_text(path, encoding)
    if extension in _JSON:
        documents = map(parts_of_record, read_values(open_text))
        yield from _pieces_of(documents, "JSON without text")
    else:
        yield from _cut(open_text(), begins=True, learn=True)
    if encoding.doubt:
        summary.repair(encoding.doubt, path)


def _pieces_of(documents: Iterable[Parts], reason_if_none: str) -> Iterator[Piece]:
    """Yields documents in pieces, without the blank ones.

    Raises:
      Skip: if that leaves none.
    """
    empty = True
    for parts in documents:
        if is_blank(parts):
            continue
        empty = False
        yield from pieces_of_document(parts)
    if empty:
        raise Skip(reason_if_none)


def pieces_of_document(parts: Parts) -> Iterator[Piece]:
    """Yields one document, cut where ``learn`` changes and where it is long."""
    for number, (text, learn) in enumerate(parts):
        yield from _cut([text], begins=number == 0, learn=learn)


def _cut(texts: Iterable[str], begins: bool, learn: bool) -> Iterator[Piece]:
    """Cuts a text where the tokens of the pieces are the tokens of the whole."""
    rest = ""
    for text in texts:
        rest += text
        if len(rest) > _MOST_HELD_CHARACTERS:
            *whole, rest = cut_text(rest)
            for piece in whole:
                yield Piece(piece, begins, learn)
                begins = False
    for piece in cut_text(rest):
        yield Piece(piece, begins, learn)
        begins = False


def _parquet(path: str) -> Iterator[Parts]:
    """Yields the rows of a file; its columns are chosen as those of a dataset."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open(path, "rb") as data, parquet.ParquetFile(data) as file:
            usual = usual_columns(file.schema_arrow)
            columns = list(usual) or columns_with_strings(file.schema_arrow)
            read = lambda: file.iter_batches(_ROWS_AT_A_TIME, columns=columns)
            for batch in read():
                batch.validate(full=True)  # that its strings are UTF-8
            for batch in read():
                for row in batch.to_pylist():
                    yield parts_of_row(row, usual) if usual else parts_of_record(row)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise Skip(f"unreadable ({error.strerror})") from error
        raise Skip("damaged parquet") from error
