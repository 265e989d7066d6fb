"""The time of a training step of every plan, all taking turns in one process."""

import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, report
from benchmarks.evidence import trial
from benchmarks.evidence.tasks import TASKS
from benchmarks.run import make_context
from mamba_jax.files import write_atomic

FILE = "times.json"
_STEPS, _ROUNDS = 50, 5


def measure(folder: pathlib.Path, deadline: float, plans: Sequence[str]) -> pathlib.Path:
    """Writes the CPU time of a step of each plan to ``times.json``; returns its path."""
    context = make_context(quick=False)
    environment = report.environment(context, "python -m benchmarks.evidence --times")
    rows: list[harness.Row] = []
    harness.measure(
        [harness.Candidate(plan, functools.partial(_prepare, plan)) for plan in plans],
        {"steps": _STEPS},
        rows,
        rounds=_ROUNDS,
        candidate_secs=float("inf"),
        deadline=deadline,
        clock=time.process_time,
    )
    steps_secs = {row.name: [secs / _STEPS for secs in row.samples_secs] for row in rows}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / FILE,
        json.dumps({"environment": environment, "samples_secs": steps_secs}, indent=1),
    )
    return folder / FILE


def read(folder: pathlib.Path) -> dict[str, list[float]]:
    """Returns the samples of each plan, seconds of a step; none where it was not measured."""
    return {plan: samples for plan, samples in _read(folder, "samples_secs").items() if samples}


def load_average(folder: pathlib.Path) -> float | None:
    """The load of the machine when the times were measured."""
    return _read(folder, "environment").get("load_average_at_start")


def _read(folder: pathlib.Path, key: str) -> dict[str, Any]:
    file = folder / FILE
    return json.loads(file.read_text()).get(key, {}) if file.exists() else {}


def _prepare(plan: str) -> harness.Prepared:
    made = trial.programs(plan, _STEPS)
    rows = [trial.train_rows(TASKS["p_hop_3"], 0, step) for step in range(_STEPS)]
    tokens, targets = (
        jnp.asarray(np.stack([getattr(row, name) for row in rows]))
        for name in ("tokens", "targets")
    )
    state = made.init(0)

    def run() -> None:
        jax.block_until_ready(made.train(state, jnp.float32(1e-3), tokens, targets))

    return harness.Prepared(run)
