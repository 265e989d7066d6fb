"""The named scopes that a profile shows: in the compiled step, forward and backward."""

import re

import jax
import jax.numpy as jnp
import pytest

from mamba_jax.training.state import abstract_state
from mamba_jax.training.step import make_train_step
from tests.support.tiny_run import (
    EOT,
    HYBRID,
    MAMBA,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
)

# Loss and optimizer have no backward: the loss makes its gradients in the forward.
ONCE = {"cross_entropy", "optimizer"}
OF_MAMBA = {"embed", "mixer", "causal_conv1d", "selective_scan", "norm_f"}
OF_HYBRID = OF_MAMBA | {
    *("recursion", "attention_memory", "attention_read", "windowed_attention", "fusion")
}


@pytest.mark.parametrize(
    ("model", "scopes"), [(MAMBA, OF_MAMBA), (HYBRID, OF_HYBRID)], ids=["mamba", "hybrid"]
)
def test_a_compiled_step_names_its_modules(model, scopes):
    run, mesh = run_config(model), one_device()
    windows = jax.ShapeDtypeStruct((run.vram.effective_batch_size, 13), jnp.int32)
    step = make_train_step(run, mesh, EOT).lower(abstract_state(run, mesh), windows).compile()
    paths = set(re.findall(r'op_name="([^"]*)"', step.as_text()))
    # "…/transpose(jvp(embed))/scatter-add" is of the backward.
    seen = {True: set(), False: set()}
    for path in paths:
        seen["transpose(" in path].update(re.findall(r"\w+", path))
    assert scopes | ONCE <= seen[False]
    assert scopes <= seen[True]
    assert not (OF_HYBRID - scopes) & (seen[True] | seen[False])
