"""How candidates take turns, and how failures are recorded."""

import itertools
import math
import sys

import jax.numpy as jnp
import pytest

from benchmarks import harness
from benchmarks.harness import Candidate, Context, NotMeasured, Prepared, Row

CASE = {"L": 4}


def recorder(log, durations):
    """Candidates that write their names into ``log`` and move a clock by their duration."""
    now = [0.0]

    def candidate(name, secs):
        def run():
            log.append(name)
            now[0] += secs

        return Candidate(name, lambda: Prepared(run, lambda: {"x_bytes": 7.0}, {"size": 2.0}))

    return [candidate(*item) for item in durations.items()], lambda: now[0]


def test_rounds_interleave_and_each_starts_with_another():
    log, rows = [], []
    candidates, clock = recorder(log, {"a": 1.0, "b": 2.0, "c": 4.0})
    harness.measure(candidates, CASE, rows, rounds=3, candidate_secs=100, clock=clock)
    assert "".join(log) == "abc" + "abc" + "bca" + "cab"  # the warm-up, then the rounds
    assert [row.samples_secs for row in rows] == [[1.0] * 3, [2.0] * 3, [4.0] * 3]
    assert rows[1].metrics == {"x_bytes": 7.0, "size": 2.0} and rows[1].case == CASE


def test_a_slow_candidate_stops_when_its_time_is_used_up_with_at_least_one_sample():
    log, rows = [], []
    candidates, clock = recorder(log, {"quick": 1.0, "slow": 4.0, "slowest": 50.0})
    harness.measure(candidates, CASE, rows, rounds=6, candidate_secs=7.0, clock=clock)
    assert [len(row.samples_secs) for row in rows] == [6, 2, 1]


def test_a_failing_candidate_gets_a_note_and_the_others_continue():
    calls = itertools.count()

    def fails(error):
        raise error

    def fails_late():
        if next(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: 5 GB")

    candidates = [
        Candidate("absent", lambda: fails(NotMeasured("not installed"))),
        Candidate("broken", lambda: Prepared(lambda: fails(ValueError("bad\nsecond line")))),
        Candidate("late", lambda: Prepared(fails_late)),
        Candidate("sound", lambda: Prepared(lambda: 0.5)),  # returns the seconds that count
    ]
    rows = []
    harness.measure(candidates, CASE, rows, rounds=4, candidate_secs=100)
    assert [row.note for row in rows] == ["not installed", "ValueError: bad", "out of memory", ""]
    assert [len(row.samples_secs) for row in rows] == [0, 0, 1, 4]
    assert rows[3].samples_secs == [0.5] * 4


def test_an_interrupt_keeps_the_samples_so_far():
    calls = itertools.count()

    def run():
        if next(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    rows = []
    with pytest.raises(KeyboardInterrupt):
        harness.measure(
            [Candidate("a", lambda: Prepared(run))], CASE, rows, rounds=9, candidate_secs=100
        )
    assert rows[0].samples_secs == [1.0, 1.0]


def test_after_the_deadline_one_candidate_has_one_round():
    rows = []
    harness.measure(
        [Candidate(name, lambda: Prepared(lambda: 1.0)) for name in "ab"],
        CASE,
        rows,
        rounds=9,
        candidate_secs=100,
        deadline=-math.inf,
    )
    assert [row.samples_secs for row in rows] == [[1.0], []]
    assert rows[1].note == "not measured: out of time"


def test_a_missing_peer_is_named_with_its_remedy():
    with pytest.raises(NotMeasured, match=r"surely_absent is not installed: pip install .*bench"):
        harness.import_peer("surely_absent.inner")


def test_a_program_larger_than_the_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(harness, "available_bytes", lambda: 1e6)
    x = jnp.zeros(1000)
    _, memory = harness.compiled(lambda x: x + 1, x)
    assert memory["program_bytes"] == 8000  # 1000 float32 in and out
    with pytest.raises(NotMeasured, match=r"needs .* GB"):
        harness.compiled(lambda x: jnp.outer(x, x), x)  # 4 MB


def fake_process(monkeypatch, code):
    """Lets ``isolate`` start this Python code in place of the probe."""
    start = harness.subprocess.Popen
    monkeypatch.setattr(
        harness.subprocess,
        "Popen",
        lambda words, **options: start([sys.executable, "-c", code], **options),
    )


CONTEXT = Context("cpu", "cpu")


def test_a_process_that_takes_too_long_is_ended_and_gives_a_lower_bound(monkeypatch):
    fake_process(
        monkeypatch, 'import time; print("{\\"begins\\": true}", flush=True); time.sleep(60)'
    )
    candidate, rows = Candidate("slow", dict, isolated_secs=3.0), [Row(CASE, "slow")]
    harness.measure_isolated("any", [candidate], CASE, rows, CONTEXT, memory=False)
    (row,) = rows
    assert row.at_least and row.note == "stopped after 3 s"
    assert 0 < row.samples_secs[0] <= 3.5  # it began some time after the process was started
    assert row.metrics["peak_rss_bytes"] > 1e6  # a Python process takes some megabytes


def test_a_process_reports_samples_and_memory_or_its_failure(monkeypatch):
    fake_process(
        monkeypatch,
        "print('chatter'); print('{\"sample_secs\": 2.5}'); print('{\"peak_rss_bytes\": 9}')",
    )
    found = harness.isolate("any", CASE, "x", CONTEXT, repetitions=1, limit_secs=30)
    assert (found.samples_secs, found.peak_rss_bytes, found.note) == ([2.5], 9, "")
    monkeypatch.undo()
    fake_process(monkeypatch, "raise SystemExit(9)")
    found = harness.isolate("any", CASE, "x", CONTEXT, repetitions=1, limit_secs=30)
    assert found.note == "its process ended with status 9"
