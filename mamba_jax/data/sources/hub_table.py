"""A dataset on disk: downloaded and built by the library, or written by ``save_to_disk``."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.config import DataConfig
from mamba_jax.data.document import Piece
from mamba_jax.data.sources.hub_access import (
    check_within_reach,
    is_folder,
    is_saved,
    library_errors,
)
from mamba_jax.data.sources.hub_rows import (
    PART_ROWS,
    ROWS_AT_A_TIME,
    SplitRows,
    choose_columns,
    choose_split,
    load_library,
    named_columns,
    open_builder,
)
from mamba_jax.data.summary import DataSummary
from mamba_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RowsPart:
    """Some thousand rows of a split on disk, cached as a whole.

    Attributes:
      rows: the split that they belong to.
      table: datasets.Dataset of the columns alone.
      start, stop: the rows.
    """

    rows: SplitRows
    table: Any
    start: int
    stop: int
    stat: None = None
    parallel: bool = True

    @property
    def size_bytes(self) -> int:
        table = self.table.data
        return table.nbytes * (self.stop - self.start) // max(len(table), 1)

    @property
    def name(self) -> str:
        return self.rows.part_name(self.start, self.stop)

    def key(self) -> str:
        return self.rows.part_key(self.start, self.stop)

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        batches = self.table.select(range(self.start, self.stop)).iter(ROWS_AT_A_TIME)
        return self.rows.pieces(batches, self.start, summary)


@dataclasses.dataclass(frozen=True)
class DatasetTable:
    """A split of a dataset, on disk."""

    rows: SplitRows
    table: Any

    @property
    def origin(self) -> str:
        return self.rows.origin

    def parts(self) -> Iterator[RowsPart]:
        for start in range(0, len(self.table), PART_ROWS):
            yield RowsPart(self.rows, self.table, start, min(start + PART_ROWS, len(self.table)))


def open_table(config: DataConfig, log: Callable[[str], None]) -> DatasetTable:
    """Finds the split and the columns that ``config`` names; downloads what is not in the cache.

    Raises:
      UserError: if the dataset is not available, or has no such configuration, split or column.
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
        named = bool(named_columns(config.text_column))
        rows = SplitRows(f"dataset {name}, split {split}", identity, columns, named)
        return DatasetTable(rows, table.select_columns(list(columns)))


def _prepared(
    datasets: Any, name: str, config: DataConfig, log: Callable[[str], None]
) -> tuple[str, str, Any]:
    builder = open_builder(datasets, name, config.dataset_config, log)
    split = choose_split(name, config.dataset_split, list(builder.info.splits or ()), log)
    builder.download_and_prepare()
    split = choose_split(name, split, list(builder.info.splits or ()), log)
    table = builder.as_dataset(split=split)
    return table._fingerprint, split, table


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
