"""Writes the rows: a JSON file with every sample, a Markdown table and a picture."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.harness import Check, Context, Row

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "mambapy", "mamba_ssm")
_FACTORS = {"_bytes": (1e-6, "MB"), "_secs": (1e3, "ms"), "_share": (1e2, "%")}


@dataclasses.dataclass(frozen=True)
class Result:
    """A whole run, as the JSON file holds it."""

    benchmark: str
    quick: bool
    baseline: str
    ending: str  # "complete", "interrupted" or "out of time after …"
    environment: dict[str, Any]
    rows: list[Row]
    checks: list[Check]


def environment(context: Context, command_line: str) -> dict[str, Any]:
    """Collects what a figure depends on."""
    return {
        "device": context.device_kind,
        "platform": context.platform,
        "cpu": cpu_name(),
        "cores_used": len(os.sched_getaffinity(0)),
        "cores_of_machine": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "versions": installed(PACKAGES),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "command_line": command_line,
    }


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of Python and of those packages that are there."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """The processor's own name, or its architecture where the system does not report it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = re.findall(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def git_commit() -> str:
    """The commit of the code that ran, with "+" if it had been changed; "" outside a checkout."""
    folder = pathlib.Path(__file__).parent.parent
    git = lambda *words: subprocess.run(
        ["git", "-C", folder, *words], capture_output=True, text=True
    ).stdout.strip()
    try:
        commit = git("rev-parse", "HEAD")
        changed = commit and git("status", "--porcelain", "--", "mamba_jax", "benchmarks/*.py")
    except OSError:
        return ""
    return commit + ("+" if changed else "")


def file_stem(result: Result, context: Context) -> str:
    """E.g. ``scan_nvidia_h200``: the benchmark and the device, as a file name."""
    device = re.sub(r"[^a-z0-9]+", "_", context.device_kind.lower()).strip("_")
    return f"{result.benchmark}_{device}" + ("_quick" if result.quick else "")


def to_json(result: Result) -> str:
    """Writes a result as JSON; ``from_json`` is the inverse."""
    return json.dumps(dataclasses.asdict(result), indent=1)


def from_json(text: str) -> Result:
    """Reads what ``to_json`` wrote."""
    values = json.loads(text)
    values["rows"] = [Row(**row) for row in values["rows"]]
    values["checks"] = [Check(**check) for check in values["checks"]]
    return Result(**values)


def ratio(row: Row, baseline: Row) -> float | None:
    """How many times as long as the baseline: the median over rounds of the ratio in one round.

    Where one took fewer samples, only the rounds that both took count; where one was measured
    separately (with a sample or two of its own), the ratio of medians is used.
    """
    pairs = list(zip(row.samples_secs, baseline.samples_secs, strict=False))
    if not pairs:
        return None
    if len(pairs) < 3:
        return row.median_secs / baseline.median_secs
    return statistics.median(a / b for a, b in pairs)


def baselines(result_rows: list[Row], name: str) -> dict[str, Row]:
    """Returns the baseline's row by case (``case_key``)."""
    return {case_key(row.case): row for row in result_rows if row.name == name}


def case_key(case: dict[str, Any]) -> str:
    """A case as text: equal for equal cases."""
    return json.dumps(case, sort_keys=True)


