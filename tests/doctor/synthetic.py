"""Records as a run writes them, made from formulas and noise.

A healthy run::

    loss        floor + (ln V − floor) / √(1 + s / 100) + text + batch
                s: steps, each weighted by its learning rate's share of the peak; text: an
                autoregressive wander of 1%; batch: Student's t with 5 degrees of freedom, 2%, and
                now and then one odd batch of 1.6 times the loss
    gradient    (0.3 + 3 exp(−s / 100)) · a lognormal factor of 25%
    evaluation  the loss without noise, 2% above it
    Δ, A        from their initialisation, drifting by factors of 10 and 3
    gates       settling at a depth of their own by layer
    speed       60,000 tokens/s ± 4%, one interval in thirty slower by 40%

A fault is a function that changes the arrays of a healthy run.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from mamba_jax.config import ModelConfig, RunConfig, TrainingConfig, VramConfig, to_dict
from mamba_jax.config.plan import parse
from mamba_jax.doctor import signals
from mamba_jax.runs import recorded

LAYERS, VOCABULARY, FLOOR, UNIGRAM = 4, 50_257, 2.8, 7.4
Arrays = dict[str, Any]
Fault = Callable[[Arrays], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What kind of run."""

    steps: int = 2_000
    seed: int = 0
    family: str = "hybrid"
    layers: str = ""  # the model's plan, of LAYERS hybrid layers among others
    eigenvalues: Literal["positive", "signed"] = "positive"
    gate: Literal["token", "channel"] = "token"
    learning_rate: float = 3e-4
    warmup_steps: int = 200
    max_steps: int = 0  # 0: as many as steps
    log_steps: int = 10
    evaluations: int = 10
    resumed: tuple[int, ...] = ()
    device_kind: str = "NVIDIA A100-SXM4-40GB"
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            name="synthetic",
            model=ModelConfig(
                family=self.family,
                n_layers=len(parse(self.layers)) or LAYERS,
                plan=self.layers,
                eigenvalues=self.eigenvalues,
                gate=self.gate,
                vocab_size=VOCABULARY,
            ),
            training=TrainingConfig(
                learning_rate=self.learning_rate,
                warmup_steps=self.warmup_steps,
                max_steps=self.max_steps or self.steps,
                log_steps=self.log_steps,
                **self.training,
            ),
            vram=VramConfig(memory_gb=40.0),
        )


