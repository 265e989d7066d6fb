"""The evidence suite on models and cells of a second: records, resume, statistics, the page."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import cells, compare, page, plans, records, suite, tasks, times, trial
from benchmarks.evidence.cells import Cell
from mamba_jax.modules.recursion import DepthGate
from tests.support.tiny_run import quick_compiles  # noqa: F401

TINY = {"d_model": 8, "d_state": 2, "attention_head_size": 4, "attention_scales": (1,)}
CELL = Cell("p_hop_3", "MMHMM", 1e-2, seed=1, steps=2, eval_steps=1)


def test_all_plans_have_as_many_parameters():
    reference = plans.model_of(plans.REFERENCE).parameters
    for name in plans.PLANS:
        assert 0.9 < plans.model_of(name).parameters / reference < 1.1, name


def test_the_transformer_is_priced_by_its_products():
    model = plans.model_of(plans.TRANSFORMER)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    is_matrix = lambda path: path[-1].key in ("kernel", "embedding")
    leaves = jax.tree_util.tree_leaves_with_path(params)
    products = 6 * sum(leaf.size for path, leaf in leaves if is_matrix(path))
    # Scores and norms come on top: at 48 tokens a small part.
    assert products < model.token_flops < 1.3 * products


def test_gates_of_bias_30_are_one_and_stay_so():
    own = dict(plans.PLANS["MMHMM no gates"][1])
    config = dataclasses.replace(plans.model_of("MMHMM").config, **own)
    graph, state = nnx.split(DepthGate(config))
    s = jax.random.normal(jax.random.key(0), (1, 9, 32))

    def gates(state):
        gate = nnx.merge(graph, state)
        _, gate_bt = gate(s, *(leaf[0] for leaf in gate.rows()))
        return gate_bt

    value, gradient = gates(state), jax.grad(lambda state: gates(state).sum())(state)
    assert (value == 1).all()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


# --- a cell


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Plans so small that they compile in seconds; nothing pins this process to a core."""
    with pytest.MonkeyPatch.context() as patch:
        for name, plan in {"M*6": "M", "MMHMM": "M,H"}.items():
            patch.setitem(plans.PLANS, name, (plan, TINY))
        patch.setattr(evidence, "set_environment", lambda threads: None)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "/nowhere")
        patch.setattr(trial, "EVAL_ROWS", 64)
        plans.model_of.cache_clear()
        trial.eval_rows.cache_clear()
        yield tmp_path_factory.mktemp("tiny")
    plans.model_of.cache_clear()
    trial.programs.cache_clear()
    trial.eval_rows.cache_clear()


def run(folder, *words):
    return evidence.main([*words, f"--results={folder}"])


@pytest.fixture(scope="module")
def record(tiny, quick_compiles):  # noqa: F811
    """The record of a cell of two steps."""
    assert run(tiny, "--cell", CELL.spec()) == 0
    (found,) = records.read(tiny)
    return found


def test_a_record_holds_all_that_its_numbers_depend_on(record):
    assert record["config"] == records.plain(trial.cell_config(CELL))
    assert record["config"]["model"]["plan"] == "M,H"
    assert record["environment"]["versions"]["jax"] and record["environment"]["git_commit"]
    assert f"--cell {CELL.spec()}" in record["environment"]["command_line"]
    curve = record["curve"]
    assert [entry["step"] for entry in curve] == [1, 2]
    flops = 2 * trial.BATCH * tasks.LENGTH * plans.model_of("MMHMM").token_flops
    assert curve[-1]["flops"] == flops
    assert 0 < curve[0]["cpu_secs"] < curve[1]["cpu_secs"]
    # Chance is 1 in 256 ids at the start, and the test rows are those of the last entry.
    assert curve[0]["train_loss"] == pytest.approx(np.log(256), rel=0.2)
    assert record["end"]["test"]["all"] == curve[-1]["test"]
    assert set(record["end"]["gate_sums"]) == {"all", "1", "2", "3"}
    counts = [record["end"]["test"][level]["answers"] for level in ("all", "1", "2", "3")]
    assert counts[0] == 64 * 18 == sum(counts[1:])


