"""The learning rate as a function of the step."""

import jax.numpy as jnp
import optax

from mamba_jax.config import TrainingConfig


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine down to ``min_learning_rate_ratio`` of the peak.

    With s the step, w the warm-up's steps, m the last step, P the peak and f the ratio::

        s < w:       P · s / w
        w ≤ s < m:   P · (f + (1 − f) · (1 + cos(π (s − w) / (m − w))) / 2)
        s ≥ m:       P · f

    Args:
      config: ``resolved_warmup_steps`` is w; it may be 0: step 0 then has the peak.

    Returns:
      step (int32 scalar, array or int) → learning rate (float32).

    Source: arXiv 1608.03983, equation 5, without restarts.
    """
    peak, floor = config.learning_rate, config.min_learning_rate_ratio
    warmup, last = config.resolved_warmup_steps, config.max_steps

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)  # exact up to 2²⁴ steps
        progress = jnp.clip((step - warmup) / (last - warmup), 0.0, 1.0)
        cosine = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return peak * jnp.where(step < warmup, step / max(warmup, 1), cosine)

    return schedule
