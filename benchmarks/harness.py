"""Measures the candidates of a case, interleaved in one process or each in its own.

Timings on a shared or throttling machine drift; ratios within one round hardly do. So every round
runs all candidates once, starting with a different one each time, and only candidates of the same
round are compared.
"""

import dataclasses
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class NotMeasured(Exception):
    """Why a candidate has no figure, in one line; it becomes the note of its row."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A candidate ready to be timed: compiled, its data in place.

    ``run`` does the work once and returns when it is done: None, or the seconds that count where
    these are not the whole call.
    """

    run: Callable[[], float | None]
    memory: Callable[[], dict[str, float]] = dict  # called after the first run; keys end in _bytes
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One implementation of a case."""

    name: str
    prepare: Callable[[], Prepared]
    # Not 0: run in a process of its own, which is ended after this many seconds. For candidates
    # too slow to interleave; their time then has only a lower bound.
    isolated_secs: float = 0.0
    isolated_samples: int = 1  # there; several come after a first run that does not count
    environment: dict[str, str] = dataclasses.field(default_factory=dict)  # there


@dataclasses.dataclass
class Row:
    """What was measured of one candidate in one case."""

    case: dict[str, Any]
    name: str
    samples_secs: list[float] = dataclasses.field(default_factory=list)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    at_least: bool = False  # the true time is longer: it was stopped
    note: str = ""

    @property
    def median_secs(self) -> float | None:
        return statistics.median(self.samples_secs) if self.samples_secs else None


@dataclasses.dataclass(frozen=True)
class Check:
    """One target of a benchmark: a claim, and whether the figures meet it (None: no figures)."""

    claim: str
    passed: bool | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Context:
    """What every part of a benchmark may need to know about the run."""

    platform: str  # "cpu", "gpu" or "tpu"
    device_kind: str
    quick: bool = False
    deadline: float = float("inf")  # on time.monotonic()'s clock
    checkpoint: str | None = None  # a trained model, where a benchmark needs one

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def measure(
    candidates: Sequence[Candidate],
    case: dict[str, Any],
    rows: list[Row],
    *,
    rounds: int,
    candidate_secs: float,
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measures candidates of one case against each other.

    Each is prepared and run once to warm up. A candidate that fails gets a note and the others
    continue; each is timed at least once, and no more after it has used up ``candidate_secs``.

    Args:
      candidates: with different names.
      case: what they all do, for the rows.
      rows: one is appended per candidate at the start and filled as measurements come, so that an
        interrupt loses nothing.
      rounds: samples per candidate.
      candidate_secs: seconds of timed work that a candidate may take.
      deadline: on ``time.monotonic``'s clock; after it only the first candidate
        is still prepared, and only the first round starts.
      clock: seconds.
    """
    started = [(candidate, Row(case, candidate.name)) for candidate in candidates]
    rows.extend(row for _, row in started)
    going: list[tuple[Row, Prepared]] = []
    for candidate, row in started:
        if candidate.isolated_secs:
            continue
        if going and time.monotonic() > deadline:  # candidates that are ready still get their turn
            row.note = "not measured: out of time"
            continue
        try:
            prepared = candidate.prepare()
            prepared.run()
        except Exception as error:  # a peer may fail in any way
            row.note = reason(error)
        else:
            row.metrics |= prepared.metrics | prepared.memory()
            going.append((row, prepared))

    for round_ in range(rounds):
        if round_ and time.monotonic() > deadline:
            break
        first = round_ % len(going) if going else 0
        for row, prepared in going[first:] + going[:first]:
            try:
                begin = clock()
                counted = prepared.run()
                row.samples_secs.append(clock() - begin if counted is None else counted)
            except Exception as error:
                row.note = reason(error)
        going = [
            (row, prepared)
            for row, prepared in going
            if not row.note and sum(row.samples_secs) < candidate_secs
        ]


def reason(error: Exception) -> str:
    """Returns why something was not measured, in one short line."""
    if isinstance(error, NotMeasured):
        return str(error)
    text = str(error).strip()
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"[:160]


def import_peer(module: str) -> Any:
    """Imports a peer's library, or raises an error that says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        if package != "mamba_ssm" and isinstance(error, ModuleNotFoundError):
            raise NotMeasured(f"{package} is not installed: pip install -e '.[bench]'") from error
        raise NotMeasured(f"{package} cannot be imported: {error}"[:160]) from error


def compiled(function: Callable, *arguments: Any, **jit_options: Any) -> tuple[Callable, dict]:
    """Compiles a JAX function for its arguments, if they and its temporaries fit this machine.

    Returns:
      The compiled function, and its memory: ``temporary_bytes``, and ``program_bytes``, that with
      its arguments and results.

    Raises:
      NotMeasured: if it would need more memory than there is.
    """
    import jax

    jitted = function if hasattr(function, "lower") else jax.jit(function, **jit_options)
    program = jitted.lower(*arguments).compile()
    analysis = program.memory_analysis()
    total = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    available = available_bytes()
    if total - analysis.argument_size_in_bytes > available:  # the arguments are there already
        raise NotMeasured(f"needs {total / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
    return program, {"temporary_bytes": analysis.temp_size_in_bytes, "program_bytes": total}


def prepare_jax(function: Callable, *arguments: Any, **metrics: float) -> Prepared:
    """Makes a candidate of a JAX function without side effects."""
    import jax

    program, memory = compiled(function, *arguments)

    def run() -> None:
        jax.block_until_ready(program(*arguments))

    return Prepared(run, lambda: memory, metrics)


def available_bytes() -> float:
    """Free memory: of the accelerator, else of the machine or container."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return available_host_bytes()


