"""The command: ``python -m benchmarks.evidence``; ``--help`` says what it does."""

import argparse
import math
import os
import pathlib
import sys
import time
from importlib.metadata import version

from benchmarks import run as harness_run
from mamba_jax.errors import UserError, command

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "evidence.md"


@command
def main(argv: list[str]) -> int:
    """Runs, lists or reports cells."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description="Trains tiny models of equal size, a cell per task, plan, learning rate and "
        "seed. Run it again to resume: finished cells are skipped.",
        epilog="Writes TASK.jsonl, a line per finished cell. Ctrl-C loses at most one cell.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the cells and which are done")
    what.add_argument("--report", action="store_true", help="write the page and its figures")
    what.add_argument(
        "--cell",
        metavar="SPEC",
        help="run one cell, task=…,plan=…,learning_rate=…,seed=…,steps=…; if it is done, run it "
        "again and compare: any other number is an error",
    )
    what.add_argument(
        "--times",
        action="store_true",
        help="measure the time of a step, plans in turns, best on an idle machine",
    )
    parser.add_argument("--quick", action="store_true", help="a few cells of four steps")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="cells of these: task=, plan=, seed=; several values separated by commas",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="N", help="stop after so long"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="cores to use (default: 1)"
    )
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR", help="folder of the records")
    parser.add_argument(
        "--page", type=pathlib.Path, default=PAGE, metavar="FILE", help="of --report"
    )
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        raise UserError(f"--minutes={arguments.minutes} must be greater than 0")
    if not 1 <= arguments.threads <= (os.cpu_count() or 1):
        raise UserError(f"--threads={arguments.threads} must be between 1 and {os.cpu_count()}")
    deadline = time.monotonic() + 60 * arguments.minutes
    set_environment(arguments.threads)
    from benchmarks.evidence import suite  # JAX may start only now

    return suite.run(arguments, deadline)


def set_environment(threads: int) -> None:
    """Pins the process to cores before JAX starts."""
    harness_run.set_environment(threads)
    if version("jax").startswith("0.10."):  # compiles in half the time; the flag may go
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


if __name__ == "__main__":
    sys.exit(main())
