"""Flags that commands share: which model to load, and how to run it."""

import argparse
from typing import Any


def add_checkpoint(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Adds ``--checkpoint``; see ``generation.load.find`` for what it accepts."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="a step_N or final folder, or a run's output_dir: its newest intact checkpoint",
    )


def add_inference(parser: argparse._ActionsContainer) -> None:
    """Adds the fields of a trained model that inference may choose; see ``chosen``."""
    parser.add_argument(
        "--scan",
        metavar="NAME",
        help="implementation of the selective scan: auto, sequential, chunked, … "
        "(default: the checkpoint's)",
    )
    parser.add_argument(
        "--gate_skip_threshold",
        type=float,
        metavar="GATE",
        help="a token skips the recursion steps whose gates do not exceed this: faster, at some "
        "cost in quality; 0: none (default: the checkpoint's)",
    )
    parser.add_argument(
        "--recursion_depth",
        type=int,
        metavar="STEPS",
        help="recursion steps, fewer or more than in training; needs a model trained with "
        "model.shared_gate (default: the checkpoint's)",
    )


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the flags of ``add_inference``, as ``config.for_inference`` takes them."""
    names = ("scan", "gate_skip_threshold", "recursion_depth")
    return {name: getattr(arguments, name) for name in names}


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
