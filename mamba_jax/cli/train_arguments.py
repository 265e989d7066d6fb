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
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from ml_collections import ConfigDict

from mamba_jax.config import (
    RunConfig,
    apply_overrides,
    default_config,
    freeze,
    load_config,
    load_json,
    merge,
    presets,
    size_fields,
    to_dict,
    training_fields,
)
from mamba_jax.config.fields import describe, fields
from mamba_jax.errors import UserError, did_you_mean

DEFAULT_SIZE, DEFAULT_PRESET = "medium", "default"
_AUTO = "auto"
_DEFAULTS = RunConfig()
SCHEMA = {field.name: field for field in fields(RunConfig)}
_FIELDS = {  # flag → the field that it sets
    "--plan": "model.plan",
    "--vram_auto": "vram.auto",
    "--vram": "vram.memory_gb",
    "--vram_safety_margin": "vram.safety_margin_mb",
    "--data_dir": "data.data_dir",
    "--dataset": "data.dataset",
    "--dataset_config": "data.dataset_config",
    "--dataset_split": "data.dataset_split",
    "--dataset_streaming": "data.dataset_streaming",
    "--text_column": "data.text_column",
    "--tokenizer": "data.tokenizer",
    "--tasks": "data.tasks",
    "--output_dir": "output_dir",
    "--seed": "seed",
}
_FLAG_OF = {field: flag for flag, field in _FIELDS.items()}


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
    flags = _parser().parse_args(rest)
    given = _given_fields(flags)
    is_json = flags.config.endswith(".json")
    file = load_json(flags.config) if is_json else {}
    if flags.config and not is_json:
        config, origin = load_config(flags.config), flags.config
    else:
        wanted = overrides.get("output_dir") or given.get("output_dir") or file.get("output_dir")
        config, origin = _starting_config(flags.resume, wanted or _DEFAULTS.output_dir)
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
    for flag, field in _FIELDS.items():
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


class Parser(argparse.ArgumentParser):
    """Raises mistakes as ``UserError``, and suggests the flag that was likely meant."""

    def parse_args(self, args: list[str]) -> argparse.Namespace:  # type: ignore[override]
        arguments, unknown = self.parse_known_args(args)
        for word in unknown:
            flag = word.partition("=")[0]
            if not flag.startswith("-"):
                self.error(f'unexpected argument "{word}"')
            fields = [f"--config.{name}" for name in SCHEMA]
            same_leaf = [field for field in fields if field.endswith("." + flag.lstrip("-"))]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = did_you_mean(flag, same_leaf) or did_you_mean(flag, [*flags, *fields])
            self.error(f"unknown flag {flag}{near}")
        return arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def _parser() -> Parser:
    parser = Parser(
        prog="mamba-jax train",
        usage="%(prog)s [flags]",
        description="Trains a Mamba or Hybrid Recursive Mamba language model.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model = parser.add_argument_group("model and schedule")
    model.add_argument(
        "--model_size", metavar="NAME", help=f"one of the sizes below (default: {DEFAULT_SIZE})"
    )
    model.add_argument(
        "--training_preset",
        metavar="NAME",
        help=f"one of the presets below (default: {DEFAULT_PRESET})",
    )
    model.add_argument(
        "--config",
        metavar="FILE",
        default="",
        help="a .py file with a complete config, or a .json file with some fields",
    )
    model.add_argument(
        "--config.GROUP.FIELD",
        metavar="VALUE",
        dest="_",
        help="any field, e.g. --config.training.max_steps=200; --help_config lists them",
    )
    model.add_argument(
        "--help_config",
        action=_HelpConfig,
        nargs=0,
        help="print every field of the config and exit",
    )
    _add_field_flag(model, "--plan", "PLAN")
    _add_field_flag(model, "--seed", "N")
    add_data_flags(parser)
    memory = parser.add_argument_group("memory")
    _add_field_flag(memory, "--vram_auto")
    memory.add_argument(
        "--vram",
        metavar="GB",
        help="memory of the device, e.g. 16gb, 24, 20.5, 16384mb "
        f"(default: {_DEFAULTS.vram.memory_gb:g}gb)",
    )
    _add_field_flag(memory, "--vram_safety_margin", "MB")
    run = parser.add_argument_group("the run")
    _add_field_flag(run, "--output_dir", "PATH")
    run.add_argument(
        "--resume",
        metavar="DIR|auto",
        default="",
        help="resume from a checkpoint, from the newest in a run's folder, or (auto) from the "
        "newest in output_dir if there is one; other flags override the checkpoint's settings",
    )
    run.add_argument(
        "--force",
        action="store_true",
        help="take over an output_dir that another run has locked; if that run is still active, "
        "the two can damage each other's checkpoints and metrics until it stops at its next save",
    )
    run.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, show what the run would do, and exit",
    )
    run.add_argument(
        "--profile",
        action="store_true",
        help="write a trace of a few steps into the run's TensorBoard folder",
    )
    run.add_argument("--profile_steps", metavar="N", type=int, help="steps to trace (default: 3)")
    run.add_argument(
        "--profile_start",
        metavar="N",
        type=int,
        help="steps to run before the trace, including compilation (default: 5)",
    )
    return parser


