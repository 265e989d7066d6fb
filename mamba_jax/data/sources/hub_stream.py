"""The rows of a dataset as they arrive, for corpora larger than the disk.

Rows are read in order, never through a shuffle buffer, whose content a restart would lose; windows
of tokens are shuffled later. Parts of a fixed number of rows go to the token cache one by one. A
*record* beside the cache stores where in the dataset's files each part ends, so that a run after a
kill resumes after the last cached part. Earlier files are not fetched again, except for those
around that place, whose ends the library's reader can look at. Once a corpus, or the requested
slice of it, was read to its end, the record makes the Hub unnecessary.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.config import DataConfig
from mamba_jax.data.document import Piece
from mamba_jax.data.sources.hub_access import (
    is_folder,
    is_saved,
    library_errors,
    out_of_reach,
    unreachable,
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
from mamba_jax.data.sources.readers import VERSION
from mamba_jax.data.summary import DataSummary
from mamba_jax.errors import UserError
from mamba_jax.files import write_atomic

_SLICE = re.compile(r"(?P<split>[\w.-]+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclasses.dataclass
class StreamRecord:
    """What is known of a streamed split, stored as JSON lines in a file that only grows.

    Attributes:
      path: the file.
      identity: hash of the split's content; changes whenever a row may have changed.
      split: its name.
      columns: the columns with text.
      states: row → the library's state before it, for the rows at which a part ended.
      rows: number of rows of the whole split; None until its end was reached.
    """

    path: pathlib.Path
    identity: str
    split: str
    columns: tuple[str, ...]
    states: dict[int, Any] = dataclasses.field(default_factory=dict)
    rows: int | None = None

    @classmethod
    def read(cls, path: pathlib.Path) -> "StreamRecord | None":
        """Returns the record in the file; None if there is none or its first line is damaged."""
        record = None
        with contextlib.suppress(OSError, UnicodeDecodeError, KeyError, TypeError):
            for line in path.read_text().splitlines():
                entry = _entry(line)
                if record is None:
                    columns = tuple(entry["columns"])
                    record = cls(path, entry["identity"], entry["split"], columns)
                elif "rows" in entry:
                    record.rows = entry["rows"]
                elif "row" in entry:
                    record.states[entry["row"]] = entry["state"]
        return record

    def begin(self) -> None:
        """Creates or replaces the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {"identity": self.identity, "split": self.split, "columns": self.columns}
        write_atomic(self.path, json.dumps(header) + "\n")

    def add_state(self, row: int, state: Any) -> None:
        if row not in self.states:
            self.states[row] = state
            self._append({"row": row, "state": state})

    def add_end(self, rows: int) -> None:
        if self.rows is None:
            self.rows = rows
            self._append({"rows": rows})

    def _append(self, entry: dict[str, Any]) -> None:
        # On a line of its own even if a kill cut off the one before.
        with open(self.path, "a") as file:
            file.write(f"\n{json.dumps(entry)}\n")


