"""The programs for GPU and TPU can be made on a machine that has neither."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mamba_jax.models import build

from ..estimator.test_targets import as_on_a_gpu
from .tiny import HYBRID, MAMBA, TOKENS


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
