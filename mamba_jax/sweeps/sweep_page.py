"""The results of a sweep as a self-contained HTML page: parallel coordinates and a table."""

import dataclasses
import html
import math
import urllib.parse
from collections.abc import Sequence
from typing import Any

from mamba_jax.pages.document import document, number
from mamba_jax.sweeps.jobs import DONE, PAGE, PRUNED, SweepRow

_TOP, _GAP, _BOTTOM = 30, 84, 30  # pixels: above the first axis, between two, below the last
_LETTER = 0.025  # the width of a letter, as a share of a phone's page
_MANY_DECADES = 1.0  # from this range on, an axis of numbers is logarithmic


@dataclasses.dataclass(frozen=True)
class Axis:
    """One coordinate: the place of each value on it, from 0 (left) to 1."""

    title: str
    places: dict[Any, float]
    ticks: Sequence[tuple[float, str]]
    is_numeric: bool = True


def axis(title: str, values: Sequence[Any]) -> Axis:
    """Places values on an axis: numbers by size (from a decade on, log scale), others in order."""
    distinct = list(dict.fromkeys(map(_key, values)))
    numbers = [v for v in distinct if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(numbers) < len(distinct) or len(distinct) == 1:
        count = len(distinct)
        places = {v: (i + 0.5) / count for i, v in enumerate(distinct)}
        ticks = [(place, number(v)) for v, place in places.items()]
        return Axis(title, places, ticks, is_numeric=False)
    low, high = min(numbers), max(numbers)
    logarithmic = low > 0 and math.log10(high / low) >= _MANY_DECADES
    scale = math.log if logarithmic else float
    places = {v: (scale(v) - scale(low)) / (scale(high) - scale(low)) for v in numbers}
    if len(distinct) <= 6:
        return Axis(title, places, [(place, number(v)) for v, place in places.items()])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    ticks = [low * (high / low) ** s if logarithmic else low + s * (high - low) for s in shares]
    return Axis(title, places, [(s, f"{t:.3g}") for s, t in zip(shares, ticks, strict=True)])


def _key(value: Any) -> Any:
    return str(value) if isinstance(value, (list, tuple, dict)) else value


def render(rows: Sequence[SweepRow], metric: str, title: str) -> str:
    """Returns the page.

    Args:
      rows: best first.
      metric: by which they are ordered; lower is better.
      title: of the page.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    shown = [row for row in rows if math.isfinite(row.measures.get(metric, math.nan))]
    done = sum(row.state == DONE for row in rows)
    best = rows[0] if rows and rows[0].state == DONE else None
    lead = f"{done} of {len(rows)} runs done"
    if best:
        settings = ", ".join(f"{_leaf(n)} {number(v)}" for n, v in best.settings.items())
        lead += f"; best: {settings}, {metric} {number(best.measures.get(metric, ''))}"
    chart = _chart(shown, names, metric) if len(shown) > 1 else ""
    body = (
        f"<h1>{html.escape(title)}</h1>\n<p>{html.escape(lead)}</p>\n"
        f"{chart}\n{_table(rows, names, metric)}"
    )
    script = f"<script>{_SCRIPT}</script>\n"
    return document(f"{title}: sweep", body, style=_STYLE, script=script)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _chart(rows: Sequence[SweepRow], names: Sequence[str], metric: str) -> str:
    """Draws a line per run across an axis per setting; the last axis is the metric.

    The axes are below each other and as wide as the page, so they fit a phone too. The page
    stretches the lines to that width, but not the labels, which are separate HTML elements.
    """
    table = [
        [*(row.settings.get(name, "–") for name in names), row.measures[metric]] for row in rows
    ]
    titles = [*map(_leaf, names), f"{metric} (lower is better)"]
    axes = [
        axis(title, column) for title, column in zip(titles, zip(*table, strict=True), strict=True)
    ]
    height = _TOP + _GAP * (len(axes) - 1) + _BOTTOM
    down = [_TOP + _GAP * i for i in range(len(axes))]
    parts, labels = [], []
    for y, one in zip(down, axes, strict=True):
        parts.append(f'<line class="axis" x1="0" x2="100" y1="{y}" y2="{y}"/>')
        labels += _labels(one, y)
    best_first = list(enumerate(zip(rows, table, strict=True)))
    for place, (row, values) in reversed(best_first):  # the best is on top
        points = " ".join(
            f"{100 * one.places[_key(value)]:.5g},{y}"
            for y, one, value in zip(down, axes, values, strict=True)
        )
        share = place / max(1, len(rows) - 1)
        label = html.escape(f"{row.name}: {metric} {number(row.measures[metric])}")
        dashed = ' stroke-dasharray="5 4"' if row.state == PRUNED else ""
        parts.append(
            f'<polyline data-run="{html.escape(row.name)}" points="{points}"{dashed} '
            f'stroke="{_colour(share)}"><title>{label}</title></polyline>'
        )
    described = html.escape(f"{len(rows)} runs over {', '.join(titles)}; the table has the values")
    return (
        f'<div class="parallel" style="height:{height}px">'
        f'<svg viewBox="0 0 100 {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{described}">{"".join(parts)}</svg>{"".join(labels)}</div>'
        '<p class="key"><i></i> best … worst; dashed: pruned. Point at a line or a row to '
        "highlight its run; a run's number links to its page.</p>"
    )


def _labels(one: Axis, y: int) -> list[str]:
    """Returns the title of an axis, and the tick labels below it."""
    made = [f'<b style="top:{y - 26}px">{html.escape(one.title)}</b>']
    if one.is_numeric:
        # A label moves left with its tick, so that it stays within the axis.
        for place, label in _apart(one.ticks):
            share = f"{100 * place:.4g}%"
            style = f"top:{y + 5}px;left:{share};transform:translateX(-{share})"
            made.append(f'<span style="{style}">{html.escape(label)}</span>')
        return made
    for place, label in one.ticks:
        style = (
            f"top:{y + 5}px;left:{100 * place:.4g}%;transform:translateX(-50%);"
            f"max-width:{100 / len(one.ticks):.4g}%"
        )
        made.append(f'<span style="{style}">{html.escape(label)}</span>')
    return made


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Returns the ticks whose labels do not overlap on a phone; both ends have priority."""
    ordered = sorted(ticks)
    chosen: list[tuple[float, float, tuple[float, str]]] = []  # begin, end, tick
    for tick in (*ordered[:1], *ordered[:0:-1]):
        place, label = tick
        width = _LETTER * (len(label) + 1)
        begin = place * (1 - width)
        if all(begin > end or begin + width < other for other, end, _ in chosen):
            chosen.append((begin, begin + width, tick))
    return sorted(tick for _, _, tick in chosen)


def _colour(share: float) -> str:
    """Returns a colour from blue (0, the best) through grey to orange (1)."""
    stops = ((33, 102, 172), (150, 150, 150), (230, 97, 1))
    at = share * 2
    low = min(int(at), 1)
    mixed = (a + (b - a) * (at - low) for a, b in zip(stops[low], stops[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def _link(row: SweepRow, shown: str) -> str:
    """Returns a link to a run's page, or to its folder if it has no page."""
    target = f"{urllib.parse.quote(row.name)}/{PAGE if row.has_page else ''}"
    name = html.escape(row.name)
    return f'<a href="{target}" title="{name}">{html.escape(shown)}</a>'


def _table(rows: Sequence[SweepRow], names: Sequence[str], metric: str) -> str:
    columns = ["train_loss", "step", "tokens_per_sec"]
    heads = ["run", metric, *map(_leaf, names), *columns, "state"]
    lines = []
    for place, row in enumerate(rows, 1):
        values = [
            row.measures.get(metric, ""),
            *(row.settings.get(name, "") for name in names),
            *(row.measures.get(column, "") for column in columns),
        ]
        cells = [
            f'<td data-value="{place}">{_link(row, str(place))}</td>',
            *(
                f'<td data-value="{html.escape(str(v))}">{html.escape(number(v))}</td>'
                for v in values
            ),
        ]
        why = html.escape(row.why)
        cells.append(f'<td class="{row.state}" title="{why}">{row.state}</td>')
        lines.append(f'<tr data-run="{html.escape(row.name)}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    failures = "".join(
        f"<li>{_link(row, row.name)}: {html.escape(row.why)}</li>"
        for row in rows
        if row.state not in (DONE, PRUNED)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody>'
        f"</table></div>{f'<h2>Not finished</h2><ul>{failures}</ul>' if failures else ''}"
    )


_STYLE = """
.parallel { position: relative; margin: 8px 0 12px; font-size: 12.5px; line-height: 18px }
.parallel svg { position: absolute; width: 100%; height: 100%; overflow: visible }
.parallel b, .parallel span { position: absolute; padding: 0 4px; border-radius: 4px;
  background: var(--paper); pointer-events: none; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; max-width: 100% }
.parallel b { left: 0; padding-left: 0 } .parallel span { color: var(--faint) }
.axis { stroke: var(--faint); stroke-width: 1.5; vector-effect: non-scaling-stroke }
polyline { fill: none; stroke-width: 2; stroke-opacity: .8; vector-effect: non-scaling-stroke;
           stroke-linejoin: round; pointer-events: stroke }
.some polyline, .some tbody tr { opacity: .2 }
.some .on { opacity: 1 !important } polyline.on { stroke-width: 4 }
.key { color: var(--faint); margin: 4px 0 20px }
.key i { display: inline-block; width: 90px; height: 8px; border-radius: 4px;
         background: linear-gradient(90deg, #2166ac, #969696, #e66101) }
table { white-space: nowrap }
th, td { padding: 4px 12px; text-align: right; border-bottom: 1px solid var(--rule) }
th { cursor: pointer; position: sticky; top: 0; background: var(--paper) }
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
