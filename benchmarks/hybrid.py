"""What each part of the hybrid costs, against plain Mamba.

Every variant is the hybrid with one field changed; the two plain ones have its width and depth, or
its width and (by more layers) its number of parameters. A training step and decoding, time and
memory.
"""

import dataclasses
import functools
from typing import Any

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Row
from benchmarks.report import bars, ratio
from mamba_jax.config import ModelConfig
from mamba_jax.costs.parameters import parameter_count

BASELINE = "Mamba, same parameters"
SAME_SHAPE, HYBRID = "Mamba, same width and depth", "hybrid"
VARIANTS = {  # of the hybrid, whose recursion has 3 steps
    "no recursion": {"recursion_depth": 0},
    "no attention": {"attention_scales": ()},
    "recursion of 1 step": {"recursion_depth": 1},
    "recursion of 2 steps": {"recursion_depth": 2},
    "attention once, after it": {"recursion_reads_attention": False},
    "fusion by sum": {"fusion": "sum"},
}
# Lowest speed and highest memory relative to the baseline, on a GPU.
SPEED_SHARES = {"training step": 0.85, "decode": 0.95}
MEMORY_TIMES = 1.25


def cases(context: Context) -> list[dict[str, Any]]:
    """A training step and decoding of one structure."""
    if context.platform == "cpu":
        shape = {"d_model": 64 if context.quick else 256, "layers": 2 if context.quick else 4}
        sizes = {"training step": (1, 128) if context.quick else (2, 512), "decode": (1, 256)}
    else:
        shape = {"d_model": 608, "layers": 10}  # hybrid-small-standard
        sizes = {"training step": (8, 2048), "decode": (1, 128)}
    return [{"task": task, **shape, "B": b, "L": t} for task, (b, t) in sizes.items()]


def models(case: dict[str, Any], context: Context) -> dict[str, ModelConfig]:
    """The structure of every variant."""
    hybrid = workloads.model_of(
        "hybrid-small-standard",
        d_model=case["d_model"],
        n_layers=case["layers"],
        # A head over 50,257 classes would hide small layers.
        vocab_size=4096 if context.platform == "cpu" else workloads.GPT2_VOCABULARY,
    )
    mamba = dataclasses.replace(hybrid, family="mamba")
    layers = lambda model: parameter_count(model).non_embedding
    n_layers = round(layers(hybrid) / layers(mamba) * case["layers"])
    # First what the targets are about: a budget may end the run early.
    found = {
        BASELINE: dataclasses.replace(mamba, n_layers=n_layers),
        HYBRID: hybrid,
        SAME_SHAPE: mamba,
    }
    variants = list(VARIANTS.items())[: 2 if context.quick else None]
    return found | {name: dataclasses.replace(hybrid, **fields) for name, fields in variants}


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """One per variant."""
    training = case["task"] == "training step"
    prepare = workloads.prepare_train_step if training else prepare_decode
    return [
        Candidate(name, functools.partial(prepare, model, case["B"], case["L"]))
        for name, model in models(case, context).items()
    ]


def prepare_decode(model: ModelConfig, batch: int, n_tokens: int) -> harness.Prepared:
    """Decodes ``n_tokens`` after a prompt so short that subtracting its time adds no noise."""
    prepared = workloads.prepare_generation(model, batch, 16, n_tokens)
    return dataclasses.replace(prepared, metrics={"parameters": parameter_count(model).total})


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures all variants of one task."""
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
    """The targets for a GPU, against plain Mamba with the same number of parameters."""
    if context.platform != "gpu":
        return []
    found = []
    for task, least in SPEED_SHARES.items():
        of_task = {row.name: row for row in rows if row.case["task"] == task}
        hybrid, mamba = of_task.get(HYBRID), of_task.get(BASELINE)
        times = ratio(hybrid, mamba) if hybrid and mamba else None
        claim = f"{task}: the hybrid's speed ≥ {least} of {BASELINE}"
        passed = None if times is None else 1 / times >= least
        found.append(Check(claim, passed, "" if times is None else f"{1 / times:.2f}"))
        memory = [row.metrics.get("program_bytes") for row in (hybrid, mamba) if row]
        if task == "training step" and len(memory) == 2 and None not in memory:
            more = memory[0] / memory[1]
            claim = f"{task}: the hybrid's memory ≤ {MEMORY_TIMES} × that of {BASELINE}"
            found.append(Check(claim, more <= MEMORY_TIMES, f"{more:.2f}"))
    return found


def draw(rows: list[Row], figure: Any) -> None:
    """Draws the time of each variant by task, and the memory of the step."""
    plots = figure.subplots(1, 3, sharey=True)
    for plot, task in zip(plots, ("training step", "decode"), strict=False):
        chosen = [row for row in rows if row.case["task"] == task]
        bars(plot, [(row.name, row.median_secs * 1e3) for row in chosen], f"{task}: time (ms)")
    step = [row for row in rows if "program_bytes" in row.metrics]
    values = [(row.name, row.metrics["program_bytes"] * 1e-6) for row in step]
    bars(plots[2], values, "training step: memory (MB)")
