"""The memory estimator's formula against the compiler, for a card that need not be installed.

    ./scripts/compilers.sh
    python -m benchmarks.estimator                    all cases for the RTX 4080, about ten minutes
    python -m benchmarks.estimator --sizes medium     some of them, printed and not written

Each case is the whole train step of a size, compiled for the card; its figure is the compiler's
(arguments + outputs − aliases + temporaries), and nothing is run. Writes
benchmarks/results/estimator_<card>.json and .md. Figures are kept in the cache folder: a second
call compiles only what has changed.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import sys
import threading
import time
from typing import Any

import jax

from benchmarks.report import git_commit
from mamba_jax.config import DataConfig, RunConfig, freeze, preset_config
from mamba_jax.costs.devices import device_named
from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary
from mamba_jax.estimator.budget import GIB, Machine, of_device
from mamba_jax.estimator.choose import CHUNK_TOKENS, StepLayout, laid_out, quick
from mamba_jax.estimator.exact import Compiler
from mamba_jax.estimator.planning import resolved

CARD = "RTX 4080"
LENGTHS = (512, 1024, 2048, 8192)
# Tokens of a microbatch, so that a step of these sizes takes between 1 and 20 GiB.
POLICIES = {"none": 8_192, "dots": 8_192, "full": 16_384}
SIZES = ("medium", "large", "hybrid-small-standard")
# One case for each of the other sizes, alternating policy, length and tokens per microbatch; the
# last ones were compiled when the formula was finished.
OTHERS = (
    ("small", "none", 2048, 8_192),
    ("medium-lite", "dots", 1024, 8_192),
    ("xlarge", "full", 2048, 16_384),
    ("hybrid-small", "none", 1024, 8_192),
    ("hybrid-medium", "dots", 2048, 8_192),
    ("hybrid-large", "full", 8192, 16_384),
    ("small", "full", 512, 512),
    ("medium-x", "none", 1024, 1_024),
    ("xxlarge", "full", 2048, 4_096),
    ("hybrid-small-pro", "dots", 1024, 4_096),
    ("hybrid-small-plus", "full", 2048, 2_048),
)
# Structures that are not presets.
CHANGED = (
    ("medium", "none", 2048, 8_192, {"dropout": 0.1}),
    ("medium", "dots", 2048, 8_192, {"tie_embeddings": False}),
    ("medium", "full", 2048, 8_192, {"dtype": "float32"}),
    ("hybrid-small", "full", 1024, 4_096, {"recursion_reads_attention": False}),
    ("hybrid-small", "full", 1024, 4_096, {"recursion_depth": 0}),
    ("hybrid-small", "dots", 1024, 4_096, {"attention_scales": ()}),
    ("hybrid-small", "full", 2048, 8_192, {"recursion_depth": 2, "attention_window": 128}),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile."""

    size: str
    policy: str
    length: int
    tokens: int  # of a microbatch
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # to the size's structure

    @property
    def rows(self) -> int:
        return max(1, self.tokens // self.length)


def cases() -> list[Case]:
    """Returns all cases."""
    grid = [(s, p, length) for s in SIZES for p in POLICIES for length in LENGTHS]
    made = [Case(size, policy, length, POLICIES[policy]) for size, policy, length in grid]
    return made + [Case(*other) for other in (*OTHERS, *CHANGED)]


def run_of(case: Case, machine: Machine) -> tuple[RunConfig, StepLayout]:
    """Returns the run of a case, of two microbatches at least, and its layout."""
    config = freeze(preset_config(case.size))
    model = dataclasses.replace(config.model, max_seq_len=case.length, **case.changes)
    vram = dataclasses.replace(config.vram, effective_batch_size=2 * case.rows)
    config = dataclasses.replace(config, model=model, vram=vram)
    config = resolved(with_vocabulary(config, load_tokenizer("gpt2")), machine)
    return config, StepLayout(case.rows, case.policy, CHUNK_TOKENS[False])


def measure(chosen: list[Case], machine: Machine, jobs: int) -> list[dict[str, Any]]:
    """Compiles the cases, ``jobs`` at a time, and compares the formula."""
    own = threading.local()  # a compiler's process for each thread
    compilers: list[Compiler] = []

    def one(case: Case) -> dict[str, Any]:
        if not hasattr(own, "compiler"):
            own.compiler = Compiler(machine, DataConfig().cache_root)
            compilers.append(own.compiler)
        config, layout = run_of(case, machine)
        compiled_bytes = own.compiler.step_bytes(laid_out(config, layout))
        estimate = quick(config, machine, layout)
        error = estimate.total_bytes / compiled_bytes - 1
        print(
            f"{case.size:<22} {case.policy:<5} {case.length:>5} × {case.rows:<3} "
            f"{compiled_bytes / GIB:6.2f} {estimate.total_bytes / GIB:6.2f} {error:+7.1%}",
            flush=True,
        )
        return {
            "size": case.size,
            "changes": case.changes,
            "remat": case.policy,
            "seq_len": case.length,
            "batch_size": case.rows,
            "compiled_bytes": compiled_bytes,
            "estimated_bytes": estimate.total_bytes,
            "error": error,
            "parts_bytes": estimate.parts,
        }

    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, chosen))
    finally:
        for compiler in compilers:
            compiler.__exit__()


def markdown(record: dict[str, Any]) -> str:
    """Returns the table for people."""
    rows = record["cases"]
    worst = max(rows, key=lambda row: abs(row["error"]))
    mean = sum(abs(row["error"]) for row in rows) / len(rows)
    lines = [
        f"# The estimator's formula against the compiler, {record['compiled_for']}",
        "",
        f"{len(rows)} train steps, bfloat16, accumulated over 2 microbatches, compiled on "
        f"{record['date']} by jax {record['jax']} (commit {record['commit'][:12]}); nothing was "
        f"run. Largest error {worst['error']:+.1%} ({_name(worst)}, {worst['remat']}, "
        f"{worst['seq_len']}), mean {mean:.1%}. To reproduce it: `./scripts/compilers.sh`, then "
        "`python -m benchmarks.estimator`.",
        "",
        "| size | remat | window × microbatch | compiled GiB | formula GiB | error |",
        "|---|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {_name(row)} | {row['remat']} | {row['seq_len']} × {row['batch_size']} "
        f"| {row['compiled_bytes'] / GIB:.2f} | {row['estimated_bytes'] / GIB:.2f} "
        f"| {row['error']:+.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    changes = [f"{field} {value}" for field, value in row["changes"].items()]
    return ", ".join([row["size"], *changes])


def main() -> int:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description="The memory formula against the compiler.")
    parser.add_argument(
        "--sizes", default="", help="only these, separated by commas; writes no files"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compiles at a time")
    given = parser.parse_args()
    device = device_named(CARD)
    assert device is not None
    wanted = given.sizes.split(",") if given.sizes else []
    chosen = [case for case in cases() if not wanted or case.size in wanted]
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "jax": jax.__version__,
        "compiled_for": CARD,
        "cases": measure(chosen, of_device(device), given.jobs),
    }
    if wanted:
        return 0
    stem = pathlib.Path(__file__).parent / "results" / "estimator_rtx4080"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(record))
    print(f"written: {stem}.json, {stem}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
