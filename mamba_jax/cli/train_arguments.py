"""The arguments of ``train``: presets, a config file and flags become one ``RunConfig``.

Precedence, lowest to highest::

    built-in < --model_size < --training_preset < --config FILE < other flags < --config.field=

A ``.json`` file sets the fields that it names. A ``.py`` file returns a whole config; so does the
checkpoint that ``--resume`` names. Either replaces the built-in values; a size or a preset changes
it only if its flag is given. Nothing here imports JAX: ``--help`` and errors appear at once.
"""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mamba_jax.cli.train_flags import DEFAULT_PRESET, DEFAULT_SIZE, DEFAULTS, FIELDS, make_parser
from mamba_jax.config import (
    RunConfig,
    apply_overrides,
    default_config,
    freeze,
    load_config,
    load_json,
    merge,
    size_fields,
    to_dict,
    training_fields,
)
from mamba_jax.errors import UserError

_AUTO = "auto"
_FLAG_OF = {field: flag for flag, field in FIELDS.items()}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The parsed command line.

    Attributes:
      config: of the run, checked.
      resume: "", "auto" or a folder: see ``checkpoints.resume.find_start``.
      profile: steps to run before a trace, and steps to trace; None: no trace.
      dry_run: describe the run instead of starting it.
      list_files: list the files that would be read instead.
      clear_cache: delete all cached tokens first.
      force: take over the output_dir even from a run that may still be active.
      notes: how the config was built, where that may surprise, for the log.
    """

    config: RunConfig
    resume: str = ""
    profile: tuple[int, int] | None = None
    dry_run: bool = False
    list_files: bool = False
    clear_cache: bool = False
    notes: tuple[str, ...] = ()
    force: bool = False


def read(argv: list[str]) -> Arguments:
    """Reads the arguments of ``train``.

    Raises:
      UserError: on an unknown flag, field or name, a value that does not fit, or a file or
        checkpoint that cannot be read.
      SystemExit: after ``--help``.
    """
    overrides, rest = _take_overrides(argv)
    flags = make_parser().parse_args(rest)
    given = _given_fields(flags)
    is_json = flags.config.endswith(".json")
    file = load_json(flags.config) if is_json else {}
    if flags.config and not is_json:
        config, origin = load_config(flags.config), flags.config
    else:
        wanted = overrides.get("output_dir") or given.get("output_dir") or file.get("output_dir")
        config, origin = _starting_config(flags.resume, wanted or DEFAULTS.output_dir)
    size = flags.model_size or ("" if origin else DEFAULT_SIZE)
    preset = flags.training_preset or ("" if origin else DEFAULT_PRESET)
    notes = []
    for flag, name, fields_of in (
        ("--model_size", size, size_fields),
        ("--training_preset", preset, training_fields),
    ):
        if name:
            # For a checkpoint, the run itself logs the fields that have changed.
            if origin and origin == flags.config and (changes := _changes(config, fields_of(name))):
                notes.append(f"{flag} {name} overrides {origin}: {', '.join(changes)}")
            merge(config, fields_of(name))
    if not origin:
        config.name = pathlib.Path(flags.config).stem if is_json else size
    merge(config, file)
    apply_overrides(config, given, _FLAG_OF)
    apply_overrides(config, overrides)
    return Arguments(
        freeze(config),
        flags.resume,
        _profile(flags),
        flags.dry_run,
        flags.list_files,
        flags.clear_cache,
        tuple(notes),
        flags.force,
    )


def _starting_config(resume: str, output_dir: str) -> tuple[ConfigDict, str]:
    """Returns (config, its origin): of the checkpoint to continue, else built in and ""."""
    from mamba_jax.checkpoints.folder import find_latest, read_metadata
    from mamba_jax.checkpoints.resume import named_start

    quiet: Callable[[str], None] = lambda _: None  # the run itself logs what it skips
    checkpoint = None
    if resume == _AUTO:
        checkpoint = find_latest(pathlib.Path(output_dir), quiet)
    elif resume:
        checkpoint = named_start(pathlib.Path(resume), quiet)
    if checkpoint is None:
        return default_config(), ""
    config = ConfigDict(to_dict(read_metadata(checkpoint).config))
    config.output_dir = str(checkpoint.parent)  # the folder may have been moved since
    return config, str(checkpoint)


def _changes(config: ConfigDict, fields: dict[str, dict[str, Any]]) -> list[str]:
    before = config.to_dict()
    return [
        f"{group}.{name} {old} → {new}"
        for group, values in fields.items()
        for name, new in values.items()
        if (old := before.get(group, {}).get(name)) != new
    ]


def _given_fields(flags: argparse.Namespace) -> dict[str, str]:
    """Returns field → text of the flags that set a field."""
    given = {}
    for flag, field in FIELDS.items():
        value = getattr(flags, flag.removeprefix("--"))
        if value is not None:
            given[field] = value
    if flags.vram is not None:
        given["vram.memory_gb"] = repr(_gigabytes(flags.vram))
        given.setdefault(
            "vram.auto", "false"
        )  # even if a file or checkpoint sets it: the size is given
    return given


def _gigabytes(text: str) -> float:
    """Reads an amount of memory: "16gb", "24", "20.5", "16384mb"."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(g|gb|gib|m|mb|mib)?", text.strip().lower())
    amount = float(match[1]) / (1024 if (match[2] or "g")[0] == "m" else 1) if match else 0.0
    if not amount:
        raise UserError(
            f"--vram={text} is not an amount of memory; give GB such as 16gb, 24 or 20.5"
        )
    return amount


def _profile(flags: argparse.Namespace) -> tuple[int, int] | None:
    """Returns how many steps to run before a trace, and to trace; None: no trace."""
    start, steps = flags.profile_start, flags.profile_steps
    if flags.profile:
        return 5 if start is None else start, 3 if steps is None else steps
    for flag, value in (("--profile_start", start), ("--profile_steps", steps)):
        if value is not None:
            raise UserError(f"{flag}={value} has no effect without --profile")
    return None


def _take_overrides(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Takes ``--config.field=value`` and ``--config.field value`` out of the arguments."""
    overrides, rest, words = {}, [], iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        if not equals and (value := next(words, None)) is None:
            raise UserError(f"{flag} needs a value: {flag}=VALUE")
        overrides[flag.removeprefix("--config.")] = value
    return overrides, rest
