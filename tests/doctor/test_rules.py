"""Each rule: a run with its fault, under several seeds, and a similar run without a finding."""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from mamba_jax.doctor import remedies, rules
from mamba_jax.doctor.finding import Finding, Severity

from .synthetic import UNIGRAM, VOCABULARY, Arrays, Fault, Plan, changed, from_records, records

FOLDER = pathlib.Path("run")
SEEDS = (0, 1, 2)
LN_V = math.log(VOCABULARY)


def findings(plan: Plan, *faults: Fault) -> dict[str, Finding]:
    return dict(rules.examine(from_records(FOLDER, records(plan, *faults))).findings)


def from_on(share: float, change: Callable[[np.ndarray], np.ndarray]) -> Callable:
    """Changes the last part of a curve: ``change`` gets its values, (…, n)."""

    def apply(values: np.ndarray) -> np.ndarray:
        start = int(share * values.shape[-1])
        return np.concatenate([values[..., :start], change(values[..., start:])], axis=-1)

    return apply


def ramp(values: np.ndarray, to: float) -> np.ndarray:
    """Multiplies by 1 at the beginning of the values, up to ``to`` at their end."""
    return values * to ** np.linspace(0, 1, values.shape[-1])


def bump(starts: tuple[int, ...], height: float, length: int) -> Fault:
    def fault(a: Arrays) -> None:
        for start in starts:
            a["loss"][start : start + length] *= height
            a["gradient_norm"][start : start + length] *= 5

    return fault


def skip(every: int) -> Fault:
    return changed(skipped=lambda skipped: np.arange(len(skipped)) % every == every - 1)


def ended_by(text: str) -> Fault:
    return lambda a: a.update(ended=text)


def warn(step: int, text: str) -> Fault:
    return lambda a: a["warnings"].append((step, text))


OOM = "out of memory with a microbatch of 8: continuing with 4 × 8 (before 8 × 4; the effective …)"
GB = 2**30
PLAIN = Plan()
NOISY = changed(loss=lambda v: LN_V + np.random.default_rng(9).normal(0, 0.05, len(v)))


def at_level(level: float, steps: float = 80.0) -> Fault:
    """The loss comes down to a level within some hundred steps, and stays there."""

    def change(loss: np.ndarray) -> np.ndarray:
        text = loss / np.median(
            np.lib.stride_tricks.sliding_window_view(np.pad(loss, 25, mode="edge"), 51), axis=1
        )
        return text * (level + (LN_V - level) * np.exp(-np.arange(len(loss)) / steps))

    return changed(loss=change)


