"""Trains one cell and measures it: the same numbers for the same cell, machine and versions.

AdamW at a constant learning rate after a short warm-up; what is judged is the moving average of the
weights, so that each evaluation is a valid end of training. Only the loss at answers counts.

Legend: s steps, b batch, n rows, t time, l layers, k recursion steps.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.evidence.cells import Cell
from benchmarks.evidence.plans import Model, model_of, segments
from benchmarks.evidence.tasks import LENGTH, NONE, TASKS, Rows, Task
from mamba_jax.config import TrainingConfig, for_inference
from mamba_jax.models import build, stacks
from mamba_jax.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from mamba_jax.training.optimizer import make_optimizer

BATCH = 16
AVERAGE_DECAY = 0.98
WARMUP_STEPS = 60
OPTIMIZER = TrainingConfig(beta2=0.98, weight_decay=0.05, gradient_clip=1.0)
EVAL_ROWS = 256
_MOST_STEPS_PER_CALL = 50
SKIP_THRESHOLDS = (0.1, 0.3, 0.5)
_EVAL_SEED = 12_345  # the rows of an evaluation are the same for all cells of a task
_STREAMS = {"train": 0, "validation": 1, "test": 2, "beyond": 3}


class OutOfTime(Exception):
    """The deadline came before a cell's end."""


class State(NamedTuple):
    """What training carries along."""

    params: Any
    moments: Any
    average: Any  # of the parameters
    step: jax.Array


class Programs(NamedTuple):
    """The compiled programs of one model."""

    init: Callable[[int], State]
    train: Callable[..., tuple[State, jax.Array]]
    evaluate: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def settings() -> dict[str, Any]:
    """What all cells share, for their records."""
    return {
        "length": LENGTH,
        "batch": BATCH,
        "average_decay": AVERAGE_DECAY,
        "warmup_steps": WARMUP_STEPS,
        "beta1": OPTIMIZER.beta1,
        "beta2": OPTIMIZER.beta2,
        "weight_decay": OPTIMIZER.weight_decay,
        "gradient_clip": OPTIMIZER.gradient_clip,
        "eval_rows": EVAL_ROWS,
    }


def steps_per_call(cell: Cell) -> int:
    """Steps of one call of the training program."""
    return math.gcd(math.gcd(cell.steps, cell.eval_steps), _MOST_STEPS_PER_CALL)


@functools.cache
def programs(plan: str, steps: int) -> Programs:
    """Compiles a model's programs; ``train`` does so many steps a call."""
    model, optimizer = model_of(plan), make_optimizer(OPTIMIZER)

    def make_state(seed: jax.Array) -> State:
        params = model.init(jax.random.key(seed))
        return State(params, optimizer.init(params), params, jnp.zeros((), jnp.int32))

    def loss(params: Any, tokens_bt: jax.Array, targets_bt: jax.Array) -> jax.Array:
        asked_n = (targets_bt != NONE).reshape(-1)
        x_btd, _ = model.hidden(params, tokens_bt)
        return weighted_cross_entropy(
            x_btd.reshape(asked_n.size, -1),
            model.head(params),
            jnp.maximum(targets_bt, 0).reshape(-1),
            asked_n / asked_n.sum(),
            chunk_tokens=asked_n.size,
            dtype=jnp.float32,
        )

    def step(rate: jax.Array, state: State, rows: tuple[jax.Array, jax.Array]):
        value, gradients = jax.value_and_grad(loss)(state.params, *rows)
        updates, moments = optimizer.update(gradients, state.moments, state.params)
        now = rate * jnp.minimum(1.0, (state.step + 1) / WARMUP_STEPS)
        params = jax.tree.map(lambda leaf, update: leaf - now * update, state.params, updates)
        average = optax.incremental_update(params, state.average, 1 - AVERAGE_DECAY)
        return State(params, moments, average, state.step + 1), value

    def train(state: State, rate: jax.Array, tokens_sbt: jax.Array, targets_sbt: jax.Array):
        return jax.lax.scan(functools.partial(step, rate), state, (tokens_sbt, targets_sbt))

    seed = jax.ShapeDtypeStruct((), jnp.int32)
    init_program = jax.jit(make_state).lower(seed).compile()
    rows_sbt = jax.ShapeDtypeStruct((steps, BATCH, LENGTH), jnp.int32)
    train_program = (
        jax.jit(train)
        .lower(
            jax.eval_shape(make_state, seed),
            jax.ShapeDtypeStruct((), jnp.float32),
            rows_sbt,
            rows_sbt,
        )
        .compile()
    )
    return Programs(
        lambda seed: init_program(jnp.int32(seed)),
        train_program,
        evaluation(model),
    )


