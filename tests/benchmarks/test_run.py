"""The command from end to end, on a benchmark small enough for a test."""

import dataclasses
import functools
import itertools
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import depth, hybrid, report, run, scaling, scan, startup
from benchmarks.harness import Candidate, Context, Prepared, Row, measure
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.config import plan as plans
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.models import build
from tests.support.made import random_params
from tests.support.tiny_models import CONFIGS


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def test_mistakes_are_one_line_with_the_remedy(capsys):
    assert run.main(["scann"]) == 2
    assert 'unknown benchmark "scann"; did you mean "scan"?' in capsys.readouterr().err
    assert run.main(["scan", "--threads=-1"]) == 2
    assert "--threads=-1 must be between 0 (all)" in capsys.readouterr().err
    assert run.main(["scan", "--budget_secs=0"]) == 2
    assert "--budget_secs=0.0 must be greater than 0" in capsys.readouterr().err
    assert run.main(["depth"]) == 2
    assert "give --checkpoint DIR" in capsys.readouterr().err
    assert run.main(["scan", "--checkpoint=x"]) == 2
    assert "--checkpoint=x has no effect on scan" in capsys.readouterr().err


def test_every_benchmark_has_the_parts_that_the_command_uses():
    for name in run.BENCHMARKS:
        module = run.load(name)
        for platform in ("cpu", "gpu", "tpu"):
            context = Context(platform, "a device")
            cases = module.cases(context)
            assert cases and len({report.case_key(case) for case in cases}) == len(cases)
            assert module.checks([], context) is not None
        assert module.BASELINE in [c.name for c in module.candidates(cases[0], context)]


def test_startup_writes_json_table_and_picture(tmp_path):
    done = command("startup", "--quick", "--budget_secs=0.001", f"--output={tmp_path}")
    assert done.returncode == 0, done.stderr
    stem = "startup_cpu_quick"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{stem}.{e}" for e in ("json", "md", "png")
    ]
    result = report.from_json((tmp_path / f"{stem}.json").read_text())
    # What began before the budget was spent is kept; nothing else began.
    assert result.ending in [f"out of time after {n} of 2 cases" for n in (0, 1)]
    assert result.environment["versions"]["jax"] and result.environment["device"] == "cpu"
    assert (
        result.environment["command_line"] == "python -m benchmarks.run startup --quick --threads=0"
    )
    assert (tmp_path / f"{stem}.md").read_text() in done.stdout
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupt_keeps_what_was_measured():
    def one(case, context, rows):
        if case["L"] == 2:
            rows.append(Row(case, "a"))
            raise KeyboardInterrupt
        measure(
            [Candidate("a", lambda: Prepared(lambda: 1.0))], case, rows, rounds=2, candidate_secs=9
        )

    benchmark = types.SimpleNamespace(cases=lambda _: [{"L": i} for i in range(1, 4)], measure=one)
    rows = []
    assert run.run_cases(benchmark, Context("cpu", "cpu"), rows) == "interrupted"
    assert [row.samples_secs for row in rows] == [[1.0, 1.0], []]
    assert rows[1].note == "not measured: interrupted"


def test_scaling_is_measured_and_judged():
    context = Context("cpu", "cpu", quick=True)
    case, rows = {"task": "forward", "family": "mamba", "B": 1}, []
    lengths = scaling.lengths
    try:
        scaling.lengths = lambda _: [64, 128]
        scaling.measure(case, context, rows)
    finally:
        scaling.lengths = lengths
    assert [row.name for row in rows] == ["L = 64", "L = 128"]
    assert all(len(row.samples_secs) == 3 and not row.note for row in rows)
    assert rows[1].metrics["temporary_bytes"] > 1.5 * rows[0].metrics["temporary_bytes"]
    time, memory = scaling.checks(rows, context)
    assert time.passed is not None and memory.passed is not None


def test_deviation_is_measured_from_the_median_per_token():
    # Per token 1, 1 and 1.3.
    assert scaling.worst_deviation({10: 10.0, 20: 20.0, 40: 52.0}) == (40, pytest.approx(0.3))
    # Too cheap counts as well: 0.5, 1 and 1.05.
    assert scaling.worst_deviation({10: 5.0, 20: 20.0, 40: 42.0}) == (10, pytest.approx(-0.5))


def test_auto_is_compared_with_the_best_of_ours_only():
    def rows(**secs):
        return [Row({"B": 1}, name, [value] * 3) for name, value in secs.items()]

    context = Context("cpu", "cpu")
    (check,) = scan.checks(rows(auto=1.0, chunked=0.95, a_peer=0.1), context)
    assert check.passed and "0.95, of chunked" in check.detail
    (check,) = scan.checks(rows(auto=1.0, chunked=0.95, sequential=0.8), context)
    assert check.passed is False and "0.80, of sequential" in check.detail


