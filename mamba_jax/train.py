"""``mamba-jax train``: trains a model. ``training/run.py`` shows a run from start to end."""

import pathlib
import sys
import types

from ml_collections import ConfigDict

from mamba_jax.cli import train_arguments
from mamba_jax.config import RunConfig, freeze
from mamba_jax.errors import command


@command
def main(argv: list[str]) -> int:
    """The command: reads ``argv``, returns the exit status."""
    arguments = train_arguments.read(argv)
    if arguments.dry_run:
        from mamba_jax.cli.dry_run import describe

        print(describe(arguments))
        return 0
    if arguments.clear_cache or arguments.list_files:
        from mamba_jax.data.listing import clear_cache, list_files

        if arguments.clear_cache:
            clear_cache(arguments.config.data, print)
        if arguments.list_files:
            list_files(arguments.config.data, print)
            return 0
    from mamba_jax.estimator import plan_run
    from mamba_jax.runs.exit_status import PREEMPTED
    from mamba_jax.training.interrupts import StoppedEarly
    from mamba_jax.training.run import run

    try:
        return run(
            arguments.config,
            arguments.resume,
            plan_run=plan_run,
            profile=arguments.profile,
            notes=arguments.notes,
            force=arguments.force,
        )
    except StoppedEarly as signal:
        print(f"stopped by {signal} before the first step: nothing to save", file=sys.stderr)
        return PREEMPTED


def train(config: ConfigDict | RunConfig, *, resume: str = "", force: bool = False) -> pathlib.Path:
    """Trains a model from Python, as the command does; ``mamba_jax.train`` is this function.

    Args:
      config: from ``default_config`` or ``preset_config``, changed as you like.
      resume: "" to start anew, "auto" for the newest checkpoint in ``config.output_dir`` if there
        is one, or a folder.
      force: take ``config.output_dir`` even from a run that may be active.

    Returns:
      The folder of the last checkpoint.

    Raises:
      UserError: for a mistake in the config or the data: one line with the value and the remedy.
      KeyboardInterrupt: after Ctrl-C or SIGTERM; the run is saved if training has started.
    """
    from mamba_jax.checkpoints.folder import FINAL
    from mamba_jax.estimator import plan_run
    from mamba_jax.training.interrupts import StoppedEarly
    from mamba_jax.training.run import run

    run_config = config if isinstance(config, RunConfig) else freeze(config)
    try:
        status = run(run_config, resume, plan_run=plan_run, force=force)
    except StoppedEarly as signal:
        raise KeyboardInterrupt(f"stopped by {signal} before the first step") from None
    if status:
        raise KeyboardInterrupt(f"stopped and saved in {run_config.output_dir}")
    return pathlib.Path(run_config.output_dir) / FINAL


class _CallableModule(types.ModuleType):
    """Lets ``mamba_jax.train`` be both this module, which ``python -m`` runs, and ``train``."""

    def __call__(
        self, config: ConfigDict | RunConfig, *, resume: str = "", force: bool = False
    ) -> pathlib.Path:
        return train(config, resume=resume, force=force)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
