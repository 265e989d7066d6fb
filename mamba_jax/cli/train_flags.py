"""The flags of ``train`` and their help; ``train_arguments`` says what they mean together."""

import argparse
import textwrap
from typing import Any, NoReturn

from mamba_jax.config import RunConfig, presets
from mamba_jax.config.fields import describe, fields
from mamba_jax.errors import UserError, did_you_mean

DEFAULT_SIZE, DEFAULT_PRESET = "medium", "default"
DEFAULTS = RunConfig()
_SCHEMA = {field.name: field for field in fields(RunConfig)}
FIELDS = {  # flag → the field that it sets
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


class Parser(argparse.ArgumentParser):
    """Raises mistakes as ``UserError``, and suggests the flag that was likely meant."""

    def parse_args(self, args: list[str]) -> argparse.Namespace:  # type: ignore[override]
        arguments, unknown = self.parse_known_args(args)
        for word in unknown:
            flag = word.partition("=")[0]
            if not flag.startswith("-"):
                self.error(f'unexpected argument "{word}"')
            fields = [f"--config.{name}" for name in _SCHEMA]
            same_leaf = [field for field in fields if field.endswith("." + flag.lstrip("-"))]
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = did_you_mean(flag, same_leaf) or did_you_mean(flag, [*flags, *fields])
            self.error(f"unknown flag {flag}{near}")
        return arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def make_parser() -> Parser:
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
        f"(default: {DEFAULTS.vram.memory_gb:g}gb)",
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
    field = _SCHEMA[FIELDS[flag]]
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
    for field in _SCHEMA.values():
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
