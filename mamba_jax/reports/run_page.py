"""The page of one run: its state, curves, samples, warnings and config."""

import html
import itertools
import re
import shlex
import time
from collections.abc import Mapping
from typing import Any

from mamba_jax.config import RunConfig, plan
from mamba_jax.errors import UserError
from mamba_jax.pages.document import duration, number, paragraph, size
from mamba_jax.reports import figures
from mamba_jax.reports.charts import (
    MOST_LAYER_POINTS,
    chart,
    curve,
    smoothing_width,
    thin,
    trailing_mean,
)
from mamba_jax.runs import metrics
from mamba_jax.runs.recorded import RUNNING, Run, flat_config

_MOST_SAMPLES, _MOST_WARNINGS, _LONGEST_TEXT = 20, 50, 4_000
_MOST_MARKS = 300  # skipped steps that are marked one by one
_NUMBER = re.compile(r"\d[\d.,]*(?:e[+-]?\d+)?")
# key of a record → key of the chart, title, unit, sentence, whether logarithmic, what it marks
_CURVES = (
    ("eval_perplexity", "perplexity", "Perplexity, held-out text", "", "", True),
    ("eval_bits_per_byte", "bits_per_byte", "Bits per byte, held-out text", "", "", False),
    ("learning_rate", "learning_rate", "Learning rate", "", "", False),
    ("gradient_norm", "gradient_norm", "Gradient norm", "", "Before clipping.", True),
    ("tokens_per_sec", "tokens_per_sec", "Training speed", "tokens/s", "", False),
    (
        *("memory_bytes", "memory", "Memory, peak so far", "bytes"),
        *("Device memory; on a CPU, memory of the process.", False),
    ),
    ("data_wait", "data_wait", "Waiting for data", "share", "Share of the training time.", False),
)
_LAYER_CURVES = (
    (
        "depth_mean",
        "depth",
        "Depth by layer",
        "",
        "Mean over tokens of the sum of the gates.",
    ),
    ("gates_closed", "gates_closed", "Gates nearly closed, by layer", "share", "Gates below 0.1."),
    ("gates_open", "gates_open", "Gates nearly open, by layer", "share", "Gates of 0.9 or more."),
    ("dt_mean", "dt_mean", "Δ by layer, mean", "", "Over the evaluation's tokens and channels."),
    ("dt_max", "dt_max", "Δ by layer, maximum", "", ""),
    (
        "A_min",
        "A_min",
        "A by layer, minimum",
        "",
        "Always negative: the lower, the more the state changes within a token.",
    ),
    (
        "A_max",
        "A_max",
        "A by layer, maximum",
        "",
        "The closer to 0, the longer the state remembers.",
    ),
)


def render(run: Run) -> str:
    """Returns the page of a run."""
    charts = [*_loss_chart(run), *_charts(run), *_layer_charts(run)]
    body = _head(run)
    data = None
    if charts:
        data = {
            "charts": charts,
            "span": [0, max(run.last_step, 1)],
            "marks": {
                "resumed": [[start.step] for start in run.starts if start.step],
                "skipped": _skip_marks(run),
            },
        }
        body += figures.curves(charts, note=_key(run, charts))
    body += (
        _missing(charts)
        + _checkpoints(run)
        + _resumes(run)
        + _warnings(run)
        + _samples(run)
        + _config(run)
    )
    return figures.document(f"{run.name}: training run", body, data)


# --- the curves -----------------------------------------------------------------------------------


def _loss_chart(run: Run) -> list[dict[str, Any]]:
    steps, losses = metrics.series(run.records, "loss")
    curves = []
    if steps:
        width, points = smoothing_width(len(steps)), thin(steps, losses)
        smoothed = width > points.size  # else the line of means is already smooth
        curves.append(curve("training", points, "faint" if smoothed else "line", colour=0))
        if smoothed:
            smooth = trailing_mean(losses, width).tolist()
            curves.append(curve(f"mean of {width:,} steps", thin(steps, smooth), colour=0))
    evaluated, eval_losses = metrics.series(run.records, "eval_loss")
    if evaluated:
        curves.append(curve("evaluation", thin(evaluated, eval_losses), "dots", colour=1))
    if curves and run.unigram_nll is not None:
        level = thin([0, max(run.last_step, 1)], [run.unigram_nll] * 2)
        curves.append(curve("token frequencies alone", level, "level", colour=7))
    return (
        [chart("loss", "Loss", curves, unit="nats per token", skips=True, robust=True)]
        if curves
        else []
    )


def _charts(run: Run) -> list[dict[str, Any]]:
    made = []
    for recorded, key, title, unit, note, log in _CURVES:
        steps, values = metrics.series(run.records, recorded)
        if steps:
            evaluated = recorded.startswith("eval_")
            look, colour = ("dots", 1) if evaluated else ("line", 0)
            one = curve(title, thin(steps, values), look, colour=colour)
            skips = recorded == "gradient_norm"
            made.append(chart(key, title, [one], unit=unit, note=note, log=log, skips=skips))
    return made


