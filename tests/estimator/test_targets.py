"""The kernels compile for cards that are not installed, within their stated memory.

The compilers are not part of the environment (see ``scripts/compilers.sh``): what needs them runs
in a process of its own, and is skipped without them. Lowering needs no compiler.
"""

import functools
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import mamba_jax
from mamba_jax.costs.devices import DEVICES
from mamba_jax.errors import UserError
from mamba_jax.estimator.targets import LIMITS, cuda_target, tpu_target
from mamba_jax.ops.selective_scan import pallas_gpu
from tests.support.lowering import as_on_a_gpu

ROOT = pathlib.Path(mamba_jax.__file__).parents[1]
COMPILERS = ROOT / ".compilers"


def compilers_fit():
    """Whether the compilers are there, and those of this Python and this jax."""
    installed = COMPILERS / "installed"
    words = installed.read_text().split() if installed.is_file() else []
    return {platform.python_version(), f"jax-cuda12-pjrt=={jax.__version__}"} <= set(words)


needs_compilers = pytest.mark.skipif(
    not compilers_fit(), reason="no .compilers for this jax: run ./scripts/compilers.sh"
)
CARDS_TO_TRY = ("A100", "RTX 4080", "H200", "12.0")


@functools.cache  # one process for all: half of its time goes into starting
def compile_in_a_process(kind, implementation, eigenvalues, *names):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(COMPILERS), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
    }
    script = pathlib.Path(__file__).with_name("compile_scan.py")
    command = [sys.executable, str(script), kind, implementation, eigenvalues, *names]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@needs_compilers
@pytest.mark.parametrize(
    ("eigenvalues", "card"),
    [*(("positive", card) for card in CARDS_TO_TRY), ("signed", "H200")],
)
def test_a_layers_gradient_compiles_in_little_memory_without_spilling(eigenvalues, card):
    cards = CARDS_TO_TRY if eigenvalues == "positive" else [card]
    result = compile_in_a_process("cuda", "pallas_gpu", eigenvalues, *cards)[card]
    # Measured: 0.18 GB. The states of all tokens would take 1.6 GB.
    assert result["temp_bytes"] < 0.25e9
    if jax.__version_info__ >= (0, 11):
        return  # whose XLA dumps no PTX of such a kernel, from which registers could be read
    assert {"selective_scan_forward", "selective_scan_backward"} <= result["kernels"].keys()
    for name, kernel in result["kernels"].items():
        assert kernel["spill_bytes"] == 0, (name, kernel)


@needs_compilers
def test_the_xla_forms_gradient_compiles_in_little_memory():
    result = compile_in_a_process("cuda", "chunked", "positive", "H200")["H200"]
    assert result["temp_bytes"] < 0.25e9  # measured: 0.19 GB


@needs_compilers
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
def test_the_tpu_kernel_compiles_in_little_memory(generation):
    result = compile_in_a_process("tpu", "pallas_tpu", "positive", "v5e", "v6e")[generation]
    assert result["has_kernel"]
    # Measured: 0.34 GB, copies of x, z, y and dt in the kernel's layout. No states.
    assert result["temp_bytes"] < 0.4e9


def test_an_unknown_target_or_a_missing_compiler_is_one_line():
    with pytest.raises(UserError, match=r'"H20"; did you mean "H200"\? .*9\.0'):
        cuda_target("H20")
    with pytest.raises(UserError, match=r'"v3" \(choices: v4, v5e'):
        tpu_target("v3")
    with pytest.raises(UserError, match=r"scripts/compilers\.sh.*PYTHONPATH=\.compilers"):
        cuda_target("9.0")
    assert {device.cuda.capability for device in DEVICES if device.cuda} == LIMITS.keys()


@pytest.mark.parametrize(
    ("b", "t", "e", "n", "dtype", "everything", "signed"),
    [
        (8, 2048, 1536, 16, "bfloat16", True, False),
        (1, 1001, 1216, 8, "float32", True, False),  # split, with a tail
        (1, 1001, 1216, 8, "float32", True, True),
        (2, 77, 48, 32, "bfloat16", False, False),
        (1, 1, 16, 16, "float32", False, False),
    ],
)
def test_the_gradient_lowers_for_cuda(b, t, e, n, dtype, everything, signed):
    shape = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, dtype)
    arguments = {
        "x_bte": shape(b, t, e, dtype=dtype),
        "dt_bte": shape(b, t, e),
        "A_en": shape(e, n),
        "B_btn": shape(b, t, n, dtype=dtype),
        "C_btn": shape(b, t, n, dtype=dtype),
    }
    reset_bt = None
    if everything:
        arguments |= {"D_e": shape(e), "dt_bias_e": shape(e), "initial_state_ben": shape(b, e, n)}
        arguments["z_bte"] = shape(b, t, e, dtype=dtype)
        reset_bt = shape(b, t, dtype="bool")

    def scalar(arguments, reset_bt):
        y_bte, state_ben = pallas_gpu.scan(
            **arguments, dt_softplus=everything, reset_bt=reset_bt, signed=signed
        )
        return y_bte.astype(jnp.float32).sum() + state_ben.sum()

    with as_on_a_gpu():
        traced = jax.jit(jax.grad(scalar)).trace(arguments, reset_bt)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = 4 if (b, t) == (1, 1001) or b == 8 else 2  # a split adds one in each direction
    assert text.count("@__gpu$xla.gpu.triton") == kernels
