"""``mamba-jax autotune``: measures the scan's tiles on this machine's GPU."""

import argparse
import dataclasses
import functools
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mamba_jax.errors import UserError, command

# (b, t, d_inner): a full card, a long row that must be split, and a width that is not a power of
# two.
SHAPES = [(8, 2048, 1536), (1, 8192, 2048), (8, 2048, 1216)]
BLOCKS, GROUPS, CHUNKS, WARPS_PER_SCHEDULER = (32, 64), (2, 3, 4, 8), (16, 32, 64), (0, 2, 3, 4, 8)
N_STATES = 16
REPEATS, CALLS = 5, 10


@command
def main(argv: list[str]) -> int:
    """Writes the table that the scan reads, with this card's row measured."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax autotune",
        description="Measure which tiles of the selective scan are fastest on this NVIDIA GPU. "
        "Without --output, the result takes effect at the next start.",
    )
    parser.add_argument("--quick", action="store_true", help="one shape and fewer candidates")
    parser.add_argument(
        "--output", type=pathlib.Path, help="file to write (default: in the user's cache)"
    )
    arguments = parser.parse_args(argv)

    import jax

    from mamba_jax.ops.selective_scan import pallas_gpu
    from mamba_jax.ops.selective_scan.pallas_gpu import tuning

    device = jax.devices()[0]
    if device.platform != "gpu":
        raise UserError(
            f"autotune measures an NVIDIA GPU, but jax found only {device.platform}; run it on a "
            "machine with a GPU, with jax for CUDA installed (./launch/test.sh installs it)"
        )
    path = arguments.output or tuning.user_table_path()
    try:
        rows = tuning.table()
        kept = tuning.read(path) if path.is_file() else {}
        fault = pallas_gpu.supports(SHAPES[0][-1], N_STATES, "bfloat16")
    except ValueError as error:
        raise UserError(str(error)) from error
    if fault:
        raise UserError(
            f"autotune cannot run: {fault}; on such a card XLA computes the scan, without tiles"
        )
    start = rows.get(device.device_kind, rows[tuning.DEFAULT_CARD])
    schedulers = 4 * getattr(device, "core_count", start.schedulers // 4)
    start = dataclasses.replace(start, measured=True, schedulers=schedulers)
    row = tune(start, SHAPES[:1] if arguments.quick else SHAPES, measure, arguments.quick)
    tuning.write(path, kept | {device.device_kind: row})
    print(f"{device.device_kind}: wrote {path}")
    return 0


def tune(
    row: Any, shapes: Sequence[tuple[int, int, int]], measure: Callable[..., float], quick: bool
) -> Any:
    """Improves a row of the table: each direction in turn, then the chunk.

    Args:
      row: a ``tuning.CardTuning``, the first candidate.
      shapes: what to measure; the geometric mean of the times decides.
      measure: (row, shape, direction) → seconds; infinity where the row does not run.
      quick: whether to try tiles only.

    Returns:
      The best row.

    Raises:
      UserError: if no candidate runs.
    """

    def best(rows: list[Any], direction: str) -> Any:
        mean = lambda row: math.prod(measure(row, shape, direction) for shape in shapes)
        times = [mean(row) for row in rows]
        if math.isinf(min(times)):
            raise UserError(
                f"none of the {len(rows)} candidates for the {direction} pass runs on this GPU, "
                "for the reasons above; the table is unchanged"
            )
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
    """Returns the seconds of one scan, or of one scan and its gradient.

    Infinity if it fails on this GPU or differs from what XLA's chunked scan computes.
    """
    import jax

    from mamba_jax.ops.selective_scan import pallas_gpu
    from mamba_jax.ops.selective_scan.pallas_gpu import tuning

    scan = functools.partial(pallas_gpu.scan, plan=tuning.plan_for(row, *shape))
    run = functools.partial(program(scan, direction), *inputs(shape))
    try:
        results = jax.block_until_ready(run())
    except Exception as error:  # too many registers, too much memory, or unsupported
        return _skip(str(error).partition("\n")[0])
    if not agree(results, expected(shape, direction)):
        return _skip(f"wrong results from {scan.keywords['plan']}")
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(CALLS):  # queued back to back, which hides the host's time
            results = run()
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / CALLS)
    return sorted(times)[REPEATS // 2]


@functools.cache
def inputs(shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """Draws x, dt, B, C and z."""
    import jax
    import jax.numpy as jnp

    b, t, e = shape
    keys = iter(jax.random.split(jax.random.key(0), 5))
    draw = lambda *dims: jax.random.normal(next(keys), dims, jnp.bfloat16)
    dt_bte = draw(b, t, e).astype(jnp.float32) - 4.0
    return draw(b, t, e), dt_bte, draw(b, t, N_STATES), draw(b, t, N_STATES), draw(b, t, e)


@functools.cache
def expected(shape: tuple[int, int, int], direction: str) -> Any:
    """Returns what every tile must compute."""
    from mamba_jax.ops.selective_scan import chunked

    return program(chunked.scan, direction)(*inputs(shape))


def program(scan: Callable[..., Any], direction: str) -> Callable[..., Any]:
    """Returns the compiled function of ``inputs``: y, or y and its gradients by each of them."""
    import jax
    import jax.numpy as jnp

    def forward(x_bte, dt_bte, B_btn, C_btn, z_bte):
        e = x_bte.shape[-1]
        A_en = -jnp.broadcast_to(jnp.arange(1.0, N_STATES + 1), (e, N_STATES))
        vectors = {"D_e": jnp.ones(e), "dt_bias_e": jnp.ones(e)}
        arrays = (x_bte, dt_bte, A_en, B_btn, C_btn)
        return scan(*arrays, z_bte=z_bte, dt_softplus=True, **vectors)[0]

    def both(*arrays):
        y_bte, pull_back = jax.vjp(forward, *arrays)
        return y_bte, pull_back(arrays[0])  # x will do as the gradient of y

    return jax.jit(forward if direction == "forward" else both)


def agree(results: Any, truth: Any) -> bool:
    """Whether two trees of arrays are equal up to rounding to bfloat16."""
    import jax
    import jax.numpy as jnp

    def same(ours: jax.Array, theirs: jax.Array) -> bool:
        difference = ours.astype(jnp.float32) - theirs.astype(jnp.float32)
        # Four roundings to bfloat16 of the largest value; NaN is never below it.
        return bool(jnp.abs(difference).max() <= 2**-6 * jnp.abs(theirs).max())

    return jax.tree.all(jax.tree.map(same, results, truth))


def _skip(reason: str) -> float:
    print(f"skipped: {reason}", file=sys.stderr)
    return math.inf


if __name__ == "__main__":
    sys.exit(main())
