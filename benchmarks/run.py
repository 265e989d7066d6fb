"""The command: ``python -m benchmarks.run NAME [--quick]``; ``--help`` lists the benchmarks.

A benchmark is a module of this folder with

  cases(context) → the cases, most telling first     candidates(case, context) → implementations
  measure(case, context, rows): appends their rows   checks(rows, context) → its targets, checked
  draw(rows, figure): the picture                    BASELINE: the name that ratios are taken to
"""

import argparse
import importlib
import os
import pathlib
import shutil
import sys
import time
from types import ModuleType

from benchmarks import report
from benchmarks.harness import Context, Row
from mamba_jax.errors import UserError, command, did_you_mean

RESULTS = pathlib.Path(__file__).parent / "results"
BENCHMARKS = {
    "scan": "the selective scan: every implementation over batch, length and width",
    "train": "a whole training step against transformers' Mamba and a Transformer in JAX",
    "decode": "generation and prefill against transformers' generate",
    "hybrid": "what each part of the hybrid costs, against plain Mamba",
    "depth": "a trained hybrid that skips recursion steps: time and quality by threshold",
    "startup": "import, --help, and compiling the training step without and with a cache",
    "data": "batches against peers, tokenising and its memory, opening a large cache",
    "serving": "the server under load: many clients, a shared prompt, endurance",
    "scaling": "whether time and memory grow in proportion to the length",
}
ALL_CORES = ("startup", "serving")  # as a user has them


@command
def main(argv: list[str]) -> int:
    """Runs one benchmark; returns 0 even if a check failed: the report says so."""
    listing = "\n".join(f"  {name:<9} {what}" for name, what in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measures speed and memory side by side with peers, in one process where "
        f"possible.\n\n{listing}",
        epilog="Writes NAME_DEVICE.json, .md and .png (NAME_DEVICE_quick with --quick). "
        "Peers come with: pip install -e '.[bench]'. Ctrl-C keeps what was measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of the above")
    parser.add_argument("--quick", action="store_true", help="few small cases: about a minute")
    parser.add_argument("--output", metavar="DIR", type=pathlib.Path, default=RESULTS)
    parser.add_argument(
        "--budget_secs",
        metavar="S",
        type=float,
        default=float("inf"),
        help="start no case after this",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="for depth: a trained hybrid, or a run's folder"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="cores to use, 0: all (default: 1 on a CPU, all of them for startup and with a GPU)",
    )
    arguments = parser.parse_args(argv)
    name = arguments.name
    if name not in BENCHMARKS:
        near = did_you_mean(name, BENCHMARKS)
        raise UserError(f'unknown benchmark "{name}"{near} (choices: {", ".join(BENCHMARKS)})')
    threads = arguments.threads
    if threads is None:
        threads = 0 if name in ALL_CORES or has_accelerator() else 1
    if not 0 <= threads <= os.cpu_count():
        raise UserError(f"--threads={threads} must be between 0 (all) and {os.cpu_count()}")
    if not arguments.budget_secs > 0:
        raise UserError(f"--budget_secs={arguments.budget_secs} must be greater than 0")
    if arguments.checkpoint and name != "depth":
        raise UserError(
            f"--checkpoint={arguments.checkpoint} has no effect on {name}; leave it out"
        )
    if name == "depth" and not arguments.checkpoint:
        raise UserError("depth measures a trained hybrid; give --checkpoint DIR")
    arguments.output.mkdir(parents=True, exist_ok=True)
    set_environment(threads)

    context = make_context(arguments.quick, arguments.budget_secs, arguments.checkpoint)
    words = [name, *(["--quick"] if context.quick else []), f"--threads={threads}"]
    words += ["--checkpoint=DIR"] if arguments.checkpoint else []
    environment = report.environment(context, "python -m benchmarks.run " + " ".join(words))
    benchmark, rows = load(name), []
    ending = run_cases(benchmark, context, rows)
    environment["load_average_at_end"] = os.getloadavg()[0]
    result = report.Result(
        benchmark=name,
        quick=context.quick,
        baseline=benchmark.BASELINE,
        ending=ending,
        environment=environment,
        rows=rows,
        checks=benchmark.checks(rows, context),
    )
    stem = arguments.output / report.file_stem(result, context)
    report.write(result, stem, benchmark.draw)
    print(report.markdown(result))
    print(f"written: {stem}.json, .md, .png")
    return 130 if ending == "interrupted" else 0


def run_cases(benchmark: ModuleType, context: Context, rows: list[Row]) -> str:
    """Measures case after case into ``rows``; returns how it ended: "complete", or why not."""
    ending = _run_cases(benchmark, context, rows)
    for row in rows:
        row.note = row.note or ("" if row.samples_secs else f"not measured: {ending}")
    return ending


def _run_cases(benchmark: ModuleType, context: Context, rows: list[Row]) -> str:
    cases = benchmark.cases(context)
    for number, case in enumerate(cases):
        if context.seconds_left() < 0:
            return f"out of time after {number} of {len(cases)} cases"
        begin = time.monotonic()
        try:
            benchmark.measure(case, context, rows)
        except KeyboardInterrupt:
            return "interrupted"
        took = time.monotonic() - begin
        words = " ".join(f"{key}={value}" for key, value in case.items())
        print(f"[{number + 1}/{len(cases)}] {words}: {took:.0f} s", file=sys.stderr, flush=True)
    return "complete"


def load(name: str) -> ModuleType:
    """Imports a benchmark's module; only now JAX may be imported."""
    return importlib.import_module(f"benchmarks.{name}")


def make_context(
    quick: bool, budget_secs: float = float("inf"), checkpoint: str | None = None
) -> Context:
    """Asks JAX what it runs on."""
    import jax

    device = jax.devices()[0]
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    deadline = time.monotonic() + budget_secs
    return Context(platform, device.device_kind, quick, deadline, checkpoint)


def has_accelerator() -> bool:
    """Whether JAX may find something better than a CPU; asked before it is imported."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return False
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/accel0")


def set_environment(threads: int) -> None:
    """Sets, before any library is imported, how many cores to use and what not to do."""
    if threads and hasattr(os, "sched_setaffinity"):
        # From the last: the first core often serves the machine's interrupts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    if threads == 1:
        flag = "--xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by torch
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a peer needs memory as well
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be downloaded


if __name__ == "__main__":
    sys.exit(main())
