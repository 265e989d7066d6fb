"""Several runs side by side: a table of their differences and results, and their curves."""

import html
import math
from collections.abc import Sequence
from typing import Any

from mamba_jax.pages.document import duration, number, paragraph, size
from mamba_jax.reports import figures
from mamba_jax.reports.charts import chart, curve, smoothing_width, thin, trailing_mean
from mamba_jax.runs import metrics
from mamba_jax.runs.recorded import Run

# Folders name the columns, so they need no rows of their own.
_PLACES = ("output_dir", "log_dir", "tensorboard_dir", "data.cache_dir")
_COLOURS = 8  # of style.css
_MOST_OPEN = 8  # fields that differ: more are folded, so that the curves stay close
_LONGEST_VALUE = 40  # characters of a field that a table shows
_PER_TOKEN = ("eval_loss", "best_eval_loss", "train_loss")  # lower is better
_PER_BYTE = ("eval_bits_per_byte",)  # lower is better, with any tokenizer
_HEADINGS = {
    "state": "state",
    "eval_loss": "eval loss, last",
    "eval_step": "… at step",
    "best_eval_loss": "eval loss, best",
    "best_eval_step": "… at step",
    "eval_bits_per_byte": "bits per byte, last",
    "train_loss": "training loss",
    "steps": "steps",
    "planned_steps": "steps planned",
    "tokens": "tokens",
    "tokens_per_sec": "tokens/s",
    "training_secs": "time in steps",
    "memory_bytes": "memory",
    "parameters": "parameters",
    "device": "device",
}