def test_the_command_of_a_record_reproduces_it_to_the_bit(tiny, record, capsys):
    assert run(tiny, "--cell", CELL.spec()) == 0
    assert "reproduced to the bit" in capsys.readouterr().out
    assert len(records.read(tiny)) == 1


def test_another_number_is_an_error(tmp_path, tiny, record, monkeypatch, capsys):
    changed = copy.deepcopy(record)
    loss = changed["curve"][1]["train_loss"]
    changed["curve"][1]["train_loss"] = float(np.nextafter(loss, 9))
    records.append(tmp_path, CELL.task, changed)
    monkeypatch.setattr(trial, "run", lambda cell, deadline: copy.deepcopy(record))
    assert run(tmp_path, "--cell", CELL.spec()) == 1
    assert f"curve[1].train_loss: {changed['curve'][1]['train_loss']} and {loss}" in (
        capsys.readouterr().out
    )


def test_another_seed_gives_other_numbers(tiny, record):
    other = records.plain(trial.run(dataclasses.replace(CELL, seed=2)))
    assert other["curve"][-1]["train_loss"] != record["curve"][-1]["train_loss"]


def test_gates_per_token_are_those_of_the_forward_and_their_means_can_replace_them(tiny, record):
    model = plans.model_of("MMHMM")
    made = trial.programs("MMHMM", 1)
    params = made.init(3).params
    kernel = params["layers"]["H"]["recursion"]["gate"]["kernel"]
    params["layers"]["H"]["recursion"]["gate"]["kernel"] = jax.random.normal(
        jax.random.key(1), kernel.shape
    )
    # Rows hold several documents, and each starts from nothing.
    rows = tasks.TASKS["mqar"].make(np.random.default_rng(0), 64, "test", 0)
    _, _, means_lk = trial.predict(made, params, rows)
    sums_nt, steps_nt = trial.gates_of_tokens(model, params, rows)
    assert (steps_nt == model.config.recursion_depth).all()
    assert sums_nt.std() > 0.1
    assert sums_nt.mean() == pytest.approx(means_lk.sum(), rel=1e-5)
    fixed = trial.with_fixed_gates(params, model, means_lk)
    np.testing.assert_allclose(trial.predict(made, fixed, rows)[2], means_lk, rtol=1e-6)
    assert trial.gates_of_tokens(model, fixed, rows)[0].std() < 1e-6


def test_tokens_skip_the_steps_whose_gates_close(tiny):
    model, made = plans.model_of("MMHMM"), trial.programs("MMHMM", 1)
    rows = tasks.TASKS["p_hop_3"].make(np.random.default_rng(0), 64, "test", 0)
    fixed = trial.with_fixed_gates(made.init(3).params, model, np.array([[0.9, 0.4, 0.9]]))
    at = lambda threshold: trial.skipping(made, model, fixed, rows, threshold)
    assert [at(threshold)["all"]["steps"] for threshold in (0.3, 0.5, 0.95)] == [3, 2, 0]
    assert at(0.3)["2"] == trial.summary(made, fixed, rows)["2"] | {"steps": 3}
    assert at(0.5)["2"]["nll"] != at(0.3)["2"]["nll"]


def test_means_replace_a_gate_that_steps_share_step_by_step(tiny):
    model = plans.model_of("MMHMM")
    config = dataclasses.replace(model.config, shared_gate=True)
    model = dataclasses.replace(model, config=config)
    means_lk = np.array([[0.23, 0.54, 0.85]])
    fixed = trial.with_fixed_gates(model.init(jax.random.key(3)), model, means_lk)
    _, aux = jax.jit(model.hidden)(fixed, np.arange(64).reshape(2, 32))
    np.testing.assert_allclose(aux["gate_mean"], means_lk, rtol=1e-6)
    assert (aux["gate_histogram"].max(-1) == 1).all()


