"""The price of a model against the products in its traced program and counts made by hand."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mamba_jax.config import ModelConfig, RunConfig, TrainingConfig, VramConfig
from mamba_jax.costs import flops, roofline, work
from mamba_jax.costs.devices import DEVICES
from mamba_jax.models import build
from mamba_jax.modules import layout
from mamba_jax.ops.selective_scan import reference
from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.training.loss import loss_sums
from tests.support.tiny import HYBRID, MAMBA, VARIANTS

B, T = 4, 32
ABLATIONS = VARIANTS | {
    "sum": dataclasses.replace(HYBRID, fusion="sum"),
    "sum, attention last": dataclasses.replace(
        HYBRID, fusion="sum", recursion_reads_attention=False
    ),
    "sum, no attention": dataclasses.replace(HYBRID, fusion="sum", attention_scales=()),
    "sum, one kind, A": dataclasses.replace(HYBRID, plan="A*2"),
    "three steps of width 3": dataclasses.replace(HYBRID, recursion_depth=3, recursion_expand=3),
    "other mixer": dataclasses.replace(
        MAMBA, d_state=8, dt_rank=5, expand_factor=3, d_conv=3, n_layers=3
    ),
}


def runs(value):
    """Says whether a parameter of an equation is a program, closed over constants or not."""
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def equations(jaxpr, times=1, scope=""):
    """Yields every equation that runs, how often it does, and the named scopes around it."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        held = [v for value in eqn.params.values() for v in jax.tree.leaves(value, is_leaf=runs)]
        inner = [getattr(v, "jaxpr", v) for v in held if runs(v)]
        if not inner:
            yield eqn, times, here
        repeated = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for sub in inner:
            yield from equations(sub, repeated, here)


def product_flops(jaxpr):
    """2·m·n·k of all matrix products outside the attention's scores and the scan.

    Both of these have several forms that pad and mask differently: they are checked separately.
    """
    total = 0
    for eqn, times, scope in equations(jaxpr):
        if eqn.primitive.name != "dot_general":
            continue
        if "selective_scan" in scope or "windowed_attention" in scope:
            continue
        (contracted, _), _ = eqn.params["dimension_numbers"]
        k = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        total += 2 * k * math.prod(eqn.outvars[0].aval.shape) * times
    return total


def priced(config, amount, **setting):
    """Matmul FLOPs of B × T tokens by the formulas, without the scores."""
    setting = flops.Setting(T, B, **setting)
    made = flops.parts(config, setting)
    per_token = sum(
        getattr(part, amount).matmul_flops for part in made if not part.name.startswith("scores")
    )
    return per_token * B * T


@pytest.mark.parametrize(
    ("name", "remat"),
    [("hybrid", "auto"), *itertools.product(ABLATIONS, ["none", "dots", "full"])],
)
def test_products_are_those_of_the_program(name, remat):
    config = dataclasses.replace(ABLATIONS[name], remat=remat)
    run = RunConfig(
        model=config, training=TrainingConfig(loss_chunk_tokens=16), vram=VramConfig(B, B)
    )
    mesh = make_mesh(run.parallel, jax.devices()[:1])
    arguments = (
        build.abstract_params(config),
        jax.ShapeDtypeStruct((B, T + 1), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.float32),
    )
    loss = lambda params, windows, weights: loss_sums(params, run, mesh, windows, weights, 0)
    forward = jax.make_jaxpr(loss)(*arguments)
    gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*arguments)
    remat = flops.setting_of(run, devices=1, on_cpu=True).remat
    assert product_flops(forward.jaxpr) == priced(config, "forward")
    assert product_flops(gradient.jaxpr) == priced(config, "hardware", remat=remat)
    # Each product has two gradients of its size: the definition of model FLOPs.
    assert priced(config, "training", remat=remat) == 3 * priced(config, "forward")


@pytest.mark.parametrize("scale", [1, 2, 4, 5])
@pytest.mark.parametrize(("length", "window"), [(29, 4), (29, 100), (64, 7)])
def test_keys_are_those_that_the_mask_shows(scale, length, window):
    where = layout.documents((1, length), None, None, None)
    blocks = layout.blocks(where, scale)
    low = np.maximum(blocks.first_bt, blocks.newest_bt - window + 1)
    seen = np.asarray(blocks.newest_bt) - low + 1
    assert flops.mean_keys(length, window, scale) == pytest.approx(seen.mean(), abs=1e-12)


