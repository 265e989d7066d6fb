"""Whether the cost of a forward pass and of a training step grows in proportion to the length.

One small model of constant structure; all lengths take turns. Memory is that of the temporaries:
weights and optimizer state do not depend on the length.
"""

import functools
import statistics
from typing import Any

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Row
from benchmarks.report import length_axis

DEVIATION = 0.15  # largest deviation from proportional
TASKS = {"forward": workloads.prepare_forward, "training step": workloads.prepare_train_step}
BASELINE = "L = 1024"


def cases(context: Context) -> list[dict[str, Any]]:
    """Both passes, plain Mamba and hybrid."""
    batch = 1 if context.platform == "cpu" else 8  # enough to fill a GPU at the shortest
    families = ("mamba",) if context.quick else ("mamba", "hybrid")
    return [{"task": task, "family": f, "B": batch} for f in families for task in TASKS]


def lengths(context: Context) -> list[int]:
    """1k to 64k; with --quick, to 8k."""
    return [1024 << i for i in range(4 if context.quick else 7)]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """One per length."""
    size = "small" if case["family"] == "mamba" else "hybrid-small"
    if context.platform == "cpu":
        small = {"d_model": 64, "n_layers": 2, "vocab_size": 512}
        model = workloads.model_of(size, **small)
    else:
        model = workloads.model_of(size)
    return [
        Candidate(f"L = {length}", functools.partial(TASKS[case["task"]], model, case["B"], length))
        for length in lengths(context)
    ]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures all lengths of one pass."""
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=3 if context.quick else 5,
        candidate_secs=12.0 if context.platform == "cpu" else 3.0,
        deadline=context.deadline,
    )
    for row in rows:
        if row.case == case and row.samples_secs:
            row.metrics["per_token_secs"] = row.median_secs / (case["B"] * length_of(row))


def length_of(row: Row) -> int:
    """The length in a row's name."""
    return int(row.name.removeprefix("L = "))


def checks(rows: list[Row], context: Context) -> list[Check]:
    """Cost per token may differ from its median over the lengths by at most ``DEVIATION``."""
    found = []
    cases_seen = [row.case for row in rows]
    for number, case in enumerate(cases_seen):
        if case in cases_seen[:number]:
            continue
        mine = [row for row in rows if row.case == case and row.samples_secs]
        costs = {
            "time": {length_of(row): row.median_secs for row in mine},
            "temporary memory": {
                length_of(row): row.metrics["temporary_bytes"]
                for row in mine
                if "temporary_bytes" in row.metrics
            },
        }
        for what, by_length in costs.items():
            claim = (
                f"{case['family']}, {case['task']}: {what} within {DEVIATION:.0%} of "
                "proportional to the length"
            )
            if len(by_length) < 2:
                found.append(Check(claim, None, ""))
                continue
            length, deviation = worst_deviation(by_length)
            detail = f"Most: {deviation:+.0%} at {length} of {min(by_length)} … {max(by_length)}"
            found.append(Check(claim, abs(deviation) <= DEVIATION, detail))
    return found


def worst_deviation(by_length: dict[int, float]) -> tuple[int, float]:
    """Returns the length whose cost per token is furthest from the median's, and by what share."""
    per_token = {length: cost / length for length, cost in by_length.items()}
    middle = statistics.median(per_token.values())
    length = max(per_token, key=lambda key: abs(per_token[key] / middle - 1))
    return length, per_token[length] / middle - 1


def draw(rows: list[Row], figure: Any) -> None:
    """Draws time and temporaries over length, with the proportional line through the longest."""
    plots = figure.subplots(1, 2)
    series = [(row.case["family"], row.case["task"]) for row in rows]
    for number, key in enumerate(dict.fromkeys(series)):
        mine = [row for row, its in zip(rows, series, strict=True) if its == key]
        for plot, value in (
            (plots[0], lambda row: row.median_secs),
            (plots[1], lambda row: row.metrics["temporary_bytes"] * 1e-6),
        ):
            points = sorted((length_of(row), value(row)) for row in mine)
            longest, most = points[-1]
            plot.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=", ".join(key))
            xs = [x for x, _ in points]
            plot.plot(xs, [most * x / longest for x in xs], "--", color=f"C{number}", alpha=0.5)
    for plot, label in zip(plots, ("time (s)", "temporary memory (MB)"), strict=True):
        plot.set(yscale="log", ylabel=label)
        length_axis(plot, map(length_of, rows), "tokens in a sequence")
    plots[0].set_title("dashed: proportional to the longest")
    plots[0].legend()
