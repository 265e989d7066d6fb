"""The results of a sweep as one HTML page that needs no network: parallel coordinates, a table."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Any

from mamba_jax.sweeps.jobs import DONE, PRUNED, Row

_HEIGHT, _TOP, _BOTTOM, _GAP, _SIDE = 340, 46, 26, 150, 70
_MANY_DECADES = 1.0  # from here on an axis of numbers is logarithmic


def text(value: Any) -> str:
    """Returns a value as a reader wants to see it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


@dataclasses.dataclass(frozen=True)
class Axis:
    """One coordinate: where each value lies on it, from 0 (below) to 1."""

    title: str
    places: dict[Any, float]
    ticks: Sequence[tuple[float, str]]


def axis(title: str, values: Sequence[Any]) -> Axis:
    """Lays values out: numbers by size, logarithmically over a decade and more; others in order."""
    distinct = list(dict.fromkeys(map(_key, values)))
    numbers = [v for v in distinct if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(distinct) or len(distinct) == 1:
        count = len(distinct)
        places = {v: (i + 0.5) / count for i, v in enumerate(distinct)}
        return Axis(title, places, [(place, text(v)) for v, place in places.items()])
    low, high = min(numbers), max(numbers)
    logarithmic = low > 0 and math.log10(high / low) >= _MANY_DECADES
    scale = math.log if logarithmic else float
    places = {v: (scale(v) - scale(low)) / (scale(high) - scale(low)) for v in numbers}
    if len(distinct) <= 6:
        return Axis(title, places, [(place, text(v)) for v, place in places.items()])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    ticks = [low * (high / low) ** s if logarithmic else low + s * (high - low) for s in shares]
    return Axis(title, places, [(s, f"{t:.3g}") for s, t in zip(shares, ticks, strict=True)])


def _key(value: Any) -> Any:
    return str(value) if isinstance(value, (list, tuple, dict)) else value


def render(rows: Sequence[Row], metric: str, title: str) -> str:
    """Returns the page.

    Args:
      rows: best first.
      metric: by which they are ordered; less is better.
      title: of the page.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    shown = [row for row in rows if metric in row.measures]
    done = sum(row.state == DONE for row in rows)
    best = rows[0] if rows and rows[0].state == DONE else None
    lead = f"{done} of {len(rows)} runs done"
    if best:
        settings = ", ".join(f"{_leaf(n)} {text(v)}" for n, v in best.settings.items())
        lead += f"; best: {settings}, {metric} {text(best.measures.get(metric, ''))}"
    return _PAGE.format(
        title=html.escape(title),
        lead=html.escape(lead),
        chart=_chart(shown, names, metric) if len(shown) > 1 else "",
        table=_table(rows, names, metric),
        style=_STYLE,
        script=_SCRIPT,
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _chart(rows: Sequence[Row], names: Sequence[str], metric: str) -> str:
    """Draws a line a run over an axis a setting, the metric on the last."""
    table = [
        [*(row.settings.get(name, "–") for name in names), row.measures[metric]] for row in rows
    ]
    titles = [*map(_leaf, names), metric]
    axes = [
        axis(title, column) for title, column in zip(titles, zip(*table, strict=True), strict=True)
    ]
    width = 2 * _SIDE + _GAP * (len(axes) - 1)
    span = _HEIGHT - _TOP - _BOTTOM
    across = [_SIDE + _GAP * i for i in range(len(axes))]
    parts, labels = [], []
    for x, one in zip(across, axes, strict=True):
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + span}"/>')
        labels.append(f'<text class="name" x="{x}" y="20">{html.escape(one.title)}</text>')
        labels += [
            f'<text class="tick" x="{x + 6}" y="{_TOP + span * (1 - place) + 4:.1f}">'
            f"{html.escape(label)}</text>"
            for place, label in one.ticks
        ]
    best_first = list(enumerate(zip(rows, table, strict=True)))
    for place, (row, values) in reversed(best_first):  # the best lies on top
        points = " ".join(
            f"{x},{_TOP + span * (1 - one.places[_key(value)]):.1f}"
            for x, one, value in zip(across, axes, values, strict=True)
        )
        share = place / max(1, len(rows) - 1)
        label = html.escape(f"{row.name}: {metric} {text(row.measures[metric])}")
        dashed = ' stroke-dasharray="5 4"' if row.state == PRUNED else ""
        parts.append(
            f'<polyline data-run="{html.escape(row.name)}" points="{points}"{dashed} '
            f'stroke="{_colour(share)}"><title>{label}</title></polyline>'
        )
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {_HEIGHT}" width="{width}" '
        f'height="{_HEIGHT}" role="img" aria-label="Parallel coordinates">'
        f"{''.join(parts + labels)}</svg></div>"
        '<p class="key"><i></i> best … worst; dashed: pruned. Point at a line or a row to '
        "see which belong together.</p>"
    )


def _colour(share: float) -> str:
    """From blue (0, the best) over grey to orange."""
    stops = ((33, 102, 172), (150, 150, 150), (230, 97, 1))
    at = share * 2
    low = min(int(at), 1)
    mixed = (a + (b - a) * (at - low) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _table(rows: Sequence[Row], names: Sequence[str], metric: str) -> str:
    columns = [metric, "train_loss", "step", "tokens_per_sec"]
    heads = ["", *map(_leaf, names), *columns, "state"]
    lines = []
    for place, row in enumerate(rows, 1):
        values = [
            place,
            *(row.settings.get(name, "") for name in names),
            *(row.measures.get(column, "") for column in columns),
        ]
        cells = [
            f'<td data-value="{html.escape(str(v))}">{html.escape(text(v))}</td>' for v in values
        ]
        why = html.escape(row.why)
        cells.append(f'<td class="{row.state}" title="{why}">{row.state}</td>')
        lines.append(f'<tr data-run="{html.escape(row.name)}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    failures = "".join(
        f"<li><b>{html.escape(row.name)}</b>: {html.escape(row.why)}</li>"
        for row in rows
        if row.state not in (DONE, PRUNED)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f"</table></div>{f'<h2>Not done</h2><ul>{failures}</ul>' if failures else ''}"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #8a939d; --rule: #d8dee4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --faint: #8a939d; --rule: #333a41 }
}
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 0 auto; max-width: 1200px; padding: 16px }
h1 { font-size: 22px; margin: 0 } h2 { font-size: 17px }
.scroll { overflow-x: auto; max-width: 100% }
svg { display: block } text { fill: var(--ink); font-size: 12px }
.name { text-anchor: middle; font-weight: 600 } 
.tick { fill: var(--faint); paint-order: stroke; stroke: var(--paper); stroke-width: 4px }
text { pointer-events: none }
.axis { stroke: var(--rule); stroke-width: 2 }
polyline { fill: none; stroke-width: 2; stroke-opacity: .8 }
.some polyline, .some tbody tr { opacity: .2 }
.some .on { opacity: 1 !important } polyline.on { stroke-width: 4 }
.key { color: var(--faint); margin: 4px 0 20px }
.key i { display: inline-block; width: 90px; height: 8px; border-radius: 4px;
         background: linear-gradient(90deg, #2166ac, #969696, #e66101) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--rule) }
th { cursor: pointer; position: sticky; top: 0; background: var(--paper) }
.failed { color: #d1242f } .done { color: #1a7f37 } .pruned, .stopped { color: var(--faint) }
li { overflow-wrap: anywhere }
"""

_SCRIPT = """
const runs = [...document.querySelectorAll('[data-run]')];
const show = name => {
  document.body.classList.toggle('some', !!name);
  runs.forEach(run => run.classList.toggle('on', run.dataset.run === name));
};
runs.forEach(run => {
  run.addEventListener('pointerenter', () => show(run.dataset.run));
  run.addEventListener('pointerleave', () => show(null));
  run.addEventListener('click', () => show(run.dataset.run));
});
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const body = document.querySelector('tbody');
  const down = head.dataset.down = head.dataset.down ? '' : 1;
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  [...body.rows].sort((a, b) => (down ? 1 : -1) * (value(a) - value(b) ||
    String(value(a)).localeCompare(value(b), undefined, { numeric: true })))
    .forEach(row => body.append(row));
}));
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: sweep</title>
<style>{style}</style>
<h1>{title}</h1>
<p>{lead}</p>
{chart}
{table}
<script>{script}</script>
</html>
"""