def evaluation(model: Model) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns (params, tokens_nt, targets_nt) → right_nt, nll_nt, and the gates' means (l, k)."""

    def evaluate(params: Any, tokens_nt: jax.Array, targets_nt: jax.Array):
        x_ntd, aux = model.hidden(params, tokens_nt)
        head_vd, targets = model.head(params), jnp.maximum(targets_nt, 0).reshape(-1)
        x = x_ntd.reshape(targets.size, -1)
        nll = cross_entropy(x, head_vd, targets, chunk_tokens=targets.size, dtype=jnp.float32)
        right = jnp.argmax(x @ head_vd.T, axis=1) == targets
        shape = targets_nt.shape
        gates_lk = aux.get("gate_mean", jnp.zeros((0, 0)))
        return right.reshape(shape), nll.reshape(shape), gates_lk

    return jax.jit(evaluate)


# --- a cell


def run(cell: Cell, deadline: float = math.inf) -> dict[str, Any]:
    """Trains and measures a cell.

    Args:
      cell: with its learning rate chosen.
      deadline: on ``time.monotonic()``'s clock.

    Returns:
      ``curve``, an entry per evaluation; ``end``, the measurements at the end; ``compile_secs``,
      of training, 0 if this process had its program.

    Raises:
      OutOfTime: if the deadline comes first.
    """
    task, model, chunk = TASKS[cell.task], model_of(cell.plan), steps_per_call(cell)
    begin = time.perf_counter()
    made = programs(cell.plan, chunk)
    compile_secs = time.perf_counter() - begin
    validation, test = (eval_rows(task.make, side, side) for side in ("validation", "test"))
    state, curve, losses, cpu_secs = made.init(cell.seed), [], [], 0.0
    rate = jnp.float32(cell.learning_rate)
    for first in range(0, cell.steps, chunk):
        if time.monotonic() > deadline:
            raise OutOfTime
        rows = [train_rows(task, cell.seed, step) for step in range(first, first + chunk)]
        tokens = jnp.asarray(np.stack([row.tokens for row in rows]))
        targets = jnp.asarray(np.stack([row.targets for row in rows]))
        begin = time.process_time()
        state, values = jax.block_until_ready(made.train(state, rate, tokens, targets))
        cpu_secs += time.process_time() - begin
        losses += np.asarray(values).tolist()
        done = first + chunk
        if done % cell.eval_steps == 0 or done == cell.steps:
            curve.append(
                {
                    "step": done,
                    "flops": done * BATCH * LENGTH * model.token_flops,
                    "cpu_secs": cpu_secs,
                    "train_loss": finite(float(np.mean(losses))),
                    "validation": summary(made, state.average, validation)["all"],
                    "test": summary(made, state.average, test)["all"],
                }
            )
            losses = []
    end = at_end(made, model, task, state.average, test)
    return {"curve": curve, "end": end, "compile_secs": compile_secs}


def train_rows(task: Task, seed: int, step: int) -> Rows:
    """The batch of one step of one seed."""
    rng = np.random.default_rng((seed, _STREAMS["train"], step))
    return task.make(rng, BATCH, "train", step)


@functools.cache
def eval_rows(make: Any, stream: str, side: str) -> Rows:
    """The rows of an evaluation: the same for all plans and seeds."""
    rng = np.random.default_rng((_EVAL_SEED, _STREAMS[stream]))
    return make(rng, EVAL_ROWS, side, math.inf)


