"""Flags that commands share: which model to load."""

import argparse


def add_checkpoint(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Adds ``--checkpoint``; see ``generation.load.find`` for what it accepts."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )


def add_models(parser: argparse.ArgumentParser, ensemble: str) -> None:
    """Adds ``--checkpoint`` and ``--ensemble``, one of which must be given.

    Args:
      parser: to extend.
      ensemble: what the command does with several models, for the help.
    """
    models = parser.add_mutually_exclusive_group(required=True)
    add_checkpoint(models, required=False)
    models.add_argument(
        "--ensemble",
        nargs="+",
        metavar="DIR",
        help=f"several checkpoints with the same tokenizer: {ensemble}",
    )
