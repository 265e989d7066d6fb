"""Run by ``test_targets.py`` in a process of its own: prints what the compiler says, as JSON."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp

from mamba_jax.estimator.targets import compile_for, cuda_target, tpu_target
from mamba_jax.ops.selective_scan import selective_scan


def compile_scan(kind: str, name: str, implementation: str, eigenvalues: str, dump: str) -> dict:
    """Compiles one layer's scan: on a card its value and gradient, on a TPU its value."""
    sharding = {"cuda": cuda_target, "tpu": tpu_target}[kind](name)
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
    switches = {"implementation": implementation, "eigenvalues": eigenvalues}
    scan = functools.partial(selective_scan, dt_softplus=True, **switches)
    b, t, e, n = 8, 2048, 1536, 16
    float32 = lambda *dims: shape(*dims, dtype=jnp.float32)
    arguments = {
        "x_bte": shape(b, t, e),
        "dt_bte": float32(b, t, e),
        "A_en": float32(e, n),
        "B_btn": shape(b, t, n),
        "C_btn": shape(b, t, n),
        "D_e": float32(e),
        "z_bte": shape(b, t, e),
        "dt_bias_e": float32(e),
    }
    if kind == "tpu":
        compiled = compile_for(lambda arguments: scan(**arguments), arguments)
        text = compiled.as_text()
        return {
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            "has_kernel": "selective_scan" in text and "tpu_custom_call" in text,
        }

    def gradient(arguments, dy_bte):
        y_bte, pull_back = jax.vjp(lambda arguments: scan(**arguments)[0], arguments)
        return y_bte, pull_back(dy_bte)

    compiled = compile_for(gradient, arguments, arguments["x_bte"])
    kernels = {}
    for path in pathlib.Path(dump).glob("*.ptx"):
        text = path.read_text()
        if entry := re.search(r"\.entry (selective_scan\w*)", text):
            kernels[entry[1]] = registers(path, re.search(r"\.target (\w+)", text)[1])
        path.unlink()  # the next card's have the same names
    return {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "kernels": kernels}


def registers(path: pathlib.Path, architecture: str) -> dict[str, int]:
    """What the assembler says of a kernel."""
    command = ["ptxas", "--verbose", f"--gpu-name={architecture}", str(path), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    number = lambda pattern: int(re.search(pattern, report)[1])
    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores"),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder}"
        kind, implementation, eigenvalues, *names = sys.argv[1:]
        how = implementation, eigenvalues, folder
        results = {name: compile_scan(kind, name, *how) for name in names}
        print(json.dumps(results))
