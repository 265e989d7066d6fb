"""The page ``docs/evidence.md`` and its figures, from the records alone."""

import os
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.evidence import compare, records, times, trial
from benchmarks.evidence.cells import (
    EVAL_STEPS,
    LEARNING_RATES,
    MAIN_PLANS,
    PAIRS,
    cells,
)
from benchmarks.evidence.compare import AXES, Group
from benchmarks.evidence.plans import PLANS, REFERENCE, model_of
from benchmarks.evidence.records import Record
from benchmarks.evidence.tasks import LENGTH, TASKS, VOCABULARY
from mamba_jax.files import write_atomic

NOTHING = "–"
_UNITS = {"steps": (1, "steps"), "FLOPs": (1e12, "TFLOPs"), "time": (1, "s")}
_HOW = f"""\
Every model has a vocabulary of {VOCABULARY} and about as many parameters; every task has rows of
{LENGTH} tokens in batches of {trial.BATCH}, made on the fly from the seed. Training is AdamW at a
constant learning rate ({trial.WARMUP_STEPS} steps of warm-up, β2 {trial.OPTIMIZER.beta2},
decay {trial.OPTIMIZER.weight_decay}, clipped to norm {trial.OPTIMIZER.gradient_clip}), with the
loss at answers alone. What is judged is the moving average of the weights
(decay {trial.AVERAGE_DECAY}), every {EVAL_STEPS} steps, on {trial.EVAL_ROWS} fixed test rows. As
the rate is constant, every evaluation is a valid end of training: equal steps, equal FLOPs and
equal time are read from the same runs, on the line between two evaluations where the budget falls
between them. A budget is what the plan that ends first has used.

- Accuracy is that of each answer token, given the ones before it. Text is judged by bits per byte.
- FLOPs are those of training: matrix products and elementwise operations, forward and backward.
- The learning rate is the best of {", ".join(map(str, LEARNING_RATES))} on validation rows, on a
  seed that no table shows, at half the steps. An asterisk marks a rate that no sweep chose, or a
  shorter run.
- `±` is half the 95% interval of the mean over seeds (Student's t); the number of seeds is in
  brackets, and one seed has no interval. Pairs are compared seed by seed.
- Problems with a text of their own are divided into training, validation and test by its hash;
  the other tasks have too many rows for two streams to meet; text is divided by file.
"""
_COMMANDS = """\
<!-- not run: days of training; tests/benchmarks runs the suite on cells of two steps -->
```bash
python -m benchmarks.evidence --quick                # some cells of four steps
python -m benchmarks.evidence --list                 # all cells, and which are done
python -m benchmarks.evidence --minutes 60           # run it again to resume
python -m benchmarks.evidence --only task=p_hop_3 plan=M*6,AMAMA
python -m benchmarks.evidence --times                # the time of a step, on an idle machine
python -m benchmarks.evidence --report               # write this page
```

Each record names the command that reproduces its numbers to the bit, on the same machine with the
same versions.
"""


def write(folder: pathlib.Path, page: pathlib.Path) -> list[pathlib.Path]:
    """Writes the page, and a figure per task that was run into the folder of the records."""
    from benchmarks.evidence import figures

    found = records.read(folder)
    by_task = compare.groups(found, folder)
    drawn = {
        task: figures.draw(task, by_task[task], folder / f"{task}.png")
        for task in TASKS
        if task in by_task
    }
    link = lambda path: os.path.relpath(path, page.parent)
    parts = [
        "# Evidence: which plan of layers learns what",
        "*Written by `python -m benchmarks.evidence --report`; do not edit.*",
        *_coverage(found, by_task, folder),
        "## How it is measured",
        _filled(_HOW),
        "## The models",
        _models(found, folder),
        *(_at_equal(by_task, axis) for axis in AXES),
        *_pairs(by_task),
        *(_by_level(task, by_task[task], link(drawn[task])) for task in drawn),
        "## Run it",
        _COMMANDS.strip(),
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, "\n\n".join(parts) + "\n")
    return [page, *drawn.values()]


