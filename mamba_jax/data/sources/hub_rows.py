"""Common parts of datasets on disk and streamed ones: split, columns, documents from rows."""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mamba_jax.data.document import Piece
from mamba_jax.data.sources.hub_access import (
    PARQUET_COPY,
    LoadingScript,
    library_errors,
    without_script,
)
from mamba_jax.data.sources.readers import VERSION, note, pieces_of_document
from mamba_jax.data.sources.records import document_of, document_of_columns, gathered, usual_columns
from mamba_jax.data.summary import DataSummary
from mamba_jax.errors import UserError, did_you_mean

_USUAL_CONFIG = "main"
PART_ROWS = 10_000  # cached as a whole
ROWS_AT_A_TIME = 1_000  # reading a table row by row is ten times slower


def load_library() -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def open_builder(datasets: Any, name: str, config: str, log: Callable[[str], None]) -> Any:
    """Returns the library's builder of one configuration.

    For a loading script it uses the parquet copy that the Hub made.
    """
    try:
        with library_errors(name):
            return _builder(datasets, name, config, None, log)
    except LoadingScript:
        if os.path.isdir(name):
            raise UserError(without_script(name)) from None
    log(f"dataset {name} is a loading script, which is not supported: using the Hub's parquet copy")
    try:
        return _builder(datasets, name, config, PARQUET_COPY, log)
    except FileNotFoundError as error:  # no such branch
        raise UserError(without_script(name)) from error


def _builder(
    datasets: Any, name: str, config: str, revision: str | None, log: Callable[[str], None]
) -> Any:
    """If there are several configurations and none was named, uses the one called "default" (as
    the library does) or "main"."""
    try:
        return datasets.load_dataset_builder(name, config or None, revision=revision)
    except ValueError as error:
        choices = datasets.get_dataset_config_names(name, revision=revision)
        if config or len(choices) < 2:
            if config in choices:
                raise
            raise UserError(
                f'dataset {name} has no configuration "{config}"{did_you_mean(config, choices)} '
                f"(choices: {', '.join(choices)})"
            ) from error
    if _USUAL_CONFIG not in choices:
        raise UserError(
            f"dataset {name} has several configurations; choose one with --dataset_config: "
            + ", ".join(choices)
        )
    log(f"dataset {name} has configurations {', '.join(choices)}: using {_USUAL_CONFIG}")
    return datasets.load_dataset_builder(name, _USUAL_CONFIG, revision=revision)


def choose_split(name: str, split: str, known: Sequence[str], log: Callable[[str], None]) -> str:
    """Returns an existing split, slices such as ``train[:10%]+test`` included.

    If there is no "train", uses the first split whose name begins with it, such as "train_sft".
    """
    if not known:
        return split
    chosen = []
    for part in split.split("+"):
        base = re.split(r"[\[(]", part)[0].strip()
        if base in (*known, "all"):
            chosen.append(part)
            continue
        alike = [other for other in known if base == "train" and other.startswith("train")]
        if not alike:
            raise UserError(
                f'dataset {name} has no split "{base}"{did_you_mean(base, known)} '
                f"(choices: {', '.join(known)}); give one with --dataset_split"
            )
        log(f"dataset {name} has no split train: using {alike[0]} (of {', '.join(known)})")
        chosen.append(part.replace(base, alike[0], 1))
    return "+".join(chosen)


def named_columns(wanted: str) -> tuple[str, ...]:
    """Returns the columns that ``data.text_column`` names."""
    return tuple(column.strip() for column in wanted.split(",") if column.strip())


def choose_columns(
    name: str, wanted: str, features: Any, log: Callable[[str], None]
) -> tuple[str, ...]:
    """Returns the columns that the user named, else those that the forms of records can need."""
    columns = named_columns(wanted)
    there = ", ".join(features)
    for column in columns:
        if column not in features:
            near = did_you_mean(column, features)
            raise UserError(f'dataset {name} has no column "{column}"{near} (it has: {there})')
    if columns:
        return columns
    usual, read = usual_columns(features.arrow_schema)
    if not usual:
        raise UserError(
            f"dataset {name} has no column text; name its text columns with --text_column, "
            f"separated by commas (it has: {there})"
        )
    if usual != ("text",):
        log(f"dataset {name} has no column text: using {', '.join(usual)} (of {there})")
    return read


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """Where rows come from, and how their text is read.

    Attributes:
      origin: of the rows, for messages.
      identity: hash of the split's content; changes whenever a row may have changed.
      columns: to read.
      named: whether the user named them, in the order of the text; otherwise a row is a record.
    """

    origin: str
    identity: str
    columns: tuple[str, ...]
    named: bool

    def part_name(self, start: int, stop: int) -> str:
        return f"{self.origin}, rows {start:,} to {stop:,}"

    def part_key(self, start: int, stop: int) -> str:
        """Returns the hash of the content of rows and of how they are read."""
        words = ["rows", VERSION, self.identity, *self.columns, self.named, str(start), str(stop)]
        return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()

    def pieces(
        self, batches: Iterator[dict[str, list]], row: int, summary: DataSummary
    ) -> Iterator[Piece]:
        """Yields the documents of rows.

        Args:
          batches: of the columns.
          row: number of the first row.
          summary: counts what was skipped.
        """
        columns, named = self.columns, self.named
        rows = (
            dict(zip(columns, values, strict=True))
            for batch in batches
            for values in zip(*(batch[column] for column in columns), strict=True)
        )
        for number, record in enumerate(rows if named else gathered(rows), row):
            document = document_of_columns(record, columns) if named else document_of(record)
            where = f"{self.origin} row {number}"
            if note(document, where, summary):
                summary.rows += 1
                yield from pieces_of_document(document.segments)
            elif not document.skip:
                summary.skip("row without text", where)
