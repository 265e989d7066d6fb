"""What is written: ratios, the JSON's round trip, the table."""

import pytest

from benchmarks import report
from benchmarks.harness import Check, Context, Row

CASE = {"L": 512}
ENVIRONMENT = {
    "device": "cpu",
    "cpu": "a processor",
    "cores_used": 1,
    "cores_of_machine": 2,
    "load_average_at_start": 0.0,
    "load_average_at_end": 1.0,
    "date": "2026-01-01",
    "git_commit": "0123456789",
    "versions": {"jax": "0.10.2"},
    "command_line": "python -m benchmarks.run scan",
}


def result(rows):
    checks = [Check("it holds", True, "2.0"), Check("it fails", False, ""), Check("who", None, "")]
    return report.Result("scan", True, "ours", "complete", ENVIRONMENT, rows, checks)


ROWS = [
    Row(CASE, "ours", [0.010, 0.020, 0.012], {"temporary_bytes": 2e6}),
    Row(CASE, "peer", [0.030, 0.060, 0.012], {"floor_share": 0.25}),
    Row(CASE, "absent", note="not installed"),
    Row(CASE, "stopped", [2.0], {"tokens_per_sec": 256.0}, True, "stopped after 2 s"),
    Row({"L": 1024}, "peer", [1.0]),
]


def test_a_ratio_is_the_median_over_rounds_not_of_the_medians():
    # By rounds 3, 3 and 1; the medians 30 and 12 ms would give 2.5.
    assert report.ratio(ROWS[1], ROWS[0]) == pytest.approx(3.0)
    assert report.ratio(ROWS[2], ROWS[0]) is None
    assert report.ratio(ROWS[3], ROWS[0]) == pytest.approx(2.0 / 0.012)  # by medians: one sample


def test_json_is_read_back_as_it_was():
    assert report.from_json(report.to_json(result(ROWS))) == result(ROWS)


def test_the_table_has_medians_spread_ratios_and_reasons():
    lines = report.markdown(result(ROWS)).splitlines()
    cells = {tuple(line.split(" | ")[0:2]): line.strip("| ").split(" | ") for line in lines}
    header = next(line for line in lines if line.startswith("| L |")).strip("| ").split(" | ")
    assert header == [
        *("L", "implementation", "time (ms)", "25–75%", "time ÷ ours"),
        *("temporary (MB)", "floor (%)", "tokens per sec", "note"),
    ]
    assert cells["| 512", "ours"] == ["512", "ours", "12", "11–16", "1.00", "2", "–", "–"]
    assert cells["| 512", "peer"] == ["512", "peer", "30", "21–45", "3.00", "–", "25", "–"]
    assert cells["| 512", "absent"][-1] == "not installed"
    assert cells["| 512", "stopped"][2] == "> 2,000" and cells["| 512", "stopped"][4] == "> 166.67"
    assert cells["| 512", "stopped"][7] == "< 256"
    assert cells["| 1024", "peer"][4] == "–"  # no baseline of that length
    assert "- pass: it holds. 2.0" in lines
    assert "- **FAIL**: it fails." in lines and "- no figures: who." in lines


def test_files_are_named_by_benchmark_device_and_whether_quick():
    stem = report.file_stem(result([]), Context("gpu", "NVIDIA GeForce RTX 4080"))
    assert stem == "scan_nvidia_geforce_rtx_4080_quick"
