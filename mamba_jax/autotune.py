"""Measures the scan's tiles on this machine's GPU: ``python -m mamba_jax.autotune [--quick]``."""

import argparse
import dataclasses
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mamba_jax.errors import UserError, command

# (b, t, d_inner): a full card, a long row that must be split, and a width that is no power of two.
SHAPES = [(8, 2048, 1536), (1, 8192, 2048), (8, 2048, 1216)]
BLOCKS, GROUPS, CHUNKS, WARPS_PER_SCHEDULER = (32, 64), (2, 3, 4, 8), (16, 32, 64), (0, 2, 3, 4, 8)
REPEATS = 10


@command
def main(argv: list[str]) -> int:
    """Writes the table that the scan reads, with this card's row measured."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax autotune",
        description="Measure which tiles of the selective scan are fastest on this NVIDIA GPU. "
        "Without --output, the result takes effect from the next start on.",
    )
    parser.add_argument("--quick", action="store_true", help="one shape and fewer candidates")
    parser.add_argument("--output", type=pathlib.Path, help="file to write (default: user's cache)")
    arguments = parser.parse_args(argv)

    import jax

    from mamba_jax.ops.selective_scan.pallas_gpu import tuning

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(
            f"autotune measures an NVIDIA GPU, but jax found only {device.platform}; run it on a "
            "machine with a GPU, with jax for CUDA installed (./launch/test.sh installs it)"
        )
    path = arguments.output or tuning.user_table_path()
    rows = tuning.table()
    start = rows.get(device.device_kind, rows[tuning.DEFAULT_CARD])
    schedulers = 4 * getattr(device, "core_count", start.schedulers // 4)
    start = dataclasses.replace(start, measured=True, schedulers=schedulers)
    row = tune(start, SHAPES[:1] if arguments.quick else SHAPES, measure, arguments.quick)
    tuning.write(path, (tuning.read(path) if path.is_file() else {}) | {device.device_kind: row})
    print(f"{device.device_kind}: wrote {path}")
    return 0


def tune(
    row: Any, shapes: Sequence[tuple[int, int, int]], measure: Callable[..., float], quick: bool
) -> Any:
    """Improves a row of the table, one direction and then the chunk after the other.

    Args:
      row: a ``tuning.Row``, the first candidate.
      shapes: what to measure; the geometric mean of the times decides.
      measure: (row, shape, direction) → seconds; infinity where the row does not run.
      quick: whether to try tiles only.

    Returns:
      The best row.
    """

    def best(rows: list[Any], direction: str) -> Any:
        mean = lambda row: math.prod(measure(row, shape, direction) for shape in shapes)
        times = [mean(row) for row in rows]
        print(f"{direction}: best of {len(rows)} is {rows[times.index(min(times))]}", flush=True)
        return rows[times.index(min(times))]

    for direction in ("forward", "backward"):
        old = getattr(row, direction)
        tiles = [
            dataclasses.replace(old.tile, block_channels=block, group_tokens=group)
            for block, group in itertools.product(BLOCKS, GROUPS)
        ]
        passes = [old, *(dataclasses.replace(old, tile=tile) for tile in tiles if tile != old.tile)]
        row = best([dataclasses.replace(row, **{direction: p}) for p in passes], direction)
        if not quick:
            old = getattr(row, direction)
            splits = [dataclasses.replace(old, warps_per_scheduler=w) for w in WARPS_PER_SCHEDULER]
            row = best([dataclasses.replace(row, **{direction: p}) for p in splits], direction)
    if not quick:
        row = best([dataclasses.replace(row, chunk_tokens=c) for c in CHUNKS], "backward")
    return row


def measure(row: Any, shape: tuple[int, int, int], direction: str) -> float:
    """Returns the seconds of one scan, or of one scan and its gradient; infinity if it fails."""
    import jax
    import jax.numpy as jnp

    from mamba_jax.ops.selective_scan import pallas_gpu
    from mamba_jax.ops.selective_scan.pallas_gpu import tuning

    (b, t, e), n = shape, 16
    keys = iter(jax.random.split(jax.random.key(0), 6))
    draw = lambda *dims: jax.random.normal(next(keys), dims, jnp.bfloat16)
    x_bte, z_bte, B_btn, C_btn = draw(b, t, e), draw(b, t, e), draw(b, t, n), draw(b, t, n)
    dt_bte = draw(b, t, e).astype(jnp.float32) - 4.0
    A_en = -jnp.broadcast_to(jnp.arange(1.0, n + 1), (e, n))
    vector_e = jnp.ones(e)
    plan = tuning.plan_for(row, b, t, e)

    def scan(x_bte, dt_bte, B_btn, C_btn, z_bte):
        return pallas_gpu.scan(
            *(x_bte, dt_bte, A_en, B_btn, C_btn),
            **{"D_e": vector_e, "z_bte": z_bte, "dt_bias_e": vector_e},
            dt_softplus=True,
            plan=plan,
        )[0]

    def both(*arrays):
        y_bte, pull_back = jax.vjp(scan, *arrays)
        return y_bte, pull_back(x_bte)

    function = jax.jit(scan if direction == "forward" else both)
    return seconds(lambda: function(x_bte, dt_bte, B_btn, C_btn, z_bte))


def seconds(run: Callable[[], Any]) -> float:
    """Returns the median time of a call after a first one; infinity where the device refuses it."""
    import jax

    try:
        jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:  # too many registers or too much memory
        print(f"skipped: {str(error).splitlines()[0]}", file=sys.stderr)
        return math.inf
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


if __name__ == "__main__":
    sys.exit(main())
