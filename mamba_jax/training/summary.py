"""The summary that a run prints at its end."""

import dataclasses
import math
import os
import pathlib
import shlex
import sys

from mamba_jax.costs.parameters import ParameterCount
from mamba_jax.training.evaluation import Evaluation

NAME = "summary.txt"
_RULE = "─" * 72


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a finished run."""

    name: str
    checkpoint: pathlib.Path
    picture: pathlib.Path  # of the loss curve
    tensorboard_dir: str
    parameters: ParameterCount
    steps: int
    skipped_steps: int
    tokens: int
    speed: str  # in the last interval of steps
    train_loss: float  # mean of the last steps
    evaluation: Evaluation
    unigram_nll: float  # nats per token
    prompt: str
    sample: str  # "": none was requested

    def text(self) -> str:
        """Returns the summary: one line per fact, and the commands to run next."""
        evaluation, skipped = self.evaluation, self.skipped_steps
        checkpoint = shlex.quote(str(self.checkpoint))
        facts = [
            (
                "parameters",
                f"{self.parameters.total:,} ({self.parameters.non_embedding:,} without embeddings)",
            ),
            (
                "steps",
                f"{self.steps:,}, {self.tokens:,} tokens"
                + (f", {skipped} skipped as spikes" if skipped else ""),
            ),
            ("speed", self.speed),
            ("train loss", f"{self.train_loss:.4f} nats per token"),
            (
                "eval loss",
                f"{evaluation.loss:.4f} nats per token: perplexity {evaluation.perplexity:.2f}, "
                f"{evaluation.bits_per_byte:.3f} bits per byte",
            ),
            (
                "unigram loss",
                f"{self.unigram_nll:.4f} nats per token: perplexity "
                f"{math.exp(self.unigram_nll):.2f}, of the corpus's token frequencies alone",
            ),
            ("loss curve", str(self.picture)),
            ("checkpoint", str(self.checkpoint)),
        ]
        lines = [_RULE, f"{self.name}: done", *(f"{name:<14}{value}" for name, value in facts)]
        if self.sample:
            lines += [_RULE, f"sample after {self.prompt!r}:", "", self.prompt + self.sample]
        lines += [
            _RULE,
            "next:",
            f"  {program('python')} -m mamba_jax.generate --checkpoint {checkpoint} "
            '--prompt "import os"',
            f"  {program('tensorboard')} --logdir {shlex.quote(self.tensorboard_dir)}",
            f"  {program('python')} -m mamba_jax.train --resume {checkpoint} "
            f"--config.training.max_steps={2 * self.steps}",
        ]
        return "\n".join(lines) + "\n"


def program(name: str) -> str:
    """Returns how to call a program of this environment, whether that is activated or not."""
    path = os.path.relpath(pathlib.Path(sys.executable).with_name(name))
    return name if path.startswith(os.pardir) else path
