"""The records of finished cells: one JSON line each, a file per task, only ever appended to."""

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from benchmarks.evidence.cells import LEARNING_RATES, Cell
from benchmarks.evidence.tasks import TASKS

FOLDER = pathlib.Path(__file__).parent.parent / "results" / "evidence"
Record = dict[str, Any]


def read(folder: pathlib.Path, names: Iterable[str] = TASKS) -> list[Record]:
    """Returns all records of some files. A line that a kill cut short is reported and skipped."""
    found = []
    for file in (folder / f"{name}.jsonl" for name in names):
        if not file.exists():
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{file}:{number}: incomplete record; skipped", file=sys.stderr)
    return found


def append(folder: pathlib.Path, name: str, record: Record) -> None:
    """Adds a record in one write, after the end of a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("ab+") as file:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def find(records: Iterable[Record], config: dict[str, Any]) -> Record | None:
    """Returns the record of a cell: that of an equal config, model and training included."""
    wanted = plain(config)
    return next((record for record in records if record["config"] == wanted), None)


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def score(entry: dict[str, Any] | None, task: str) -> float | None:
    """Returns what plans are compared by, of an ``all`` or a level's entry."""
    if entry is None:
        return None
    if TASKS[task].score == "accuracy":
        return None if entry["nll"] is None else entry["accuracy"]
    return None if entry["nll"] is None else entry["nll"] / math.log(2)


def best_rates(records: Iterable[Record]) -> dict[tuple[str, str], float]:
    """Chooses learning rates on validation rows: (task, plan) → rate, of finished sweeps.

    A rate that diverged loses to all others; at equal scores the smaller rate wins.
    """
    swept: dict[tuple[str, str], dict[float, float]] = {}
    for record in records:
        config = record["config"]
        cell = Cell(**{name: config[name] for name in Cell.__dataclass_fields__})
        if not cell.sweeps or cell.learning_rate not in LEARNING_RATES:
            continue
        sign = 1 if TASKS[cell.task].higher_is_better else -1
        value = score(record["curve"][-1]["validation"], cell.task)
        ranked = float("-inf") if value is None else sign * value
        swept.setdefault((cell.task, cell.plan), {})[cell.learning_rate] = ranked
    return {
        key: max(sorted(rates), key=rates.__getitem__)
        for key, rates in swept.items()
        if len(rates) == len(LEARNING_RATES)
    }


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Lists where two results differ; their times are not compared."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in sorted(one.keys() | other.keys())
            if key not in ("cpu_secs", "compile_secs")
            for line in differences(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            line
            for index, pair in enumerate(zip(one, other, strict=True))
            for line in differences(*pair, f"{place}[{index}]")
        ]
    return [] if one == other else [f"{place}: {one} and {other}"]
