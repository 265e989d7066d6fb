"""Pages with curves: the place of each chart, its buttons, and the data that ``charts.js`` draws.

Text that comes from a run passes ``html.escape`` or, in the data of the curves, ``_json``.
"""

import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from mamba_jax.pages import document as frame
from mamba_jax.pages.document import paragraph

_HERE = pathlib.Path(__file__).parent
_PARTS = ((1, "all steps"), (0.5, "last half"), (0.1, "last tenth"))


def document(title: str, body: str, data: dict[str, Any] | None = None) -> str:
    """Returns a page.

    Args:
      title: the page's title, as plain text.
      body: HTML.
      data: the data of its curves, as ``curves`` shows them: ``charts`` as ``charts.chart`` makes
        them, and ``span``, first and last step. For one run also ``marks``, its steps ``resumed``
        and ``skipped``; for several runs ``tokens``, their token lines, and ``token_span``. None:
        the page has no curves.
    """
    script = ""
    if data is not None:
        code = (_HERE / "charts.js").read_text(encoding="utf-8")
        script = (
            f'<script type="application/json" id="data">{_json(data)}</script>\n'
            f"<script>{code}</script>\n"
        )
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return frame.document(title, body, style=style, script=script)


def _json(data: dict[str, Any]) -> str:
    """Encodes data so that no text in it can end the script element."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def notes(charts: Sequence[dict[str, Any]]) -> list[str]:
    """Returns sentences that explain thinned curves and gaps, where there are any."""
    shown = [curve for chart in charts for curve in chart["curves"]]
    sentences = []
    if (most := max(curve["size"] for curve in shown)) > 1:
        sentences.append(
            f"Each point represents up to {most:,} values: the line shows their mean, the band "
            "their range."
        )
    if any("gaps" in curve for curve in shown):
        sentences.append("✕ marks values that are not finite (NaN or infinite).")
    return sentences


def curves(charts: Sequence[dict[str, Any]], choices: str = "", note: str = "") -> str:
    """Returns a placeholder for each chart; the script draws the chart into it.

    Args:
      charts: as ``charts.chart`` makes them.
      choices: HTML of more buttons above them.
      note: text above them.
    """
    parts = "".join(
        f'<button type="button" data-part="{part}" aria-pressed="{str(part == 1).lower()}">'
        f"{name}</button>"
        for part, name in _PARTS
    )
    return (
        "<noscript><p>This page draws its curves with JavaScript, which is disabled.</p>"
        "</noscript>\n"
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