def _filled(text: str) -> str:
    """Breaks the lines of paragraphs and points anew, at 100 characters."""
    blocks = re.split(r"\n\n|\n(?=- )", text.strip())
    filled = [
        textwrap.fill(" ".join(block.split()), 100, subsequent_indent="  " * (block[:2] == "- "))
        for block in blocks
    ]
    return "\n".join([filled[0], "", *filled[1:]])


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    line = lambda words: "| " + " | ".join(map(escaped, words)) + " |"
    rule = line(["---", *(["---:"] * (len(header) - 1))])
    return "\n".join([line(header), rule, *map(line, rows)])


def escaped(text: str) -> str:
    """Text whose asterisks are no emphasis; in code they never are."""
    return text if "`" in text else text.replace("*", "\\*")


def shown(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean of some seeds, half its interval, their number; a dash for none."""
    if not values:
        return NOTHING
    mean, half = compare.mean_interval(values)
    text = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    return f"{text} ({len(values)})" if half is None else f"{text} ± {half:.3f} ({len(values)})"


def _coverage(
    found: list[Record], by_task: dict[str, dict[str, Group]], folder: pathlib.Path
) -> list[str]:
    """What was run and what was not."""
    table_ = cells(records.best_rates(found))
    n_done = sum(
        cell.learning_rate is not None and records.find(found, trial.cell_config(cell)) is not None
        for cell in table_
    )
    extra = [r for r in found if r["config"]["task"] in TASKS]
    lines = [
        "**What was run.** "
        f"{n_done} of the {len(table_)} cells of the full table, and {len(extra) - n_done} others, "
        "named here. A dash (–) is a cell that was not run. Few seeds are leads, and not proof: a "
        "claim needs the full table.",
    ]
    points = []
    for task, of_task in by_task.items():
        plans = ", ".join(
            f"{escaped(plan)} ({len(group.by_seed)} × {group.steps:,} steps"
            f"{'' if group.tuned else f', rate {group.learning_rate} not tuned'})"
            for plan, group in of_task.items()
        )
        points.append(f"- `{task}`: {plans}.")
    not_run = [f"`{task}`" for task in TASKS if task not in by_task]
    if not_run:
        points.append(f"- Not run at all: {', '.join(not_run)}.")
    apart = escaped(", ".join(times.read(folder)))
    if apart:
        load = times.load_average(folder)
        points.append(
            f"- Time of a step, CPU seconds without compiling: measured apart, plans in turns, for "
            f"{apart}{f' (load {load:.1f})' if load is not None else ''}; else as the runs took it."
        )
    else:
        points.append(
            "- Time of a step, CPU seconds without compiling: as the runs themselves took it, on a "
            "machine that may have been busy, so good to ± 15% at best."
        )
    if found:
        where = found[-1]["environment"]
        versions = ", ".join(
            f"{name} {where['versions'][name]}"
            for name in ("python", "jax")
            if name in where["versions"]
        )
        commits = sorted({r["environment"]["git_commit"][:8] or "unknown" for r in found})
        points.append(
            f"- {where['device']} ({where['cpu']}, {where['cores_used']} cores used), {versions}, "
            f"commit {', '.join(commits)}."
        )
    return [*lines, "\n".join(points)]


def _models(found: list[Record], folder: pathlib.Path) -> str:
    secs = compare.step_secs(found, folder)
    rows = []
    for name, (plan, fields) in PLANS.items():
        model = model_of(name)
        own = ", ".join(f"`{field}={value}`" for field, value in fields.items()) or NOTHING
        rows.append(
            [
                name,
                f"`{plan}`" if plan else "attention and MLP only",
                f"{model.parameters:,}",
                f"{model.parameters / model_of(REFERENCE).parameters:.3f}",
                f"{model.token_flops / 1e6:.3f}",
                f"{1e3 * secs[name]:.1f}" if name in secs else NOTHING,
                own,
            ]
        )
    header = ["name", "plan", "parameters", f"÷ {REFERENCE}", "MFLOPs a token", "ms a step"]
    return (
        f"{table([*header, 'fields that differ'], rows)}\n\n"
        "All others have d_model 32, d_state 16, the fusion `residual_zero`, an embedding of "
        "standard deviation 0.3, three recursion steps, and attention over 32 keys at the scales "
        "1, 2, 4. "
        "`gate_bias=30` makes every gate exactly 1 and its gradient exactly 0: a hybrid without "
        "gates. Without attention an A layer is an M layer, so AMHMA has no such variant."
    )


def _at_equal(by_task: dict[str, dict[str, Group]], axis: str) -> str:
    """All plans and tasks at an equal budget."""
    header, columns = ["plan"], []
    factor, unit = _UNITS[axis]
    for task, of in TASKS.items():
        if task not in by_task:
            header.append(f"{task}")
            columns.append(dict.fromkeys(PLANS, NOTHING))
            continue
        budget = compare.budget(by_task[task], axis)
        header.append(
            f"{task}, {budget / factor:,.4g} {unit}"
            + ("" if of.score == "accuracy" else f" ({of.score}, less is better)")
        )
        column = dict.fromkeys(PLANS, NOTHING)
        for plan, group in by_task[task].items():
            text = shown(list(group.scores(axis, budget).values()))
            column[plan] = text if group.tuned or text == NOTHING else f"{text}*"
        columns.append(column)
    rows = [[plan, *(column[plan] for column in columns)] for plan in PLANS]
    return f"## At equal {axis}\n\n{table(header, rows)}"


def _pairs(by_task: dict[str, dict[str, Group]]) -> list[str]:
    """The differences of the main pairs, seed by seed."""
    rows = []
    for task, of_task in by_task.items():
        for plan, baseline in PAIRS:
            if plan not in of_task or baseline not in of_task:
                continue
            cells_ = []
            for axis in AXES:
                budget = compare.budget(of_task, axis)
                one, other = (of_task[name].scores(axis, budget) for name in (plan, baseline))
                cells_.append(shown(compare.paired(one, other), signed=True))
            tuned = of_task[plan].tuned and of_task[baseline].tuned
            rows.append([f"{task}: {plan} − {baseline}{'' if tuned else '*'}", *cells_])
    if not rows:
        return []
    header = ["pair", *(f"equal {axis}" for axis in AXES)]
    seeds = f"Plans with five seeds in the full table: {escaped(', '.join(MAIN_PLANS))}."
    return [f"## Main pairs, seed by seed\n\n{seeds}\n\n{table(header, rows)}"]


def _by_level(task: str, of_task: dict[str, Group], figure: str) -> str:
    """Accuracy and gates by level at each plan's own end."""
    of, rows = TASKS[task], []
    parts = (("test", "test"), ("beyond", "beyond"), ("mean gates", "mean_gates"))
    levels = sorted(
        {
            int(level)
            for group in of_task.values()
            for record in group.by_seed.values()
            for level in record["end"]["test"]
            if level != "all"
        }
    )
    for plan, group in of_task.items():
        ends = [record["end"] for record in group.by_seed.values()]
        for name, key in parts:
            if all(key in end for end in ends):
                value = lambda end, level, key=key: records.score(end[key].get(level), task)
                rows.append([f"{plan}, {name}", *_row(ends, value, levels)])
        if all("gate_sums" in end for end in ends):
            gates = lambda end, level: (end["gate_sums"].get(level) or {}).get("gates")
            rows.append([f"{plan}, sum of gates", *_row(ends, gates, levels)])
        skipped = [end["skipping"] for end in ends if "skipping" in end]
        for threshold in trial.SKIP_THRESHOLDS if skipped else ():
            found = [end[str(threshold)] for end in skipped]
            value = lambda end, level: records.score(end.get(level), task)
            rows.append([f"{plan}, skipping at {threshold}", *_row(found, value, levels)])
            steps = lambda end, level: (end.get(level) or {}).get("steps")
            rows.append([f"{plan}, steps at {threshold}", *_row(found, steps, levels)])
    header = [f"plan, {of.level}", "all", *map(str, levels)]
    beyond = (
        '"beyond": answers past the trained length or number of moves, all together. '
        if of.beyond
        else ""
    )
    return (
        f"## {task} by {of.level}\n\nEach plan at its own end ({of.score}). {beyond}"
        '"mean gates": every gate replaced by its mean over tokens; where that costs accuracy, the '
        'depth is dynamic. "skipping": a token skips the recursion steps whose gates do not '
        'exceed the threshold; "steps": how many it takes then, over all layers.'
        f"\n\n{table(header, rows)}\n\n![Curves of {task}]({figure})"
    )


def _row(ends: list[dict[str, Any]], value: Any, levels: list[int]) -> list[str]:
    made = []
    for level in ("all", *map(str, levels)):
        values = [value(end, level) for end in ends]
        made.append(shown([one for one in values if one is not None]))
    return made