def test_the_time_of_a_step_is_measured_apart(tiny, record, monkeypatch, tmp_path):
    monkeypatch.setattr(times, "_STEPS", 1)
    times.measure(tmp_path, float("inf"), ("MMHMM",))
    samples = times.read(tmp_path)["MMHMM"]
    assert len(samples) == 5 and min(samples) > 0
    assert compare.step_secs([record], tmp_path) == {"MMHMM": sorted(samples)[2]}


def test_levels_are_averaged_over_their_answers():
    targets = np.array([[5, tasks.NONE, 7], [8, 9, tasks.NONE]])
    levels = np.array([[1, tasks.NONE, 2], [1, 1, tasks.NONE]])
    right = np.array([[True, True, False], [False, True, True]])
    found = trial.by_level(tasks.Rows(targets, targets, levels), accuracy=right)
    assert found == {
        "all": {"accuracy": 0.5, "answers": 4},
        "1": {"accuracy": pytest.approx(2 / 3), "answers": 3},
        "2": {"accuracy": 0.0, "answers": 1},
    }


# --- the table of cells


def test_an_interrupt_loses_one_cell_and_the_next_call_resumes(
    tmp_path, tiny, record, monkeypatch, capsys
):
    ran = []

    def fake(cell, deadline):
        ran.append(cell)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {key: record[key] for key in ("curve", "end", "compile_secs")}

    monkeypatch.setattr(trial, "run", fake)
    first, second, third = cells.quick_cells()
    assert run(tmp_path, "--quick") == 130
    assert run(tmp_path, "--quick") == 0
    assert ran == [first, second, second, third]
    assert run(tmp_path, "--quick") == 0 and len(ran) == 4
    capsys.readouterr()
    assert run(tmp_path, "--quick", "--list", "--only", "task=p_hop_3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"done   {first.spec()}", f"done   {second.spec()}", "2 of 2 done"]


def test_out_of_time_ends_cleanly_and_keeps_no_part_of_a_cell(tmp_path, tiny, monkeypatch, capsys):
    def late(cell, deadline):
        raise trial.OutOfTime

    monkeypatch.setattr(trial, "run", late)
    assert run(tmp_path, "--quick", "--minutes=1") == 0
    assert "out of time with 3 cells left; run it again" in capsys.readouterr().out
    assert not records.read(tmp_path, [suite.QUICK])


def test_the_deadline_is_looked_at_within_a_cell(tiny, record):
    with pytest.raises(trial.OutOfTime):
        trial.run(CELL, deadline=0)


def test_mistakes_are_one_line_with_the_remedy(tiny, capsys):
    for words, message in [
        (["--only", "task=pariti"], 'unknown task "pariti"; did you mean "parity"?'),
        (["--only", "rate=1"], '--only: "rate=1" is not one of task=, plan=, seed='),
        (["--cell", "task=s3,plan=M*6"], "add learning_rate=, seed=, steps="),
        (["--cell", "task=s3,plan=M*6,learning_rate=1,seed=0,steps=0"], "steps=0 must be"),
        (["--minutes", "0"], "--minutes=0.0 must be greater than 0"),
    ]:
        assert evidence.main(words) == 2
        assert message in capsys.readouterr().err


def made(plan, seed, scores, *, rate=3e-3, steps=400, task="p_hop_3", flops=10.0, secs=2.0):
    """A record with an evaluation every 200 steps; its cost a step, and its scores."""
    curve = [
        {
            "step": 200 * i,
            "flops": 200 * i * flops,
            "cpu_secs": 200 * i * secs,
            "validation": {"accuracy": score, "nll": 1.0},
            "test": {"accuracy": score, "nll": None if score is None else 1.0},
        }
        for i, score in enumerate(scores, 1)
    ]
    cell = Cell(task, plan, rate, seed, steps)
    level = {"all": curve[-1]["test"], "2": curve[-1]["test"]}
    environment = {
        "device": "cpu", "cpu": "a cpu", "cores_used": 1, "versions": {}, "git_commit": "abc",
    }  # fmt: skip
    return {
        "config": records.plain(trial.cell_config(cell)),
        "curve": curve,
        "end": {"test": level},
        "environment": environment,
    }


def test_a_sweep_chooses_by_validation_rows_and_makes_the_main_cells_ready():
    sweep = [
        made("M*6", cells.SWEEP_SEED, [0.1, score], rate=rate)
        for rate, score in zip(cells.LEARNING_RATES, (0.5, 0.7, 0.6), strict=True)
    ]
    for record in sweep:
        record["curve"][-1]["test"]["accuracy"] = 1 - record["curve"][-1]["test"]["accuracy"]
    assert records.best_rates(sweep[:2]) == {}
    assert records.best_rates(sweep) == {("p_hop_3", "M*6"): cells.LEARNING_RATES[1]}
    of = lambda best: [
        cell for cell in cells.only(cells.cells(best), ["task=p_hop_3", "plan=M*6", "seed=0,4"])
    ]
    assert [cell.learning_rate for cell in of({})] == [None, None]
    chosen = {cell.learning_rate for cell in of(records.best_rates(sweep))}
    assert chosen == {cells.LEARNING_RATES[1]}
    # Less is better of bits per byte.
    text = [
        made("M*6", cells.SWEEP_SEED, [0.1], rate=rate, task="text")
        for rate in cells.LEARNING_RATES
    ]
    for record, nll in zip(text, (2.0, None, 1.5), strict=True):
        record["curve"][-1]["validation"]["nll"] = nll
    assert records.best_rates(text) == {("text", "M*6"): cells.LEARNING_RATES[2]}


def test_a_changed_model_is_another_cell(monkeypatch):
    record = made("M*6", 0, [0.5, 0.5])
    config = trial.cell_config(Cell("p_hop_3", "M*6", 3e-3, 0, 400))
    assert records.find([record], config) is record
    config["model"] = config["model"] | {"d_state": 99}
    assert records.find([record], config) is None


def test_a_line_that_a_kill_cut_short_is_reported_and_the_next_one_whole(tmp_path, capsys):
    record = made("M*6", 0, [0.5, 0.5])
    records.append(tmp_path, "s3", record)
    file = tmp_path / "s3.jsonl"
    file.write_text(file.read_text() + json.dumps(record)[:50])
    records.append(tmp_path, "s3", record)
    assert records.read(tmp_path) == [record, record]
    assert "s3.jsonl:2: incomplete record; skipped" in capsys.readouterr().err


# --- statistics and the page


def test_intervals_are_those_of_student():
    # s = 1, t(0.975, 2) = 4.30265: 4.30265 / sqrt(3).
    assert compare.mean_interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(2.48414, abs=1e-5))
    # s = 0.1 · sqrt(2.5), t(0.975, 4) = 2.77645.
    half = 2.77645 * 0.1 * 2.5**0.5 / 5**0.5
    assert compare.mean_interval([0.1, 0.2, 0.3, 0.4, 0.5])[1] == pytest.approx(half, abs=1e-5)
    assert compare.mean_interval([0.25]) == (0.25, None)
    assert compare.paired({0: 0.5, 1: 0.75, 3: 1.0}, {1: 0.5, 0: 0.5, 2: 9.0}) == [0.0, 0.25]


