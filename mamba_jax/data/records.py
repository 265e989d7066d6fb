"""From a record (a JSON value, a row of a table) to the text of one document, and what is learnt.

A document is a list of *parts* ``(text, learn)``: joined they are the text; ``learn`` is False
where ``data.loss_on="answer"`` takes no loss. Each part after the first begins with the white
space before it, so that the tokens of the parts are, as a rule, the tokens of the whole.

Chats are rendered ``role: content``, a blank line between two turns:

    user: How much is 1 + 1?

    assistant: It is 2.

A turn has ``role`` and ``content``, or ``from`` and ``value``; ``human`` is called user; ``gpt``,
``bot``, ``chatgpt``, ``model`` and ``ai`` assistant. What follows ``assistant:`` is learnt. Content
that is a list gives the text of its entries, joined by line feeds; a turn without content is left
out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mamba_jax.data.text_cuts import well_formed

# Raise it whenever the same record would give another text.
TEMPLATE = 2
Parts = list[tuple[str, bool]]

# The text of a record, best first.
TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations", "conversation")
# What is asked, and last what is to be answered.
ANSWER_KEYS = (
    ("question", "answer"),
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("question", "generated_solution"),
    ("context", "question", "answers"),
)
# Where no column was named: the first of these that the table has, whole.
_USUAL_COLUMNS = (*((key,) for key in (*TEXT_KEYS, "code", *CHAT_KEYS)), *ANSWER_KEYS)

_ROLES = {"human": "user"} | dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai"), "assistant")


def parts_of_record(record: Any) -> Parts:
    """Returns the text of a JSON value: its text key, its chat, or all its strings in order.

    All strings are joined by a blank line; of a record with a question and its answer under usual
    keys the answer alone is learnt, of any other all.
    """
    if isinstance(record, dict):
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                return [(well_formed(record[key]), True)]
        for key in CHAT_KEYS:
            if (chat := _chat(record.get(key))) is not None:
                return chat
        for keys in ANSWER_KEYS:
            if all(record.get(key) for key in keys):
                return _joined(
                    (string, key == keys[-1]) for key in record for string in _strings(record[key])
                )
    return _joined((string, True) for string in _strings(record))


def parts_of_row(row: Mapping[str, Any], columns: Sequence[str]) -> Parts:
    """Returns the text of a row: its columns in order, joined by a blank line.

    Of several columns the last is the answer and learnt; a single one is learnt whole, or as a
    chat.
    """
    if len(columns) == 1:
        chat = _chat(row[columns[0]])
        return _joined([(_text(row[columns[0]]), True)]) if chat is None else chat
    return _joined((_text(row[column]), column == columns[-1]) for column in columns)


def usual_columns(schema: Any) -> tuple[str, ...]:
    """Returns what to read of a table with this Arrow schema; () if nothing suggests itself."""
    strings = columns_with_strings(schema)
    for columns in _USUAL_COLUMNS:
        if all(column in strings for column in columns):
            return columns
    return tuple(strings) if len(strings) == 1 else ()


def columns_with_strings(schema: Any) -> list[str]:
    """Returns the columns of an Arrow schema that hold strings, be it deep inside."""
    return [field.name for field in schema if _has_strings(field.type)]


def _has_strings(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _has_strings(kind.value_type)
    if hasattr(kind, "storage_type"):  # an extension
        return _has_strings(kind.storage_type)
    inner = [kind.field(i) for i in range(kind.num_fields)]
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or any(_has_strings(field.type) for field in inner)


def is_blank(parts: Parts) -> bool:
    """Says whether a document has no text."""
    return not any(text.strip() for text, _ in parts)


def _text(value: Any) -> str:
    """Returns a column's text: itself, a number's digits, a chat, or all its strings."""
    if isinstance(value, str | int | float):
        return str(value)
    chat = _chat(value)
    return "\n\n".join(_strings(value)) if chat is None else "".join(text for text, _ in chat)


def _joined(pieces: Iterator[tuple[str, bool]] | Sequence[tuple[str, bool]]) -> Parts:
    """Joins texts by a blank line, leaving out white space alone."""
    parts: Parts = []
    for text, learn in pieces:
        if text.strip():
            _add(parts, f"\n\n{text}" if parts else text, learn)
    return parts


def _add(parts: Parts, text: str, learn: bool) -> None:
    text = well_formed(text)
    if parts and parts[-1][1] == learn:
        text = parts.pop()[0] + text
    parts.append((text, learn))


def chat_text(turns: list[Any]) -> str:
    """Returns a chat as it is rendered for training; "" if these are no turns, or empty ones."""
    return "".join(text for text, _ in _chat(turns) or ())


def _chat(value: Any) -> Parts | None:
    """Returns a rendered chat; None if this is none."""
    if not (isinstance(value, list) and value and all(map(_is_turn, value))):
        return None
    parts: Parts = []
    for turn in value:
        role, content = _turn(turn)
        if not content.strip():
            continue
        role = _ROLES.get(role.lower(), role.lower())
        _add(parts, f"\n\n{role}:" if parts else f"{role}:", False)
        _add(parts, f" {content}", role == "assistant")
    return parts


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(role), str)
        and content in value
        and isinstance(value[content], str | list | None)
        for role, content in (("role", "content"), ("from", "value"))
    )


def _turn(turn: dict[str, Any]) -> tuple[str, str]:
    keys = ("role", "content") if isinstance(turn.get("role"), str) else ("from", "value")
    role, content = (turn.get(key) for key in keys)
    if isinstance(content, list):
        entries = (entry.get("text") if isinstance(entry, dict) else entry for entry in content)
        content = "\n".join(entry for entry in entries if isinstance(entry, str))
    return str(role), content or ""


def _strings(value: Any) -> Iterator[str]:
    """Yields the string leaves in order; an explicit stack, for JSON nests deeper than Python."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack.extend(reversed(value.values()))
        elif isinstance(value, list):
            stack.extend(reversed(value))