def _layer_charts(run: Run) -> list[dict[str, Any]]:
    made = []
    for recorded, key, title, unit, note in _LAYER_CURVES:
        steps, layers = metrics.layer_series(run.records, recorded)
        gated = _gated_layers(run)
        numbers = gated if len(gated) == len(layers) else range(len(layers))
        curves = [
            curve(
                f"layer {number}",
                thin(steps, values, MOST_LAYER_POINTS),
                share=place / max(1, len(layers) - 1),
            )
            for place, (number, values) in enumerate(zip(numbers, layers, strict=True))
        ]
        if curves:
            made.append(chart(key, title, curves, unit=unit, note=note, by_layer=True))
    return made


def _gated_layers(run: Run) -> tuple[int, ...]:
    """Returns the numbers of the layers whose gates are recorded; (): of all, or not known."""
    try:
        return plan.numbers("H", plan.parse(str(run.config.get("model.plan", ""))))
    except UserError:  # of another version
        return ()


def _skip_marks(run: Run) -> list[list[int]]:
    """Returns the skipped steps to mark; of very many, an evenly spaced selection."""
    steps = run.skipped_steps
    return [[step] for step in steps[:: -(-len(steps) // _MOST_MARKS) or 1]]


def _key(run: Run, charts: list[dict[str, Any]]) -> str:
    """Returns the sentences that explain the marks in the curves."""
    sentences = figures.notes(charts)
    if run.skipped_steps:
        sentences.append("Short ticks on the lower edge mark skipped steps.")
    if any(start.step for start in run.starts):
        sentences.append("Dashed lines mark where the run resumed from a checkpoint.")
    return " ".join(sentences)


def _missing(charts: list[dict[str, Any]]) -> str:
    """Lists the curves that are missing because the run did not record their values."""
    if not charts:
        return paragraph(f"No curves: {metrics.NAME} has no measurements yet; training adds them.")
    have = {each["key"] for each in charts}
    titles = [("loss", "Loss"), *((key, title) for _, key, title, *_ in (*_CURVES, *_LAYER_CURVES))]
    lacking = [title for key, title in titles if key not in have]
    return paragraph(f"Not recorded: {'; '.join(lacking)}." if lacking else "")


# --- the text -------------------------------------------------------------------------------------


def _head(run: Run) -> str:
    best = run.best_evaluation
    last = run.evaluations[-1] if run.evaluations else None
    planned = run.planned_steps
    steps = number(run.last_step) + (f" of {planned:,}" if planned else "")
    tokens = run.tokens_at(run.last_step)
    facts = [
        ("steps", steps, f"{run.last_step / planned:.0%}" if planned else ""),
        ("tokens", number(tokens), "trained on"),
        ("training loss", number(run.train_loss), "mean of the last tenth of the steps"),
        (
            "evaluation loss, last",
            number(last["eval_loss"]) if last else "–",
            _measures(last) if last else "not evaluated yet",
        ),
        (
            "evaluation loss, best",
            number(best["eval_loss"]) if best else "–",
            _place(run, best) if best else "",
        ),
        ("tokens per second", number(run.tokens_per_sec), "median"),
        ("memory", size(run.memory_bytes), "peak"),
        ("parameters", number(run.parameters), ""),
        ("device", run.device or "–", ""),
        ("time in training steps", *_time(run)),
        ("started", run.starts[0].started or "–", _written(run)),
        ("skipped steps", number(len(run.skipped_steps)), ""),
    ]
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(value)}"
        f"{f'<small>{html.escape(about)}</small>' if about else ''}</dd></div>"
        for name, value, about in facts
    )
    why = f": {html.escape(run.why[:_LONGEST_TEXT])}" if run.why else ""
    return (
        f"<h1>{html.escape(run.name)}</h1>\n"
        f'<p><b class="{run.state.replace(" ", "-")}">{run.state}</b>{why} '
        f'<span class="faint">in {html.escape(str(run.folder))}</span></p>\n<dl>{cells}</dl>\n'
    )


def _place(run: Run, best: Mapping[str, Any]) -> str:
    kept = run.best_checkpoint
    at = f"at step {best['step']:,}"
    return f"{at}: {kept[1].name}" if kept and kept[0] == best["step"] else at


def _measures(evaluation: Mapping[str, Any]) -> str:
    perplexity, bits = evaluation.get("eval_perplexity"), evaluation.get("eval_bits_per_byte")
    text = f"at step {evaluation['step']:,}"
    if perplexity is not None:
        text += f"; perplexity {number(perplexity, 4)}"
    return text + (f", {number(bits, 4)} bits per byte" if bits is not None else "")


def _time(run: Run) -> tuple[str, str]:
    secs = run.training_secs
    if secs is None:
        return "–", ""
    return duration(secs), "excluding compilation, evaluation, saving"


def _written(run: Run) -> str:
    file = run.folder / metrics.NAME
    if not file.is_file():
        return ""
    then = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(file.stat().st_mtime))
    return f"last written {then}"