def few():
    """A cheap plan of two seeds, and one of twice its time and four times its FLOPs."""
    return [
        made("M*6", 0, [0.1, 0.2]),
        made("M*6", 1, [0.3, 0.4]),
        made("MMHMM", 0, [0.5, 0.9], flops=40.0, secs=4.0),
        made("MMHMM", 1, [0.6, None], flops=40.0, secs=4.0),
    ]


def test_plans_are_compared_within_the_budget_that_all_have_used(tmp_path):
    of_task = compare.groups(few(), tmp_path)["p_hop_3"]
    mamba, hybrid = of_task["M*6"], of_task["MMHMM"]
    budgets = {axis: compare.budget(of_task, axis) for axis in compare.AXES}
    assert budgets == {"steps": 400, "FLOPs": 4000, "time": 800}
    assert mamba.scores("time", 800) == {0: 0.2, 1: 0.4}
    assert hybrid.scores("steps", 400) == {0: 0.9}  # what diverged has no score
    assert hybrid.scores("time", 800) == {0: 0.5, 1: 0.6}
    assert hybrid.scores("FLOPs", 4000) == {}  # its first evaluation comes after 8,000
    # A quarter of the way from one evaluation to the next; nothing is known next to a divergence.
    assert hybrid.scores("time", 1000) == {0: pytest.approx(0.6)}
    assert mamba.scores("steps", 250) == {0: pytest.approx(0.125), 1: pytest.approx(0.325)}


