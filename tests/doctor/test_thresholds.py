"""The threshold of each rule: a run just below it and one just above."""

import numpy as np
import pytest

from mamba_jax.doctor import rules

from .synthetic import Arrays, Fault, Plan, changed, from_records, records
from .test_rules import FOLDER, LN_V, UNIGRAM, at_level, bump, findings, from_on, layer, ramp, skip

PLAIN = Plan()


def loss_of(shape, noise: float = 0.004) -> Fault:
    """The loss as a function of the share of the run that is over, with that much noise."""

    def change(loss: np.ndarray) -> np.ndarray:
        share = np.linspace(0, 1, len(loss))
        factor = 1 + noise * np.random.default_rng(1).normal(size=len(loss))
        return np.vectorize(shape)(share) * factor

    return changed(loss=change)


def down_and_up(low: float, rise: float, turn: float = 0.4, noise: float = 0.004):
    """Falls from ln V to ``low``, then rises by this much."""
    return loss_of(lambda x: low + (LN_V - low) * np.exp(-30 * x) + rise * (x > turn), noise)


def evaluation(scale: float, rise: float) -> Fault:
    """The sixth is the best; all after it are higher by a share."""
    return changed(
        eval_loss=lambda v: scale * np.concatenate([v[:6], np.full(len(v) - 6, v[5] * (1 + rise))])
    )


def constant(value: float):
    return lambda values: value + 0 * values


def norms(first: float, last: float) -> Fault:
    """Gradient norms that go from one to the other; there is something left to learn."""
    return changed(
        gradient_norm=lambda v: np.geomspace(first, last, len(v)) * np.ones(len(v)),
        loss=lambda v: v.clip(7.0),
    )


def every(period: int, high: float) -> Fault:
    return changed(gradient_norm=lambda v: np.where(np.arange(len(v)) % period, high, 0.5))


def last_open(count: int, value: float = 0.97):
    """All gates are open in the last records."""
    return lambda v: np.where(np.arange(v.shape[1]) < v.shape[1] - count, v, value)


def two_speeds(slow_before: float, slow_now: float, speed: float):
    """Some intervals are slow: a share of them before, and another in the last tenth."""

    def change(values: np.ndarray) -> np.ndarray:
        share = np.where(np.arange(len(values)) < 0.9 * len(values), slow_before, slow_now)
        order = np.arange(len(values)) * 0.618034 % 1  # spread evenly
        return 60_000 * np.where(order < share, speed, 1.0)

    return change


def grown(a: Arrays, first: float, last: float, name: str = "dt_max") -> None:
    a[name][1] = np.geomspace(first, last, a[name].shape[1])