def _entry(line: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(entry := json.loads(line), dict):
            return entry
    return {}


class Stream:
    """A split whose rows are fetched one after the other."""

    def __init__(
        self,
        name: str,
        record: StreamRecord,
        rows: tuple[int, int | None],
        connect: Callable[[], Any],
        *,
        named: bool,
    ):
        """Args:
        name: the dataset's name.
        record: what earlier runs saw.
        rows: (first, end) of the rows to use; None for the end of the split.
        connect: opens the dataset, an IterableDataset of the columns.
        named: whether the user named the columns, in the order of the text.
        """
        self.origin = f"dataset {name}, split {record.split}"
        self.rows = SplitRows(self.origin, record.identity, record.columns, named)
        self.record = record
        self._name = name
        self._start, self._stop = rows
        self._connect = connect
        self._dataset: Any = None
        self._batches: Iterator[dict[str, list]] = iter(())
        self._position = -1  # the row that comes next; -1: not connected

    def parts(self) -> Iterator["StreamPart"]:
        """Yields parts in order.

        Each one must be read, or found in the cache, before the next is requested: the end of the
        split is only known when it is reached.
        """
        start = self._start
        while not (self._is_past(start, self._stop) or self._is_past(start, self.record.rows)):
            stop = (start // PART_ROWS + 1) * PART_ROWS
            yield StreamPart(self, start, min(stop, self._stop or stop))
            start = stop

    @staticmethod
    def _is_past(row: int, end: int | None) -> bool:
        return end is not None and row >= end

    def batches(self, start: int, stop: int) -> Iterator[dict[str, list]]:
        """Yields rows ``start`` to ``stop`` or to the end of the split; records where they end."""
        if self._position != start:
            self._seek(start)
        while self._position < stop:
            batch = self._next()
            if not batch:
                return
            surplus = self._position - stop
            if surplus > 0:  # the end of a slice: reading does not continue from here
                batch = {column: values[:-surplus] for column, values in batch.items()}
                self._position = -1
                yield batch
                return
            yield batch
        if stop % PART_ROWS == 0:
            self.record.add_state(stop, self._dataset.state_dict())

    def _seek(self, start: int) -> None:
        with library_errors(self._name):
            self._dataset = self._connect()
            at = max((row for row in self.record.states if row <= start), default=0)
            if at:
                self._dataset.load_state_dict(self.record.states[at])
            self._batches = self._dataset.iter(ROWS_AT_A_TIME)
        self._position = at
        while self._position < start and (batch := self._next()):
            if wanted := max(self._position - start, 0):
                rest = {column: values[-wanted:] for column, values in batch.items()}
                self._batches = itertools.chain([rest], self._batches)
                self._position = start

    def _next(self) -> dict[str, list]:
        """Returns the next rows; at the end of the split, records it and returns nothing."""
        with library_errors(self._name):
            batch = next(self._batches, {})
        if batch:
            self._position += len(next(iter(batch.values())))
        else:
            self.record.add_end(self._position)
        return batch


@dataclasses.dataclass(frozen=True)
class StreamPart:
    """Some thousand rows, fetched on demand."""

    stream: Stream
    start: int
    stop: int
    stat: None = None
    parallel: bool = False  # it holds a connection
    size_bytes: int = 0  # unknown

    @property
    def name(self) -> str:
        return self.stream.rows.part_name(self.start, self.stop)

    def key(self) -> str:
        return self.stream.rows.part_key(self.start, self.stop)

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        batches = self.stream.batches(self.start, self.stop)
        return self.stream.rows.pieces(batches, self.start, summary)


def open_stream(config: DataConfig, log: Callable[[str], None]) -> Stream:
    """Finds the split and the columns that ``config`` names; fetches only a few rows.

    Raises:
      UserError: if the dataset is not available, or has no such configuration, split or column.
    """
    name = os.path.expanduser(config.dataset)
    match = _SLICE.fullmatch(config.dataset_split)
    if not match:
        raise UserError(
            f'data.dataset_split="{config.dataset_split}" cannot be streamed; give a split or rows '
            "of one, such as train[:100000]"
        )
    rows = int(match["start"] or 0), int(match["stop"]) if match["stop"] else None
    named = bool(named_columns(config.text_column))
    # The forms of records decide which columns are fetched if none is named.
    words = [config.dataset, config.dataset_config, match["split"], config.text_column, VERSION]
    if is_folder(name):
        words[0] = os.path.realpath(name)
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()
    path = config.cache_root / "streams" / f"{digest}.jsonl"
    record = StreamRecord.read(path)
    if not is_folder(name) and (why := out_of_reach()):
        if record is None:
            raise UserError(unreachable(name, why))
        log(f"the Hugging Face Hub is out of reach ({why}): using dataset {name} from the cache")
        return Stream(name, record, rows, lambda: _refuse(name, why), named=named)

    datasets = load_library()
    with library_errors(name):
        if is_saved(name):
            raise UserError(
                f"dataset {name} was written by save_to_disk and is on this machine: leave out "
                "--dataset_streaming"
            )
        builder = open_builder(datasets, name, config.dataset_config, log)
        if record is None or record.identity != builder._get_dataset_fingerprint(record.split):
            splits = builder.as_streaming_dataset()
            split = choose_split(name, match["split"], list(splits), log)
            identity = builder._get_dataset_fingerprint(split)
            dataset = splits[split]
            features = dataset._resolve_features().features  # those of JSON show in its first rows
            columns = choose_columns(name, config.text_column, features, log)
            record = StreamRecord(path, identity, split, columns)
            record.begin()
    split, columns = record.split, list(record.columns)
    connect = lambda: builder.as_streaming_dataset(split).select_columns(columns)
    return Stream(name, record, rows, connect, named=named)


def _refuse(name: str, why: str) -> Any:
    raise UserError(
        f"dataset {name} is only partly in the cache, and the Hugging Face Hub is out of reach "
        f"({why}); go online once, or use fewer rows with --dataset_split, such as train[:100000]"
    )
