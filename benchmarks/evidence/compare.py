"""Compares plans on a task at equal steps, FLOPs and time, from the records alone.

Every evaluation of a curve is a valid end of training; so a score at a budget is read from the
curve, on the line between two evaluations. A budget is what the plan that ends first has used.
"""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterable, Sequence

from scipy import stats

from benchmarks.evidence import records, times
from benchmarks.evidence.cells import SWEEP_SEED
from benchmarks.evidence.plans import PLANS
from benchmarks.evidence.records import Record
from benchmarks.evidence.tasks import TASKS

AXES = {"steps": "step", "FLOPs": "flops", "time": "secs"}


@dataclasses.dataclass(frozen=True)
class Group:
    """The records of one plan on one task that differ in their seed alone."""

    task: str
    plan: str
    learning_rate: float
    steps: int
    tuned: bool  # the sweep chose the rate, and training was as long as the table says
    by_seed: dict[int, Record]
    step_secs: float

    def at(self, record: Record, entry: dict, axis: str) -> float:
        """Where an entry of a curve stands on an axis."""
        return entry["step"] * self.step_secs if axis == "time" else entry[AXES[axis]]

    def end(self, axis: str) -> float:
        """The last point of its curves on an axis."""
        return min(self.at(r, r["curve"][-1], axis) for r in self.by_seed.values())

    def scores(self, axis: str, budget: float) -> dict[int, float]:
        """Returns seed → score at a budget; none of what diverged or was not yet evaluated."""
        found = {}
        for seed, record in self.by_seed.items():
            points = [
                (self.at(record, entry, axis), records.score(entry["test"], self.task))
                for entry in record["curve"]
            ]
            value = _interpolated(points, budget)
            if value is not None:
                found[seed] = value
        return found


def _interpolated(points: list[tuple[float, float | None]], x: float) -> float | None:
    """The line through the evaluations at x; None before the first, and next to what diverged."""
    for number, (end, value) in enumerate(points):
        if math.isclose(x, end):
            return value
        if x < end:
            start, before = points[number - 1] if number else (0.0, None)
            if before is None or value is None:
                return None
            return before + (value - before) * (x - start) / (end - start)
    return points[-1][1]


def groups(found: Sequence[Record], folder: pathlib.Path) -> dict[str, dict[str, Group]]:
    """Returns task → plan → its group.

    If a plan ran at several rates or lengths, this is the group of the chosen rate and the table's
    length; if that was not run, the group with the most seeds, then the most steps.
    """
    best, secs = records.best_rates(found), step_secs(found, folder)
    made: dict[tuple[str, str, float, int], dict[int, Record]] = {}
    for record in found:
        config = record["config"]
        if config["seed"] != SWEEP_SEED:
            key = (config["task"], config["plan"], config["learning_rate"], config["steps"])
            made.setdefault(key, {})[config["seed"]] = record
    chosen: dict[str, dict[str, Group]] = {}
    for (task, plan, rate, steps), by_seed in made.items():
        if task not in TASKS or plan not in PLANS:
            continue
        tuned = best.get((task, plan)) == rate and steps == TASKS[task].steps
        group = Group(task, plan, rate, steps, tuned, by_seed, secs[plan])
        other = chosen.setdefault(task, {}).get(plan)
        rank = lambda one: (one.tuned, len(one.by_seed), one.steps)
        if other is None or rank(group) > rank(other):
            chosen[task][plan] = group
    return {
        task: {plan: chosen[task][plan] for plan in PLANS if plan in chosen[task]}
        for task in TASKS
        if task in chosen
    }


def step_secs(found: Iterable[Record], folder: pathlib.Path) -> dict[str, float]:
    """Returns the CPU seconds of a step of each plan: measured apart, else that of its records."""
    taken: dict[str, list[float]] = {}
    for record in found:
        last = record["curve"][-1]
        taken.setdefault(record["config"]["plan"], []).append(last["cpu_secs"] / last["step"])
    return {
        plan: statistics.median(samples) for plan, samples in (taken | times.read(folder)).items()
    }


def budget(of_task: dict[str, Group], axis: str) -> float:
    """The most that every plan of a task has used; of tuned plans alone, where there are any."""
    tuned = [group for group in of_task.values() if group.tuned]
    return min(group.end(axis) for group in tuned or of_task.values())


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and half its 95% interval by Student's t; of one value, None."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Returns the differences of two plans, seed by seed."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
