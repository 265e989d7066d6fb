"""What layer plans, and each part of the hybrid, cost against plain Mamba.

A group is a layer plan and what is compared with it: a Mamba of as many parameters, and the plan
with one field changed. A training step and decoding, time and memory.
"""

import dataclasses
import functools
import itertools
from typing import Any

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Row
from benchmarks.report import bars, baselines, case_key, ratio
from mamba_jax.config import ModelConfig
from mamba_jax.config import plan as plans
from mamba_jax.costs.parameters import parameter_count

BASELINE = "Mamba, same parameters"
SAME_SHAPE, HYBRID = "Mamba, same width and depth", "hybrid"
SHALLOWER = "recursion of 2 steps"
VARIANTS = {  # of the hybrid, whose recursion has 3 steps
    "no recursion": {"recursion_depth": 0},
    "no attention": {"attention_scales": ()},
    "recursion of 1 step": {"recursion_depth": 1},
    SHALLOWER: {"recursion_depth": 2},
    "attention once, after it": {"recursion_reads_attention": False},
    "fusion by sum": {"fusion": "sum"},
}
# Candidates for a default, with the zero-start fusion; the hybrid itself is H in every layer.
PLANS = ("A,M,H,M,A", "M,M,H,M,M", "A,M,A,M,A")
# Highest time and training memory relative to the baseline. On a GPU only the hybrid has targets.
TIMES = {
    "cpu": {"training step": 1.35, "decode": 1.25},
    "gpu": {"training step": 1 / 0.85, "decode": 1 / 0.95},
}
MEMORY_TIMES = 1.25
# A Mamba as near as this to the parameters of a plan keeps its width.
NEAR = 0.03


def cases(context: Context) -> list[dict[str, Any]]:
    """A training step and decoding of every group, those with targets first."""
    if context.platform == "cpu":
        shape = {"d_model": 64 if context.quick else 256}
        sizes = {"training step": (1, 128) if context.quick else (2, 512), "decode": (1, 256)}
        groups = [*PLANS[: 1 if context.quick else None], f"H*{2 if context.quick else 4}"]
    else:
        shape = {"d_model": 608}  # hybrid-small-standard
        sizes = {"training step": (8, 2048), "decode": (1, 128)}
        groups = ["H*10", *(f"({plan})*2" for plan in PLANS)]
    return [
        {"task": task, "plan": plan, **shape, "B": b, "L": t}
        for plan in groups
        for task, (b, t) in sizes.items()
    ]


def models(case: dict[str, Any], context: Context) -> dict[str, ModelConfig]:
    """The structure of every member of a group."""
    kinds = plans.parse(case["plan"])
    own = workloads.model_of(
        "hybrid-small-standard",
        d_model=case["d_model"],
        n_layers=len(kinds),
        # A head over 50,257 classes would hide small layers.
        vocab_size=4096 if context.platform == "cpu" else workloads.GPT2_VOCABULARY,
    )
    mamba = dataclasses.replace(own, family="mamba")
    if set(kinds) == {"H"}:
        # First what the targets are about: a budget may end the run early.
        found = {HYBRID: own, SAME_SHAPE: mamba}
        variants = dict(list(VARIANTS.items())[: 2 if context.quick else None])
    else:
        own = dataclasses.replace(own, plan=case["plan"], fusion="residual_zero")
        found = {case["plan"]: own}
        variants = {SHALLOWER: VARIANTS[SHALLOWER]} if "H" in kinds else {}
    found |= {name: dataclasses.replace(own, **fields) for name, fields in variants.items()}
    return {BASELINE: same_parameters(mamba, parameter_count(own).non_embedding)} | found


def same_parameters(mamba: ModelConfig, parameters: int) -> ModelConfig:
    """Returns a Mamba with about this many parameters, of this width or one close to it."""

    def distance(model: ModelConfig) -> tuple[float, float]:
        apart = abs(parameter_count(model).non_embedding / parameters - 1)
        return max(apart, NEAR), abs(model.d_model - mamba.d_model), apart

    layers = parameters * mamba.n_layers / parameter_count(mamba).non_embedding
    return min(
        (
            dataclasses.replace(mamba, n_layers=n_layers, d_model=mamba.d_model + more)
            for n_layers, more in itertools.product(
                (int(layers), int(layers) + 1), (0, -8, 8, -16, 16)
            )
        ),
        key=distance,
    )


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """One per member of a group."""
    training = case["task"] == "training step"
    prepare = workloads.prepare_train_step if training else workloads.prepare_generation
    # Decoding: a prompt so short that subtracting its time adds no noise.
    sizes = (case["B"], case["L"]) if training else (case["B"], 16, case["L"])
    return [
        Candidate(name, functools.partial(prepare_counted, prepare, model, sizes))
        for name, model in models(case, context).items()
    ]


def prepare_counted(prepare: Any, model: ModelConfig, sizes: tuple[int, ...]) -> harness.Prepared:
    """Prepares a candidate and adds its numbers of parameters."""
    count = parameter_count(model)
    metrics = {"parameters": count.total, "non_embedding": count.non_embedding}
    return dataclasses.replace(prepare(model, *sizes), metrics=metrics)


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures a group in one task."""
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=3 if context.quick else 10,
        candidate_secs=10.0 if context.platform == "cpu" else 3.0,
        deadline=context.deadline,
    )
    workloads.add_token_rates(rows, case, case["B"] * case["L"])


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The targets against a Mamba of as many parameters: on a GPU the hybrid's, else the plans'."""
    found = []
    gpu = context.platform == "gpu"
    for row, baseline in _pairs(rows):
        task, plan = row.case["task"], row.case["plan"]
        if (row.name != HYBRID) if gpu else plan.startswith("H*"):
            continue
        name = row.name if row.name != SHALLOWER else f"{plan}, {SHALLOWER}"
        most = TIMES[context.platform][task]
        claims = [("time", most, ratio(row, baseline))]
        if task == "training step":
            claims.append(("memory", MEMORY_TIMES, _memory(row, baseline)))
        for what, most, times in claims:
            claim = f"{task}: the {what} of {name} ≤ {most:.3g} × that of {BASELINE}"
            passed, detail = (None, "") if times is None else (times <= most, f"{times:.2f}")
            found.append(Check(claim, passed, detail))
    return found


def draw(rows: list[Row], figure: Any) -> None:
    """Draws the time of each member by task, and the memory of the step, against the baseline."""
    plots = figure.subplots(1, 3, sharey=True)
    values = {"training step": [], "decode": [], "memory": []}
    for row, baseline in _pairs(rows):
        plan = row.case["plan"]
        name = row.name if row.name == plan else f"{plan}: {row.name}"
        values[row.case["task"]].append((name, ratio(row, baseline)))
        if memory := _memory(row, baseline):
            values["memory"].append((name, memory))
    titles = ("training step: time", "decode: time", "training step: memory")
    for plot, title, of_plot in zip(plots, titles, values.values(), strict=True):
        bars(plot, of_plot, f"{title} ÷ the baseline's")


def _pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Every row but the baselines, with its baseline."""
    of_case = baselines(rows, BASELINE)
    pairs = [(row, of_case.get(case_key(row.case))) for row in rows if row.name != BASELINE]
    return [(row, baseline) for row, baseline in pairs if baseline]


def _memory(row: Row, baseline: Row) -> float | None:
    """How many times the memory of the baseline."""
    own, its = row.metrics.get("program_bytes"), baseline.metrics.get("program_bytes")
    return own / its if own and its else None