def test_a_process_that_fails_to_compile_is_an_error_not_a_time():
    with pytest.raises(subprocess.CalledProcessError):
        startup.compile_in_process("no-such-size", "/nowhere")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_plan_is_compared_with_a_mamba_of_as_many_parameters(platform):
    context = Context(platform, "a device")
    groups = {case["plan"]: hybrid.models(case, context) for case in hybrid.cases(context)}
    assert len(groups) == len(hybrid.PLANS) + 1
    for plan, models in groups.items():
        count = {name: parameter_count(model).non_embedding for name, model in models.items()}
        own = hybrid.HYBRID if plan.startswith("H*") else plan
        assert abs(count[hybrid.BASELINE] / count[own] - 1) <= 0.03
        assert ",".join(models[own].kinds) == ",".join(plans.parse(plan))
        assert set(models[hybrid.BASELINE].kinds) == {"M"}
        assert len(set(models.values())) == len(models)  # all differ
        if own == hybrid.HYBRID:
            assert count[own] > 1.2 * count[hybrid.SAME_SHAPE]
            assert models[own].recursion_depth == 3
            assert {*hybrid.VARIANTS} < {*models}


@pytest.mark.parametrize(
    ("platform", "name", "plan", "n_claims"),
    [
        ("cpu", "A,M,H,M,A", "A,M,H,M,A", 2),
        ("cpu", hybrid.SHALLOWER, "A,M,H,M,A", 2),
        ("cpu", hybrid.HYBRID, "H*4", 0),
        ("gpu", hybrid.HYBRID, "H*10", 2),
        ("gpu", "A,M,H,M,A", "A,M,H,M,A", 0),
    ],
)
def test_the_targets_are_of_the_plans_on_a_cpu_and_of_the_hybrid_on_a_gpu(
    platform, name, plan, n_claims
):
    case = {"task": "training step", "plan": plan}
    rows = [
        Row(case, hybrid.BASELINE, [1.0] * 3, {"program_bytes": 100}),
        Row(case, name, [1.1] * 3, {"program_bytes": 126}),
    ]
    found = hybrid.checks(rows, Context(platform, "a device"))
    assert [check.passed for check in found] == [True, False][:n_claims]


def test_depth_measures_the_loss_and_the_steps_of_a_threshold(tmp_path):
    """Against the public logits, and the gates of each token alone."""
    model = CONFIGS["hybrid"]
    text = " ".join(f"word{i}" for i in range(999))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    data = DataConfig(tokenizer="bytes", data_dir=str(tmp_path / "texts"), cache_dir=str(tmp_path))
    model = dataclasses.replace(model, max_seq_len=24)
    with CheckpointWriter(tmp_path, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": random_params(model), "step": np.int32(0)}
        writer.save("final", state, Metadata(RunConfig(model=model, data=data), 0, 0, "none"))
    trained = depth.load(str(tmp_path / "final"), 4)
    trained = dataclasses.replace(trained, windows_nt=trained.windows_nt[:1])
    found, never = (depth.quality(trained, threshold) for threshold in (0.5, 0.0))
    window_t = trained.windows_nt[0]
    skipping = dataclasses.replace(model, gate_skip_threshold=0.5)
    nll, steps, cache = [], [], build.init_cache(skipping, 1)
    run_token = jax.jit(functools.partial(build.forward, config=skipping))
    for token, target in itertools.pairwise(window_t.tolist()):
        x_btd, aux, cache = run_token(
            trained.params, tokens_bt=jnp.array([[token]]), initial_cache=cache
        )
        logits = build.logits(trained.params, skipping, x_btd)[0, 0, : trained.vocab_size]
        nll.append(-float(jax.nn.log_softmax(logits)[target]))
        steps.append((np.asarray(aux["gate_mean"]) > 0).sum(1).mean())
    assert found["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert found["recursion_steps"] == pytest.approx(np.mean(steps), rel=1e-6)
    assert 0 < found["recursion_steps"] < never["recursion_steps"] == model.recursion_depth
    assert found["loss"] != pytest.approx(never["loss"], rel=1e-3)
    context, rows = Context("cpu", "cpu", quick=True, checkpoint=str(tmp_path / "final")), []
    for case in depth.cases(context):
        depth.measure(case | {"tokens": 2}, context, rows)
    assert len(rows) == 4 and all(row.samples_secs and not row.note for row in rows)
    assert all(check.passed is not None for check in depth.checks(rows, context))
