"""What the command does: run the cells that are not done, one cell, or show the table."""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

from benchmarks import report
from benchmarks.evidence import cells, page, records, times, trial
from benchmarks.evidence.cells import Cell
from benchmarks.evidence.plans import PLANS, model_of
from benchmarks.evidence.records import Record
from benchmarks.evidence.tasks import TASKS, corpus_digest
from benchmarks.run import make_context
from mamba_jax.config import DataConfig
from mamba_jax.parallel.compile_cache import cache_compilations

QUICK = "quick"  # the file of quick cells, which the report never reads


def run(arguments: argparse.Namespace, deadline: float) -> int:
    """Does what the arguments of the command say; returns its exit status."""
    folder = arguments.results or records.FOLDER
    if arguments.report:
        for path in page.write(folder, arguments.page):
            print(f"written: {path}")
        return 0
    cache_compilations(DataConfig().cache_root)
    if arguments.times:
        chosen = {cell.plan for cell in cells.only(cells.cells({}), arguments.only)}
        plans = tuple(plan for plan in PLANS if plan in chosen)
        print(f"written: {times.measure(folder, deadline, plans)}")
        return 0
    suite = Suite(arguments, deadline)
    if arguments.cell:
        return suite.run_one(cells.parse(arguments.cell))
    if arguments.list:
        return suite.show()
    return suite.run_all()


class Suite:
    """The cells of one call of the command, and the records so far."""

    def __init__(self, arguments: argparse.Namespace, deadline: float):
        self.folder = arguments.results or records.FOLDER
        self.quick, self.threads = arguments.quick, arguments.threads
        self.only, self.deadline = arguments.only, deadline
        self.records = self.read()

    def read(self) -> list[Record]:
        """The records of all calls of the command so far, of others too."""
        return records.read(self.folder, [QUICK] if self.quick else TASKS)

    def table(self) -> list[Cell]:
        """The cells, with the learning rates that finished sweeps have chosen."""
        best = records.best_rates(self.records)
        made = cells.quick_cells() if self.quick else cells.cells(best)
        return cells.only(made, self.only)

    def record_of(self, cell: Cell) -> Record | None:
        """The record of a finished cell."""
        if cell.learning_rate is None:
            return None
        return records.find(self.records, trial.cell_config(cell))

    def run_all(self) -> int:
        """Runs every cell that is not done, until the deadline."""
        while True:
            # After every cell: a finished sweep makes others ready, and other processes add too.
            self.records = self.read()
            left = [cell for cell in self.table() if self.record_of(cell) is None]
            ready = [cell for cell in left if cell.learning_rate is not None]
            if not ready:
                break
            if time.monotonic() > self.deadline or self.run_cell(ready[0]) is None:
                print(f"out of time with {len(left)} cells left; run it again to resume")
                return 0
        if left:
            print(f"{len(left)} cells wait for their sweep (seed={cells.SWEEP_SEED})")
        print(f"done: {len(self.table()) - len(left)} cells in {self.folder}")
        return 0

    def run_cell(self, cell: Cell) -> Record | None:
        """Runs a cell and keeps its record; returns None if the deadline came first."""
        begin = time.monotonic()
        command = " ".join(
            [
                "python -m benchmarks.evidence",
                *(["--quick"] if self.quick else []),
                *([f"--threads={self.threads}"] if self.threads != 1 else []),
                f"--cell {shlex.quote(cell.spec())}",
            ]
        )
        environment = report.environment(make_context(quick=self.quick), command)
        if cell.task == "text":
            environment["corpus"] = corpus_digest()
        try:
            result = trial.run(cell, self.deadline)
        except trial.OutOfTime:
            return None
        model = model_of(cell.plan)
        record = records.plain(
            {
                "config": trial.cell_config(cell),
                "parameters": model.parameters,
                "token_flops": model.token_flops,
                **result,
                "wall_secs": time.monotonic() - begin,
                "environment": environment,
            }
        )
        records.append(self.folder, QUICK if self.quick else cell.task, record)
        value = records.score(record["curve"][-1]["test"], cell.task)
        print(
            f"{cell.spec()}: {TASKS[cell.task].score} "
            f"{'not finite' if value is None else f'{value:.4f}'}, "
            f"{record['wall_secs']:.0f} s, of which {result['compile_secs']:.0f} s compiling",
            file=sys.stderr,
            flush=True,
        )
        return record

    def run_one(self, cell: Cell) -> int:
        """Runs a cell; if it was done before, compares the two. Returns 1 if they differ."""
        before = self.record_of(cell)
        if before is None:
            if self.run_cell(cell) is None:
                print("out of time; nothing was kept")
            return 0
        try:
            again = records.plain(trial.run(cell, self.deadline))
        except trial.OutOfTime:
            print("out of time; nothing was compared")
            return 0
        # A later version may measure more at the end.
        again["end"] = {name: again["end"].get(name) for name in before["end"]}
        lines = records.differences(
            {name: before[name] for name in ("curve", "end")},
            {name: again[name] for name in ("curve", "end")},
        )
        if not lines:
            print(f"reproduced to the bit: {cell.spec()}")
            return 0
        where = report.environment(make_context(quick=self.quick), "")
        lines += records.differences(
            *(
                {key: of[key] for key in ("device", "cpu", "versions", "xla_flags", "git_commit")}
                for of in (before["environment"], where)
            )
        )
        print(f"not the same as recorded (recorded and now): {cell.spec()}")
        print("\n".join(f"  {line}" for line in lines[:20]))
        return 1

    def show(self) -> int:
        """Prints the cells: done, to do, or waiting for the sweep of their learning rate."""
        table = self.table()
        taken: dict[str, list[float]] = {}
        for record in self.records:
            config = record["config"]
            taken.setdefault(config["plan"], []).append(record["wall_secs"] / config["steps"])
        n_done, secs = 0, 0.0
        for cell in table:
            done = self.record_of(cell) is not None
            n_done += done
            if not done:
                secs += cell.steps * _typical(taken, cell.plan)
            state = "done" if done else "to do" if cell.learning_rate is not None else "waits"
            print(f"{state:5}  {cell.spec()}")
        print(f"{n_done} of {len(table)} done", end="")
        print(f"; about {secs / 3600:.1f} hours left at the rate so far" if secs else "")
        return 0


def _typical(taken: dict[str, list[float]], plan: str) -> float:
    """Seconds of a step of a plan, or of any plan that was run."""
    known: Iterable[Any] = taken.get(plan) or [one for of in taken.values() for one in of]
    return statistics.median(known) if known else 0.0
