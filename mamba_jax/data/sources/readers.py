"""From a file to pieces of documents: uses ``decode``, ``json_records`` and ``records``."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from mamba_jax.data.document import Piece
from mamba_jax.data.sources.chats import Segments
from mamba_jax.data.sources.decode import Skip, probe, read_text, split_extension
from mamba_jax.data.sources.json_records import read_values
from mamba_jax.data.sources.records import (
    TEMPLATE,
    Document,
    columns_with_strings,
    document_of,
    gathered,
    usual_columns,
)
from mamba_jax.data.summary import DataSummary, shown
from mamba_jax.data.text_cuts import cut_text
from mamba_jax.errors import UserError

# Increase it whenever the same file would give different pieces.
VERSION = f"4 {TEMPLATE}"
_TEXT, _JSON = (".txt", ".py", ".md"), (".json", ".jsonl")
EXTENSIONS = (*_TEXT, *_JSON, ".parquet")
_ROWS_AT_A_TIME = 1_000
_MOST_HELD_CHARACTERS = 1 << 21


def is_readable(path: str) -> bool:
    """Returns whether ``pieces`` reads files with this name."""
    extension, compression = split_extension(path)
    return extension in (EXTENSIONS if not compression else (*_TEXT, *_JSON))


def pieces(path: str, summary: DataSummary) -> Iterator[Piece]:
    """Yields the documents of a file in pieces; if it has no text, reports that in the summary.

    Plain text is one document; JSON has one per record, parquet one per row.

    Raises:
      UserError: if the file changed between the reading that examined it and this one.
    """
    has_text = False
    try:
        for piece in _pieces(path, summary):
            has_text = True
            yield piece
    except Skip as skip:
        if has_text:
            raise UserError(
                f"{shown(path)} changed while it was being read; run the command again"
            ) from skip
        size_bytes = 0
        with contextlib.suppress(OSError):
            size_bytes = os.path.getsize(path)
        summary.skip(skip.reason, f"{path}:{skip.line}" if skip.line else path, size_bytes)
    summary.files += has_text


def _pieces(path: str, summary: DataSummary) -> Iterator[Piece]:
    extension = split_extension(path)[0]
    if extension == ".parquet":
        yield from _pieces_of(_parquet(path), path, "parquet without text", summary)
        return
    encoding = probe(path)
    open_text = lambda: read_text(path, encoding)
    if extension in _JSON:

        def lose(reason: str, line: int) -> None:
            summary.records += 1
            summary.lose(reason, f"{path}:{line}")

        values = read_values(open_text, lose)
        yield from _pieces_of(values, path, "JSON without text", summary)
    else:
        yield from _cut(open_text(), begins=True, is_target=True)
    if encoding.warning:
        summary.repair(encoding.warning, path)


def _pieces_of(
    records: Iterable[Any], path: str, reason_if_none: str, summary: DataSummary
) -> Iterator[Piece]:
    """Yields the documents of records, in pieces.

    Raises:
      Skip: if there is no document.
    """
    empty = True
    for number, record in enumerate(gathered(records), 1):
        document = document_of(record)
        taken = note(document, f"{path} record {number}", summary)
        empty = empty and not taken
        if taken:
            yield from pieces_of_document(document.segments)
    if empty:
        raise Skip(reason_if_none)


def note(document: Document, where: str, summary: DataSummary) -> bool:
    """Counts a record and its warnings; returns whether the record is used."""
    summary.records += 1
    if document.skip:
        summary.lose(document.skip, where)
    taken = not (document.skip or document.is_blank)
    for warning in document.warnings if taken else ():
        summary.repair(warning, where)
    return taken


def pieces_of_document(segments: Segments) -> Iterator[Piece]:
    """Yields one document, cut where ``is_target`` changes and where the text is long."""
    for number, (text, is_target) in enumerate(segments):
        yield from _cut([text], begins=number == 0, is_target=is_target)


def _cut(texts: Iterable[str], begins: bool, is_target: bool) -> Iterator[Piece]:
    """Cuts a text where the tokens of the pieces are the tokens of the whole."""
    rest = ""
    for text in texts:
        rest += text
        if len(rest) > _MOST_HELD_CHARACTERS:
            *whole, rest = cut_text(rest)
            for piece in whole:
                yield Piece(piece, begins, is_target)
                begins = False
    for piece in cut_text(rest):
        yield Piece(piece, begins, is_target)
        begins = False


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file, with columns chosen as for a dataset."""
    import pyarrow
    from pyarrow import parquet

    try:
        with open(path, "rb") as data, parquet.ParquetFile(data) as file:
            _, usual = usual_columns(file.schema_arrow)
            columns = list(usual) or columns_with_strings(file.schema_arrow)
            read = lambda: file.iter_batches(_ROWS_AT_A_TIME, columns=columns)
            for batch in read():
                batch.validate(full=True)  # that its strings are UTF-8
            for batch in read():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise Skip(f"unreadable ({error.strerror})") from error
        raise Skip("damaged parquet") from error
