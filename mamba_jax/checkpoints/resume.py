"""Where a run starts: which checkpoint it resumes, and what it refuses to resume.

All of this happens before anything slow: before the data are read and JAX starts.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable

from mamba_jax.checkpoints.folder import (
    FINAL,
    Metadata,
    find_latest,
    list_checkpoints,
    read_metadata,
    verify,
)
from mamba_jax.config import RunConfig, plan, to_dict
from mamba_jax.config.schema import flatten
from mamba_jax.errors import UserError

AUTO = "auto"
# Fields that change how parameters are used or were initialised, not what they mean.
_FREE_MODEL_FIELDS = (
    *("dtype", "remat", "scan", "dropout"),
    *("gate_bias", "fusion_gain", "embedding_std", "gate_skip_threshold"),
)
# Groups and fields of the config that do not affect training.
_SILENT_FIELDS = ("name", "output_dir", "log_dir", "tensorboard_dir", "sample_prompt")


@dataclasses.dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes."""

    path: pathlib.Path
    metadata: Metadata

    def is_in(self, output_dir: str) -> bool:
        """Returns whether the checkpoint is one of the run in ``output_dir``."""
        return self.path.resolve().parent == pathlib.Path(output_dir).resolve()

    def ends(self, config: RunConfig) -> bool:
        """Returns whether this is the last checkpoint of the run that ``config`` describes."""
        complete = self.metadata.step >= config.training.max_steps
        return self.is_in(config.output_dir) and complete and self.path.name == FINAL


def find_start(config: RunConfig, resume: str, log: Callable[[str], None]) -> Start | None:
    """Chooses the checkpoint to continue from.

    Args:
      config: that of the run that is about to start.
      resume: "" to start from step 0, "auto" for the newest intact checkpoint in
        ``config.output_dir``, if any, else a checkpoint folder or the folder of a run.
      log: receives what was found and skipped.

    Returns:
      None where the run starts from the beginning.

    Raises:
      UserError: if there is nothing to resume, it belongs to another model, or the output folder
        contains another run's checkpoints.
    """
    output_dir = pathlib.Path(config.output_dir)
    occupied = list_checkpoints(output_dir)
    if not resume:
        if occupied:
            raise UserError(
                f"output_dir {output_dir} already holds checkpoints of a run "
                f"({occupied[0][1].name}); continue it with --resume auto, or choose another "
                "--output_dir"
            )
        return None
    if resume == AUTO:
        path = find_latest(output_dir, log)
        if path is None and occupied:
            raise UserError(
                f"output_dir {output_dir} holds no intact checkpoint; remove the damaged ones or "
                "choose another --output_dir to start from step 0"
            )
        if path is None:
            log(f"no checkpoint in {output_dir} yet: starting from the beginning")
            return None
    else:
        path = named_start(pathlib.Path(resume), log)
        if occupied and path.resolve().parent != output_dir.resolve():
            raise UserError(
                f"output_dir {output_dir} already holds checkpoints of a run "
                f"({occupied[0][1].name}), not of the one in {path.parent}; choose another "
                "--output_dir"
            )
    metadata = read_metadata(path)
    _check_same_model(path, metadata.config, config)
    log(f"continuing from {path}: step {metadata.step}")
    for change in _changes(metadata.config, config):
        log(f"changed since that checkpoint: {change}")
    return Start(path, metadata)


def named_start(path: pathlib.Path, log: Callable[[str], None]) -> pathlib.Path:
    """Returns the checkpoint at ``path``, if damaged the one before it, or a run's newest."""
    if path.is_symlink() or path.name in (
        "",
        "..",
    ):  # a link's siblings are not those of the checkpoint
        path = path.resolve()
    siblings = {folder: step for step, folder in list_checkpoints(path.parent)}
    if path not in siblings:
        latest = find_latest(path, log)
        if latest is None:
            what = "holds no intact checkpoint" if path.is_dir() else "does not exist"
            raise UserError(f"--resume={path}: the folder {what}; give a step_N or final folder")
        return latest
    try:
        verify(path)
        return path
    except UserError as damage:
        earlier = find_latest(path.parent, log, before=siblings[path])
        if earlier is None:
            raise UserError(f"{damage}, and there is no intact one before it") from damage
        log(f"skipped: {damage}")
        return earlier


