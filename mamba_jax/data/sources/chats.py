"""Chats: which values are chats, and how their turns are rendered.

A turn is ``role: content``, a blank line between two turns:

    user: How much is 1 + 1?

    assistant: It is 2.

The text after ``assistant:`` is trained on, unless the turn has ``weight`` 0. A turn has its role
under ``role`` or ``from``, its content under ``content``, ``value`` or ``text``; ``ROLES`` maps the
aliases of roles. Content that is a list contributes the text of its entries, joined by line feeds.
Each tool call of a turn is a line of JSON after the content, such as ``{"name": "weather",
"arguments": {"town": 1}}``: arguments given as a JSON string are kept as they are, others are
written with sorted keys. A turn with neither content nor tool calls is left out.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mamba_jax.data.sources.values import scalar_text
from mamba_jax.data.text_cuts import well_formed

Segments = list[tuple[str, bool]]
Turn = tuple[str, str, bool]  # role, content, is_target

ROLES = (
    dict.fromkeys(("human", "prompter"), "user")
    | dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai", "function_call"), "assistant")
    | dict.fromkeys(("function", "observation", "ipython", "function_response"), "tool")
    | {"developer": "system"}
)
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
# Other keys of turns; their values are not rendered, except for tool calls.
_OTHER_KEYS = (
    *("name", "weight", "tool_calls", "function_call", "tool_call_id", "refusal", "audio"),
    *("annotations", "prefix", "thinking", "reasoning", "reasoning_content"),
)
_TURN_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, *_OTHER_KEYS))
_KNOWN_ROLES = frozenset(("user", "assistant", "system", "tool", *ROLES))


class NotUnderstood(Exception):
    """A value looks like a chat, but its turns cannot be identified."""


def is_lone_turn(record: Any) -> bool:
    """Returns whether a record is only a turn."""
    if not _has_known_role(record):
        return False
    keys = {key for key, value in record.items() if value is not None}
    return keys <= _TURN_KEYS and len(keys) > 1


def are_turn_keys(names: Sequence[str]) -> bool:
    """Returns whether each row of a table with these columns is only a turn."""
    has = lambda keys: any(key in names for key in keys)
    return has(_ROLE_KEYS) and has(_CONTENT_KEYS) and set(names) <= _TURN_KEYS


def turns_in(value: Any, *, expected: bool) -> list[Turn] | None:
    """Returns the turns of a chat that have content; None if the value does not look like a chat.

    Args:
      value: a list of turns, a single turn, an object of lists (of roles, of contents), or a
        string with one of these as JSON.
      expected: whether every list of objects looks like a chat, as under a key such as
        ``messages``; otherwise one of the objects must have a known role.

    Raises:
      NotUnderstood: if it looks like a chat, but a turn has no known role or content.
    """
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, dict):
        value = _of_object(value)
    looks_like_turn = (lambda turn: isinstance(turn, dict)) if expected else _has_known_role
    if not isinstance(value, list) or not any(map(looks_like_turn, value)):
        return None
    try:
        turns = [_turn(turn) for turn in value if turn is not None]
    except RecursionError:
        raise NotUnderstood from None
    return [turn for turn in turns if turn[1].strip()]


def _role_of(turn: dict[str, Any]) -> Any:
    return next((turn[key] for key in _ROLE_KEYS if turn.get(key) is not None), None)


def _has_known_role(value: Any) -> bool:
    role = _role_of(value) if isinstance(value, dict) else None
    return isinstance(role, str) and role.strip().lower() in _KNOWN_ROLES


def _decoded(text: str) -> Any:
    """Returns the JSON value in a string if it can be a chat, else None."""
    if text.lstrip()[:1] not in ("[", "{") or not any(f'"{key}"' in text for key in _ROLE_KEYS):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_object(value: dict[str, Any]) -> list[Any] | None:
    """Returns the turns of an object of lists, or of a single turn."""
    role = _role_of(value)
    if not isinstance(role, list):
        return [value] if _has_known_role(value) else None
    lists = {key: inner for key, inner in value.items() if inner is not None}
    if not all(isinstance(inner, list) and len(inner) == len(role) for inner in lists.values()):
        raise NotUnderstood
    return [dict(zip(lists, turn, strict=True)) for turn in zip(*lists.values(), strict=True)]


def _turn(turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise NotUnderstood
    given = {key: value for key, value in turn.items() if value is not None}
    role = _role_of(given)
    if not isinstance(role, str) or not role.strip():
        raise NotUnderstood
    role = role.strip().lower()
    role = ROLES.get(role, role)
    content = next((given[key] for key in _CONTENT_KEYS if given.get(key, "") != ""), "")
    lines = [text for text in (_content(content), *_calls(given)) if text.strip()]
    if not lines and any(given.keys() - _TURN_KEYS):
        raise NotUnderstood  # its content is under an unknown key
    is_target = role == "assistant" and given.get("weight") != 0
    return role, "\n".join(lines), is_target


def _content(value: Any) -> str:
    if isinstance(value, dict):  # a single entry, or an object with a list of entries
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if isinstance(value, list):
        texts = [_entry(entry) for entry in value]
        return "\n".join(text for text in texts if text)
    text = scalar_text(value)
    if text is None:
        raise NotUnderstood
    return text


def _entry(entry: Any) -> str:
    """Returns the text of one entry of a content; "" for an image and the like."""
    if not isinstance(entry, dict):
        return entry if isinstance(entry, str) else ""
    if entry.get("type") == "tool_use":
        return _call_text(entry.get("name"), entry.get("input"))
    inner = entry.get("text") or entry.get("content")
    return inner if isinstance(inner, str) else ""


def _calls(turn: dict[str, Any]) -> Iterator[str]:
    calls = turn.get("tool_calls") or []
    if isinstance(calls, str):
        try:
            calls = json.loads(calls)
        except (ValueError, RecursionError):
            raise NotUnderstood from None
    if not isinstance(calls, list):
        raise NotUnderstood
    for call in (*calls, turn.get("function_call")):
        if call is not None:
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict):
                raise NotUnderstood
            yield _call_text(function.get("name"), function.get("arguments"))


def _call_text(name: Any, arguments: Any) -> str:
    if not isinstance(name, str):
        raise NotUnderstood
    if isinstance(arguments, str):
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        # Tables give every object the keys of all objects; nulls are not this object's own.
        arguments = json.dumps(_without_nulls(arguments or {}), ensure_ascii=False, sort_keys=True)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return scalar_text(value) if isinstance(value, bytes) else value


def render(turns: Sequence[Turn]) -> Segments:
    """Returns a chat as it is trained on."""
    segments: Segments = []
    for role, content, is_target in turns:
        add(segments, f"\n\n{role}:" if segments else f"{role}:", False)
        add(segments, f" {content}", is_target)
    return segments


def add(segments: Segments, text: str, is_target: bool) -> None:
    """Appends to a document, joined to the last segment if both have the same ``is_target``."""
    text = well_formed(text)
    if segments and segments[-1][1] == is_target:
        text = segments.pop()[0] + text
    segments.append((text, is_target))


def chat_text(turns: list[Any]) -> str:
    """Returns a chat as it is rendered for training; "" if there is no turn with content."""
    try:
        return "".join(text for text, _ in render(turns_in(turns, expected=True) or ()))
    except NotUnderstood:
        return ""
