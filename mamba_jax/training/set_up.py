"""``set_up``: every check of a run that needs no text, once and in order, and its plan."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Protocol

import jax

from mamba_jax.checkpoints import resume as resuming
from mamba_jax.checkpoints.resume import Start
from mamba_jax.config import RunConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary
from mamba_jax.errors import UserError, need
from mamba_jax.models.language_model import matmul_dtype
from mamba_jax.modules.mamba import resolve_scan
from mamba_jax.parallel import mesh as meshes
from mamba_jax.runs import log_file
from mamba_jax.training import summary
from mamba_jax.training.profile import traced_steps
from mamba_jax.training.trackers import check_trackers


class Plan(Protocol):
    """A memory plan, as ``estimator.plan_run`` makes it; the estimator builds on this folder."""

    @property
    def config(self) -> RunConfig: ...  # with the layout filled in

    @property
    def device(self) -> str: ...

    def text(self) -> str: ...

    def compared(self) -> str: ...


PlanRun = Callable[[RunConfig, Start | None], Plan]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is known of a run before its text is read.

    Attributes:
      config: as given, with the tokenizer's vocabulary; its layout may be open.
      plan: its config has a layout.
      tokenizer: the data's tokenizer.
      start: the checkpoint that the run resumes from; None: it starts anew.
      resume: as given.
      scan: the implementation of the selective scan.
      mesh: the mesh of the devices.
      traced: first and last step of the profile; (1, 0): none.
    """

    config: RunConfig
    plan: Plan
    tokenizer: Tokenizer
    start: Start | None
    resume: str
    scan: str
    mesh: jax.sharding.Mesh
    traced: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Complete:
    """A run that has nothing left to do."""

    start: Start  # its last checkpoint
    summary_file: pathlib.Path


def set_up(
    config: RunConfig,
    resume: str,
    say: Callable[[str], None],
    *,
    plan_run: PlanRun,
    profile: tuple[int, int] | None = None,
) -> Setup | Complete:
    """Refuses what can be refused before anything slow, and plans the run; starts JAX.

    Args:
      config: the run's config.
      resume: as in ``run``, likewise ``plan_run`` and ``profile``.
      say: takes log lines.

    Raises:
      UserError: if the run cannot start.
    """
    start = resuming.find_start(config, resume, say)
    summary_file = pathlib.Path(config.output_dir) / summary.NAME
    if start is not None and start.ends(config) and summary_file.is_file():
        return Complete(start, summary_file)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if start is not None:
        resuming.check_steps_left(start, config)
        resuming.check_same_tokenizer(start, tokenizer.name, tokenizer.identity)
    before = start.metadata.step if start is not None else 0
    traced = traced_steps(*profile, before, config.training.max_steps) if profile else (1, 0)
    _check_folders(config)
    check_trackers(config)
    if config.data.deduplicate == "near":
        need("datasketch", "dedup")
    config = with_vocabulary(config, tokenizer)
    plan = plan_run(config, start)
    scan = resolve_scan(config.model, matmul_dtype(config.model))
    mesh = meshes.make_mesh(config.parallel)
    meshes.check_batch(plan.config.vram.batch_size, mesh)
    return Setup(config, plan, tokenizer, start, resume, scan, mesh, traced)


def _check_folders(config: RunConfig) -> None:
    """Refuses folders that cannot be written, without making them."""
    flags = {
        "output_dir": "--output_dir",
        "log_dir": "--config.log_dir",
        "tensorboard_dir": "--config.tensorboard_dir",
    }
    if log_file.redirected():
        del flags["log_dir"]  # the log is open
    for field, flag in flags.items():
        folder = pathlib.Path(getattr(config, field))
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise UserError(
                f"cannot write into {field} {folder}: {there} is not a writable folder; "
                f"choose another {flag}"
            )
