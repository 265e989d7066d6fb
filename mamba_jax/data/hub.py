"""From a dataset of the Hugging Face Hub, or a folder laid out like one, to documents: one a row.

Everything goes through the library ``datasets``, imported when it is needed: it takes seconds.
``data.hub_stream`` takes the rows as they arrive; here the split lies on disk first.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mamba_jax.config import DataConfig
from mamba_jax.data.document import Piece
from mamba_jax.data.hub_access import (
    PARQUET_COPY,
    LoadingScript,
    check_within_reach,
    is_folder,
    library_errors,
    without_script,
)
from mamba_jax.data.readers import VERSION, pieces_of_document
from mamba_jax.data.records import is_blank, parts_of_row, usual_columns
from mamba_jax.data.sources import Summary
from mamba_jax.errors import UserError, did_you_mean

_USUAL_CONFIG = "main"
PART_ROWS = 10_000
ROWS_AT_A_TIME = 1_000  # read row by row a table is ten times slower


@dataclasses.dataclass(frozen=True)
class RowsPart:
    """Some thousand rows of a split on disk, cached as a whole.

    Attributes:
      name: for people.
      origin: of the split they belong to.
      identity: hash of the split's content; changes whenever a row may have changed.
      table: datasets.Dataset of the columns alone.
      columns: joined in this order.
      start, stop: the rows.
    """

    origin: str
    identity: str
    table: Any
    columns: tuple[str, ...]
    start: int
    stop: int
    stat: None = None

    @property
    def name(self) -> str:
        return f"{self.origin}, rows {self.start:,} to {self.stop:,}"

    def key(self) -> str:
        return part_key(self.identity, self.columns, self.start, self.stop)

    def pieces(self, summary: Summary) -> Iterator[Piece]:
        rows = self.table.select(range(self.start, self.stop)).iter(ROWS_AT_A_TIME)
        return pieces_of_batches(rows, self.columns, self.origin, self.start, summary)


def part_key(identity: str, columns: Sequence[str], start: int, stop: int) -> str:
    """Returns the hash of what rows hold and of how they are read."""
    words = ["rows", VERSION, identity, *columns, str(start), str(stop)]
    return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()


def pieces_of_batches(
    batches: Iterator[dict[str, list]],
    columns: Sequence[str],
    origin: str,
    row: int,
    summary: Summary,
) -> Iterator[Piece]:
    """Yields the documents of rows, the first of which has number ``row``."""
    for batch in batches:
        for values in zip(*(batch[column] for column in columns), strict=True):
            parts = parts_of_row(dict(zip(columns, values, strict=True)), columns)
            if is_blank(parts):
                summary.skip("row without text", f"{origin} row {row}")
            else:
                summary.rows += 1
                yield from pieces_of_document(parts)
            row += 1


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split of a dataset, on disk."""

    origin: str
    identity: str
    table: Any
    columns: tuple[str, ...]

    def parts(self) -> Iterator[RowsPart]:
        for start in range(0, len(self.table), PART_ROWS):
            stop = min(start + PART_ROWS, len(self.table))
            yield RowsPart(self.origin, self.identity, self.table, self.columns, start, stop)

    def texts(self, summary: Summary) -> Iterator[str]:
        """Yields the text of each row."""
        text = ""
        for part in self.parts():
            for piece in part.pieces(summary):
                if piece.begins and text:
                    yield text
                    text = ""
                text += piece.text
        if text:
            yield text


def open_dataset(config: DataConfig, log: Callable[[str], None]) -> Rows:
    """Finds the split and the columns that ``config`` names; downloads what is not in the cache.

    Raises:
      UserError: if the dataset cannot be had, or has no such configuration, split or column.
    """
    name = os.path.expanduser(config.dataset)
    if not is_folder(name):
        check_within_reach(name, log)
    datasets = load_library()
    with library_errors(name):
        if is_saved(name):
            identity, split, table = _saved(datasets, name, config, log)
        else:
            identity, split, table = _prepared(datasets, name, config, log)
        columns = choose_columns(name, config.text_column, table.features, log)
        return Rows(
            f"dataset {name}, split {split}", identity, table.select_columns(columns), columns
        )