def available_host_bytes() -> float:
    """Free memory of the machine (Linux), or infinity where unknown."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
    except OSError:
        return float("inf")
    return float(fields["MemAvailable"].split()[0]) * 1024


# --- candidates in processes of their own


@dataclasses.dataclass
class Isolated:
    """The result of a candidate that ran in a process of its own."""

    samples_secs: list[float] = dataclasses.field(default_factory=list)
    peak_rss_bytes: float = 0.0  # of the whole process, libraries included
    unfinished_secs: float = 0.0  # how long the sample that was stopped had run
    note: str = ""


def isolate(
    benchmark: str,
    case: dict,
    name: str,
    context: Context,
    *,
    repetitions: int,
    limit_secs: float,
    environment: Mapping[str, str] | None = None,
) -> Isolated:
    """Runs one candidate in a process of its own, for its peak memory or because it is slow.

    The process inherits the pinned cores and flags of this one. See ``benchmarks.probe``.

    Args:
      benchmark: the module that has the candidate.
      case: a case of that benchmark.
      name: the candidate's.
      context: that of this run.
      repetitions: samples to take; there is no warm-up.
      limit_secs: seconds after which the process is ended.
      environment: variables to add to those of this process.
    """
    request = {
        "benchmark": benchmark,
        "case": case,
        "name": name,
        "quick": context.quick,
        "repetitions": repetitions,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.probe", json.dumps(request)],
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True).start()
    result = Isolated()
    began, finished, deadline = None, False, time.monotonic() + limit_secs
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            if not line.startswith("{"):
                continue  # a library's own output
            reported = json.loads(line)
            if "begins" in reported:
                began = time.monotonic()
            elif "sample_secs" in reported:
                result.samples_secs.append(reported["sample_secs"])
            elif "note" in reported:
                result.note = reported["note"]
            else:
                result.peak_rss_bytes, finished = reported["peak_rss_bytes"], True
    except queue.Empty:
        result.note = f"stopped after {limit_secs:.0f} s"
        result.unfinished_secs = time.monotonic() - began if began else 0.0
        result.peak_rss_bytes = peak_rss_bytes(process.pid)
    finally:
        process.kill()
        process.wait()
    if not finished and not result.note:
        result.note = f"its process ended with status {process.returncode}"
    return result


def _read_lines(stream: Any, lines: queue.Queue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def peak_rss_bytes(process_id: int | None = None) -> float:
    """The most memory that a process (by default this one) ever held: VmHWM, on Linux; else 0."""
    try:
        with open(f"/proc/{process_id or os.getpid()}/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return float(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def measure_isolated(
    benchmark: str,
    candidates: Sequence[Candidate],
    case: dict,
    rows: list[Row],
    context: Context,
    *,
    memory: bool,
) -> None:
    """Adds to the rows of ``measure`` what only separate processes can measure.

    Args:
      benchmark, candidates, case, context: as in ``isolate``.
      rows: the rows of this case, in any order.
      memory: whether to take every candidate's peak memory, not only time the isolated ones.
    """
    by_name = {row.name: row for row in rows if row.case == case}
    for candidate in candidates:
        row, limit_secs = by_name[candidate.name], candidate.isolated_secs
        n_warm_up = int(candidate.isolated_samples > 1)
        if row.note or not (limit_secs or memory) or context.seconds_left() < 0:
            row.note = row.note or ("" if row.samples_secs else "not measured: out of time")
            continue
        result = isolate(
            benchmark,
            case,
            candidate.name,
            context,
            repetitions=candidate.isolated_samples + n_warm_up if limit_secs else 2,
            environment=candidate.environment,
            limit_secs=min(limit_secs or 120.0, max(5.0, context.seconds_left())),
        )
        if result.peak_rss_bytes:
            row.metrics["peak_rss_bytes"] = result.peak_rss_bytes
        if limit_secs:
            row.samples_secs, row.note = result.samples_secs[n_warm_up:], result.note
            if not result.samples_secs and result.unfinished_secs:
                row.samples_secs, row.at_least = [result.unfinished_secs], True
