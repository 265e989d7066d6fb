"""A whole training step against transformers' Mamba and a Transformer in JAX.

The same tokens, AdamW and clipping for all; float32 on a CPU, bfloat16 matmuls on an accelerator,
where the length grows while the tokens of a step stay the same: that shows where Mamba wins and
where it does not. On a CPU peak memory is that of a process per candidate (``peak_rss_bytes``,
libraries included); on a GPU that of its program.

Where a CPU's C library returns freed memory to the system, a step spends time on mapping it again;
with large temporary arrays such as mambapy's, most of its time. So both are measured again with a
malloc that keeps it.
"""

import functools
from collections.abc import Callable
from typing import Any

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Row
from benchmarks.peers import gpt2, transformers_mamba
from benchmarks.peers.transformers_mamba import MAMBAPY, SLOW
from benchmarks.report import bars, case_key, colours, length_axis, ratio

BASELINE = "mamba_jax"
TRANSFORMER, TRANSFORMER_REMAT = "Transformer in JAX", "Transformer in JAX, remat"
# Not glibc's default: the memory kept may grow to several times the memory used.
KEEP_FREED = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}
SLOW_PATH_SECS = 130.0  # for one step on a CPU; beyond, its time has only a lower bound
LONGEST_SLOW_PATH = 2048  # tokens, on a GPU
TIMES_FASTER = {MAMBAPY: 5.0, SLOW: 40.0}  # target on one CPU core
MEMORY_SHARE = 0.5  # target against the peer with mambapy


def cases(context: Context) -> list[dict[str, Any]]:
    """Preset sizes, small first, over the length."""
    if context.platform == "cpu":
        shape = {"B": 1, "L": 128} if context.quick else {"B": 2, "L": 512}
        return [{"size": "small", **shape}]
    lengths = (512, 2048) if context.quick else (2048, 8192, 32768, 512)
    sizes = ("small",) if context.quick else ("small", "medium")
    return [{"size": s, "B": 32768 // t, "L": t} for s in sizes for t in lengths]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """Ours, transformers' two paths, and the Transformer."""
    model, batch, length = workloads.model_of(case["size"]), case["B"], case["L"]
    tokens = workloads.windows(batch, length, model.vocab_size)
    on_cpu = context.platform == "cpu"

    def peer(use_mambapy: bool) -> harness.Prepared:
        if not (use_mambapy or on_cpu) and length > LONGEST_SLOW_PATH:
            raise harness.NotMeasured(f"its loop over more than {LONGEST_SLOW_PATH} tokens is slow")
        return transformers_mamba.prepare_train_step(
            model, tokens, context, use_mambapy=use_mambapy
        )

    def transformer(remat: bool) -> harness.Prepared:
        return gpt2.prepare_train_step(gpt2.config_like(model, context, remat=remat), tokens)

    ours = functools.partial(workloads.prepare_train_step, model, batch, length)
    transformer_whole = Candidate(TRANSFORMER, functools.partial(transformer, False))
    mambapy, slow = functools.partial(peer, True), functools.partial(peer, False)
    if on_cpu:
        keeping = functools.partial(
            Candidate, isolated_secs=120.0, isolated_samples=5, environment=KEEP_FREED
        )
        return [
            Candidate(BASELINE, ours),
            transformer_whole,
            Candidate(MAMBAPY, mambapy),
            keeping(f"{BASELINE}, freed memory kept", ours),
            keeping(f"{MAMBAPY}, freed memory kept", mambapy),
            Candidate(SLOW, slow, isolated_secs=SLOW_PATH_SECS),
        ]
    return [
        Candidate(BASELINE, ours),
        transformer_whole,
        # There we recompute activations, too.
        Candidate(TRANSFORMER_REMAT, functools.partial(transformer, True)),
        Candidate(MAMBAPY, mambapy),
        Candidate(SLOW, slow),
    ]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures one size and length."""
    found = candidates(case, context)
    on_cpu = context.platform == "cpu"
    harness.measure(
        found,
        case,
        rows,
        rounds=20 if not on_cpu else 3 if context.quick else 5,
        candidate_secs=60.0 if on_cpu else 5.0,
        deadline=context.deadline,
    )
    harness.measure_isolated("train", found, case, rows, context, memory=on_cpu)
    workloads.add_token_rates(rows, case, case["B"] * case["L"])


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The targets for one CPU core, at the full shape."""
    if context.platform != "cpu" or context.quick:
        return []
    by_name = {row.name: row for row in rows}
    ours, found = by_name.get(BASELINE), []
    for name, least in TIMES_FASTER.items():
        row, claim = by_name.get(name), f"a step is ≥ {least:g} × as fast as {name}'s"
        times = ratio(row, ours) if row and ours else None
        if times is None:
            found.append(Check(claim, None, ""))
        else:
            detail = f"{'At least ' if row.at_least else ''}{times:.1f} ×"
            # A step that was stopped proves a ratio reached, but not one missed.
            missed = None if row.at_least else False
            found.append(Check(claim, True if times >= least else missed, detail))
    claim = f"peak memory is ≤ {MEMORY_SHARE} of {MAMBAPY}'s"
    peaks = [row.metrics.get("peak_rss_bytes") for row in (ours, by_name.get(MAMBAPY)) if row]
    if len(peaks) < 2 or None in peaks:
        return [*found, Check(claim, None, "")]
    share = peaks[0] / peaks[1]
    return [*found, Check(claim, share <= MEMORY_SHARE, f"{share:.2f}")]


def draw(rows: list[Row], figure: Any) -> None:
    """Draws speed and memory: bars for a single case, else lines over the length."""
    plots = figure.subplots(1, 2)
    apart = any("peak_rss_bytes" in row.metrics for row in rows)
    memory, what = ("peak_rss_bytes", "process") if apart else ("program_bytes", "program")
    one_case = len({case_key(row.case) for row in rows}) == 1
    for plot, key, factor, label in (
        (plots[0], "tokens_per_sec", 1.0, "tokens per second"),
        (plots[1], memory, 1e-6, f"peak memory of the {what} (MB)"),
    ):
        known = [row for row in rows if key in row.metrics]
        if one_case:
            stopped = lambda row: ", stopped: at best" if row.at_least else ""
            named = [(row.name + stopped(row), row.metrics[key] * factor) for row in known]
            bars(plot, named, label)
        else:
            draw_lines(plot, known, lambda row, k=key, f=factor: row.metrics[k] * f, label)


def draw_lines(plot: Any, rows: list[Row], value: Callable[[Row], float], label: str) -> None:
    """Draws a line per implementation and size over the length."""
    colour, sizes = colours(rows), list(dict.fromkeys(row.case["size"] for row in rows))
    for name in colour:
        for size in sizes:
            mine = [row for row in rows if row.name == name and row.case["size"] == size]
            points = sorted((row.case["L"], value(row)) for row in mine)
            plot.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker="o",
                linestyle="-" if size == sizes[0] else ":",
                color=colour[name],
                label=f"{name}, {size}",
            )
    plot.set(yscale="log", ylabel=label)
    length_axis(plot, (row.case["L"] for row in rows), "tokens in a sequence")
    plot.legend(fontsize=7)
