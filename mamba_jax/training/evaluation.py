"""Evaluation on the held-out windows."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

# The measures of each layer, and how to combine those of several batches.
OVER_BATCHES: Mapping[str, Callable[..., Any]] = {
    "dt_mean": np.mean,
    "dt_max": np.max,
    "A_min": np.min,
    "A_max": np.max,
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over the held-out windows and the measures that follow from them."""

    nll: float  # nats
    targets: float  # target tokens
    bytes: float  # UTF-8 bytes of their text
    layers: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)  # by OVER_BATCHES

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.targets

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^709 is the largest float

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike loss and perplexity; NaN if no target has text, as
        with unknown tokens."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else math.nan

    def measures(self) -> dict[str, float]:
        """Returns the measures by the names they are recorded under."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_bits_per_byte": self.bits_per_byte,
        }


def evaluate(
    eval_step: Callable[..., dict[str, Any]],
    params: Any,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
) -> Evaluation:
    """Sums ``eval_step`` over batches.

    Args:
      eval_step: as ``step.make_eval_step`` makes it.
      params: the model's parameters.
      batches: (windows (b, t + 1) int32, weights (b,) float32); the same each time, so that
        evaluations can be compared.
    """
    parts = [eval_step(params, windows, weights) for windows, weights in batches]
    # On the host in double precision: over millions of tokens float32 sums lose digits.
    nll, targets, bytes_ = (
        math.fsum(float(part[name]) for part in parts) for name in ("nll", "targets", "bytes")
    )
    layers = {
        name: reduce(np.stack([part["layers"][name] for part in parts]), axis=0).tolist()
        for name, reduce in OVER_BATCHES.items()
    }
    return Evaluation(nll, targets, bytes_, layers)