def _checkpoints(run: Run) -> str:
    """Names the best and the newest checkpoint, with the commands that use them."""
    if not run.checkpoints:
        return ""
    lines = []
    newest, best, record = run.checkpoints[0], run.best_checkpoint, run.best_evaluation
    step, path = best[:2] if best else newest
    if best:
        sentences = f"Best: {path.name}, evaluation loss {number(best[2])} at step {step:,}."
        if record and record["eval_loss"] < best[2]:
            sentences += (
                f" The best evaluation, {number(record['eval_loss'])} at step "
                f"{record['step']:,}, has no checkpoint."
            )
    else:
        sentences = f"Newest: {path.name}, at step {step:,}; none was evaluated."
    named, folder = shlex.quote(str(path)), shlex.quote(str(run.folder))
    lines.append(f"mamba-jax generate --checkpoint {named} --prompt ''")
    out = shlex.quote(f"{run.folder.resolve().name}-{path.name}-hf")
    lines.append(f"mamba-jax export --checkpoint {named} --format hf --out {out}")
    is_unfinished = run.planned_steps is None or newest[0] < run.planned_steps
    if is_unfinished and run.state != RUNNING:
        sentences += f" The last command resumes from the newest, {newest[1].name}."
        lines.append(f"mamba-jax train --resume {folder}")
    return (
        f"<h2>Checkpoints</h2>\n<p>{html.escape(sentences)}</p>\n"
        f'<pre class="commands">{html.escape(chr(10).join(lines))}</pre>\n'
    )


def _resumes(run: Run) -> str:
    lines = []
    for before, after in itertools.pairwise(run.starts):
        changed = [
            f"{name} {number(before.config[name])} → {number(value)}"
            for name, value in after.config.items()
            if name in before.config and before.config[name] != value
        ]
        when = f" ({after.started})" if after.started else ""
        what = f": {'; '.join(changed)}" if changed else ""
        lines.append(f"<li>at step {after.step:,}{html.escape(when + what)}</li>")
    return f"<h2>Resumed from a checkpoint</h2>\n<ul>{''.join(lines)}</ul>\n" if lines else ""


def _warnings(run: Run) -> str:
    """Lists the warnings; those that differ only in their numbers become one line."""
    alike: dict[str, list[tuple[int, str]]] = {}
    for record in run.records:
        if "warning" in record:
            text = str(record["warning"])
            alike.setdefault(_NUMBER.sub("#", text), []).append((record["step"], text))
    if not alike:
        return ""
    lines = []
    for similar in list(alike.values())[-_MOST_WARNINGS:]:
        step, text = similar[-1]
        times = f" ({len(similar):,} similar ones, steps {similar[0][0]:,} to {step:,})"
        lines.append(
            f'<li><span class="faint">{step:,}:</span> {html.escape(text[:_LONGEST_TEXT])}'
            f"{times if len(similar) > 1 else ''}</li>"
        )
    left_out = len(alike) - len(lines)
    more = f"{left_out:,} older ones are not shown." if left_out else ""
    return f"<h2>Warnings</h2>\n<ul>{''.join(lines)}</ul>\n{paragraph(more)}"


def _samples(run: Run) -> str:
    """Shows the newest sample, with the earlier ones folded away."""
    samples = [record for record in run.records if "sample" in record]
    if not samples:
        return ""
    shown = [
        f'<p class="faint">after step {record["step"]:,}</p><pre><b>'
        f"{html.escape(str(record.get('prompt', ''))[:_LONGEST_TEXT])}</b>"
        f"{html.escape(str(record['sample'])[:_LONGEST_TEXT])}"
        f"{' …' if len(str(record['sample'])) > _LONGEST_TEXT else ''}</pre>\n"
        for record in samples[: -_MOST_SAMPLES - 1 : -1]
    ]
    n_earlier = len(shown) - 1
    summary = f"{n_earlier} earlier sample{'s' if n_earlier > 1 else ''}"
    older = f"<details><summary>{summary}</summary>{''.join(shown[1:])}</details>"
    left_out = len(samples) - len(shown)
    more = paragraph(f"{left_out:,} older ones are not shown." if left_out else "")
    return f"<h2>Samples</h2>\n{shown[0]}{older if len(shown) > 1 else ''}{more}"


def _config(run: Run) -> str:
    if not run.config:
        return "<h2>Config</h2>\n" + paragraph("Not recorded.")
    defaults = flat_config(RunConfig())
    groups: dict[str, list[str]] = {}
    for name, value in run.config.items():
        group, _, leaf = name.rpartition(".")
        changed = name in defaults and defaults[name] != value
        mark, default = "", ""
        if changed:
            mark = ' class="changed"'
            default = f"<small>default {_shown(defaults[name])}</small>"
        groups.setdefault(group or "run", []).append(
            f'<tr{mark} data-field="{html.escape(name)}"><td>{html.escape(leaf)}</td>'
            f"<td>{_shown(value)}{default}</td></tr>"
        )
    sections = "".join(
        f"<section><h3>{html.escape(group)}</h3><table>{''.join(rows)}</table></section>"
        for group, rows in groups.items()
    )
    note = paragraph(
        "The config that the run used; bold marks values that are not the built-in default."
    )
    return f'<h2>Config</h2>\n{note}<div class="config">{sections}</div>\n'


def _shown(value: Any) -> str:
    return html.escape(repr(value) if value == "" else number(value))
