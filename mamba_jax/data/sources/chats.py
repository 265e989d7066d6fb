"""Chats: which values are one, and how their turns are rendered.

A turn is ``role: content``, a blank line between two turns:

    user: How much is 1 + 1?

    assistant: It is 2.

What follows ``assistant:`` is learnt, unless the turn has ``weight`` 0. A turn names its role by
``role`` or ``from``, its content by ``content``, ``value`` or ``text``; ``ROLES`` gives the names
of roles. Content that is a list gives the text of its entries, joined by line feeds. Each tool call
of a turn is a line of JSON behind the content, ``{"name": "weather", "arguments": {"town": 1}}``:
arguments that are a JSON string stand as they are, others are written with sorted keys. A turn with
neither content nor calls is left out.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from mamba_jax.data.sources.values import scalar_text
from mamba_jax.data.text_cuts import well_formed

Parts = list[tuple[str, bool]]
Turn = tuple[str, str, bool]  # role, content, learnt

ROLES = (
    dict.fromkeys(("human", "prompter"), "user")
    | dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai", "function_call"), "assistant")
    | dict.fromkeys(("function", "observation", "ipython", "function_response"), "tool")
    | {"developer": "system"}
)
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
# Other keys of turns; what they hold is not rendered.
_OTHER_KEYS = (
    *("name", "weight", "tool_calls", "function_call", "tool_call_id", "refusal", "audio"),
    *("annotations", "prefix", "thinking", "reasoning", "reasoning_content"),
)
_TURN_KEYS = frozenset((*_ROLE_KEYS, *_CONTENT_KEYS, *_OTHER_KEYS))
_KNOWN_ROLES = frozenset(("user", "assistant", "system", "tool", *ROLES))


class NotUnderstood(Exception):
    """What looks like a chat, and whose turns cannot be told."""


def is_lone_turn(record: Any) -> bool:
    """Says whether a record is a turn and nothing else."""
    if not _has_known_role(record):
        return False
    keys = {key for key, value in record.items() if value is not None}
    return keys <= _TURN_KEYS and len(keys) > 1


def are_turn_keys(names: Sequence[str]) -> bool:
    """Says whether a table with these columns has a turn in each row, and nothing else."""
    has = lambda keys: any(key in names for key in keys)
    return has(_ROLE_KEYS) and has(_CONTENT_KEYS) and set(names) <= _TURN_KEYS


def turns_in(value: Any, *, expected: bool) -> list[Turn] | None:
    """Returns the turns of a chat that have content; None if the value does not look like a chat.

    Args:
      value: a list of turns, a single turn, an object of lists with the parts of turns, or a string
        with one of these as JSON.
      expected: whether every list of objects looks like a chat, as under a key that names one;
        else one of them must have a role that is known.

    Raises:
      NotUnderstood: if it looks like a chat, and a turn has no role or no content that is known.
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
    """Returns what a string holds as JSON, if that may be a chat."""
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
        raise NotUnderstood  # its content has a name that is not known
    learnt = role == "assistant" and given.get("weight") != 0
    return role, "\n".join(lines), learnt


def _content(value: Any) -> str:
    if isinstance(value, dict):  # a single entry, or the parts of one
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if isinstance(value, list):
        texts = [_entry(entry) for entry in value]
        return "\n".join(text for text in texts if text)
    text = scalar_text(value)
    if text is None:
        raise NotUnderstood
    return text


def _entry(entry: Any) -> str:
    """Returns the text of an entry of a content; "" of an image and the like."""
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
        # Tables give every object the keys of all; nulls tell nothing of this one.
        arguments = json.dumps(_without_nulls(arguments or {}), ensure_ascii=False, sort_keys=True)
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return scalar_text(value) if isinstance(value, bytes) else value


def render(turns: Sequence[Turn]) -> Parts:
    """Returns a chat as it is trained on."""
    parts: Parts = []
    for role, content, learnt in turns:
        add(parts, f"\n\n{role}:" if parts else f"{role}:", False)
        add(parts, f" {content}", learnt)
    return parts


def add(parts: Parts, text: str, learn: bool) -> None:
    """Appends to a document, joining what is learnt alike."""
    text = well_formed(text)
    if parts and parts[-1][1] == learn:
        text = parts.pop()[0] + text
    parts.append((text, learn))


def chat_text(turns: list[Any]) -> str:
    """Returns a chat as it is rendered for training; "" if these are no turns, or empty ones."""
    try:
        return "".join(text for text, _ in render(turns_in(turns, expected=True) or ()))
    except NotUnderstood:
        return ""
