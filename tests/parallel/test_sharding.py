"""The mesh and the table: they change where numbers are stored, but not their values."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mamba_jax.config import ParallelConfig
from mamba_jax.errors import UserError
from mamba_jax.models import build
from mamba_jax.parallel.mesh import batch_sharding, check_batch, make_mesh
from mamba_jax.parallel.rules import param_shardings, spec_for
from mamba_jax.training.state import abstract_state, init_state
from mamba_jax.training.step import make_eval_step, make_train_step
from tests.support.tiny import PLANS, VARIANTS
from tests.support.tiny_run import (
    EOT,
    HYBRID,
    MAMBA,
    assert_same_bits,
    one_device,
    quick_compiles,  # noqa: F401
    run_config,
    to_host,
    windows,
)


def test_the_data_axis_takes_what_fsdp_leaves():
    assert dict(make_mesh(ParallelConfig()).shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(ParallelConfig(fsdp=4)).shape) == {"data": 2, "fsdp": 4}
    assert make_mesh(ParallelConfig(), jax.devices()[:1]).size == 1


def test_a_bad_fsdp_or_batch_is_named_with_its_remedy():
    with pytest.raises(UserError, match=r"parallel\.fsdp=3 .* 8 device.* 1, 2, 4, 8"):
        make_mesh(ParallelConfig(fsdp=3))
    with pytest.raises(UserError, match=r"vram\.batch_size=12 .* 8 devices.* 16"):
        check_batch(12, make_mesh(ParallelConfig()))
    with pytest.raises(UserError, match=r"vram\.batch_size=4 "):
        make_train_step(run_config(microbatch=4), make_mesh(ParallelConfig()), EOT)


@pytest.mark.parametrize("variant", VARIANTS | PLANS)
def test_the_table_has_every_parameter_and_shards_every_matrix(variant):
    params = build.abstract_params((VARIANTS | PLANS)[variant])
    shardings = param_shardings(params, make_mesh(ParallelConfig(fsdp=8)))
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_matrix = name.endswith(("/kernel", "/embedding")) and "gate" not in name
        assert ("fsdp" in sharding.spec) == is_matrix, (name, sharding.spec)
        assert "layers" not in name or sharding.spec[:1] in ((), (None,)), name


@pytest.mark.parametrize(
    ("path", "shape", "fsdp", "spec"),
    [
        ("params/embed/embedding", (50304, 768), 8, P(None, "fsdp")),
        (
            "opt_state/1/mu/layers/mixer/in_proj/kernel",
            (2, 16, 2, 32),
            4,
            P(None, "fsdp", None, None),
        ),
        ("layers/recursion/up/kernel", (8, 6, 24), 8, P(None, None, "fsdp")),  # the axis after
        ("layers/mixer/dt_proj/kernel", (8, 8, 12), 8, P(None, "fsdp", None)),  # the axis before
        ("layers/mixer/x_proj/kernel", (8, 12, 9), 8, P()),  # the layer axis never
        ("layers/mixer/A_log", (8, 32, 16), 8, P()),
        ("layers/attention/scale_logits", (8, 3, 8), 8, P()),
        ("step", (), 8, P()),
    ],
)
def test_specs(path, shape, fsdp, spec):
    assert spec_for(path, shape, fsdp) == spec


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="layers/mixer/novelty"):
        spec_for("layers/mixer/novelty", (2, 4), 2)


def test_the_state_is_sharded_as_the_table_states():
    mesh = make_mesh(ParallelConfig(fsdp=4))
    state, abstract = init_state(run_config(), mesh), abstract_state(run_config(), mesh)
    jax.tree.map(lambda a, b: None, state, abstract)  # the same tree
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    moments = state["opt_state"][1].mu["layers"]["mixer"]["out_proj"]["kernel"]
    assert moments.addressable_shards[0].data.size * 4 == moments.size


def run(model, mesh, steps=3):
    """Three steps of two microbatches of eight; returns state, metrics, evaluation, program."""
    # adam_eps well above the rounding of a gradient: else Adam makes ±rate of what is only noise.
    config = run_config(model, batch=16, microbatch=8, adam_eps=1e-3)
    state = init_state(config, mesh)
    start = to_host(state)
    lay_out = lambda array: jax.device_put(array, batch_sharding(mesh))
    step = make_train_step(config, mesh, EOT).lower(state, lay_out(windows(16))).compile()
    for i in range(steps):
        state, metrics = step(state, lay_out(windows(16, seed=i)))
    evaluate = make_eval_step(config, mesh, EOT, np.arange(32))
    sums = evaluate(state["params"], windows(8), np.arange(8, dtype=np.float32))
    return start, to_host(state), to_host(metrics), to_host(sums), step.as_text()


@functools.cache
def run_on_one(model):
    return run(model, one_device())


# One layout, with both axes, is enough for what is slower to compile.
LOOP = dataclasses.replace(HYBRID, plan="(M,H)*2", n_layers=4)


@pytest.mark.parametrize(
    ("model", "fsdp"),
    [(MAMBA, 1), (MAMBA, 2), (MAMBA, 8), (LOOP, 2)],
    ids=["mamba, data 8", "mamba, data 4 fsdp 2", "mamba, fsdp 8", "plan, data 4 fsdp 2"],
)
def test_the_same_numbers_on_one_and_on_eight_devices(model, fsdp):
    # Dropout too: its masks must not depend on the mesh either.
    model = dataclasses.replace(model, dropout=0.1)
    start, state, metrics, sums, _ = run_on_one(model)
    mesh = make_mesh(ParallelConfig(fsdp=fsdp))
    own_start, own_state, own_metrics, own_sums, program = run(model, mesh)
    assert_same_bits(own_start, start)
    # Eight partial sums in float32 instead of one, carried through three updates.
    for name in ("loss", "gradient_norm", "learning_rate", "target_tokens"):
        np.testing.assert_allclose(own_metrics[name], metrics[name], rtol=5e-6, err_msg=name)
    compare = lambda ours, truth: np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=2e-6)
    jax.tree.map(compare, own_state["params"], state["params"])
    jax.tree.map(compare, own_metrics["aux"], metrics["aux"])
    jax.tree.map(compare, own_sums, sums)
    # Weights travel, activations do not: one gather a divided matrix (the embedding's tied head
    # included), nothing exchanged between all.
    assert "all-to-all" not in program
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(state["params"])}
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    assert (len(gathered) > 0) == (fsdp > 1)
    assert {tuple(map(int, shape.split(","))) for shape in gathered} <= shapes