def test_times_measured_apart_replace_those_of_the_runs(tmp_path):
    (tmp_path / "times.json").write_text(json.dumps({"samples_secs": {"MMHMM": [1.0, 2.0, 9.0]}}))
    assert compare.step_secs(few(), tmp_path) == {"M*6": 2.0, "MMHMM": 2.0}
    of_task = compare.groups(few(), tmp_path)["p_hop_3"]
    assert of_task["MMHMM"].scores("time", 800) == {0: 0.9}


def test_the_page_shows_what_was_run_and_dashes_for_the_rest(tmp_path):
    for record in few():
        records.append(tmp_path, "p_hop_3", record)
    written = page.write(tmp_path, tmp_path / "docs" / "evidence.md")
    assert [path.name for path in written] == ["evidence.md", "p_hop_3.png"]
    assert (tmp_path / "p_hop_3.png").read_bytes().startswith(b"\x89PNG")
    text = written[0].read_text()
    # Mean of .2 and .4; t(0.975, 1) = 12.7062 times s / sqrt(2) = .1. No sweep chose the rate.
    steps, flops, time, pairs = (
        text.partition(f"## {title}")[2].partition("\n## ")[0]
        for title in ("At equal steps", "At equal FLOPs", "At equal time", "Main pairs")
    )
    assert "| plan | p_hop_3, 400 steps | p_hop_6 |" in steps
    assert r"| M\*6 | 0.300 ± 1.271 (2)\* | – |" in steps
    assert r"| MMHMM | 0.900 (1)\* | – |" in steps and "| AMAMA | – | – |" in steps
    assert "| MMHMM | – | – |" in flops and r"| MMHMM | 0.550 ± 0.635 (2)\* | – |" in time
    # .9 − .2 at equal steps; .5 − .2 and .6 − .4 at equal time.
    assert r"| p_hop_3: MMHMM − M\*6\* | +0.700 (1) | – | +0.250 ± 0.635 (2) |" in pairs
    assert "Not run at all: `p_hop_6`" in text and "Few seeds are leads, and not proof" in text
    assert "](../p_hop_3.png)" in text
    page.write(tmp_path, tmp_path / "docs" / "evidence.md")
    assert written[0].read_text() == text


def test_a_tuned_group_comes_before_one_of_more_seeds(tmp_path):
    steps = tasks.TASKS["p_hop_3"].steps
    sweep = [made("M*6", cells.SWEEP_SEED, [0.1, 0.5], rate=rate) for rate in cells.LEARNING_RATES]
    chosen = records.best_rates(sweep)["p_hop_3", "M*6"]
    others = [made("M*6", seed, [0.1, 0.1], rate=6e-3) for seed in range(3)]
    tuned = made("M*6", 0, [0.7] * (steps // 200), rate=chosen, steps=steps)
    group = compare.groups([*sweep, *others, tuned], tmp_path)["p_hop_3"]["M*6"]
    assert group.tuned and group.steps == steps and list(group.by_seed) == [0]
    group = compare.groups([*sweep, *others], tmp_path)["p_hop_3"]["M*6"]
    assert not group.tuned and list(group.by_seed) == [0, 1, 2]  # and no seed of the sweep
