"""From a value of a record or row to its text: one spelling, wherever the value comes from.

A string is itself. A number is its shortest decimal form, without ``.0``: 1, 2.5, 0.1; so a column
that a file holds as 1 and a table as 1.0 or 1.00 reads alike. Truth values are ``true`` and
``false``. Dates and times are ISO 8601, a time stamp at midnight its date alone: libraries read
``2024-01-02`` as one. Bytes are UTF-8. Null and NaN are no text.
"""

import datetime
import decimal
import math
import struct
from collections.abc import Iterator
from typing import Any

# Keys that describe a record. What they hold is no text, unless a column is named by the user.
# A rejected answer is here, for it must never be learnt.
_METADATA = frozenset(
    (
        *("id", "uid", "uuid", "guid", "idx", "index", "hash", "sha", "sha256", "md5"),
        *("url", "urls", "uri", "link", "href", "path", "file", "filename", "file_name"),
        *("license", "licence", "meta", "metadata", "source", "dataset", "split", "lang"),
        *("language", "timestamp", "date", "created", "created_at", "updated_at", "rejected"),
    )
)
_METADATA_ENDINGS = ("_id", "_url", "_uri", "_license", "_licence", "_hash", "_path", "_metadata")
# Of a value that is an object the first of these is its text, as in SQuAD's answers.
_INNER_TEXT = ("text", "value")


def is_metadata(key: str) -> bool:
    """Says whether a key describes a record and holds no text of it."""
    key = key.lower()
    return key in _METADATA or key.endswith(_METADATA_ENDINGS)


def scalar_text(value: Any) -> str | None:
    """Returns the text of a single value; None if it is none, or of another kind.

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
        # A number in single precision, whose neighbours are far: 0.1, not 0.10000000149011612.
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
    """Returns the text of a value; that of a list or object are its leaves, a blank line between.

    Raises:
      UnicodeDecodeError: if it holds bytes that are not UTF-8.
    """
    text = scalar_text(value)
    return "\n\n".join(leaves(value, numbers=True)) if text is None else text


def leaves(value: Any, *, numbers: bool) -> Iterator[str]:
    """Yields the text in a value in order, that of metadata left out; white space alone as well.

    Args:
      value: of any kind.
      numbers: whether what is no string counts, in lists; in objects strings alone do.

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