class Comparison:
    """Runs, their names in the comparison, and their differences."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.names = names([run.folder.resolve().parts for run in runs])
        known = [run.config for run in runs if run.config]
        fields = dict.fromkeys(name for config in known for name in config)
        # Dotted name of a field → its value in each run; None: unknown.
        self.differences = {
            name: [run.config.get(name) for run in runs]
            for name in fields
            if name not in _PLACES
            and any(config.get(name) != known[0].get(name) for config in known)
        }
        self.results = [_results(run) for run in runs]

    def record(self) -> dict[str, Any]:
        """Returns the table as plain JSON types; a value that is not finite is None."""
        rows = [
            {"name": name, "folder": str(run.folder), "why": run.why, **results}
            for name, run, results in zip(self.names, self.runs, self.results, strict=True)
        ]
        return {"runs": rows, "differences": self.differences, "notes": self.notes()}

    def lines(self) -> list[list[str]]:
        """Returns the table as text: a heading, then a line per field and per result."""
        fields = [[name, *map(_shown, values)] for name, values in self.differences.items()]
        results = [
            [heading, *(_text(key, each[key]) for each in self.results)]
            for key, heading in _HEADINGS.items()
        ]
        return [["", *self.names], *fields, *results]

    @property
    def _unknown(self) -> list[str]:
        return [n for n, run in zip(self.names, self.runs, strict=True) if not run.config]

    @property
    def _other_tokens(self) -> bool:
        return bool({"data.tokenizer", "model.vocab_size"} & self.differences.keys())

    @property
    def _other_text(self) -> bool:
        return any(n.startswith("data.") and n != "data.tokenizer" for n in self.differences)

    @property
    def comparable(self) -> tuple[str, ...]:
        """The metrics whose minimum is the best; none that ``notes`` calls incomparable."""
        if self._unknown or self._other_text:
            return ()
        return _PER_BYTE if self._other_tokens else (*_PER_TOKEN, *_PER_BYTE)

    def notes(self) -> list[str]:
        """Returns what a reader must know before comparing."""
        sentences = []
        if unknown := self._unknown:
            sentences.append(
                f"No config is recorded for {', '.join(unknown)}: the losses may come from another "
                "text or tokenizer."
            )
        if self._other_text:
            sentences.append("The data settings differ: the losses may come from different texts.")
        if self._other_tokens:
            bits = "" if self._other_text else ", bits per byte can"
            sentences.append(f"The tokenizers differ: losses per token cannot be compared{bits}.")
        return sentences


def names(folders: Sequence[tuple[str, ...]]) -> list[str]:
    """Names each folder by the shortest unique end of its path.

    Args:
      folders: the parts of absolute paths. A folder that occurs twice gets numbers.
    """
    others = [[other for other in folders if other != parts] for parts in folders]
    ends = []
    for parts, rest in zip(folders, others, strict=True):
        alone = (n for n in range(1, len(parts)) if all(o[-n:] != parts[-n:] for o in rest))
        ends.append("/".join(parts[-next(alone, len(parts)) :]).replace("//", "/"))
    return [
        f"{end} ({ends[:place].count(end) + 1})" if ends.count(end) > 1 else end
        for place, end in enumerate(ends)
    ]


def _results(run: Run) -> dict[str, Any]:
    """Returns the results of a run, by the keys of ``_HEADINGS``."""
    last = run.evaluations[-1] if run.evaluations else {}
    best = run.best_evaluation or {}
    results = {
        "state": run.state,
        "steps": run.last_step,
        "planned_steps": run.planned_steps,
        "tokens": run.tokens_at(run.last_step),
        "parameters": run.parameters,
        "device": run.device or None,
        "eval_loss": last.get("eval_loss"),
        "eval_step": last.get("step"),
        "best_eval_loss": best.get("eval_loss"),
        "best_eval_step": best.get("step"),
        "eval_bits_per_byte": last.get("eval_bits_per_byte"),
        "train_loss": run.train_loss,
        "tokens_per_sec": run.tokens_per_sec,
        "memory_bytes": run.memory_bytes,
        "training_secs": run.training_secs,
    }
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in results.items()
    }


def _text(key: str, value: Any) -> str:
    if key == "memory_bytes":
        return size(value)
    if key == "training_secs" and value is not None:
        return duration(value)
    return number(value)


def _shown(value: Any) -> str:
    """Returns the value of a field, shortened to one line."""
    if not isinstance(value, str):
        return number(value)
    text = value if value.isprintable() and value else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


# --- the page -------------------------------------------------------------------------------------


def render(comparison: Comparison) -> str:
    """Returns the page of a comparison."""
    charts = _charts(comparison)
    names_ = ", ".join(comparison.names)
    body = (
        f"<h1>{len(comparison.runs)} runs</h1>\n"
        f"{''.join(map(paragraph, comparison.notes()))}{_results_table(comparison)}"
        f"{_reasons(comparison)}{_differences_table(comparison)}"
    )
    data = None
    if charts:
        lines = [run.token_line for run in comparison.runs]
        ends = [(run.last_step, run.tokens_at(run.last_step) or 0) for run in comparison.runs]
        last_step, last_token = (max(1, *column) for column in zip(*ends, strict=True))
        data = {
            "charts": charts,
            "tokens": lines,
            "span": [0, last_step],
            "token_span": [0, last_token],
        }
        body += figures.curves(charts, _axes() if any(lines) else "", _note(comparison, charts))
    else:
        body += paragraph("No curves: none of the runs has recorded any measurements.")
    return figures.document(f"Runs: {names_}", body, data)


def _axes() -> str:
    return (
        '<div class="choice"><span class="faint">over</span>'
        '<button type="button" data-axis="steps" aria-pressed="true">steps</button>'
        '<button type="button" data-axis="tokens" aria-pressed="false">tokens</button></div>'
    )


def _note(comparison: Comparison, charts: list[dict[str, Any]]) -> str:
    sentences = [
        "The training loss is a moving average (over 1/40 of a run's steps, at most 200); the "
        "gradient norm is that of each step.",
        *figures.notes(charts),
    ]
    lost = [
        name
        for name, run in zip(comparison.names, comparison.runs, strict=True)
        if run.token_line is None
    ]
    if lost:
        sentences.append(
            f"Not shown over tokens, because their batch is unknown: {', '.join(lost)}."
        )
    return " ".join(sentences)


def _charts(comparison: Comparison) -> list[dict[str, Any]]:
    kinds = (
        ("loss", "train_loss", "Training loss", "nats per token", False, "line"),
        ("eval_loss", "eval_loss", "Evaluation loss", "nats per token", False, "dots"),
        ("tokens_per_sec", "tokens_per_sec", "Training speed", "tokens/s", False, "line"),
        ("gradient_norm", "gradient_norm", "Gradient norm", "", True, "line"),
        ("learning_rate", "learning_rate", "Learning rate", "", False, "line"),
        ("memory_bytes", "memory", "Memory, peak so far", "bytes", False, "line"),
    )
    made = []
    for recorded, key, title, unit, log, look in kinds:
        curves = []
        for place, (name, run) in enumerate(zip(comparison.names, comparison.runs, strict=True)):
            steps, values = metrics.series(run.records, recorded)
            if recorded == "loss":
                values = trailing_mean(values, smoothing_width(len(values))).tolist()
            if steps:
                curves.append(curve(name, thin(steps, values), look, colour=place, run=place))
        if curves:
            robust = recorded in ("loss", "eval_loss")
            made.append(chart(key, title, curves, unit=unit, log=log, robust=robust))
    return made


def _results_table(comparison: Comparison) -> str:
    """The results of the runs; the best of each comparable metric is marked."""
    rows = []
    for key, heading in _HEADINGS.items():
        values = [each[key] for each in comparison.results]
        known = {value for value in values if value is not None}
        best = min(known) if key in comparison.comparable and len(known) > 1 else math.nan
        cells = [(_text(key, value), value == best) for value in values]
        rows.append(_row(comparison, key, heading, cells))
    return f"<h2>Results</h2>\n{_table(comparison, rows)}"


def _differences_table(comparison: Comparison) -> str:
    """The config fields in which the runs differ; a long list is folded."""
    rows = [
        _row(comparison, name, name, [(_shown(value), False) for value in values])
        for name, values in comparison.differences.items()
    ]
    if not rows:
        return ""
    fields = "1 field differs" if len(rows) == 1 else f"{len(rows)} fields differ"
    is_open = " open" if len(rows) <= _MOST_OPEN else ""
    return (
        f"<details{is_open}><summary><h2>Config: {fields}</h2></summary>\n"
        f"{_table(comparison, rows)}</details>\n"
    )


def _table(comparison: Comparison, rows: list[str]) -> str:
    # The style for phones changes the layout, which would remove these roles.
    heads = "".join(
        f'<th role="columnheader"><i style="background:var(--c{place % _COLOURS})"></i>'
        f"{html.escape(name)}</th>"
        for place, name in enumerate(comparison.names)
    )
    return (
        '<div class="scroll"><table class="compared" role="table"><thead role="rowgroup">'
        f'<tr role="row"><th role="columnheader"></th>{heads}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table></div>\n'
    )


def _row(comparison: Comparison, key: str, heading: str, cells: list[tuple[str, bool]]) -> str:
    """Returns a row of (text, whether it is the best)."""
    marks = {True: ' class="best"', False: ""}
    values = "".join(
        f'<td role="cell" data-name="{html.escape(name)}" style="--run:var(--c{place % _COLOURS})"'
        f"{marks[best]}>{html.escape(text)}</td>"
        for place, (name, (text, best)) in enumerate(zip(comparison.names, cells, strict=True))
    )
    breakable = html.escape(heading).replace(".", ".<wbr>").replace("_", "_<wbr>")
    return (
        f'<tr role="row" data-row="{html.escape(key)}"><th role="rowheader">{breakable}</th>'
        f"{values}</tr>"
    )


def _reasons(comparison: Comparison) -> str:
    lines = "".join(
        f"<li>{html.escape(name)}: {run.state}, {html.escape(run.why)}</li>"
        for name, run in zip(comparison.names, comparison.runs, strict=True)
        if run.why
    )
    return f"<ul>{lines}</ul>\n" if lines else ""
