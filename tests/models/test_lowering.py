"""The programs for GPU and TPU can be lowered on a machine that has neither."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from mamba_jax.models import build
from tests.support.lowering import as_on_a_gpu
from tests.support.tiny import HYBRID, MAMBA, TOKENS


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("config", [MAMBA, HYBRID], ids=["mamba", "hybrid"])
def test_the_gradient_lowers_with_bfloat16_matmuls(config, platform):
    config = dataclasses.replace(config, dtype="bfloat16", scan="chunked", remat="full")
    params = build.abstract_params(config)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    gradient = jax.grad(lambda params, tokens: build.apply(params, config, tokens)[0].sum())
    text = jax.export.export(jax.jit(gradient), platforms=[platform])(params, tokens).mlir_module()
    matmuls = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert any("bf16" in line for line in matmuls)
    # The head and every other matrix; only the scan's and the gate's sums stay in float32.
    assert sum("bf16" in line for line in matmuls) > len(matmuls) / 2


@pytest.mark.parametrize(("remat", "kernels"), [("none", 2), ("full", 3)])
def test_the_gradient_lowers_with_the_gpu_kernels(remat, kernels):
    config = dataclasses.replace(MAMBA, dtype="bfloat16", scan="pallas_gpu", remat=remat)
    params = build.abstract_params(config)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    gradient = jax.grad(lambda params, tokens: build.apply(params, config, tokens)[0].sum())
    with as_on_a_gpu():
        traced = jax.jit(gradient).trace(params, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # One scan over layers in each direction; remat runs the forward kernel once more.
    assert text.count("@__gpu$xla.gpu.triton") == kernels


def equations(jaxpr):
    """All equations of a program, those of loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_recursion_adds_its_weights_gradients_in_float32_and_no_others(remat):
    """Its loop over steps carries a sum for each kernel: float32, although products are bfloat16,
    and for the queries' third of ``qkv`` alone."""
    config = dataclasses.replace(HYBRID, dtype="bfloat16", remat=remat, recursion_depth=5)
    params = build.abstract_params(config)
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, jnp.int32)
    gradient = jax.grad(lambda params, tokens: build.apply(params, config, tokens)[0].sum())
    program = jax.make_jaxpr(gradient)(params, tokens).jaxpr
    loops = [
        equation
        for equation in equations(program)
        if equation.primitive.name == "scan" and equation.params["length"] == 5
    ]
    # What is stacked by step has an axis more.
    sums = {(out.aval.shape, out.aval.dtype.name) for loop in loops for out in loop.outvars}
    d, h, p = config.d_model, config.n_heads, config.head_size
    for kernel in [(d, 2 * d), (2 * d, d), (d, h, p), (h, p, d)]:
        assert (kernel, "float32") in sums
        assert (kernel, "bfloat16") not in sums
    assert not any(
        variable.aval.shape == (d, 3, h, p)
        for loop in loops
        for equation in equations(loop.params["jaxpr"].jaxpr)
        for variable in equation.outvars
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_decoding_copies_no_ring(batch_size):
    """The loop over tokens writes rings in place and reads them without a copy."""
    config = dataclasses.replace(HYBRID, attention_window=96)  # a size that nothing else has
    prepared = jax.eval_shape(
        lambda: build.prepare_for_decoding(build.init(config, jax.random.key(0)), config)
    )
    cache = jax.eval_shape(
        lambda: build.unstack_cache(build.init_cache(config, batch_size), config)
    )

    def tokens(prepared, cache, n):
        def one_token(_, carry):
            token_b, cache = carry
            logits_bv, cache = build.decode_step(prepared, config, token_b, cache)
            return logits_bv.argmax(-1), cache

        return jax.lax.fori_loop(0, n, one_token, (jnp.zeros(batch_size, jnp.int32), cache))

    program = jax.jit(tokens, donate_argnums=1).lower(prepared, cache, 7).compile().as_text()
    assert program is not None
    ring = sorted([*[batch_size][batch_size == 1 :], config.n_heads, 96, config.head_size])
    of_rings = set()
    for dims, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", program):
        if sorted(int(n) for n in dims.split(",") if n != "1") == ring:
            of_rings.add(operation)
    assert of_rings & {"dynamic-update-slice", "scatter", "while"}  # the rings were found
    assert not of_rings & {"copy", "transpose", "concatenate", "pad"}
