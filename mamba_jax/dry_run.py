"""``train --dry_run``: what a run would be and do, and every refusal that needs no training to find.

It reads no text, makes no array and writes nothing.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mamba_jax import presets
from mamba_jax.arguments import Arguments
from mamba_jax.config import DataConfig, RunConfig, size_fields, training_fields
from mamba_jax.errors import UserError

_LABEL_WIDTH = 10


def describe(arguments: Arguments) -> str:
    """Returns the resolved plan for people.

    Raises:
      UserError: where the run would end with it before its first step.
    """
    from mamba_jax.data.tokenizer import load_tokenizer, with_vocabulary
    from mamba_jax.estimator import plan

    config = arguments.config
    output = _output(config, arguments.resume)
    data = _data(config.data)
    config = with_vocabulary(config, load_tokenizer(config.data.tokenizer))
    parts = {
        "note": list(arguments.notes),
        "model": _model(config),
        "training": _training(config),
        "data": data,
        "memory": plan(config).text().splitlines(),
        "output": output,
    }
    lines = [f'dry run of "{config.name}": nothing is started']
    for label, texts in parts.items():
        lines += [f"{label if not i else '':<{_LABEL_WIDTH}}{text}" for i, text in enumerate(texts)]
    return "\n".join(lines)


def _name_of(table: Mapping[str, Any], fields_of: Callable[[str], dict], group: Any) -> str:
    """Returns the row of a table that a group of the config agrees with."""
    for name in table:
        ((_, fields),) = fields_of(name).items()
        if all(getattr(group, field) == value for field, value in fields.items()):
            return name
    return "custom"


def _model(config: RunConfig) -> list[str]:
    from mamba_jax.models.cost import parameter_count

    model, count = config.model, parameter_count(config.model)
    structure = f"{model.family}, {model.d_model} wide, {model.n_layers} layers"
    if model.family == "hybrid":
        scales = " ".join(map(str, model.attention_scales)) or "none"
        structure += f", recursion depth {model.recursion_depth}, attention scales {scales}"
    return [
        f"{_name_of(presets.SIZES, size_fields, model)}: {structure}",
        f"{count.total:,} parameters, {count.non_embedding:,} without embeddings "
        f"(vocabulary {model.vocab_size:,}, tokenizer {config.data.tokenizer})",
    ]


def _training(config: RunConfig) -> list[str]:
    training, sequences = config.training, config.vram.effective_batch_size
    tokens_per_step = sequences * config.model.max_seq_len
    return [
        f"{_name_of(presets.TRAINING_PRESETS, training_fields, training)}: "
        f"{training.max_steps:,} steps, learning rate up to {training.learning_rate:g}, warm-up "
        f"{training.resolved_warmup_steps:,}; saves every {training.save_steps:,}, evaluates every "
        f"{training.eval_steps:,}",
        f"{sequences} windows of {config.model.max_seq_len:,} tokens a step, "
        f"{training.max_steps * tokens_per_step:,} tokens in all; seed {config.seed}",
    ]


def _data(data: DataConfig) -> list[str]:
    from mamba_jax.data.hub import is_folder
    from mamba_jax.data.sources import open_source

    lines: list[str] = []
    if data.data_dir or not data.dataset:
        source = open_source(data.data_dir, lines.append)
        lines.append(f"{source.origin}: {len(source.files):,} files")
    if data.dataset:
        where = "a folder here" if is_folder(data.dataset) else "on the Hugging Face Hub, not asked"
        columns = f"columns {data.text_column}" if data.text_column else "its columns with text"
        lines.append(f"dataset {data.dataset}, split {data.dataset_split}, {columns}: {where}")
    return lines


def _output(config: RunConfig, resume: str) -> list[str]:
    from mamba_jax.training import resume as resuming
    from mamba_jax.training import summary

    output_dir = pathlib.Path(config.output_dir)
    lines: list[str] = []
    start = resuming.find_start(config, resume, lines.append)
    _check_could_write(output_dir)
    if start is None:
        return [f"{output_dir}: a new run", *lines]
    if start.ends(config) and (output_dir / summary.NAME).is_file():
        return [f"{output_dir}: complete at step {start.metadata.step}: nothing to do", *lines]
    left = config.training.max_steps - start.metadata.step
    return [f"{output_dir}: {max(left, 0):,} steps to go", *lines]


def _check_could_write(folder: pathlib.Path) -> None:
    """Does what ``check_writable`` does, without making the folder."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(
            f"cannot write into output_dir {folder}: {there} is no folder to write into; "
            "choose another --output_dir"
        )