def markdown(result: Result) -> str:
    """The result as a Markdown page: where it ran, checks, the table."""
    where, rows = result.environment, result.rows
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        f"# Benchmark: {result.benchmark}{' (quick)' if result.quick else ''}",
        "",
        f"{where['device']} ({where['cpu']}, {where['cores_used']} of {where['cores_of_machine']} "
        f"cores, load {where['load_average_at_start']:.1f} to "
        f"{where['load_average_at_end']:.1f}), {where['date']}, commit "
        f"{where['git_commit'][:8] or 'unknown'}; {versions}. `{where['command_line']}`: "
        f"{result.ending}.",
        "",
    ]
    for check in result.checks:
        word = {True: "pass", False: "**FAIL**", None: "no figures"}[check.passed]
        lines.append(f"- {word}: {check.claim}. {check.detail}".rstrip())
    keys = list(dict.fromkeys(key for row in rows for key in row.case))
    metrics = list(dict.fromkeys(key for row in rows for key in row.metrics))
    header = [
        *keys,
        "implementation",
        "time (ms)",
        "25–75%",
        f"time ÷ {result.baseline}",
        *map(metric_title, metrics),
        "note",
    ]
    lines += [
        "",
        _line(header),
        _line(["---"] * (len(keys) + 1) + ["---:"] * (3 + len(metrics)) + ["---"]),
    ]
    base = baselines(rows, result.baseline)
    for row in rows:
        times = ratio(row, base[case_key(row.case)]) if case_key(row.case) in base else None
        bound = "> " if row.at_least else ""
        lines.append(
            _line(
                [
                    *(str(row.case.get(key, "")) for key in keys),
                    row.name,
                    "–" if row.median_secs is None else bound + number(row.median_secs * 1e3),
                    spread(row.samples_secs),
                    "–" if times is None else f"{bound}{times:.2f}",
                    *(
                        # A lower bound of a time is an upper bound of a rate.
                        ("< " if row.at_least and key.endswith("_per_sec") else "")
                        + metric_text(key, row.metrics.get(key))
                        for key in metrics
                    ),
                    row.note.replace("|", "/"),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(samples_secs: list[float]) -> str:
    """The middle half of the samples, in ms."""
    if len(samples_secs) < 3:
        return "–"
    low, _, high = statistics.quantiles(samples_secs, n=4, method="inclusive")
    return f"{number(low * 1e3)}–{number(high * 1e3)}"


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def metric_title(key: str) -> str:
    """E.g. ``temporary_bytes`` → "temporary (MB)"."""
    for suffix, (_, unit) in _FACTORS.items():
        if key.endswith(suffix):
            return f"{key.removesuffix(suffix).replace('_', ' ')} ({unit})"
    return key.replace("_", " ")


def metric_text(key: str, value: float | None) -> str:
    """A metric in the unit of its title."""
    if value is None:
        return "–"
    return number(value * next((f for end, (f, _) in _FACTORS.items() if key.endswith(end)), 1.0))


def colours(rows: list[Row]) -> dict[str, str]:
    """One colour per implementation, the same in all plots of a picture."""
    return {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.name for row in rows))}


def length_axis(plot: Any, lengths: Iterable[int], title: str) -> None:
    """A logarithmic axis whose ticks are the lengths that were measured."""
    ticks = sorted(set(lengths))
    plot.set_xscale("log", base=2)
    plot.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    plot.set_xlabel(title)


def bars(plot: Any, values: list[tuple[str, float]], title: str) -> None:
    """Draws named bars, the first on top, with their values."""
    for name, value in values:
        plot.barh(name, value, color="C0")
        plot.text(value, name, f" {number(value)}", va="center", fontsize=8)
    if not plot.yaxis_inverted():
        plot.invert_yaxis()
    plot.set_xlim(right=1.2 * max((value for _, value in values), default=1.0))
    plot.set_xlabel(title)


def write(result: Result, stem: pathlib.Path, draw: Callable[[list[Row], Any], None]) -> None:
    """Writes ``stem``.json, .md and .png."""
    import matplotlib
    from matplotlib.figure import Figure

    for suffix, text in ((".json", to_json(result)), (".md", markdown(result))):
        stem.with_name(stem.name + suffix).write_text(text)
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 6), layout="constrained")
        draw([row for row in result.rows if row.samples_secs], figure)
        figure.suptitle(f"{result.benchmark}, {result.environment['device']}")
        figure.savefig(stem.with_name(stem.name + ".png"), dpi=110)