SHORT = Plan(steps=900)
OF_100 = Plan(steps=100, warmup_steps=10, evaluations=2)
# rule, name, plan, faults without a finding, faults with one; None: the plan decides:
# (plan without a finding, plan with one), with the same faults
CASES = [
    ("loss falls", "share", SHORT, [at_level(LN_V * 0.93)], [at_level(LN_V * 0.97)]),
    ("loss falls", "steps", (SHORT, PLAIN), [at_level(UNIGRAM)], None),
    ("loss falls", "still falling", PLAIN,
     [at_level(UNIGRAM), changed(loss=lambda v: v * np.linspace(1.10, 1, len(v)))],
     [at_level(UNIGRAM), changed(loss=lambda v: v * np.linspace(1.03, 1, len(v)))]),
    ("learning rate", "short", (Plan(steps=49, warmup_steps=5), OF_100),
     [down_and_up(4.0, 2.0)], None),
    ("learning rate", "share", PLAIN, [down_and_up(5.0, 0.15)], [down_and_up(5.0, 0.4)]),
    ("learning rate", "share of the first", PLAIN,
     [down_and_up(0.3, 0.07)], [down_and_up(0.3, 0.2)]),
    ("learning rate", "noise", OF_100,
     [down_and_up(5.0, 0.3, noise=0.04)], [down_and_up(5.0, 1.5, noise=0.04)]),
    ("learning rate", "length of an overshoot", PLAIN,
     [bump((300,), 1.8, 8)], [bump((300,), 1.8, 40)]),
    ("learning rate", "overshoot", PLAIN,
     [loss_of(lambda x: LN_V * (1 + 0.06 * (0.2 < x < 0.25)) - 4 * (x > 0.25))],
     [loss_of(lambda x: LN_V * (1 + 0.25 * (0.2 < x < 0.25)) - 4 * (x > 0.25))]),
    ("loss spikes", "short", (Plan(steps=49, warmup_steps=5), Plan(steps=60, warmup_steps=5)),
     [bump((30,), 2.0, 8)], None),
    ("loss spikes", "early, by share", PLAIN, [bump((20,), 1.15, 5)], [bump((20,), 1.4, 5)]),
    ("loss spikes", "early", PLAIN, [bump((4,), 1.6, 3)], [bump((6,), 1.6, 3)]),
    ("loss spikes", "one step", PLAIN, [bump((39,), 2.5, 1)], [bump((39,), 4.5, 1)]),
    ("loss spikes", "one step, near 0", PLAIN,
     [down_and_up(0.2, 0), bump((900,), 4.0, 1)], [down_and_up(0.2, 0), bump((900,), 9.0, 1)]),
    ("loss spikes", "noise", PLAIN,
     [down_and_up(5.0, 0, noise=0.03), bump((900,), 1.15, 8)],
     [down_and_up(5.0, 0, noise=0.03), bump((900,), 1.4, 8)]),
    ("loss spikes", "share", PLAIN,
     [down_and_up(5.0, 0), bump((900,), 1.07, 8)], [down_and_up(5.0, 0), bump((900,), 1.2, 8)]),
    ("overfitting", "share", PLAIN, [evaluation(1.0, 0.006)], [evaluation(1.0, 0.02)]),
    ("overfitting", "nats", PLAIN, [evaluation(0.05, 0.04)], [evaluation(0.05, 0.2)]),
    ("vanishing gradients", "steps",
     (Plan(steps=45, warmup_steps=4), Plan(steps=100, warmup_steps=10)), [norms(3, 1e-5)], None),
    ("vanishing gradients", "share", PLAIN, [norms(10, 0.018)], [norms(10, 0.0035)]),
    ("vanishing gradients", "epsilon", PLAIN, [norms(0.1, 0.0012)], [norms(0.1, 0.0004)]),
    ("vanishing gradients", "low loss", PLAIN,
     [norms(3, 1e-5), changed(loss=lambda v: v * np.linspace(1, 0.6, len(v)))],
     [norms(3, 1e-5)]),
    ("growing gradients", "times", PLAIN, [norms(0.5, 3.5)], [norms(0.5, 12)]),
    ("growing gradients", "clip", PLAIN, [norms(0.01, 0.8)], [norms(0.01, 1.6)]),
    ("clipping", "share", PLAIN, [every(60, 9.0)], [every(180, 9.0)]),
    ("clipping", "times", PLAIN, [every(500, 3.5)], [every(500, 7.0)]),
    ("skipped steps", "share", PLAIN, [skip(150)], [skip(60)]),
    ("skipped steps", "number", Plan(steps=300), [skip(75)], [skip(40)]),
    ("Δ", "forgets", PLAIN,
     [changed(dt_mean=layer(0, 3.5), A_max=constant(-1.0))],
     [changed(dt_mean=layer(0, 7.0), A_max=constant(-1.0))]),
    ("Δ", "least", PLAIN, [changed(dt_mean=layer(0, 2e-4))], [changed(dt_mean=layer(0, 6e-5))]),
    ("Δ", "most", PLAIN,
     [changed(dt_max=layer(0, 1.0)), lambda a: grown(a, 70, 75)],
     [changed(dt_max=layer(0, 1.0)), lambda a: grown(a, 140, 150)]),
    ("Δ", "grows from", PLAIN,
     [lambda a: grown(a, 1, 14)], [lambda a: grown(a, 1, 40)]),
    ("Δ", "evaluations", (Plan(evaluations=3), PLAIN), [lambda a: grown(a, 1, 40)], None),
    ("A", "slower", PLAIN, [changed(A_max=layer(0, -2e-3))], [changed(A_max=layer(0, -5e-4))]),
    ("depth gates", "records",
     (Plan(steps=220, evaluations=2), Plan(steps=260, evaluations=2)),
     [changed(gates_open=constant(1.0))], None),
    ("depth gates", "a while", PLAIN,
     [changed(gates_open=last_open(5))], [changed(gates_open=last_open(30))]),
    ("depth gates", "a while, by depth", PLAIN,
     [changed(depth_mean=last_open(5, 2.95))], [changed(depth_mean=last_open(30, 2.95))]),
    ("speed", "apart", PLAIN, [changed(tokens_per_sec=two_speeds(0.45, 0.65, 0.5))],
     [changed(tokens_per_sec=two_speeds(0.05, 0.9, 0.5))]),
    ("speed", "share", PLAIN,
     [changed(tokens_per_sec=from_on(0.7, lambda v: v * 0.82))],
     [changed(tokens_per_sec=from_on(0.7, lambda v: v * 0.6))]),
    ("speed", "intervals", (Plan(steps=190, evaluations=2), Plan(steps=300, evaluations=2)),
     [changed(tokens_per_sec=from_on(0.6, lambda v: v * 0.4))], None),
    ("waiting for data", "near", PLAIN,
     [changed(data_wait=constant(0.4))], [changed(data_wait=constant(0.6))]),
    ("waiting for data", "intervals",
     (Plan(steps=40, evaluations=1), Plan(steps=60, evaluations=1)),
     [changed(data_wait=constant(0.9))], None),
    ("memory", "share", PLAIN,
     [changed(memory_bytes=lambda v: v * 0 + round(0.96 * 40 * 2**30))],
     [changed(memory_bytes=lambda v: v * 0 + round(0.98 * 40 * 2**30))]),
]  # fmt: skip