def predict(made: Programs, params: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns right_nt (bool), nll_nt (nats) and the gates' means over all tokens, (l, k)."""
    parts = [
        made.evaluate(params, rows.tokens[at : at + 64], rows.targets[at : at + 64])
        for at in range(0, len(rows.tokens), 64)
    ]
    right, nll, gates = zip(*parts, strict=True)
    return np.concatenate(right), np.concatenate(nll), np.mean(gates, axis=0)


def by_level(rows: Rows, **values_nt: np.ndarray) -> dict[str, dict[str, Any]]:
    """Averages values over the answers of each level, and over all: level → means and answers."""
    asked_nt = rows.targets != NONE
    levels = [("all", asked_nt)]
    levels += [(str(level), rows.levels == level) for level in np.unique(rows.levels[asked_nt])]
    return {
        name: {key: finite(float(value[chosen].mean())) for key, value in values_nt.items()}
        | {"answers": int(chosen.sum())}
        for name, chosen in levels
    }


def summary(made: Programs, params: Any, rows: Rows) -> dict[str, dict[str, Any]]:
    """Accuracy and mean nll (nats) by level and over all."""
    right_nt, nll_nt, _ = predict(made, params, rows)
    return by_level(rows, accuracy=right_nt, nll=nll_nt)


def at_end(made: Programs, model: Model, task: Task, params: Any, test: Rows) -> dict[str, Any]:
    """Measures a trained model on test rows: by level, beyond the trained levels, its gates."""
    right_nt, nll_nt, gates_lk = predict(made, params, test)
    found = {"test": by_level(test, accuracy=right_nt, nll=nll_nt)}
    if task.beyond is not None:
        beyond = eval_rows(task.beyond, "beyond", "test")
        found["beyond"] = summary(made, params, beyond)
    if model.gated:
        found["gate_means"] = gates_lk.tolist()
    if model.gated_by_token:
        found["gate_sums"] = by_level(test, gates=gates_of_tokens(model, params, test)[0])
        fixed = with_fixed_gates(params, model, gates_lk)
        found["mean_gates"] = summary(made, fixed, test)
        found["skipping"] = {
            str(threshold): skipping(made, model, params, test, threshold)
            for threshold in SKIP_THRESHOLDS
        }
    return found


def skipping(
    made: Programs, model: Model, params: Any, rows: Rows, threshold: float
) -> dict[str, dict[str, Any]]:
    """Accuracy and the recursion steps of a token, by level, where a token skips the steps whose
    gates do not exceed the threshold."""
    assert model.config is not None
    config = for_inference(model.config, gate_skip_threshold=threshold)
    model = dataclasses.replace(model, config=config)
    right_nt, nll_nt, _ = predict(made._replace(evaluate=evaluation(model)), params, rows)
    _, steps_nt = gates_of_tokens(model, params, rows)
    return by_level(rows, accuracy=right_nt, nll=nll_nt, steps=steps_nt)


def with_fixed_gates(params: Any, model: Model, gates_lk: np.ndarray) -> Any:
    """Returns parameters whose gates are the given ones, whatever the token: no weights, and the
    bias from which a sigmoid makes the gate; a row per step, where all steps share one too."""
    assert model.config is not None
    kinds = model.config.kinds
    by_kind = stacks.by_kind(params["layers"], kinds)
    stack = by_kind["H"]
    clipped = np.clip(gates_lk.astype(np.float64), 1e-30, 1 - 1e-13)
    bias_lk = jnp.asarray(np.log(clipped) - np.log1p(-clipped), jnp.float32)
    kernel_lkd = jnp.zeros((*bias_lk.shape, model.config.d_model), jnp.float32)
    fixed = {"kernel": kernel_lkd, "bias": bias_lk}
    stack = stack | {"recursion": stack["recursion"] | {"gate": fixed}}
    return params | {"layers": stacks.joined(by_kind | {"H": stack}, kinds)}


def gates_of_tokens(model: Model, params: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Returns each token's sum of gates, and its recursion steps, over all layers: both (n, t).

    A forward reports means over its tokens only; so each row is read token by token, as decoding
    does, where the mean is that of one token.
    """
    sums_nt, steps_nt = _gates_of_tokens(model.config, params, jnp.asarray(rows.tokens))
    return np.asarray(sums_nt), np.asarray(steps_nt)


@functools.partial(jax.jit, static_argnames="config")
def _gates_of_tokens(config: Any, params: Any, tokens_nt: jax.Array) -> Any:
    def row(tokens_t: jax.Array, segments_t: jax.Array) -> Any:
        def token(cache: Any, read: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            token, segment = read
            _, aux, cache = build.forward(
                params,
                config,
                token[None, None],
                segment_ids_bt=segment[None, None],
                initial_cache=cache,
            )
            # The gates of skipped steps are 0; no other gate is, unless it underflows.
            return cache, (aux["depth_mean"].sum(), (aux["gate_mean"] > 0).sum())

        return jax.lax.scan(token, build.init_cache(config, 1), (tokens_t, segments_t))[1]

    return jax.vmap(row)(tokens_nt, segments(tokens_nt))


def finite(value: float) -> float | None:
    """A number as JSON has it; None: not finite."""
    return value if math.isfinite(value) else None


def cell_config(cell: Cell) -> dict[str, Any]:
    """All that a cell's numbers depend on, besides the code, the versions and the machine."""
    return {
        **dataclasses.asdict(cell),
        "model": model_of(cell.plan).fields,
        "training": settings(),
    }
