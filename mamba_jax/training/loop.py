"""Pieces of the training loop: batches one ahead of the step, metrics one behind it."""

import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from mamba_jax.errors import UserError
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.step import culprits


def prefetch(batches: Iterable[np.ndarray], sharding: jax.sharding.Sharding) -> Iterator[jax.Array]:
    """Yields each batch on the devices while the next one is being transferred."""
    arrays = (jax.device_put(batch, sharding) for batch in batches)
    upcoming = next(arrays)
    for following in arrays:
        yield upcoming
        upcoming = following
    yield upcoming


class LateMetrics:
    """Reads the metrics of a step after the next one has been dispatched.

    Reading them at once would leave the device idle until the host has dispatched the next step.
    """

    def __init__(
        self,
        monitor: Monitor,
        max_gradient_norm: float,
        last_good: Callable[[], pathlib.Path | None],
    ) -> None:
        """
        Args:
          monitor: records the steps.
          max_gradient_norm: above it the run has diverged.
          last_good: finds the checkpoint to go back to, for the message of a run that diverged.
        """
        self._monitor = monitor
        self._max_gradient_norm = max_gradient_norm
        self._last_good = last_good
        self._pending: tuple[int, dict[str, Any]] | None = None

    def push(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of a step just dispatched and reads those of the step before.

        Raises:
          UserError: if that step was not finite or its gradient exploded.
        """
        self.drain()
        self._pending = step, metrics

    def drain(self) -> None:
        """Reads the pending metrics; waits for the device.

        Called before a save too, so that every saved state has been checked.

        Raises:
          UserError: as ``push``.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        step, metrics = pending
        names = ("loss", "gradient_norm", "learning_rate", "target_tokens", "skipped", "finite")
        values = jax.device_get({name: metrics[name] for name in names})
        values = {name: value.item() for name, value in values.items()}
        norm = values["gradient_norm"]
        finite = values["finite"] and math.isfinite(values["loss"]) and math.isfinite(norm)
        if not finite or norm > self._max_gradient_norm:
            what = (
                f"the gradient norm {norm:.3g} exceeds training.max_gradient_norm="
                f"{self._max_gradient_norm:g}"
                if finite
                else f"loss {values['loss']:.4g} and gradient norm {norm:.4g} are not both finite"
            )
            named = culprits(jax.device_get(metrics["tensor_norms"]))
            last_good = self._last_good()
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            raise UserError(
                f"training diverged at step {step}: {what}; culprits: "
                f"{', '.join(named[:3])}{more}; last good checkpoint: "
                f"{last_good or 'none was saved yet'}; lower training.learning_rate or set "
                "training.skip_spikes"
            )
        self._monitor.step(
            step,
            loss=values["loss"],
            learning_rate=values["learning_rate"],
            gradient_norm=norm,
            tokens=int(values["target_tokens"]),
            skipped=values["skipped"],
            aux=lambda: jax.device_get(metrics.get("aux", {})),
        )
