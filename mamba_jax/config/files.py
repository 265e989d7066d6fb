"""From files and command-line text to a checked ``RunConfig``.

A config file is a Python file with ``get_config() -> ConfigDict``, or JSON with some fields. Every
field can be overridden on the command line as ``--config.group.field=value``. ``freeze`` turns the
result into a ``RunConfig``; an invalid value raises a ``UserError`` that names it.
"""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mamba_jax import paths
from mamba_jax.config import checks
from mamba_jax.config.fields import describe, fields
from mamba_jax.config.schema import RunConfig, to_dict
from mamba_jax.errors import UserError, did_you_mean

T = typing.TypeVar("T")
_TYPES = {field.name: field.type for field in fields(RunConfig)}  # dotted name → type


def load_config(path: str) -> ConfigDict:
    """Runs ``get_config()`` of a Python config file.

    Raises:
      UserError: if the file is missing, does not run, or has no ``get_config``.
    """
    if _existing_file(path).suffix != ".py":
        raise UserError(
            f"config file {path} is neither a .py file with a get_config() function nor .json"
        )
    return call_in_file("config file", path, "get_config", ConfigDict, "a ConfigDict")


def call_in_file(
    kind: str, path: str, function: str, returned: type[T], returned_text: str, **arguments: Any
) -> T:
    """Runs a user's Python file and returns what a function of it returns.

    Args:
      kind: of file, for messages.
      path: of the file.
      function: its name.
      returned: the type that it must return.
      returned_text: the same in words, for messages.
      **arguments: of the function, passed by position; their names are for messages.

    Raises:
      UserError: if the file is missing, does not run, or the function is missing, fails or returns
        something else.
    """
    file = _existing_file(path, kind)
    signature = f"{function}({', '.join(arguments)})"
    if file.suffix != ".py":
        raise UserError(f"{kind} {path} is not a .py file with a {signature} function")
    try:
        spec = importlib.util.spec_from_file_location(f"mamba_jax_user_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look it up there
        spec.loader.exec_module(module)
        result = getattr(module, function)(*arguments.values())
    except UserError as error:
        raise UserError(f"{kind} {path}: {error}") from error
    except Exception as error:  # the file is a program: it can raise anything
        raise UserError(
            f"{kind} {path} failed: {type(error).__name__}: {error}; "
            f"it must define {signature} and return {returned_text}"
        ) from error
    if not isinstance(result, returned):
        raise UserError(
            f"{kind} {path}: {signature} must return {returned_text}, not {result!r:.200}"
        )
    return result


def load_json(path: str) -> dict[str, Any]:
    """Reads a JSON config file: some fields, in their groups ``model``, ``training``, ``vram`` ….

    Returns:
      The fields that the file names, and no others, checked and of their types.

    Raises:
      UserError: if the file is missing or not a JSON object, or has an unknown or repeated field or
        one of a wrong type.
    """
    file = _existing_file(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(values, dict):
            raise UserError(
                f'must contain an object with groups such as "model", not {values!r:.40}'
            )
        return _only(values, to_dict(from_dict(values)))
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # with the line and column
        raise UserError(f"config file {path} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f'"{repeated}" is given twice in one group')
    return values


def _only(names: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``values`` that ``names`` has, group by group."""
    return {
        name: _only(names[name], value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name in names
    }


def _existing_file(path: str, kind: str = "config file") -> pathlib.Path:
    file = pathlib.Path(path)
    if not file.is_file():
        beside = (other.name for other in file.parent.glob("*") if other.suffix in (".py", ".json"))
        raise UserError(f"{kind} {path} does not exist{did_you_mean(file.name, beside)}")
    return file


def apply_overrides(
    config: ConfigDict, overrides: Mapping[str, str], flags: Mapping[str, str] | None = None
) -> None:
    """Sets dotted fields from the command line's text, e.g. ``{"training.max_steps": "200"}``.

    Args:
      config: modified in place.
      overrides: field → text.
      flags: field → the flag that set it, for messages; ``--config.field`` otherwise.

    Raises:
      UserError: if a field does not exist (suggesting the nearest) or the text does not fit it.
    """
    for name, text in overrides.items():
        flag = (flags or {}).get(name, f"--config.{name}")
        if name not in _TYPES:
            raise UserError(f"unknown config field {flag}{_nearest_field(name, _TYPES)}")
        *groups, leaf = name.split(".")
        target: Any = config
        for group in groups:
            if group not in target:
                raise UserError(f"{flag}: the config file has no group {group}")
            target = target[group]
        with target.unlocked(), target.ignore_type():
            target[leaf] = _parse(text, _TYPES[name], flag)


def freeze(config: ConfigDict) -> RunConfig:
    """Checks a config and makes it immutable.

    Raises:
      UserError: on an unknown or missing field, a wrong type or a value that cannot work.
    """
    run = from_dict(config.to_dict())
    checks.check(run)
    return dataclasses.replace(run, model=run.model.normalised())


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Builds a ``RunConfig`` from nested plain values; absent fields take their default."""
    return _build(RunConfig, values, "")


def from_json(text: str) -> RunConfig:
    """Reads what ``json.dumps(to_dict(config))`` wrote."""
    return from_dict(json.loads(text))


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    types_ = typing.get_type_hints(cls)
    for name in values:
        if name not in types_:
            known = types_ if "[" in prefix else _TYPES  # in a list
            near = (
                did_you_mean(name, known) if "[" in prefix else _nearest_field(prefix + name, known)
            )
            raise UserError(f'unknown config field "{prefix}{name}"{near}')
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types_[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"config group {prefix}{name} must contain fields, not {value!r}")
            made[name] = _build(typing.cast(type, types_[name]), value, f"{prefix}{name}.")
        else:
            value = paths.expand(name, value) if isinstance(value, str) else value
            made[name] = _coerce(value, types_[name], prefix + name)
    return cls(**made)


def _nearest_field(name: str, fields: Mapping[str, Any]) -> str:
    """Suggests the field nearest by full name, else by last part (a field put in a wrong group)."""
    leaf = name.rsplit(".", 1)[-1]
    same_leaf = [field for field in fields if field.rsplit(".", 1)[-1] == leaf]
    return did_you_mean(name, same_leaf) or did_you_mean(name, fields)


def _parse(text: str, type_: Any, name: str) -> Any:
    if type_ is str:
        return text
    if type_ is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return _coerce(ast.literal_eval(text), type_, name)
    except (ValueError, SyntaxError):
        raise UserError(f"{name}={text!r} is not {describe(type_)}") from None


def _coerce(value: Any, type_: Any, name: str) -> Any:
    """Accepts ``value`` as ``type_``: whole floats as int (3e4), ints as float, lists as tuple."""
    if typing.get_origin(type_) is typing.Literal:  # ``checks`` compares it with the choices
        type_ = str
    if isinstance(type_, types.GenericAlias):  # tuple[int, ...]
        if isinstance(value, (list, tuple)):
            item = typing.get_args(type_)[0]
            return tuple(_coerce_item(each, item, f"{name}[{i}]") for i, each in enumerate(value))
    elif type_ is int and type(value) in (int, float) and value % 1 == 0:
        return int(value)
    elif type_ is float and type(value) in (int, float):
        return float(value)
    elif type(value) is type_:
        return value
    raise UserError(f"{name}={value!r} is not {describe(type_)}")


def _coerce_item(value: Any, type_: Any, name: str) -> Any:
    if not dataclasses.is_dataclass(type_):
        return _coerce(value, type_, name)
    if isinstance(value, typing.cast(type, type_)):  # an override, parsed already
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must contain fields, not {value!r}")
    return _build(typing.cast(type, type_), value, f"{name}.")