def load_library() -> Any:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _prepared(
    datasets: Any, name: str, config: DataConfig, log: Callable[[str], None]
) -> tuple[str, str, Any]:
    builder = open_builder(datasets, name, config.dataset_config, log)
    split = choose_split(name, config.dataset_split, list(builder.info.splits or ()), log)
    builder.download_and_prepare()
    split = choose_split(name, split, list(builder.info.splits or ()), log)
    table = builder.as_dataset(split=split)
    return table._fingerprint, split, table


def is_saved(name: str) -> bool:
    """Says whether a folder is one that ``save_to_disk`` wrote."""
    has = lambda file: os.path.isfile(os.path.join(name, file))
    return has("dataset_dict.json") or (has("dataset_info.json") and has("state.json"))


def _saved(
    datasets: Any, name: str, config: DataConfig, log: Callable[[str], None]
) -> tuple[str, str, Any]:
    """Opens a folder that ``save_to_disk`` wrote."""
    if config.dataset_config:
        raise UserError(
            f"dataset {name} was written by save_to_disk and has no configurations: leave out "
            f'--dataset_config "{config.dataset_config}"'
        )
    loaded = datasets.load_from_disk(name)
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    split = choose_split(name, config.dataset_split, list(loaded), log)
    lengths = {key: len(table) for key, table in loaded.items()}
    instructions = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    tables = [loaded[part.splitname].select(range(part.from_, part.to)) for part in instructions]
    # The library keeps a fingerprint, but not of files that were changed by hand.
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(pathlib.Path(name).rglob("*"))
    ]
    identity = hashlib.blake2b(repr((split, files)).encode(), digest_size=16).hexdigest()
    return identity, split, datasets.concatenate_datasets(tables)


def open_builder(datasets: Any, name: str, config: str, log: Callable[[str], None]) -> Any:
    """Returns the library's builder of one configuration.

    Of a loading script it takes the parquet copy that the Hub made.
    """
    try:
        with library_errors(name):
            return _builder(datasets, name, config, None, log)
    except LoadingScript:
        if os.path.isdir(name):
            raise UserError(without_script(name)) from None
    log(
        f"dataset {name} is a loading script, which is not run: taking the Hub's parquet copy of it"
    )
    try:
        return _builder(datasets, name, config, PARQUET_COPY, log)
    except FileNotFoundError as error:  # no such branch
        raise UserError(without_script(name)) from error


def _builder(
    datasets: Any, name: str, config: str, revision: str | None, log: Callable[[str], None]
) -> Any:
    """Where there are several and none was named, it takes the one called "default" (the library
    does that by itself) or "main"."""
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
            f"dataset {name} has several configurations; choose one by --dataset_config: "
            + ", ".join(choices)
        )
    log(f"dataset {name} has configurations {', '.join(choices)}: taking {_USUAL_CONFIG}")
    return datasets.load_dataset_builder(name, _USUAL_CONFIG, revision=revision)


def choose_split(name: str, split: str, known: Sequence[str], log: Callable[[str], None]) -> str:
    """Returns a split that is there, slices such as ``train[:10%]+test`` included.

    Where there is no "train", it takes the first whose name begins so, such as "train_sft".
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
                f"(choices: {', '.join(known)}); give one by --dataset_split"
            )
        log(f"dataset {name} has no split train: taking {alike[0]} (of {', '.join(known)})")
        chosen.append(part.replace(base, alike[0], 1))
    return "+".join(chosen)


def choose_columns(
    name: str, wanted: str, features: Any, log: Callable[[str], None]
) -> tuple[str, ...]:
    """Returns the columns that were named, else the usual ones."""
    columns = tuple(column.strip() for column in wanted.split(",") if column.strip())
    there = ", ".join(features)
    for column in columns:
        if column not in features:
            near = did_you_mean(column, features)
            raise UserError(f'dataset {name} has no column "{column}"{near} (it has: {there})')
    if columns:
        return columns
    usual = usual_columns(features.arrow_schema)
    if not usual:
        raise UserError(
            f"dataset {name} has no column text; name its columns with text by --text_column, "
            f"separated by commas (it has: {there})"
        )
    if usual != ("text",):
        log(f"dataset {name} has no column text: taking {', '.join(usual)} (of {there})")
    return usual
