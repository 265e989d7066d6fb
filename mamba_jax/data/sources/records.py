"""From a record to a document: one recogniser for files and datasets.

A record is a JSON value, a row of parquet, or a row of a dataset. It becomes *segments* ``(text,
is_target)``: joined they are the text; ``is_target`` is False where ``data.loss_on="answer"``
computes no loss. Each segment after the first begins with the white space before it, so that the
tokens of the segments are, as a rule, the tokens of the whole text.

The recogniser tries these forms in this order. The order of a record's keys has no effect. If a
form gives no text, the next form is tried:

1. a turn, or a list of turns: a chat (``data.sources.chats``);
2. ``text``, ``content``: plain text, all of it trained on;
3. ``chosen``, with or without a prompt: the chosen answer, never the rejected one; with a warning;
4. ``messages`` and its aliases: a chat, possibly as JSON in a string, possibly with ``system``;
5. a question or instruction and its answer (``_QUESTION_FORMS``): the question, a blank line, and
   the answer, which alone is trained on. If either is a list of turns, both become one chat. A
   ``completion`` that begins with white space follows its prompt directly;
6. ``code``: as text.

In any other record a single list of turns is a chat; otherwise its strings are joined, without
metadata (``data.sources.values``). A value that looks like a chat but is not understood is skipped.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mamba_jax.data.sources.chats import (
    NotUnderstood,
    Segments,
    Turn,
    add,
    are_turn_keys,
    is_lone_turn,
    render,
    turns_in,
)
from mamba_jax.data.sources.values import is_metadata, leaves, value_text
from mamba_jax.data.text_cuts import well_formed

# Increase it whenever the same record would give different segments.
TEMPLATE = 3

_TEXT_KEYS = ("text", "content")
_CHAT_KEYS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
_SYSTEM_KEYS = ("system_prompt", "system")
# (before, question, after, answers): the answer is the first one that is not blank.
_QUESTION_FORMS = (
    (
        ("instruction", "context"),
        "question",
        (),
        ("answer", "answers", "response", "generated_solution", "solution", "output"),
    ),
    ((), "instruction", ("input", "context"), ("output", "response", "answer", "completion")),
    ((), "prompt", ("input", "context"), ("completion", "response", "answer", "output")),
    (("instruction", "context"), "query", (), ("response", "answer", "output", "completion")),
    ((), "problem", (), ("solution", "generated_solution", "answer", "response")),
    (("context",), "input", (), ("output", "target", "response", "answer")),
    ((), "inputs", (), ("targets", "outputs")),
    ((), "source", (), ("target",)),
)
# A record that has only these, and what stands beside them, is a question without an answer.
_QUESTION_KEYS = ("question", "instruction", "prompt", "query", "problem")
_CHOICES = ("choices", "options")

WITHOUT_ANSWER = 'record without an answer: no target with loss_on="answer"'
CHOSEN_ALONE = "preference pair: only the chosen answer is used"
LOOSE = "record of unknown form: its strings are joined"
CHAT_NOT_UNDERSTOOD = "chat in an unknown format"
UNDESIRABLE = "completion labelled undesirable (label false)"
CHOICE_BY_NUMBER = "answer given as the number of a choice"


@dataclasses.dataclass(frozen=True)
class Document:
    """What a record gives.

    Attributes:
      segments: its text.
      warnings: what to report about it.
      skip: why the record is left out although it has content; "" if it is used.
    """

    segments: Segments = dataclasses.field(default_factory=list)
    warnings: tuple[str, ...] = ()
    skip: str = ""

    @property
    def is_blank(self) -> bool:
        return not any(text.strip() for text, _ in self.segments)


@dataclasses.dataclass(frozen=True)
class _Form:
    """The keys that a record of one form uses.

    Attributes:
      kind: "text", "chat", "preference" or "answer".
      prompts: keys of the text before the answer, in order.
      answers: keys of the answer; the first one that is not blank is used.
      beside: keys that can exclude a record.
    """

    kind: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.prompts, *self.answers, *self.beside)


class _Skipped(Exception):
    """A record is left out; the message says why."""


def document_of(record: Any) -> Document:
    """Returns the document of a record of any form."""
    return _checked(lambda: _recognised(record))


def document_of_columns(row: Mapping[str, Any], columns: Sequence[str]) -> Document:
    """Returns the document made of the columns that the user named, in this order.

    If there are several columns, only the last one, the answer, is trained on. A single column is
    trained on as a whole, or as a chat.
    """
    *prompts, answer = columns
    chat = not prompts
    return _checked(lambda: Document(_prompted(row, prompts, answer, is_chat=chat)))


def _checked(read: Callable[[], Document]) -> Document:
    try:
        document = read()
    except NotUnderstood:
        return Document(skip=CHAT_NOT_UNDERSTOOD)
    except _Skipped as skipped:
        return Document(skip=str(skipped))
    except UnicodeDecodeError:
        return Document(skip="bytes that are not UTF-8")
    if document.is_blank or any(is_target for _, is_target in document.segments):
        return document
    return dataclasses.replace(document, warnings=(*document.warnings, WITHOUT_ANSWER))


def _recognised(record: Any) -> Document:
    if is_lone_turn(record):
        record = [record]
    if isinstance(record, list) and (turns := turns_in(record, expected=False)) is not None:
        return Document(render(turns))
    if not isinstance(record, Mapping):
        return Document(_joined((), "\n\n".join(leaves(record, numbers=False))))
    is_known = False
    for form in _forms(record):
        is_known = True
        if not (document := _read(form, record)).is_blank:
            return document
    return Document() if is_known else _loose(record)


def _forms(names: Collection[str]) -> Iterator[_Form]:
    """Yields the forms that a record with these keys can have, in order of preference."""
    here = lambda keys: tuple(key for key in keys if key in names)
    system = here(_SYSTEM_KEYS)[:1]
    for key in here(_TEXT_KEYS):
        yield _Form("text", (), (key,))
    questions = [(prompts, here(answers)) for prompts, _, answers in _questions(names)]
    if "chosen" in names:
        prompts = next((prompts for prompts, _ in questions), None)
        yield _Form("preference", prompts or (*system, *here(_CHAT_KEYS)[:1]), ("chosen",))
    for key in here(_CHAT_KEYS):
        yield _Form("chat", system, (key,))
    for prompts, answers in questions:
        if answers:
            yield _Form("answer", prompts, answers, here((*_CHOICES, "label")))
    if "code" in names:
        yield _Form("text", (), ("code",))


def _questions(names: Collection[str]) -> Iterator[tuple[tuple[str, ...], str, tuple[str, ...]]]:
    """Yields, for each kind of question that a record with these keys can hold: the keys of the
    whole prompt, the key of the question itself, and the possible keys of the answer."""
    here = lambda keys: tuple(key for key in keys if key in names)
    system = here(_SYSTEM_KEYS)[:1]
    for before, prompt, after, answers in _QUESTION_FORMS:
        if prompt in names:
            yield (*system, *here(before), prompt, *here(after)), prompt, answers


def _read(form: _Form, record: Mapping[str, Any]) -> Document:
    if form.kind == "text" and isinstance(text := record[form.answers[0]], str):
        return Document([(well_formed(text), True)])
    answer, *others = form.answers
    if others:
        answer = next((key for key in form.answers if _text(record, key).strip()), answer)
    if record.get("label") is False and "label" in form.beside and "prompt" in form.prompts:
        raise _Skipped(UNDESIRABLE)
    is_number = isinstance(record[answer], int | float) and not isinstance(record[answer], bool)
    if is_number and any(record.get(key) for key in _CHOICES):
        raise _Skipped(CHOICE_BY_NUMBER)
    segments = _prompted(record, form.prompts, answer, is_chat=form.kind == "chat")
    return Document(segments, (CHOSEN_ALONE,) if form.kind == "preference" else ())


def _loose(record: Mapping[str, Any]) -> Document:
    """Returns a record of unknown form: its one chat, or its strings."""
    kept = {key: value for key, value in record.items() if not is_metadata(str(key))}
    if turns := _nested_chat(kept):
        return Document(render(turns))
    texts = {key: list(leaves(value, numbers=False)) for key, value in kept.items()}
    keys = [key for key, found in texts.items() if found]
    for prompts, prompt, _ in _questions(keys):
        if prompt in _QUESTION_KEYS and set(prompts) == set(keys):
            return Document(_joined(["\n\n".join(texts[key]) for key in prompts], ""))
    text = "\n\n".join(text for key in keys for text in texts[key])
    return Document(_joined((), text), (LOOSE,) if len(keys) > 1 else ())


def _nested_chat(value: Any) -> list[Turn] | None:
    """Returns the only chat inside a list or object, itself included.

    Raises:
      NotUnderstood: if there are several.
    """
    found, stack = None, [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list) and (turns := turns_in(value, expected=False)) is not None:
            if found:
                raise NotUnderstood
            found = turns
        elif isinstance(value, list | dict):
            stack.extend(value.values() if isinstance(value, dict) else value)
    return found


def _chat_in(value: Any, *, expected: bool = False) -> list[Turn] | None:
    turns = turns_in(value, expected=expected)
    return _nested_chat(value) if turns is None else turns


def _text(record: Mapping[str, Any], key: str) -> str:
    try:
        return value_text(record[key])
    except UnicodeDecodeError:
        raise _Skipped(f'bytes that are not UTF-8 in "{key}"') from None


def _prompted(
    record: Mapping[str, Any], prompts: Sequence[str], answer: str, *, is_chat: bool
) -> Segments:
    """Renders prompt and answer: as text, or as a chat if one of them holds turns."""
    prompt_turns = [_chat_in(record[key]) for key in prompts]
    answer_turns = _chat_in(record[answer], expected=is_chat)
    if answer_turns is None and all(turns is None for turns in prompt_turns):
        texts = [_text(record, key) for key in prompts]
        follows = answer == "completion"
        return _joined(texts, _text(record, answer), follows=follows)
    turns: list[Turn] = []
    for key, found in zip(prompts, prompt_turns, strict=True):
        role = "system" if key in _SYSTEM_KEYS else "user"
        for turn in [(role, _text(record, key), False)] if found is None else found:
            turns.append((*turn[:2], False))
    if answer_turns is None:
        answer_turns = [("assistant", _text(record, answer), True)]
    # An answer that begins with the prompt holds the whole prompt.
    begins = answer_turns[0][0] if answer_turns else ""
    if begins in ("system", "user"):
        turns = [turn for turn in turns if turn[0] == "system" != begins]
    return render([turn for turn in (*turns, *answer_turns) if turn[1].strip()])


def _joined(prompts: Iterable[str], answer: str, *, follows: bool = False) -> Segments:
    """Joins texts by blank lines and leaves out blank texts; only the answer is trained on.

    Args:
      prompts: the texts that are not trained on.
      answer: the text that is.
      follows: whether white space at the answer's start replaces the blank line.
    """
    segments: Segments = []
    for text in prompts:
        if text.strip():
            add(segments, f"\n\n{text}" if segments else text, False)
    if answer.strip():
        is_joined = not segments or (follows and answer[0].isspace())
        add(segments, answer if is_joined else f"\n\n{answer}", True)
    return segments


def gathered(records: Iterable[Any]) -> Iterator[Any]:
    """Yields records; if each one is only a turn, yields all of them as one conversation."""
    turns: list[Any] | None = []
    for record in records:
        if turns is not None and is_lone_turn(record):
            turns.append(record)
            continue
        yield from turns or ()
        turns = None
        yield record
    if turns:
        yield turns


def usual_columns(schema: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the columns to use from a table with this Arrow schema, by the forms of records.

    Returns:
      The columns of the table's preferred form, and the columns to read: those of all possible
      forms, since a row can have another form. Both () if no form fits.
    """
    names = list(dict.fromkeys(schema.names))
    if are_turn_keys(names):
        return tuple(names), tuple(names)
    if forms := list(_forms(names)):
        keys = {key for form in forms for key in form.keys}
        best = forms[0]
        return (*best.prompts, best.answers[0]), tuple(name for name in names if name in keys)
    strings = tuple(columns_with_strings(schema))
    return (strings, strings) if len(strings) == 1 else ((), ())


def columns_with_strings(schema: Any) -> list[str]:
    """Returns the columns of an Arrow schema that hold strings at any depth and are not
    metadata."""
    return [f.name for f in schema if _has_strings(f.type) and not is_metadata(f.name)]


def _has_strings(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _has_strings(kind.value_type)
    if hasattr(kind, "storage_type"):  # an extension
        return _has_strings(kind.storage_type)
    inner = [kind.field(i) for i in range(kind.num_fields)]
    is_string = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return is_string or any(_has_strings(field.type) for field in inner)