def test_scores_by_hand():
    config = dataclasses.replace(HYBRID, recursion_depth=3, n_layers=2)
    rows = {part.name: part for part in flops.parts(config, flops.Setting(8, B))}
    # Scale 1, window 4, 8 tokens: 1 2 3 4 4 4 4 4 keys. Products with keys and with values.
    d, heads, keys, reads, layers = 32, 4, 26 / 8, 3, 2
    forward = rows["scores, scale 1"].forward
    assert forward.matmul_flops == 2 * 2 * d * keys * reads * layers
    assert forward.special_ops == heads * (keys + 1) * reads * layers
    # Whatever the policy, the backward recomputes q·k; layers under remat recompute everything.
    none = flops.parts(config, flops.Setting(8, B, remat="none"))
    again = {part.name: part.recomputed.matmul_flops for part in none}["scores, scale 1"]
    assert again == forward.matmul_flops / 2
    assert rows["scores, scale 1"].recomputed.matmul_flops == 1.5 * forward.matmul_flops


@pytest.mark.parametrize("eigenvalues", ["positive", "signed"])
def test_scan_against_the_reference_implementation(eigenvalues):
    e, n = 5, 16
    signed = eigenvalues == "signed"
    step = lambda h, x, dt, A, B, C: reference.advance(h, x, dt, A, B, C, None, signed)
    state, channels, rates, reads = (1, e, n), (1, e), (e, n), (1, n)
    shapes = (state, channels, channels, rates, reads, reads)
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = {"exp": 0, "flops": 0}
    for eqn, times, _ in equations(jax.make_jaxpr(step)(*specs).jaxpr):
        size = times * math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "exp":
            counted["exp"] += size
        elif eqn.primitive.name in ("mul", "add", "sub"):
            counted["flops"] += size
        elif eqn.primitive.name == "dot_general":
            counted["flops"] += 2 * size * n
    config = dataclasses.replace(
        MAMBA, d_model=e, expand_factor=1, d_state=n, n_layers=1, eigenvalues=eigenvalues
    )
    (scan,) = (p for p in flops.parts(config, flops.Setting(T, B)) if p.name == "selective_scan")
    assert counted["exp"] == n * e == scan.forward.special_ops - 2 * e  # the rest is softplus
    # dt·A, dt·x, its product with B, decay, sum, C: bias and softplus (3 a channel) come on top.
    assert counted["flops"] == scan.forward.elementwise_flops - 3 * e
    # The fused adjoint's special operations are 25 a channel with the gate's two, at 16 states.
    assert scan.backward.special_ops + 2 * e == 25 * e


def test_hybrid_small_standard_by_hand():
    """MACs per token and layer, d 608: Mamba 6.25 d² + 64 d, then the hybrid's extra parts."""
    config = ModelConfig(
        family="hybrid", d_model=608, n_layers=10, recursion_depth=3, vocab_size=50257
    )
    rows = {p.name: p.forward.matmul_flops for p in flops.parts(config, flops.Setting(2048, 8))}
    d, layers = 608, 10
    mamba = sum(rows[name] for name in ("in_proj", "x_proj, dt_proj", "out_proj"))
    # in 4, out 2, x_proj and dt_proj 2 · 2d · d/16, B and C 2d · 32
    assert mamba == 2 * layers * (6.25 * d * d + 64 * d)
    assert mamba / 2 == pytest.approx(23.5e6, rel=2e-3)
    assert rows["head, loss"] == 2 * 50304 * d  # padded
    assert rows["recursion"] == 2 * layers * 3 * (4 * d * d + d)
    assert rows["q, k, v, o"] == 2 * layers * (2 + 3 * 2) * d * d
    assert rows["fusion"] == 2 * layers * 2 * d * d