@pytest.mark.parametrize("row", CASES, ids=lambda row: f"{row[0]}: {row[1]}")
def test_both_sides(row):
    rule, _, plan, silent, loud_faults = row
    quiet, loud = plan if isinstance(plan, tuple) else (plan, plan)
    assert rule not in findings(quiet, *silent)
    assert rule in findings(loud, *(silent if loud_faults is None else loud_faults))


@pytest.mark.parametrize("wait,title", [(0.75, "Reading data"), (0.85, "The training waits")])
def test_a_stall_is_worse_than_a_long_wait(wait, title):
    finding = findings(PLAIN, changed(data_wait=constant(wait)))["waiting for data"]
    assert finding.title.startswith(title)


@pytest.mark.parametrize("at", [0.25, 0.9])
def test_late_climbs_are_not_blamed_on_a_small_learning_rate(at):
    fault = changed(loss=from_on(at, lambda v: ramp(v, 3.0)))
    blamed = findings(PLAIN, fault)["learning rate"].title
    assert blamed == ("The learning rate is too high" if at < 0.5 else "The loss rises")


def test_a_rise_of_both_losses_is_not_overfitting():
    both = down_and_up(5.0, 1.0, turn=0.7)
    assert "overfitting" in findings(PLAIN, down_and_up(5.0, 0), evaluation(1.0, 0.2))
    assert "overfitting" not in findings(PLAIN, both, evaluation(1.0, 0.2))


def test_a_record_that_begins_late_has_no_first_loss():
    """Its first loss is not that of random guessing, and may be exceeded for a while."""
    bulge = loss_of(lambda x: 6.0 + 2.0 * (0.2 < x < 0.25))
    late = [line for line in records(PLAIN, bulge) if line["step"] > 100 or "run" in line]
    found = dict(rules.examine(from_records(FOLDER, late)).findings)
    assert "learning rate" not in found
    assert "learning rate" in findings(PLAIN, bulge)
