"""Real runs, as small as they can be: the trainer's own step, loop, monitor and evaluation.

Only the text and the clock are made up. The test decides how long a step takes, not the machine, so
that a busy one raises no finding.
"""

import dataclasses
import functools
import itertools
import pathlib
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np

from mamba_jax.config import RunConfig, to_dict
from mamba_jax.errors import UserError
from mamba_jax.training import loop, monitor
from mamba_jax.training.evaluation import evaluate
from mamba_jax.training.hardware import Hardware
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_eval_step, make_train_step
from tests.support.tiny_run import EOT, HYBRID, one_device, run_config

STEPS, TOKENS, BATCH = 300, 24, 8
MODEL = dataclasses.replace(HYBRID, vocab_size=128, max_seq_len=TOKENS)
HEALTHY = run_config(
    MODEL,
    batch=BATCH,
    microbatch=BATCH,
    learning_rate=1e-2,
    warmup_steps=20,
    max_steps=STEPS,
    log_steps=5,
    eval_steps=30,
)
# A different program, as the rate is part of it: the smaller family, never evaluated.
FAR_TOO_HIGH = run_config(
    dataclasses.replace(MODEL, family="mamba"),
    batch=BATCH,
    microbatch=BATCH,
    learning_rate=5.0,
    warmup_steps=20,
    max_steps=STEPS,
    eval_steps=STEPS,
)


@functools.cache
def text() -> np.ndarray:
    """About a hundred thousand bytes of the standard library, as ids below 128."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{name}.py" for name in ("argparse", "tarfile", "inspect", "typing")]
    data = b"\n".join(file.read_bytes() for file in files)
    return np.minimum(np.frombuffer(data, np.uint8), 127).astype(np.int32)


def windows(ids: np.ndarray, seed: int, count: int = BATCH) -> Iterator[np.ndarray]:
    """Batches of windows cut out at random."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(ids) - TOKENS, count)
        batch = np.stack([ids[start : start + TOKENS + 1] for start in starts])
        batch[:, 0] = EOT
        yield batch


@functools.cache
def compiled(config: RunConfig):
    mesh = one_device()
    widths = np.ones(MODEL.vocab_size, np.int32)
    return make_train_step(config, mesh, EOT), make_eval_step(config, mesh, EOT, widths), mesh


class Clock:
    """Time that advances on command."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def train(
    folder: pathlib.Path,
    config: RunConfig = HEALTHY,
    *,
    ids: np.ndarray | None = None,
    eval_ids: np.ndarray | None = None,
    step_secs: Callable[[int], float] = lambda step: 0.01,
    read_secs: float = 1e-3,
    steps: int = STEPS,
    meddle: Mapping[int, Callable[[Any], Any]] | None = None,
) -> pathlib.Path:
    """Trains on a text and returns the folder with what the run recorded.

    Args:
      folder: the run's folder.
      config: the run's config.
      ids: the text; None: source code.
      eval_ids: the held-out text; None: the end of ``ids``.
      step_secs: step → seconds that it takes, without reading the batch.
      read_secs: seconds that a batch takes to read.
      steps: steps to take, unless an error ends the run.
      meddle: step → what to make of the parameters before it.
    """
    ids = text() if ids is None else ids
    eval_ids = ids[-len(ids) // 10 :] if eval_ids is None else eval_ids
    folder.mkdir(parents=True)
    places = {name: str(folder / name) for name in ("log_dir", "tensorboard_dir")}
    config = dataclasses.replace(config, name="tiny", output_dir=str(folder), **places)
    train_step, eval_step, mesh = compiled(dataclasses.replace(config, name="", **_NOWHERE))
    state, clock = init_state(config, mesh), Clock()
    held_out = [(w, np.ones(BATCH, np.float32)) for w in itertools.islice(windows(eval_ids, 1), 8)]

    def read() -> Iterator[np.ndarray]:
        for batch in windows(ids, seed=0):
            clock.now += read_secs
            yield batch

    try:
        with (
            mock.patch.object(monitor.time, "perf_counter", clock),
            monitor.Monitor(config) as shown,
        ):
            shown.open()
            about = {"config": to_dict(config), "parameters": _count(state["params"])}
            shown.start(0, None, Hardware("cpu", 1, 1e6, None), about)
            late = loop.LateMetrics(shown, config.training.max_gradient_norm, lambda: None)
            batches = shown.waiting(read())
            for step in range(1, steps + 1):
                if meddle and step in meddle:
                    state["params"] = meddle[step](state["params"])
                state, metrics = train_step(state, next(batches))
                late.push(step, metrics)
                clock.now += step_secs(step)
                if step == 1 or step % config.training.eval_steps == 0:
                    late.drain()
                    with shown.paused():
                        if step > 1:
                            shown.evaluation(step, evaluate(eval_step, state["params"], held_out))
            late.drain()
    except UserError:  # a divergence, which is recorded
        pass
    return folder


_NOWHERE = {"output_dir": "out", "log_dir": "logs", "tensorboard_dir": "runs"}


def _count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
