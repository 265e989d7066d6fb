"""An HTML page of one file: its style, its script and its data are in it, and no network is asked.

Everything that comes from a run passes ``html.escape`` or, as data of the curves, ``_json``.
"""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

_HERE = pathlib.Path(__file__).parent
_PARTS = ((1, "whole"), (0.5, "last half"), (0.1, "last tenth"))


def document(title: str, body: str, data: dict[str, Any] | None = None) -> str:
    """Returns a page.

    Args:
      title: of the page, as plain text.
      body: HTML.
      data: of its curves, as ``curves`` shows them: ``charts`` as ``charts.chart`` makes them, and
        ``span``, first and last step. Of one run also ``marks``, its steps ``resumed`` and
        ``skipped``; of several ``tokens``, their token lines, and ``token_span``. None: no curves.
    """
    script = ""
    if data is not None:
        code = (_HERE / "charts.js").read_text(encoding="utf-8")
        script = (
            f'<script type="application/json" id="data">{_json(data)}</script>\n'
            f"<script>{code}</script>\n"
        )
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n{body}\n{script}</html>\n"
    )


def _json(data: dict[str, Any]) -> str:
    """Encodes so that no text in it can end the script element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def curves(charts: Sequence[dict[str, Any]], choices: str = "", note: str = "") -> str:
    """Returns the place of each chart, which the script fills.

    Args:
      charts: as ``charts.chart`` makes them.
      choices: HTML of more buttons above them.
      note: a sentence above them.
    """
    parts = "".join(
        f'<button type="button" data-part="{part}" aria-pressed="{str(part == 1).lower()}">'
        f"{name}</button>"
        for part, name in _PARTS
    )
    return (
        "<noscript><p>The curves are drawn by a script in this page, which is switched off."
        "</p></noscript>\n"
        f'<div class="choices"><div class="choice"><span class="faint">Show</span>{parts}</div>'
        f"{choices}</div>\n{paragraph(note)}"
        f'<div class="charts">\n{"".join(map(_figure, charts))}</div>'
    )


def _figure(chart: dict[str, Any]) -> str:
    note = f'<p class="faint">{html.escape(chart["note"])}</p>' if chart["note"] else ""
    return (
        f'<figure id="chart-{chart["key"]}"><figcaption><b>{html.escape(chart["title"])}</b>'
        '<small class="unit"></small><button type="button" class="log" '
        f'aria-pressed="{str(chart["log"]).lower()}">log</button></figcaption>'
        f'<div class="plot"></div><div class="legend"></div>{note}</figure>\n'
    )


def paragraph(text: str) -> str:
    """Returns a faint sentence; "" where there is none."""
    return f'<p class="faint">{html.escape(text)}</p>\n' if text else ""


def number(value: Any, digits: int = 5) -> str:
    """Returns a value as a reader wants to see it; None, which is not known, as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def size(value_bytes: float | None) -> str:
    """Returns bytes in GiB or MiB."""
    if value_bytes is None:
        return "–"
    gib = value_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{value_bytes / 2**20:.0f} MiB"


def duration(secs: float) -> str:
    """Returns hours, minutes and seconds."""
    hours, rest = divmod(round(secs), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
