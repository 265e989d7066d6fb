"""From a value of a record or row to its text: one spelling for every source.

A string is its own text. A number has its shortest decimal form, without ``.0``: 1, 2.5, 0.1; so a
value that is 1 in a file and 1.0 or 1.00 in a table gives the same text. Booleans are ``true`` and
``false``. Dates and times are in ISO 8601; a time stamp at midnight is only its date, since
libraries read ``2024-01-02`` as a time stamp. Bytes are UTF-8. Null and NaN have no text.
"""

import datetime
import decimal
import math
import struct
from collections.abc import Iterator
from typing import Any

# Keys that describe a record. Their values are not text, unless the user names a column.
# "rejected" is among them because a rejected answer must never be trained on.
_METADATA = frozenset(
    (
        *("id", "uid", "uuid", "guid", "idx", "index", "hash", "sha", "sha256", "md5"),
        *("url", "urls", "uri", "link", "href", "path", "file", "filename", "file_name"),
        *("license", "licence", "meta", "metadata", "source", "dataset", "split", "lang"),
        *("language", "timestamp", "date", "created", "created_at", "updated_at", "rejected"),
    )
)
_METADATA_ENDINGS = ("_id", "_url", "_uri", "_license", "_licence", "_hash", "_path", "_metadata")
# The text of an object is the first of these, as in SQuAD's answers.
_INNER_TEXT = ("text", "value")


def is_metadata(key: str) -> bool:
    """Returns whether a key describes a record and is not part of its text."""
    key = key.lower()
    return key in _METADATA or key.endswith(_METADATA_ENDINGS)


def scalar_text(value: Any) -> str | None:
    """Returns the text of a single value; None if it has none, or is a list or object.

    Raises:
      UnicodeDecodeError: if it is bytes that are not UTF-8.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, decimal.Decimal):
        return _decimal_text(value) if value.is_finite() else _float_text(float(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8")
    if isinstance(value, datetime.datetime):
        is_date = value.tzinfo is None and value.time() == datetime.time()
        return (value.date() if is_date else value).isoformat()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, datetime.timedelta) else None


def _float_text(value: float) -> str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    text = repr(value).removesuffix(".0")
    if "." in text and len(text) > 12 and _as_single(value) == value:
        # A number in single precision, with few digits: 0.1, not 0.10000000149011612.
        shorter = (f"{value:.{digits}g}" for digits in range(1, 10))
        text = next((t for t in shorter if _as_single(float(t)) == value), text)
    return text


def _decimal_text(value: decimal.Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").removesuffix(".") if "." in text else text


def _as_single(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.nan


def value_text(value: Any) -> str:
    """Returns the text of a value; for a list or object, its leaves joined by blank lines.

    Raises:
      UnicodeDecodeError: if it holds bytes that are not UTF-8.
    """
    text = scalar_text(value)
    return "\n\n".join(leaves(value, numbers=True)) if text is None else text


def leaves(value: Any, *, numbers: bool) -> Iterator[str]:
    """Yields the texts in a value in order, without metadata and blank texts.

    Args:
      value: any value.
      numbers: whether values other than strings count, in lists; in objects only strings do.

    Raises:
      UnicodeDecodeError: if it holds bytes that are not UTF-8.
    """
    stack = [(value, numbers)]  # explicit, for JSON nests deeper than Python
    while stack:
        value, numbers = stack.pop()
        if isinstance(value, dict):
            inner = next((key for key in _INNER_TEXT if value.get(key)), None)
            if inner is not None:
                stack.append((value[inner], numbers))
                continue
            kept = [inner for key, inner in value.items() if not is_metadata(str(key))]
            stack.extend((inner, False) for inner in reversed(kept))
        elif isinstance(value, list | tuple):
            stack.extend((inner, numbers) for inner in reversed(value))
        elif numbers or isinstance(value, str):
            text = scalar_text(value)
            if text and text.strip():
                yield text
