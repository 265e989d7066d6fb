"""How long a user waits: imports, ``--help``, and compiling a preset size's training step.

Every sample is a fresh Python process. Compiling is timed inside it, tracing and lowering included:
without a cache ("cold"), and with JAX's persistent cache filled by another process ("warm").
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import harness
from benchmarks.harness import Candidate, Check, Context, Prepared, Row
from benchmarks.report import bars

BASELINE = "import jax"
TRAIN_HELP = "mamba_jax.train --help"
COLD_SECS = 30.0  # target for the size medium on 2 CPU cores
COMMANDS = {
    BASELINE: ["-c", "import jax"],
    "import mamba_jax.training.step": ["-c", "import mamba_jax.training.step"],
    TRAIN_HELP: ["-m", "mamba_jax.train", "--help"],
}
MEASURED_IN = "compiled in"


def cases(context: Context) -> list[dict[str, Any]]:
    """Commands, then compilation by size."""
    sizes = ("small",) if context.quick else ("medium", "small", "hybrid-small-standard")
    return [{"task": "command"}, *({"task": f"compile {size}"} for size in sizes)]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """Commands, or both ways to compile."""
    if case["task"] == "command":
        return [
            Candidate(name, functools.partial(prepare_command, words))
            for name, words in COMMANDS.items()
        ]
    size = case["task"].removeprefix("compile ")
    return [
        Candidate(name, functools.partial(prepare_compilation, size, warm))
        for name, warm in (("cold", False), ("warm", True))
    ]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Runs each in turn."""
    compiles = case["task"] != "command"
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=(1 if context.quick else 3) if compiles else (3 if context.quick else 7),
        candidate_secs=60.0,
        deadline=context.deadline,
    )


def prepare_command(words: list[str]) -> Prepared:
    """A Python process, from its start to its end."""

    def run() -> None:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    return Prepared(run)


def prepare_compilation(size: str, warm: bool) -> Prepared:
    """A process that compiles the step; a warm one finds the cache of an earlier one."""
    kept = tempfile.TemporaryDirectory()  # until the candidate is dropped

    def run() -> float:
        if warm:
            return compile_in_process(size, kept.name)
        with tempfile.TemporaryDirectory() as fresh:
            return compile_in_process(size, fresh)

    return Prepared(run)


def compile_in_process(size: str, cache: str) -> float:
    """Returns the seconds that a fresh process took to compile the step of a size."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup", size],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
    )
    (line,) = (x for x in done.stdout.splitlines() if x.startswith(MEASURED_IN))
    return float(line.removeprefix(MEASURED_IN))


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The target for the time to the first step of ``medium``."""
    if context.platform != "cpu" or context.quick:
        return []
    claim = f"the step of medium compiles within {COLD_SECS:.0f} s without a cache"
    for row in rows:
        if row.case == {"task": "compile medium"} and row.name == "cold" and row.samples_secs:
            passed = row.median_secs <= COLD_SECS
            return [Check(claim, passed, f"{row.median_secs:.1f} s")]
    return [Check(claim, None, "")]


def draw(rows: list[Row], figure: Any) -> None:
    """Draws one bar each."""
    label = lambda row: (
        row.name if row.case["task"] == "command" else f"{row.case['task']}, {row.name}"
    )
    plot = figure.subplots()
    bars(plot, [(label(row), row.median_secs) for row in rows], "seconds, each a fresh process")


def main() -> None:
    """Compiles the step of the named size and reports how long it took."""
    import jax
    import numpy as np

    from benchmarks.workloads import model_of
    from mamba_jax.config import ParallelConfig, RunConfig
    from mamba_jax.parallel.mesh import make_mesh
    from mamba_jax.training.state import abstract_state
    from mamba_jax.training.step import make_train_step

    config = RunConfig(model=model_of(sys.argv[1]))  # the defaults' batch, length, accumulation
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    shape = (config.vram.effective_batch_size, config.model.max_seq_len + 1)
    begin = time.perf_counter()
    step = make_train_step(config, mesh, config.model.vocab_size - 1)
    step.lower(abstract_state(config, mesh), jax.ShapeDtypeStruct(shape, np.int32)).compile()
    print(MEASURED_IN, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
