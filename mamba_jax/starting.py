"""The start of a run as far as it reads no text, and every refusal that this can find.

``train`` and its ``--dry_run`` both call it, so a dry run refuses what the run would.
"""

import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING

from mamba_jax.checkpoints import resume
from mamba_jax.checkpoints.resume import Start
from mamba_jax.config import RunConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary
from mamba_jax.errors import UserError, need
from mamba_jax.runs import log_file
from mamba_jax.training import summary
from mamba_jax.training.trackers import check_trackers

if TYPE_CHECKING:
    import jax

    from mamba_jax.estimator import Plan


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is known before the text is read."""

    asked: RunConfig  # as given, with the tokenizer's vocabulary
    plan: "Plan"  # its config has a layout and the vocabulary
    tokenizer: Tokenizer
    scan: str  # the implementation of the selective scan
    mesh: "jax.sharding.Mesh"
    traced: tuple[int, int]  # first and last step of the profile; (1, 0): none


def is_complete(start: Start | None, config: RunConfig) -> bool:
    """Says whether the run that ``config`` asks for has ended and told what came of it."""
    told = (pathlib.Path(config.output_dir) / summary.NAME).is_file()
    return start is not None and start.ends(config) and told


def prepare(
    config: RunConfig, start: Start | None, profile: tuple[int, int] | None = None
) -> Prepared:
    """Checks and plans a run; starts jax.

    Args:
      config: of the run.
      start: the checkpoint that it continues; None: it starts anew.
      profile: as in ``train.run``.

    Raises:
      UserError: where the run cannot start.
    """
    from mamba_jax.estimator import plan_run
    from mamba_jax.estimator.budget import set_client_fraction
    from mamba_jax.models.language_model import matmul_dtype
    from mamba_jax.modules.mamba import resolve_scan
    from mamba_jax.parallel.mesh import check_batch, make_mesh
    from mamba_jax.training.profile import traced_steps

    tokenizer = load_tokenizer(config.data.tokenizer)
    if start:
        resume.check_steps_left(start, config)
        resume.check_same_tokenizer(start, tokenizer.name, tokenizer.identity)
    begun = start.metadata.step if start else 0
    traced = traced_steps(*profile, begun, config.training.max_steps) if profile else (1, 0)
    _check_folders(config)
    check_trackers(config)
    if config.data.deduplicate == "near":
        need("datasketch", "dedup")
    asked = with_vocabulary(config, tokenizer)
    set_client_fraction(config.vram)  # before jax starts
    plan = plan_run(asked, start)
    scan = resolve_scan(config.model, matmul_dtype(config.model))
    mesh = make_mesh(config.parallel)
    check_batch(plan.config.vram.batch_size, mesh)
    return Prepared(asked, plan, tokenizer, scan, mesh, traced)


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
                f"cannot write into {field} {folder}: {there} is no folder to write into; "
                f"choose another {flag}"
            )
