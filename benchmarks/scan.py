"""The selective scan: every implementation over batch, length and width.

The whole operation as a layer calls it: softplus and bias of Δ, skip and gate, N = 16 states;
inputs bfloat16 on an accelerator, float32 on a CPU. "forward and backward" takes the gradients of
all eight inputs and returns y as well.

``floor_share``: the least time the machine allows over the time taken. On a GPU that is computed
(``benchmarks.floor``). On a CPU it is the exps alone, N per channel and token forward and as many
backward, at the rate that XLA's exp reaches on one core, measured here.

Shapes: b batch, t time, e d_inner, n d_state.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import floor, harness
from benchmarks.harness import Candidate, Check, Context, Prepared, Row
from benchmarks.peers import torch_scan
from benchmarks.report import case_key, colours, ratio
from mamba_jax.ops.selective_scan import IMPLEMENTATIONS, choose, selective_scan

BASELINE = "auto"
BOTH = "forward and backward"
PLATFORM_OF = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}  # others run everywhere
AUTO_SHARE = 0.9  # lowest speed of "auto" relative to the best
BLOCK_TOKENS = 2048
CANDIDATE_SECS = 2.0  # of timed work per case; a sample at least


def cases(context: Context) -> list[dict[str, Any]]:
    """Batch, length and width; the most informative first, as a budget may end the run early."""
    if context.platform != "cpu":
        sizes = [(8, 2048, 1536), (1, 2048, 1536), (32, 2048, 1536), (8, 512, 1536)]
        if not context.quick:
            sizes += [(8, 8192, 1536), (8, 2048, 1216), (8, 2048, 2048), (1, 32768, 1536)]
            grid = [(b, t, e) for e in (1536, 1216, 2048) for t in LENGTHS for b in (1, 8, 32)]
            sizes += [size for size in grid if size not in sizes]
    elif context.quick:
        sizes = [(1, 512, 768), (2, 512, 768), (4, 512, 768)]
    else:
        sizes = [(2, 512, 768), (1, 1024, 768), (4, 1024, 768), (8, 512, 768), (1, 4096, 768)]
        sizes += [(2, 512, 1536), (4, 256, 2048)]
    return [
        {"pass": which, "B": b, "L": t, "d": e} for b, t, e in sizes for which in ("forward", BOTH)
    ]


LENGTHS = (512, 2048, 8192, 32768)


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """ "auto", every other implementation that this platform can run, and the peers."""
    runs_here = [
        n for n in IMPLEMENTATIONS if PLATFORM_OF.get(n, context.platform) == context.platform
    ]
    ours = [BASELINE, *(name for name in runs_here if name != chosen(case, context))]
    found = [Candidate(name, functools.partial(prepare, name, case, context)) for name in ours]
    for name in torch_scan.names(context):

        def peer(name: str = name) -> Prepared:
            block, repeats = make_inputs(case)
            return torch_scan.prepare(name, block, repeats, case["pass"] == BOTH, context)

        found.append(Candidate(name, peer))
    return found


def chosen(case: dict[str, Any], context: Context) -> str:
    """The implementation that "auto" chooses."""
    return choose(context.platform, dtype_on(context.platform), case["d"], floor.N_STATES)


def dtype_on(platform: str) -> jnp.dtype:
    """That of the inputs."""
    return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures one size and pass."""
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=20 if context.platform != "cpu" else 5 if context.quick else 10,
        candidate_secs=CANDIDATE_SECS / 2 if context.quick else CANDIDATE_SECS,
        deadline=context.deadline,
    )
    least_secs = floor_secs(case, context)
    for row in rows:
        if row.case == case and row.samples_secs and least_secs:
            row.metrics["floor_share"] = least_secs / row.median_secs
        if row.case == case and row.name == BASELINE and not row.note:
            row.note = chosen(case, context)


