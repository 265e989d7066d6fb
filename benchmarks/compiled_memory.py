"""The memory of each scan's gradient on a GPU, as its compiler reports it; no GPU is needed.

    ./scripts/compilers.sh
    PYTHONPATH=.compilers JAX_PLATFORMS=cpu python -m benchmarks.compiled_memory [CARD]

Writes benchmarks/results/compiled_memory_<card>.json. Nothing is run, so nothing is timed.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.report import git_commit
from mamba_jax.estimator.targets import compile_for, cuda_target
from mamba_jax.ops.selective_scan import selective_scan

IMPLEMENTATIONS = ("pallas_gpu", "chunked", "sequential", "associative", "reference")
B, T, E, N = 8, 2048, 1536, 16


def temporary_bytes(implementation: str, sharding: Any) -> dict[str, int]:
    """Compiles one layer's scan with everything on, and its value with all gradients."""
    shape = lambda *dims, dtype="bfloat16": jax.ShapeDtypeStruct(
        dims, jnp.dtype(dtype), sharding=sharding
    )
    float32 = lambda *dims: shape(*dims, dtype="float32")
    arguments = {
        "x_bte": shape(B, T, E),
        "dt_bte": float32(B, T, E),
        "A_en": float32(E, N),
        "B_btn": shape(B, T, N),
        "C_btn": shape(B, T, N),
        "D_e": float32(E),
        "z_bte": shape(B, T, E),
        "dt_bias_e": float32(E),
    }

    def forward(arguments):
        return selective_scan(**arguments, dt_softplus=True, implementation=implementation)[0]

    def gradient(arguments, dy_bte):
        y_bte, pull_back = jax.vjp(forward, arguments)
        return y_bte, pull_back(dy_bte)

    compiled = {
        "forward": compile_for(forward, arguments),
        "gradient": compile_for(gradient, arguments, arguments["x_bte"]),
    }
    return {name: c.memory_analysis().temp_size_in_bytes for name, c in compiled.items()}


def main(card: str = "H200") -> None:
    """Prints and writes the figures of all implementations."""
    sharding = cuda_target(card)
    results = {name: temporary_bytes(name, sharding) for name in IMPLEMENTATIONS}
    for name, figures in results.items():
        print(name.ljust(12), *(f"{what} {n / 1e9:.3f} GB" for what, n in figures.items()))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "jax": jax.__version__,
        "compiled_for": card,
        "shape": {"b": B, "t": T, "e": E, "n": N},
        "temporary_bytes": results,
    }
    folder = pathlib.Path(__file__).parent / "results"
    path = folder / f"compiled_memory_{card.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