def _add_field_flag(
    group: argparse._ArgumentGroup | argparse.ArgumentParser, flag: str, metavar: str | None = None
) -> None:
    """Adds a flag that sets a field, with the field's help and default."""
    field = SCHEMA[_FIELDS[flag]]
    first, space, rest = field.help.rstrip(".").partition(" ")
    text = (first.lower() if first.istitle() else first) + space + rest  # as argparse writes
    if field.default not in ("", False):
        text += f" (default: {field.default})"
    text = text.replace("%", "%%")
    if field.type is bool:
        group.add_argument(flag, action="store_const", const="true", help=text)
    else:
        group.add_argument(flag, metavar=metavar, help=text)


class _HelpConfig(argparse.Action):
    """Prints every field of the config, as ``--help`` does the flags."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(fields_text())
        parser.exit()


def fields_text() -> str:
    """Returns every field of the config with its default and help, for a terminal."""
    lines, indent = [], " " * 8
    for field in SCHEMA.values():
        kind = " | ".join(field.choices) or describe(field.type)
        kind += f"; {field.constraint.words}" if field.constraint else ""
        lines += [f"--config.{field.name}={field.default!r}", f"{indent}({kind})"]
        lines += textwrap.wrap(field.help, 90, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags about text to a command."""
    data = parser.add_argument_group("data")
    _add_field_flag(data, "--data_dir", "PATH")
    _add_field_flag(data, "--dataset", "ID")
    _add_field_flag(data, "--dataset_config", "NAME")
    _add_field_flag(data, "--dataset_split", "SPLIT")
    _add_field_flag(data, "--dataset_streaming")
    _add_field_flag(data, "--text_column", "A,B")
    _add_field_flag(data, "--tasks", "NAME:N,…")
    _add_field_flag(data, "--tokenizer", "NAME")
    data.add_argument(
        "--list_files",
        action="store_true",
        help="list the files that would be read, and those skipped with the reason, and exit",
    )
    data.add_argument(
        "--clear_cache",
        action="store_true",
        help="first delete the cached tokens of every corpus",
    )


def _epilog() -> str:
    sizes = "\n".join(
        f"  {size.name:<22} {size.parameters / 1e6:>6.1f}M  {size.d_model:>5} × {size.n_layers:<2} "
        f" {f'depth {size.depth}' if size.depth else '':<8} {size.nominal:>5}  {size.use_case}"
        for size in presets.SIZES.values()
    )
    schedules = "\n".join(
        f"  {name:<14} {row.max_steps:>9,} {row.learning_rate:>15.0e} {row.warmup_steps:>9,} "
        f"{row.save_steps:>26,}"
        for name, row in presets.TRAINING_PRESETS.items()
    )
    return f"""\
sizes: parameters (with GPT-2's vocabulary), width × layers, recursion, common label
{sizes}

training presets:     steps   learning rate   warm-up    save and evaluate every
{schedules}

precedence, lowest to highest:
  built-in < --model_size < --training_preset < --config FILE < other flags < --config.field=
  A .py file, or the checkpoint to resume, replaces the built-in config as a whole;
  --model_size and --training_preset change it only if given, and the log reports the changes.

examples:
  mamba-jax train --vram_auto --model_size hybrid-small-standard --data_dir texts
  mamba-jax train --dataset openai/gsm8k --text_column question,answer
  mamba-jax train --config=configs/quickstart.py
  mamba-jax train --config=custom.json --training_preset fast --dry_run
  mamba-jax train --model_size=small --resume=auto    (resume where it stopped)
  mamba-jax train --resume=checkpoints/step_5000 --training_preset=careful \\
      --output_dir=checkpoints/longer                           (resume with another schedule)
  mamba-jax train --config=configs/small.py --profile (traces steps 6 to 8)

Ctrl-C or SIGTERM: the run finishes its step, saves and stops; a second Ctrl-C stops at once.
Exit status: 0 done, 75 stopped by a signal and saved, 2 a mistake (one line).
"""