def _check_same_model(path: pathlib.Path, saved: RunConfig, wanted: RunConfig) -> None:
    value = lambda model, name: plan.text(model.kinds) if name == "plan" else getattr(model, name)
    differences = [
        f"model.{name} {value(saved.model, name)} there, {value(wanted.model, name)} here"
        for name in (field.name for field in dataclasses.fields(saved.model))
        if name not in _FREE_MODEL_FIELDS
        and getattr(saved.model, name) != (new := getattr(wanted.model, name))
        and not (name == "vocab_size" and new == 0)  # not known yet
    ]
    if differences:
        raise UserError(
            f"checkpoint {path} does not match this model: {'; '.join(differences)}; resume with "
            "the config it was made with, or choose another --output_dir"
        )


def check_steps_left(start: Start, config: RunConfig) -> None:
    """Refuses to resume if no step is left to train.

    The run's own last step is accepted: a kill may have prevented the evaluation or save after it.

    Raises:
      UserError: if no step is left.
    """
    step, max_steps = start.metadata.step, config.training.max_steps
    if step > max_steps or (step == max_steps and not start.is_in(config.output_dir)):
        raise UserError(
            f"nothing to train: checkpoint {start.path} has {step} steps and "
            f"training.max_steps={max_steps}; give a larger --config.training.max_steps"
        )


def check_same_tokenizer(start: Start, name: str, identity: str) -> None:
    """Refuses to resume with another tokenizer, whose ids mean other text.

    Args:
      start: the checkpoint.
      name: ``data.tokenizer`` of the run; two names may mean the same tokenizer.
      identity: as in ``data.tokenizer.Tokenizer``.

    Raises:
      UserError: if it differs from the checkpoint's.
    """
    saved = start.metadata
    if saved.tokenizer_identity != identity:
        same_name = saved.config.data.tokenizer == name
        how = "has changed since" if same_name else f"there, {name} here"
        raise UserError(
            f"checkpoint {start.path} does not match this model: data.tokenizer "
            f"{saved.config.data.tokenizer} {how}; resume with the tokenizer it was made with, or "
            "choose another --output_dir"
        )


def laid_out_as_before(start: Start, config: RunConfig, device: str) -> RunConfig:
    """Returns the run with the checkpoint's layout, if nothing that affects the layout has changed.

    Another microbatch rounds gradients differently: only with the same one does a resumed run equal
    an uninterrupted one bit for bit, however much memory is free now.

    Args:
      start: the checkpoint.
      config: the run's config; returned unchanged on another device, or where its settings of
        layout and memory differ from the checkpoint's.
      device: what the run trains on.
    """
    saved = start.metadata
    settings = lambda run: (run.vram, run.model.remat, run.training.loss_chunk_tokens)
    if saved.device != device or settings(saved.config) != settings(config):
        return config
    return saved.lay_out(config)


def check_same_data(start: Start, fingerprint: str) -> None:
    """Refuses to resume on other data: the position in them would be meaningless.

    Raises:
      UserError: if the corpus differs from the checkpoint's.
    """
    saved = start.metadata.data_fingerprint
    if saved and saved != fingerprint:  # an imported model has none
        raise UserError(
            f"checkpoint {start.path} was trained on other data (fingerprint {saved[:12]} there, "
            f"{fingerprint[:12]} here); give the same --data_dir, --seed and config.data, or "
            "choose another --output_dir and start from step 0"
        )


def set_newer_aside(output_dir: pathlib.Path, step: int, log: Callable[[str], None]) -> None:
    """Moves checkpoints later than the resumed one into ``superseded_<time>/``.

    They are damaged, or the end of a run that is being rewound: left in place they would count as
    this run's newest after the next interruption. Nothing is deleted.
    """
    newer = [path for later, path in list_checkpoints(output_dir) if later > step]
    if newer:
        aside = output_dir / time.strftime("superseded_%Y%m%d-%H%M%S")
        aside.mkdir(exist_ok=True)
        for path in newer:
            path.rename(aside / path.name)
        log(f"moved later checkpoints ({', '.join(path.name for path in newer)}) to {aside}")


def _changes(saved: RunConfig, wanted: RunConfig) -> list[str]:
    old, new = flatten(to_dict(saved)), flatten(to_dict(wanted))
    return [
        f"{name} {old[name]} → {new[name]}"
        for name in old
        if old[name] != new[name] and name not in _SILENT_FIELDS and name != "model.vocab_size"
    ]