def test_bytes_and_optimizer_by_hand():
    config = dataclasses.replace(MAMBA, n_layers=1)  # d 32, e 64
    setting = flops.Setting(
        T, 4, accumulation_steps=2, devices=2, fsdp=2, dtype="bfloat16", remat="none"
    )
    rows = {part.name: part for part in flops.parts(config, setting)}
    tokens = T * 4 / 2  # of a device and microbatch
    forward, backward = rows["in_proj"].forward, rows["in_proj"].backward
    assert forward.activation_bytes == 2 * 32 + 2 * 128
    assert forward.weight_bytes == 2 * 32 * 128 / tokens
    assert backward.activation_bytes == 2 * 2 * 32 + 2 * 128  # x, dx; dy
    assert backward.weight_bytes == (2 + 4) * 32 * 128 / tokens
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(build.abstract_params(config)))
    # Update: parameter, two moments and gradient read, the gradient twice, all but it written;
    # each of two microbatches: sum and gradient read, sum written. A device has half of them.
    optimizer = rows["optimizer"].training.weight_bytes
    assert optimizer == pytest.approx((8 + 2 * 3) * 4 * (count / 2) / (2 * tokens), rel=1e-12)
    # The scan reads x, B and C in two bytes, Δ in four, and keeps a state in 64 tokens.
    scan = rows["selective_scan"].forward.activation_bytes
    assert scan == 64 * (2 + 4 + 2) + 2 * 2 * 16 + 64 * 16 * 4 / 64


def test_floor_is_the_slowest_resource_of_each_part():
    peaks = roofline.Peaks("x", "made up", 100.0, 10.0, 5.0, 50.0)
    works = [work.Work(matmul_flops=200.0, weight_bytes=50.0), work.Work(special_ops=20.0)]
    works += [work.Work(elementwise_flops=30.0), work.Work(activation_bytes=250.0)]
    assert [peaks.secs(each) for each in works] == [2.0, 4.0, 3.0, 5.0]
    assert roofline.floor_secs(works, peaks) == 14.0
    unknown = dataclasses.replace(peaks, special_ops_per_sec=None)
    assert unknown.secs(works[1]) == 0.0


def test_devices():
    kinds = [kind for device in DEVICES for kind in device.kinds]
    assert len(kinds) == len(set(kinds))
    assert roofline.find_device("TPU v5 lite").name == "TPU-v5e"
    assert roofline.find_device("TPU v5").name == "TPU-v5p"
    assert roofline.find_device("NVIDIA GH200 480GB") is None
    assert roofline.find_device("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    h200 = roofline.find_device("NVIDIA H200")
    assert roofline.published(h200, "bfloat16").matmul_flops_per_sec == 989.4e12
    assert roofline.published(h200, "float32").matmul_flops_per_sec == 494.7e12
    # The special functions that notes of the kernels count with: 16 a clock, 132 SMs, 1.98 GHz.
    special = roofline.published(h200, "bfloat16").special_ops_per_sec
    assert special == pytest.approx(16 * 132 * 1.98e9, rel=1e-3)


def test_measured_peaks_are_rates_of_this_machine():
    peaks = roofline.measure("float32")
    assert peaks.origin == "measured here" and peaks.name == "cpu"
    # From 0.1 GFLOP/s to 1 PFLOP/s: a figure wrong by the size of an array would fall out. An exp
    # costs more than a multiplication, which is half of a link of the other chain.
    for rate in (peaks.matmul_flops_per_sec, peaks.special_ops_per_sec, peaks.bytes_per_sec):
        assert 1e8 < rate < 1e15
    assert peaks.special_ops_per_sec < peaks.elementwise_flops_per_sec


@pytest.mark.parametrize(
    ("on_cpu", "dtype", "remat"), [(True, "float32", "dots"), (False, "bfloat16", "full")]
)
def test_setting_of_a_run(on_cpu, dtype, remat):
    run = RunConfig(vram=VramConfig(effective_batch_size=32, batch_size=8))
    setting = flops.setting_of(run, devices=3, on_cpu=on_cpu)
    assert setting == flops.Setting(2048, 8, 4, 3, 1, dtype, remat)
    model = dataclasses.replace(run.model, dtype="bfloat16", remat="none")
    named = flops.setting_of(dataclasses.replace(run, model=model), devices=1, on_cpu=on_cpu)
    assert (named.dtype, named.remat) == ("bfloat16", "none")
