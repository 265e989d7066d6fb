"""The block that closes a run."""

import dataclasses
import math
import pathlib

from mamba_jax.models.cost import ParameterCount
from mamba_jax.training.evaluation import Evaluation

NAME = "summary.txt"
_RULE = "─" * 72


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished run has to say."""

    name: str
    checkpoint: pathlib.Path
    picture: pathlib.Path  # of the loss curve
    tensorboard_dir: str
    parameters: ParameterCount
    steps: int
    skipped_steps: int
    tokens: int
    train_loss: float  # mean of the last steps
    evaluation: Evaluation
    unigram_nll: float  # nats per token
    prompt: str
    sample: str  # "": none was asked for

    def text(self) -> str:
        """Returns the block, a line for each fact and the commands to try next."""
        evaluation, skipped = self.evaluation, self.skipped_steps
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
            f'  python -m mamba_jax.generate --checkpoint {self.checkpoint} --prompt "…"',
            f"  tensorboard --logdir {self.tensorboard_dir}",
            f"  python -m mamba_jax.train --resume {self.checkpoint} "
            f"--config.training.max_steps={2 * self.steps}",
        ]
        return "\n".join(lines) + "\n"
