"""The constraint, choices and help of a config field, declared together with the field.

A field is ``name: Annotated[type, CONSTRAINT, "help"] = default``; the constraint is optional, and
a ``Literal`` type lists the choices. Checks, ``--help`` and the reference are made from these.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A condition on a single value, beyond its type."""

    words: str  # complete the message "field=value …"
    holds: Callable[[Any], bool]


POSITIVE = Constraint("must be greater than 0", lambda value: value > 0)
NOT_NEGATIVE = Constraint("must not be negative", lambda value: value >= 0)
FRACTION = Constraint("must be at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Constraint("must be between 0 and 1", lambda value: 0 <= value <= 1)
NOT_EMPTY = Constraint("must not be empty", bool)


@dataclasses.dataclass(frozen=True)
class Field:
    """One leaf of the config.

    Attributes:
      name: dotted, as after ``--config.``.
      type: without its annotations; ``str`` for a choice.
      default: the default value.
      choices: the permitted values of a text field; (): any value.
      constraint: None: any value of the type.
      help: one sentence or a few, for users.
    """

    name: str
    type: Any
    default: Any
    choices: tuple[str, ...]
    constraint: Constraint | None
    help: str


def fields(cls: type, prefix: str = "") -> Iterator[Field]:
    """Yields every leaf field of a config class and of the groups in it, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for declared in dataclasses.fields(cls):
        hint = hints[declared.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(typing.cast(type, hint), f"{prefix}{declared.name}.")
            continue
        assert typing.get_origin(hint) is typing.Annotated, declared.name
        type_, *notes = typing.get_args(hint)
        is_choice = typing.get_origin(type_) is typing.Literal
        choices = typing.get_args(type_) if is_choice else ()
        constraint = next((note for note in notes if isinstance(note, Constraint)), None)
        (help_,) = (note for note in notes if isinstance(note, str))
        yield Field(
            f"{prefix}{declared.name}",
            str if is_choice else type_,
            declared.default,
            choices,
            constraint,
            help_,
        )


def describe(type_: Any) -> str:
    """Returns the words for a type: "a whole number"."""
    if isinstance(type_, types.GenericAlias):
        if dataclasses.is_dataclass(typing.get_args(type_)[0]):
            return "a list of groups of fields such as ({'name': value},)"
        return "a list such as (1,2,4)"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[type_]