def arrays(plan: Plan) -> Arrays:
    """The curves of a healthy run: of every step, of an interval (i), of an evaluation (e)."""
    random, n, training = np.random.default_rng(plan.seed), plan.steps, plan.config.training
    step = np.arange(1, n + 1)
    warmup, last = training.resolved_warmup_steps, training.max_steps
    progress = np.clip((step - 1 - warmup) / max(1, last - warmup), 0, 1)
    cosine = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress))
    rate = np.where(step - 1 < warmup, (step - 1) / max(1, warmup), cosine)
    trained = np.cumsum(rate)
    clean = FLOOR + (math.log(VOCABULARY) - FLOOR) / np.sqrt(1 + trained / 100)
    wander = np.zeros(n)
    for i, shock in enumerate(random.normal(0, 0.01 * math.sqrt(1 - 0.9**2), n)):
        wander[i] = 0.9 * wander[i - 1] + shock
    loss = clean * (1 + wander + 0.02 * np.clip(random.standard_t(5, n), -8, 8))
    loss *= np.where(random.random(n) < 5e-4, 1.6, 1.0)
    norm = (0.3 + 3 * np.exp(-trained / 100)) * np.exp(0.25 * random.normal(size=n))
    interval = np.arange(plan.log_steps, n + 1, plan.log_steps)
    i = len(interval)
    slow = np.where(random.random(i) < 1 / 30, 0.6, 1.0)
    every = max(1, n // plan.evaluations) if plan.evaluations else n + 1
    evaluated = np.arange(every, n + 1, every)
    drift_e = np.linspace(0.1, 1, len(evaluated))[None] * random.uniform(0.5, 1, (LAYERS, 1))
    settling_i = 1 - np.exp(-interval / (0.2 * n))
    depth_li = 1.5 + random.uniform(-0.8, 0.8, (LAYERS, 1)) * settling_i
    return {
        "step": step,
        "loss": loss,
        "learning_rate": training.learning_rate * rate,
        "gradient_norm": norm,
        "skipped": np.zeros(n, bool),
        "interval": interval,
        "tokens_per_sec": 60_000 * slow * (1 + 0.04 * random.normal(size=i)),
        "data_wait": np.clip(0.05 + 0.03 * random.normal(size=i), 0, 1),
        "memory_bytes": np.full(i, 30 * 2**30),
        "depth_mean": depth_li + 0.05 * random.normal(size=(LAYERS, i)),
        "gates_closed": np.clip(0.1 + 0.05 * random.normal(size=(LAYERS, i)), 0, 1),
        "gates_open": np.clip(0.1 + 0.05 * random.normal(size=(LAYERS, i)), 0, 1),
        "evaluated": evaluated,
        "eval_loss": 1.02 * clean[evaluated - 1] * (1 + 0.001 * random.normal(size=len(evaluated))),
        "dt_mean": 0.02 * 10**drift_e,
        "dt_max": 0.12 * 50**drift_e,
        "A_min": -16.0 * 3**drift_e,
        "A_max": -1.0 / 3**drift_e,
        "warnings": [],
        "ended": None,
    }


def records(plan: Plan = Plan(), *faults: Fault) -> list[dict[str, Any]]:
    """What such a run writes, in its order."""
    a = arrays(plan)
    for fault in faults:
        fault(a)
    about = {"config": to_dict(plan.config), "parameters": 60_000_000, "unigram_nll": UNIGRAM}
    starts = {
        step: {"step": step, "run": {"started": "2026-01-02 03:04:05", **about}}
        for step in plan.resumed
    }
    at_interval = {int(step): i for i, step in enumerate(a["interval"])}
    at_evaluation = {int(step): i for i, step in enumerate(a["evaluated"])}
    warnings = dict(a["warnings"])
    lines = [{"step": 0, "run": {"started": "2026-01-02 03:04:05", **about}}]
    for n, step in enumerate(a["step"].tolist()):
        values = {key: float(a[key][n]) for key in ("loss", "learning_rate", "gradient_norm")}
        lines.append({"step": step, **values})
        if a["skipped"][n]:
            lines[-1]["skipped"] = True
            text = f"step {step}: gradient norm 9 is a spike; step skipped"
            lines.append({"step": step, "warning": text})
        if step in warnings:
            lines.append({"step": step, "warning": warnings[step]})
        if (i := at_interval.get(step)) is not None:
            rates = {key: float(a[key][i]) for key in ("tokens_per_sec", "data_wait")}
            rates |= {"device_kind": plan.device_kind, "device_count": 1}
            lines.append({"step": step, "memory_bytes": int(a["memory_bytes"][i]), **rates})
            if plan.family == "hybrid":
                gates = ("depth_mean", "gates_closed", "gates_open")
                lines.append({"step": step, **{key: a[key][:, i].tolist() for key in gates}})
        if (e := at_evaluation.get(step)) is not None:
            layers = ("dt_mean", "dt_max", "A_min", "A_max")
            measures = {key: a[key][:, e].tolist() for key in layers}
            lines.append({"step": step, "eval_loss": float(a["eval_loss"][e]), **measures})
        if step in starts:
            lines.append(starts[step])
    if a["ended"]:
        lines.append({"step": plan.steps, "ended": a["ended"]})
    return lines


def from_records(folder: pathlib.Path, lines: list[dict[str, Any]]) -> signals.RunSignals:
    return signals.of_run(recorded.from_records(folder, lines))


def changed(**changes: Callable[[np.ndarray], Any]) -> Fault:
    """A fault that changes curves: name → function of its values."""

    def fault(a: Arrays) -> None:
        for name, change in changes.items():
            a[name] = change(a[name])

    return fault
