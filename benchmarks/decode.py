"""Decoding and prefill against transformers' ``generate`` with its cache.

"prefill" is the time to the first token; "decode" is the time from there to the end of a text of N
more tokens. Greedy, random weights, no row ends early.
"""

import functools
from typing import Any

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Row
from benchmarks.peers import transformers_mamba
from benchmarks.peers.transformers_mamba import MAMBAPY, SLOW
from benchmarks.report import colours, length_axis, ratio

BASELINE = "mamba_jax"
INT8 = "mamba_jax, int8 head"
TIMES_FASTER = {"prefill": 6.0, "decode": 4.0}  # target on one CPU core, against transformers' best
PREFILL = {"context": 1024, "tokens": 0}


def cases(context: Context) -> list[dict[str, Any]]:
    """Contexts and batches at the size ``small``; on a GPU ``medium`` too."""
    decode = lambda size, batch, length, n: {
        "task": "decode",
        "size": size,
        "batch": batch,
        "context": length,
        "tokens": n,
    }
    prefill = {"task": "prefill", "size": "small", "batch": 1, **PREFILL}
    if context.quick:
        return [decode("small", 1, 128, 32), prefill | {"context": 256}]
    if context.platform == "cpu":
        found = [decode("small", 1, 128, 96), prefill, decode("small", 16, 128, 32)]
        return [*found, decode("small", 1, 1024, 96), decode("small", 1, 4096, 96)]
    found = [decode(s, b, 128, 128) for s in ("medium", "small") for b in (1, 16)]
    found += [prefill | {"size": size} for size in ("medium", "small")]
    return found + [decode("medium", b, t, 128) for t in (1024, 4096, 32768) for b in (1, 16)]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """Ours, on a CPU with an int8 head too, and transformers'.

    The latter's mambapy changes only the prefill.
    """
    model, batch = workloads.model_of(case["size"]), case["batch"]
    length, n_tokens = case["context"], case["tokens"]
    prompts = workloads.windows(batch, length, model.vocab_size)[:, :-1]
    peer = functools.partial(
        transformers_mamba.prepare_generation, model, prompts, n_tokens, context
    )
    ours = functools.partial(workloads.prepare_generation, model, batch, length, n_tokens)
    found = [Candidate(BASELINE, ours), Candidate(SLOW, peer)]
    if case["task"] == "decode" and context.platform == "gpu":
        # Its slow path would prefill a long prompt for minutes; it decodes the same way.
        found[1] = Candidate(SLOW, functools.partial(peer, use_mambapy=True))
    if case["task"] == "decode" and context.platform == "cpu":
        found.append(Candidate(INT8, functools.partial(ours, int8_head=True)))
    if case["task"] == "prefill":
        found.append(Candidate(MAMBAPY, functools.partial(peer, use_mambapy=True)))
    return found


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures one batch and context."""
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=3 if context.quick else 5,
        candidate_secs=15.0,
        deadline=context.deadline,
    )
    # All tokens of a prompt but the first have to be prefilled; each token of a text is decoded.
    workloads.add_token_rates(rows, case, case["batch"] * (case["tokens"] or case["context"]))


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The targets for one CPU core and one row, against the faster of transformers' paths."""
    if context.platform != "cpu" or context.quick:
        return []
    found = []
    for task, least in TIMES_FASTER.items():
        claim = f"{task} is ≥ {least:g} × as fast as transformers', batch 1"
        chosen = [row for row in rows if row.case["task"] == task and row.case["batch"] == 1]
        times = [
            ratio(row, ours)
            for ours in chosen
            for row in chosen
            if ours.name == BASELINE and row.name not in (BASELINE, INT8) and row.case == ours.case
        ]
        times = [value for value in times if value is not None]
        if times:
            detail = f"{min(times):.1f} × to {max(times):.1f} ×"
            found.append(Check(claim, min(times) >= least, detail))
        else:
            found.append(Check(claim, None, ""))
    return found


def draw(rows: list[Row], figure: Any) -> None:
    """Draws tokens per second over the context, per batch and implementation."""
    plots = figure.subplots(1, 2)
    colour = colours(rows)
    for plot, task in zip(plots, ("decode", "prefill"), strict=True):
        chosen = [row for row in rows if row.case["task"] == task]
        series = [(row.name, row.case["size"], row.case["batch"]) for row in chosen]
        for name, size, batch in dict.fromkeys(series):
            mine = sorted(
                (row.case["context"], row.metrics["tokens_per_sec"])
                for row, key in zip(chosen, series, strict=True)
                if key == (name, size, batch)
            )
            plot.plot(
                *zip(*mine, strict=True),
                marker="o" if batch == 1 else "s",
                linestyle="-" if size == "small" else ":",
                color=colour[name],
                label=f"{name}, {size}, batch {batch}",
            )
        plot.set(title=task, ylabel="tokens per second, all rows")
        plot.set_ylim(bottom=0)
        length_axis(plot, (row.case["context"] for row in chosen), "tokens of context")
        if chosen:
            plot.legend(fontsize=7)
