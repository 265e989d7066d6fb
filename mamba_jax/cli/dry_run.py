"""``train --dry_run``: the plan of a run, and every error that ``training.set_up`` raises.

It reads no text, makes no array and writes nothing; it does start jax, to see the devices.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mamba_jax.cli.train_arguments import Arguments
from mamba_jax.config import DataConfig, RunConfig, presets, size_fields, training_fields

if TYPE_CHECKING:
    from mamba_jax.checkpoints.resume import Start

_LABEL_WIDTH = 10


def describe(arguments: Arguments) -> str:
    """Returns the resolved plan for people.

    Raises:
      UserError: where the run would end with it before it reads its text.
    """
    from mamba_jax.estimator import plan_run
    from mamba_jax.runs import lock
    from mamba_jax.training.set_up import Complete, set_up

    config, said = arguments.config, list(arguments.notes)
    # Errors are found in the same order as by the run itself.
    lock.check_free(pathlib.Path(config.output_dir), arguments.force, said.append)
    # Takes no memory from a run that is using the GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    setup = set_up(
        config, arguments.resume, said.append, plan_run=plan_run, profile=arguments.profile
    )
    parts = {"said": said}
    if isinstance(setup, Complete):
        step = setup.start.metadata.step
        parts["output"] = [f"{config.output_dir}: nothing to do, complete at step {step}"]
    else:
        parts |= {
            "model": [*_model(setup.config), f"selective scan: {setup.scan}"],
            "training": _training(config),
            "data": [line for source in config.data.sources for line in _data(source)],
            "memory": setup.plan.text().splitlines(),
            "output": [_output(config, setup.start)],
        }
    lines = [f'dry run of "{config.name}": nothing is started']
    for label, texts in parts.items():
        lines += [f"{label if not i else '':<{_LABEL_WIDTH}}{text}" for i, text in enumerate(texts)]
    return "\n".join(lines)


def _name_of(table: Mapping[str, Any], fields_of: Callable[[str], dict], group: Any) -> str:
    """Returns the name of the table row that a group of the config matches."""
    for name in table:
        ((_, fields),) = fields_of(name).items()
        if all(getattr(group, field) == value for field, value in fields.items()):
            return name
    return "custom"


def _model(config: RunConfig) -> list[str]:
    from mamba_jax.costs.parameters import parameter_count

    model, count = config.model, parameter_count(config.model)
    structure = f"{model.family}, {model.d_model} wide, {model.n_layers} layers"
    if model.family == "hybrid":
        depth = model.recursion_depth if model.gated_layers else "none"
        scales = " ".join(map(str, model.attention_scales)) if model.attends else "none"
        structure += f", recursion depth {depth}, attention scales {scales}"
        structure += f", plan {model.plan}" if model.plan else ""
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
    from mamba_jax.data.sources.files import open_source
    from mamba_jax.data.sources.hub_access import is_folder
    from mamba_jax.data.sources.task_rows import open_tasks

    lines: list[str] = []
    if data.data_dir or not (data.dataset or data.tasks):
        source = open_source(data.data_dir, lines.append)
        lines.append(f"{source.origin}: {len(source.files):,} files")
    if data.dataset:
        where = (
            "a folder here" if is_folder(data.dataset) else "on the Hugging Face Hub, not checked"
        )
        columns = f"columns {data.text_column}" if data.text_column else "its columns with text"
        lines.append(f"dataset {data.dataset}, split {data.dataset_split}, {columns}: {where}")
    if data.tasks:
        rows = open_tasks(data.tasks, data.task_examples)
        lines.append(f"{rows.origin}: {rows.examples:,} problems of each")
    return lines


def _output(config: RunConfig, start: "Start | None") -> str:
    folder = pathlib.Path(config.output_dir)
    if start is None:
        return f"{folder}: a new run"
    return f"{folder}: {max(config.training.max_steps - start.metadata.step, 0):,} steps to go"
