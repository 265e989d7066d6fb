"""Run by ``test_targets.py`` in a process of its own: prints what the compiler says, as JSON."""

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
from mamba_jax.ops.selective_scan import pallas_gpu


def compile_scan(kind: str, name: str, dump: str) -> dict:
    """Compiles the gradient of one layer's scan, or for a TPU of a plain product."""
    sharding = {"cuda": cuda_target, "tpu": tpu_target}[kind](name)
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)
    if kind == "tpu":
        compiled = compile_for(lambda a: a @ a, shape(256, 256))
        return {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
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

    def gradient(arguments, dy_bte):
        scan = lambda arguments: pallas_gpu.scan(**arguments, dt_softplus=True)[0]
        y_bte, pull_back = jax.vjp(scan, arguments)
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
        kind, *names = sys.argv[1:]
        print(json.dumps({name: compile_scan(kind, name, folder) for name in names}))