def make_inputs(case: dict[str, Any]) -> tuple[dict[str, np.ndarray], tuple[int, int, int]]:
    """Draws float32 inputs as a fresh layer sees them: A = −1 … −N, Δ from 0.001 to 0.1.

    Returns:
      The inputs of one row, or its first ``BLOCK_TOKENS``; and how often the arrays with a time
      axis are to be repeated on the device, as drawing gigabytes here would take minutes.
    """
    t, e, n = min(case["L"], BLOCK_TOKENS), case["d"], floor.N_STATES
    assert case["L"] % t == 0
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    dt_e = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), e))
    block = {
        "x_bte": normal(1, t, e),
        "dt_bte": 0.1 * normal(1, t, e),
        "A_en": np.tile(-np.arange(1, n + 1, dtype=np.float32), (e, 1)),
        "B_btn": normal(1, t, n),
        "C_btn": normal(1, t, n),
        "D_e": np.ones(e, np.float32),
        "z_bte": normal(1, t, e),
        "dt_bias_e": np.log(np.expm1(dt_e)).astype(np.float32),  # the inverse of softplus
        "dy_bte": normal(1, t, e),
    }
    return block, (case["B"], case["L"] // t, 1)


@functools.lru_cache(maxsize=1)  # all implementations of a case share them: they are gigabytes
def inputs_on_device(b: int, t: int, e: int, platform: str) -> dict[str, jax.Array]:
    """The inputs of one size, bfloat16 on an accelerator; weights are float32."""
    dtype = dtype_on(platform)
    block, repeats = make_inputs({"B": b, "L": t, "d": e})
    return {
        key: jnp.tile(jnp.asarray(value, dtype), repeats) if value.ndim == 3 else jnp.asarray(value)
        for key, value in block.items()
    }


def prepare(name: str, case: dict[str, Any], context: Context) -> Prepared:
    """Compiles one of our implementations."""
    arrays = dict(inputs_on_device(case["B"], case["L"], case["d"], context.platform))
    dy_bte = arrays.pop("dy_bte")

    def forward(arrays: dict[str, jax.Array]) -> jax.Array:
        return selective_scan(**arrays, dt_softplus=True, implementation=name)[0]

    def both(arrays: dict[str, jax.Array], dy_bte: jax.Array) -> Any:
        y_bte, pull = jax.vjp(forward, arrays)
        return y_bte, pull(dy_bte)

    if case["pass"] == BOTH:
        return harness.prepare_jax(both, arrays, dy_bte)
    return harness.prepare_jax(forward, arrays)


def floor_secs(case: dict[str, Any], context: Context) -> float | None:
    """The least time for a case, or None where no floor is known."""
    channel_tokens = case["B"] * case["L"] * case["d"]
    backward = case["pass"] == BOTH
    if context.platform == "cpu":
        return channel_tokens * floor.N_STATES * (1 + backward) / exps_per_sec()
    card = floor.find_card(context.device_kind)
    return floor.floor_secs(card, channel_tokens, backward=backward) if card else None


@functools.cache
def exps_per_sec() -> float:
    """How many float32 exps a second XLA makes, in place in the second-level cache."""
    n_values, n_loops = 1 << 15, 100
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, n_loops, lambda _, x: jnp.exp(-x), x))
    x = jnp.linspace(0, 1, n_values)
    jax.block_until_ready(loop(x))
    samples = []
    for _ in range(7):
        begin = time.perf_counter()
        jax.block_until_ready(loop(x))
        samples.append(time.perf_counter() - begin)
    return n_values * n_loops / statistics.median(samples)


def checks(rows: list[Row], context: Context) -> list[Check]:
    """ "auto" must reach 0.9 times the speed of our best other implementation in every case."""
    claim = f"auto ÷ best other implementation ≥ {AUTO_SHARE} in speed, in every case"
    worst = (float("inf"), "", {})
    for auto in (row for row in rows if row.name == BASELINE and row.samples_secs):
        for row in rows:
            if row.case == auto.case and row.name in IMPLEMENTATIONS and row.samples_secs:
                worst = min(worst, (ratio(row, auto), row.name, row.case), key=lambda w: w[0])
    share, name, case = worst
    if not name:
        return [Check(claim, None, "")]
    where = ", ".join(f"{key} {value}" for key, value in case.items())
    return [Check(claim, share >= AUTO_SHARE, f"Least: {share:.2f}, of {name}, {where}")]


def draw(rows: list[Row], figure: Any) -> None:
    """Nanoseconds per channel and token, by case, one line per implementation."""
    plots = figure.subplots(1, 2, sharey=True)
    colour = colours(rows)
    for plot, which in zip(plots, ("forward", BOTH), strict=True):
        shown = [row for row in rows if row.case["pass"] == which]
        keys = list(dict.fromkeys(case_key(row.case) for row in shown))
        for name in dict.fromkeys(row.name for row in shown):
            mine = [row for row in shown if row.name == name]
            plot.plot(
                [keys.index(case_key(row.case)) for row in mine],
                [
                    row.median_secs * 1e9 / (row.case["B"] * row.case["L"] * row.case["d"])
                    for row in mine
                ],
                marker="o",
                linestyle="--" if name == BASELINE else "-" if name in IMPLEMENTATIONS else ":",
                color=colour[name],
                label=name,
            )
        sizes = {
            case_key(row.case): f"{row.case['B']}×{row.case['L']}×{row.case['d']}" for row in shown
        }
        plot.set_xticks(range(len(keys)), [sizes[key] for key in keys], rotation=60, ha="right")
        plot.set(title=which, xlabel="batch × length × width", yscale="log")
    plots[0].set_ylabel("ns per channel and token")
    plots[1].legend(fontsize=8)