def layer(number: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Sets what one layer has from the middle on."""

    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[number, values.shape[1] // 2 :] = value
        return values

    return change


# rule, name of the case, plan, faults, title's beginning, severity, figures in the evidence
SHOWN = [
    ("end of the run", "diverged", PLAIN,
     [ended_by("UserError: training diverged at step 2000: the gradient norm 2e+04 exceeds …")],
     "The training diverged", Severity.CRITICAL, ["step 2,000", "2e+04"]),
    ("end of the run", "error", PLAIN, [ended_by("OSError: [Errno 28] No space left on device")],
     "OSError ended the run", Severity.CRITICAL, ["No space left"]),
    ("end of the run", "mistake", PLAIN, [ended_by("UserError: data.cache_dir is gone")],
     "An error ended the run", Severity.CRITICAL, ["cache_dir"]),
    ("end of the run", "memory", PLAIN, [ended_by("JaxRuntimeError: RESOURCE_EXHAUSTED: Out of …")],
     "The run ran out of memory", Severity.CRITICAL, ["RESOURCE_EXHAUSTED"]),
    ("end of the run", "stopped", PLAIN, [ended_by("KeyboardInterrupt: ")],
     "The run was stopped", Severity.NOTE, ["step 2,000"]),
    ("loss falls", "flat", PLAIN, [NOISY],
     "The loss does not fall", Severity.CRITICAL, ["10.8", "steps 1,801 to 2,000"]),
    ("loss falls", "frequencies", PLAIN, [at_level(UNIGRAM)],
     "The model has only learned token frequencies", Severity.CRITICAL, ["7.4"]),
    ("learning rate", "climbs", PLAIN, [changed(loss=from_on(0.2, lambda v: ramp(v, 2.5)))],
     "The learning rate is too high", Severity.CRITICAL, ["lowest loss", "0.00028 then"]),
    ("learning rate", "overshoots", PLAIN,
     [changed(loss=lambda v: v * (1 + np.arange(len(v)) / 20 * np.exp(-np.arange(len(v)) / 40)))],
     "The learning rate is too high", Severity.CRITICAL, ["at the start"]),
    ("learning rate", "climbs late", PLAIN, [changed(loss=from_on(0.8, lambda v: ramp(v, 1.6)))],
     "The loss rises", Severity.WARNING, ["lowest loss"]),
    ("vanishing gradients", "to nothing", PLAIN,
     [NOISY, changed(gradient_norm=lambda norm: ramp(norm, 1e-5))],
     "The gradients vanish", Severity.CRITICAL, ["gradient norm"]),
    ("growing gradients", "by 100", PLAIN,
     [changed(gradient_norm=from_on(0.4, lambda v: ramp(v, 100)))],
     "The gradients grow", Severity.WARNING, ["clipped at 1"]),
    ("loss spikes", "one", PLAIN, [bump((900,), 1.5, 8)],
     "The loss spikes", Severity.NOTE, ["1 spike, beginning at step 901"]),
    ("loss spikes", "one step, worse than at the start", PLAIN, [bump((39,), 4.5, 1)],
     "The loss spikes", Severity.WARNING, ["beginning at step 40", "the loss at the start was 1"]),
    ("loss spikes", "soon", Plan(steps=60, warmup_steps=5), [bump((30,), 1.6, 4)],
     "The loss spikes", Severity.WARNING, ["1 spike, beginning at step 31"]),
    ("loss spikes", "several", PLAIN, [bump((500, 900, 1_300, 1_700), 1.4, 6)],
     "The loss spikes", Severity.WARNING, ["4 spikes, beginning at step 501, 901, 1,301, 1,701"]),
    ("overfitting", "rises", PLAIN, [changed(eval_loss=from_on(0.4, lambda v: ramp(v, 1.3)))],
     "The model overfits", Severity.WARNING, ["evaluation loss", "training loss"]),
    ("Δ", "explodes", PLAIN, [changed(dt_max=layer(2, 350.0))],
     "Δ runs away", Severity.WARNING, ["layer 2 of 4", "3.5e+02"]),
    ("Δ", "grows", PLAIN,
     [changed(dt_max=lambda v: np.where(np.arange(4)[:, None] == 1, ramp(0.2 + 0 * v, 400), v))],
     "Δ runs away", Severity.WARNING, ["layer 1 of 4"]),
    ("Δ", "forgets", PLAIN, [changed(dt_mean=layer(0, 30.0))],
     "Δ runs away", Severity.WARNING, ["layer 0 of 4", "30 now"]),
    ("Δ", "towards 0", PLAIN, [changed(dt_mean=layer(3, 2e-5))],
     "Δ collapses towards 0", Severity.WARNING, ["layer 3 of 4", "2e-05"]),
    ("A", "fast", PLAIN, [changed(A_min=layer(1, -900.0))],
     "The decay rates A run away", Severity.WARNING, ["layer 1 of 4", "-900"]),
    ("A", "slow", PLAIN, [changed(A_max=layer(2, -1e-5))],
     "The decay rates A run away", Severity.WARNING, ["layer 2 of 4", "-1e-05"]),
    ("depth gates", "closed by share", PLAIN, [changed(gates_closed=layer(0, 0.99))],
     "Depth gates are stuck closed", Severity.NOTE, ["layer 0 of 4", "99%"]),
    ("depth gates", "closed, by the layers' own numbers", Plan(layers="(M,M,H)*4"),
     [changed(gates_closed=layer(1, 0.99))],
     "Depth gates are stuck closed", Severity.NOTE, ["layer 5 of 12", "99%"]),
    ("depth gates", "open by share", PLAIN, [changed(gates_open=lambda v: 0.98 + 0 * v)],
     "Depth gates are stuck open", Severity.WARNING, ["layers 0, 1, 2 and 3 of 4"]),
    ("depth gates", "closed by depth", PLAIN, [changed(depth_mean=lambda v: 0.05 + 0 * v)],
     "Depth gates are stuck closed", Severity.WARNING, ["mean depth 0.05 of 3"]),
    ("depth gates", "open by depth", PLAIN, [changed(depth_mean=layer(2, 2.95))],
     "Depth gates are stuck open", Severity.NOTE, ["layer 2 of 4", "2.95 of 3"]),
    ("skipped steps", "many", PLAIN, [skip(20)],
     "Many steps are skipped", Severity.WARNING, ["100 of 2,000 steps (5.0%)", "step 20"]),
    ("speed", "half", PLAIN, [changed(tokens_per_sec=from_on(0.7, lambda v: v / 2))],
     "The training has become slower", Severity.WARNING, ["-50%", "-49%", "-51%"]),
    ("waiting for data", "stalls", PLAIN, [changed(data_wait=from_on(0.3, lambda v: v + 0.85))],
     "The training waits for data", Severity.WARNING, ["90%", "89%", "91%"]),
    ("waiting for data", "near", PLAIN, [changed(data_wait=from_on(0.3, lambda v: v + 0.55))],
     "Reading data takes a long time", Severity.NOTE, ["60%", "59%", "61%"]),
    ("memory", "full", PLAIN, [changed(memory_bytes=lambda v: v * 0 + round(39.5 * GB))],
     "The memory is nearly full", Severity.NOTE, ["40,448 MiB of 40,960 MiB (98.8%)"]),
    ("memory", "shrunk", PLAIN, [warn(3, OOM)],
     "Out of memory; the trainer halved", Severity.WARNING, ["step 3", "microbatch of 8"]),
    ("clipping", "always", PLAIN, [changed(gradient_norm=lambda v: 8 + 5 * v)],
     "Nearly every step is clipped", Severity.NOTE, ["100.0% of steps"]),
    ("warnings", "one", PLAIN, [warn(7, "TensorBoard cannot be written (disk full); training …")],
     "The run logged a warning", Severity.NOTE, ["step 7: TensorBoard"]),
]  # fmt: skip

# rule, name of the case, plan, faults: close to the rule's fault, but without any finding
SILENT = [
    ("end of the run", "an old error", Plan(resumed=(2_000,)), []),
    ("loss falls", "slow, on its way", PLAIN, [at_level(6.0, steps=2_000.0)]),
    ("loss falls", "just below frequencies", PLAIN, [at_level(UNIGRAM * 0.96)]),
    ("loss falls", "flat at the end, as trained", Plan(steps=9_000, max_steps=9_000), []),
    ("loss falls", "flat, in the warm-up", Plan(warmup_steps=1_900), [NOISY]),
    ("learning rate", "a harder stretch", PLAIN,
     [changed(loss=from_on(0.9, lambda v: v * 1.03))]),
    ("learning rate", "near 0", PLAIN,
     [changed(loss=lambda v: 0.02 + (v - 2.8).clip(0) * np.linspace(1, 0, len(v)) ** 2)]),
    ("vanishing gradients", "as the loss is low", PLAIN,
     [changed(loss=lambda v: ramp(v, 1e-3), gradient_norm=lambda v: ramp(v, 1e-5),
              eval_loss=lambda v: ramp(v, 1e-3))]),
    ("vanishing gradients", "small from the start", PLAIN,
     [changed(gradient_norm=lambda v: v / 10)]),
    ("growing gradients", "tripling", PLAIN,
     [changed(gradient_norm=from_on(0.4, lambda v: ramp(v, 3)))]),
    ("growing gradients", "from nothing, below the clip", PLAIN,
     [changed(gradient_norm=lambda v: np.full(len(v), 0.9) * np.linspace(0.01, 1, len(v)))]),
    ("loss spikes", "odd batches", PLAIN, [bump((300, 700, 1_100, 1_500), 2.5, 1)]),
    ("loss spikes", "a noisy loss", PLAIN,
     [changed(loss=lambda v: v * (1 + 0.05 * np.random.default_rng(3).normal(size=len(v))))]),
    ("overfitting", "one worse evaluation", PLAIN,
     [changed(eval_loss=lambda v: v * np.where(np.arange(len(v)) == len(v) - 1, 1.1, 1))]),
    ("overfitting", "worse, made good", PLAIN,
     [changed(eval_loss=lambda v: v * np.where(np.arange(len(v)) == 5, 1.2, 1))]),
    ("overfitting", "a gap that stays", PLAIN, [changed(eval_loss=lambda v: v + 1.0)]),
    ("Δ", "large for one token", PLAIN, [changed(dt_max=lambda v: v * 0 + 18)]),
    ("A", "spread by training", PLAIN,
     [changed(A_min=lambda v: v * 5, A_max=lambda v: v * 0.05)]),
    ("depth gates", "nearly shut", PLAIN,
     [changed(gates_closed=lambda v: 0.8 + v / 10, depth_mean=lambda v: 0.25 + 0 * v)]),
    ("depth gates", "stuck, then free", PLAIN,
     [changed(gates_open=lambda v: np.where(np.arange(v.shape[1]) < 100, 1.0, v))]),
    ("depth gates", "none, by the plan", Plan(layers="A,M*3"),
     [changed(gates_open=lambda v: 1 + 0 * v)]),
    ("depth gates", "none", Plan(family="mamba"), [changed(gates_open=lambda v: 1 + 0 * v)]),
    ("skipped steps", "few", PLAIN, [skip(400)]),
    ("speed", "a slow while", PLAIN,
     [changed(tokens_per_sec=lambda v: np.where(abs(np.arange(len(v)) - 100) < 20, v / 2, v))]),
    ("speed", "a machine that wanders", PLAIN,
     [changed(tokens_per_sec=lambda v: v * np.random.default_rng(5).uniform(0.4, 1, len(v)))]),
    ("waiting for data", "at the start", PLAIN,
     [changed(data_wait=lambda v: np.where(np.arange(len(v)) < 60, 0.95, v))]),
    ("memory", "of a processor", Plan(device_kind="cpu"),
     [changed(memory_bytes=lambda v: v * 0 + 60 * GB)]),
    ("memory", "as planned", PLAIN, [changed(memory_bytes=lambda v: v * 0 + 38 * GB)]),
    ("clipping", "half of the time", PLAIN, [changed(gradient_norm=lambda v: 0.7 + v)]),
    ("warnings", "skipped steps", PLAIN, [skip(700)]),
]  # fmt: skip


def case(row) -> str:
    return f"{row[0]}: {row[1]}"


@pytest.mark.parametrize("row", SHOWN, ids=case)
def test_what_is_wrong_is_found(row):
    rule, _, plan, faults, title, severity, figures = row
    for seed in SEEDS:
        found = findings(dataclasses.replace(plan, seed=seed), *faults)
        assert rule in found, (seed, list(found))
        finding = found[rule]
        assert finding.title.startswith(title)
        assert finding.severity == severity
        text = " ".join(finding.evidence)
        if "%" in figures[-1] and len(figures) == 3:  # one of them, by the noise
            assert any(figure in text for figure in figures), text
        else:
            assert all(figure in text for figure in figures), text
        assert finding.why and finding.remedies


# From a real run, the quick start: a single step of 70 is at 21 nats.
QUICK_START = """
10.98 10.99 10.78 10.43 10.2 10.06 9.67 9.71 9.54 9.32 9.33 9.43 8.99 8.82 8.24 8.22 8.42 8.22 8.41
7.95 7.31 6.42 6.86 6.79 5.98 5.61 5.0 5.27 5.7 5.56 5.54 4.66 4.49 3.69 3.94 4.21 4.39 4.51 4.57
21.05 5.7 4.03 5.18 4.64 3.77 4.13 4.57 4.44 4.71 3.37 4.05 3.71 4.19 3.88 4.62 4.7 3.62 3.73 3.82
4.09 4.32 4.52 2.97 4.89 4.31 4.5 4.64 5.17 2.87 3.32
"""


@pytest.mark.parametrize("steps", [50, 70])
def test_the_spike_of_the_quick_start(steps):
    losses = [float(word) for word in QUICK_START.split()][:steps]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    examined = rules.examine(from_records(FOLDER, lines))
    (finding,) = [finding for rule, finding in examined.findings if rule == "loss spikes"]
    assert finding.severity == Severity.WARNING
    assert "step 40" in finding.evidence[0] and "21.050 at step 40" in finding.evidence[1]
    lines[39]["loss"] = 4.5
    assert not rules.examine(from_records(FOLDER, lines)).findings


@pytest.mark.parametrize("row", SHOWN, ids=case)
def test_nothing_else_is_found(row):
    """One fault, one finding; only in these cases does a fault cause a second one."""
    rule, _, plan, faults, *_ = row
    follows = {
        "loss falls": {"overfitting"},
        "vanishing gradients": {"loss falls"},
        "clipping": set(),
    }
    found = set(findings(plan, *faults))
    assert found - {rule} <= follows.get(rule, set())


@pytest.mark.parametrize("row", SILENT, ids=case)
def test_nearly_faulty_runs_raise_no_finding(row):
    _, _, plan, faults = row
    for seed in SEEDS:
        found = findings(dataclasses.replace(plan, seed=seed), *faults)
        assert not found, (seed, {name: finding.evidence for name, finding in found.items()})


def test_every_rule_has_both_cases():
    assert {row[0] for row in SHOWN} == {row[0] for row in SILENT} == set(rules.RULES)


def test_a_resumed_run_shows_the_same():
    """The file of a run that was interrupted differs by ``run`` records alone."""
    for rule, _, plan, faults, title, *_ in SHOWN:
        resumed = dataclasses.replace(plan, resumed=(500, 1_500))
        assert findings(resumed, *faults)[rule].title.startswith(title), rule


def test_another_device_has_another_speed():
    lines = records(Plan(), changed(tokens_per_sec=from_on(0.6, lambda v: v / 3)))
    for line in lines:
        if "device_kind" in line and line["step"] > 1_200:
            line["device_kind"] = "Tesla T4"
    run = from_records(FOLDER, lines)
    assert run.layout_step == 1_209
    assert run["tokens_per_sec"].after(run.layout_step).steps[0] == 1_210
    assert "speed" not in dict(rules.examine(run).findings)


def test_another_layout_has_another_speed():
    lines = records(Plan(resumed=(1_200,)), changed(tokens_per_sec=from_on(0.6, lambda v: v / 3)))
    starts = [line for line in lines if "run" in line]
    assert "speed" in dict(rules.examine(from_records(FOLDER, lines)).findings)
    config = starts[1]["run"]["config"]
    changed_model = config["model"] | {"max_seq_len": 8192}
    starts[1]["run"] = starts[1]["run"] | {"config": config | {"model": changed_model}}
    assert "speed" not in dict(rules.examine(from_records(FOLDER, lines)).findings)


def test_the_worst_comes_first():
    run = from_records(
        FOLDER, records(Plan(), warn(3, "x"), changed(dt_max=layer(0, 200.0)), NOISY)
    )
    found = [finding.severity for _, finding in rules.examine(run).findings]
    assert found == sorted(found, reverse=True)
    assert {Severity.CRITICAL, Severity.WARNING, Severity.NOTE} <= set(found)


@pytest.mark.parametrize(
    "rate,text",
    [(1e-4, "0.0001"), (3e-4 / 3, "0.0001"), (9.9e-5, "9e-05"), (0.0123, "0.01"), (3.0, "3")],
)
def test_a_rate_is_rounded_down_to_one_digit(rate, text):
    assert remedies.rate_flag(rate) == f"--config.training.learning_rate={text}"


def test_a_rate_that_has_worked_is_preferred():
    run = from_records(FOLDER, records(Plan(steps=100)))
    peak = run.peak_rate
    assert remedies.rate_flag(peak / 3) in remedies.lower_rate(run).command
    assert remedies.rate_flag(peak / 9) in remedies.lower_rate(run, peak / 9).command
    assert remedies.rate_flag(peak / 3) in remedies.lower_rate(run, peak / 2).command


def test_which_checkpoint_to_resume_from(tmp_path):
    run = from_records(tmp_path / "a b", records(Plan(steps=900, max_steps=1_000)))
    assert remedies.resume(run, "--x=1") == "--x=1", "there is no checkpoint"
    for step in (300, 600, 900):
        (run.folder / f"step_{step}").mkdir(parents=True)
        (run.folder / f"step_{step}" / "config.json").write_text("{}")
        (run.folder / f"step_{step}" / "MANIFEST.json").write_text("{}")
    start = "mamba-jax train --resume"
    assert remedies.resume(run, "--x=1") == f"{start} '{run.folder}' --x=1"
    assert remedies.resume(run, before=700) == f"{start} '{run.folder}/step_600'"
    assert remedies.resume(run, "--x=1", before=200) == "--x=1"
    complete = from_records(run.folder, records(Plan(steps=900)))
    assert remedies.resume(complete, "--x=1") == "--x=1", "a complete run is not resumed"
    assert remedies.resume(complete, before=700) == f"{start} '{run.folder}/step_600'"


@pytest.mark.parametrize(
    "rate,text,advised",
    [
        (1e-5, "Raise the learning rate", "0.0003"),
        (5e-5, "Lower the learning rate", "1e-05"),
        (2.4e-3, "Lower the learning rate", "0.0008"),
        (5e-3, "Lower the learning rate", "0.0003"),
    ],
)
def test_the_remedy_for_a_flat_loss(rate, text, advised):
    finding = findings(Plan(learning_rate=rate), NOISY)["loss falls"]
    (remedy,) = (remedy for remedy in finding.remedies if remedy.text.startswith(text))
    assert remedy.command == f"--config.training.learning_rate={advised}"


@pytest.mark.parametrize("now,then", [(0.0, 5), (8.0, 5), (5.0, 2.5), (3.0, 2)])
def test_skipping_more_spikes_than_so_far(now, then):
    run = from_records(FOLDER, records(Plan(steps=60, training={"skip_spikes": now})))
    assert remedies.skip_spikes(run).command == f"--config.training.skip_spikes={then:g}"


def test_gates_that_are_equal_for_all_tokens_are_not_stuck():
    fault = changed(gates_open=lambda v: 0.98 + 0 * v)
    found = [findings(Plan(gate=gate), fault) for gate in ("token", "channel")]
    assert [("depth gates" in each) for each in found] == [True, False]


@pytest.mark.parametrize(
    ("eigenvalues", "words"), [("positive", "forget"), ("signed", "changes its sign")]
)
def test_what_a_large_step_does_depends_on_the_eigenvalues(eigenvalues, words):
    faults = {"Δ": changed(dt_mean=layer(0, 30.0)), "A": changed(A_min=layer(1, -900.0))}
    for rule, fault in faults.items():
        assert words in findings(Plan(eigenvalues=eigenvalues), fault)[rule].why
