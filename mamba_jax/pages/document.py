"""An HTML page in one file: style, scripts and data are inside it, so it needs no network.

Text that comes from a run or a user must pass ``html.escape`` before it becomes part of a body.
"""

import html
import pathlib
from typing import Any

_BASE_STYLE = pathlib.Path(__file__).with_name("base.css")


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Returns a page.

    Args:
      title: the page's title, as plain text.
      body: HTML.
      style: CSS of this page, after the base style.
      script: HTML script elements, at the end of the page.
    """
    base = _BASE_STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{base}{style}</style>\n"
        f"{body}\n{script}</html>\n"
    )


def paragraph(text: str) -> str:
    """Returns a faint sentence, or "" if the text is empty."""
    return f'<p class="faint">{html.escape(text)}</p>\n' if text else ""


def number(value: Any, digits: int = 5) -> str:
    """Formats a value for people; None, an unknown value, becomes a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def size(value_bytes: float | None) -> str:
    """Formats bytes as GiB or MiB."""
    if value_bytes is None:
        return "–"
    gib = value_bytes / 2**30
    return f"{gib:.2f} GiB" if gib >= 1 else f"{value_bytes / 2**20:.0f} MiB"


def duration(secs: float) -> str:
    """Formats seconds as hours, minutes and seconds."""
    hours, rest = divmod(round(secs), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
