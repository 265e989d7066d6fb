"""The memory that a run needs, computed before it starts."""

from mamba_jax.estimator.planning import Plan, plan, plan_run

__all__ = ["Plan", "plan", "plan_run"]
