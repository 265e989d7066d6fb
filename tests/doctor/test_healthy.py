"""A healthy run raises no finding, whatever its length, schedule, noise or history."""

import json
import math
import pathlib

import numpy as np
import pytest

from mamba_jax.doctor import rules, signals
from mamba_jax.runs import metrics

from .synthetic import Plan, from_records, records

FOLDER = pathlib.Path("run")
LONG = 200_000
PLANS = {
    **{f"hybrid, seed {seed}": Plan(seed=seed) for seed in range(10)},
    **{f"mamba, seed {seed}": Plan(seed=seed, family="mamba") for seed in range(10, 16)},
    **{
        f"{steps} steps": Plan(steps=steps, seed=steps, evaluations=evaluations)
        for steps, evaluations in ((50, 1), (51, 2), (150, 3), (300, 4), (1_000, 5), (9_999, 7))
    },
    **{
        f"{steps} steps of a warm-up of 2000": Plan(
            steps=steps, seed=1, warmup_steps=2_000, max_steps=100_000, evaluations=0
        )
        for steps in (50, 500, 2_500)
    },
    "no warm-up": Plan(warmup_steps=0, seed=3),
    "fast preset": Plan(steps=5_000, max_steps=50_000, learning_rate=5e-4, warmup_steps=1_000),
    "careful preset": Plan(steps=20_000, max_steps=200_000, learning_rate=1e-4, warmup_steps=5_000),
    "resumed": Plan(resumed=(700, 1_400), seed=4),
    "on a processor": Plan(device_kind="cpu", seed=5),
    "logs seldom": Plan(log_steps=100, seed=6),
    "logs each step": Plan(steps=500, log_steps=1, seed=7),
    "long": Plan(steps=LONG, warmup_steps=2_000, evaluations=40, seed=8),
}


def examine(lines) -> rules.Diagnosis:
    return rules.examine(from_records(FOLDER, lines))


def output(diagnosis: rules.Diagnosis) -> dict[str, str]:
    return {rule: finding.title for rule, finding in diagnosis.findings}


@pytest.mark.parametrize("name", PLANS)
def test_a_healthy_run_raises_no_finding(name):
    diagnosis = examine(records(PLANS[name]))
    assert output(diagnosis) == {}
    assert set(diagnosis.clear) | set(diagnosis.unchecked) == set(rules.RULES)
    if PLANS[name].steps >= 1_000 and PLANS[name].evaluations >= 4 and "preset" not in name:
        assert not diagnosis.unchecked, "silent only because of missing data"


def test_a_short_run_says_what_it_lacks():
    lacks = examine(records(Plan(steps=40, evaluations=1))).unchecked
    assert lacks["loss falls"] == "needs 200 steps after the warm-up; the run has 36"
    assert lacks["overfitting"] == "needs 4 evaluations; the run has 1"
    assert {"learning rate", "loss spikes", "speed"} <= lacks.keys()


@pytest.mark.parametrize(
    "key", ["unigram_nll", "eval_loss", "dt_mean", "depth_mean", "data_wait", "tokens_per_sec"]
)
def test_older_runs_without_some_records(key):
    lines = [{k: v for k, v in line.items() if k != key} for line in records()]
    for line in lines:
        if "run" in line:
            line["run"] = {k: v for k, v in line["run"].items() if k != key}
    assert output(examine(lines)) == {}


def test_a_run_that_records_losses_alone():
    lines = [{"step": r["step"], "loss": r["loss"]} for r in records() if "loss" in r]
    diagnosis = examine(lines)
    assert output(diagnosis) == {}
    assert {"Δ", "A", "depth gates", "speed", "memory", "clipping"} <= diagnosis.unchecked.keys()


def test_a_config_of_another_version():
    lines = records()
    lines[0]["run"]["config"]["model"]["of_the_future"] = 1
    run = from_records(FOLDER, lines)
    assert run.config is None
    assert output(rules.examine(run)) == {}


def test_a_record_that_begins_late():
    """Where an earlier part is lost, a loss that is low and flat means nothing."""
    late = [line for line in records(Plan(steps=4_000)) if line["step"] > 3_000]
    diagnosis = examine(late)
    assert output(diagnosis) == {}
    assert "loss falls" in diagnosis.unchecked


def test_steps_recorded_twice_count_as_the_later_record():
    lines = records(Plan(steps=1_000))
    wild = [{"step": step, "loss": 50.0, "gradient_norm": 1e3} for step in range(400, 600)]
    cut = next(i for i, line in enumerate(lines) if line["step"] == 400)
    assert output(examine(lines[:cut] + wild + lines[cut:])) == {}
    assert output(examine(lines[:cut] + lines[cut:] + wild)) != {}


def test_a_resumed_run_is_that_of_its_file(tmp_path):
    """An error before the run was resumed is not reported, and its lost steps have no effect."""
    lines = records(Plan(steps=1_000))
    cut = next(i for i, line in enumerate(lines) if line["step"] == 600)
    first = metrics.History(tmp_path, 0)
    for line in lines[:cut]:
        first.append(**line)
    for step in range(600, 650):
        first.append(step=step, loss=1e9, learning_rate=1.0, gradient_norm=math.nan)
    first.append(step=599, ended="OSError: no space left on device")
    first.close()
    again = metrics.History(tmp_path, 599)
    again.append(**lines[0] | {"step": 599})
    for line in lines[cut:]:
        again.append(**line)
    again.close()
    run = signals.read(tmp_path)
    assert run["loss"].values.tolist() == [r["loss"] for r in lines if "loss" in r]
    assert output(rules.examine(run)) == {}


def test_a_cut_last_line(tmp_path):
    lines = records(Plan(steps=300))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / metrics.NAME).write_text(text[:-20])
    assert output(rules.examine(signals.read(tmp_path))) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_reported_and_disturbs_no_other_rule(value):
    lines = records(Plan(steps=1_000))
    for line in lines:
        if line["step"] > 990:
            for key in line.keys() - {"step"}:
                if type(line[key]) is float:
                    line[key] = value
                elif isinstance(line[key], list):
                    line[key] = [value] * len(line[key])
    diagnosis = examine(lines)
    assert output(diagnosis) == {"end of the run": "The training diverged"}
    (finding,) = (finding for _, finding in diagnosis.findings)
    assert "step 991" in finding.evidence[0]


def test_windows_are_relative_to_the_length():
    for steps in (50, 399, 200_000):
        curve = signals.Curve(np.arange(1, steps + 1), np.zeros(steps))
        parts = signals.windows(curve)
        assert sum(map(len, parts)) == steps
        assert len(parts) == min(40, steps // 10)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
