"""The memory that a run needs, computed before it starts."""

from mamba_jax.estimator.planning import MemoryPlan, plan, plan_run

__all__ = ["MemoryPlan", "plan", "plan_run"]
