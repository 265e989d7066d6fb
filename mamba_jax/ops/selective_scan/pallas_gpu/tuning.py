"""The tiles and segments of a scan: a small table with one entry per card.

The table in this folder can be overridden, card by card, by a file that
``mamba-jax autotune`` writes: ``user_table_path()``. Both are read once.

Shapes: b batch, t time, e d_inner.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax

from mamba_jax.files import write_atomic
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Tile

DEFAULT_CARD = "default"

# Fewer tokens in a segment are not worth the kernel that joins segments.
MIN_SEGMENT_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Pass:
    """How to run one direction.

    Attributes:
      tile: the shape of a program.
      warps_per_scheduler: where rows and channels alone give each of the card's warp schedulers
        less than half of these, the sequence is split until they have them. 0: never.
    """

    tile: Tile
    warps_per_scheduler: int

    def segments(self, b: int, t: int, e: int, schedulers: int) -> int:
        """Returns the segments for a scan: a power of two."""
        warps = b * e // self.tile.fit(e).block_channels * self.tile.num_warps
        wanted = self.warps_per_scheduler * schedulers
        segments = 1
        while warps * segments * 2 <= wanted and t >= 2 * segments * MIN_SEGMENT_TOKENS:
            segments *= 2
        return segments


@dataclasses.dataclass(frozen=True)
class CardTuning:
    """One entry of the table: how scans run on a card.

    Attributes:
      measured: whether the choice was timed on the card or only calculated.
      schedulers: warp schedulers of the card: four for each multiprocessor.
      chunk_tokens: tokens for each state that the forward saves for the backward.
      forward: how to run the scan.
      backward: how to run its adjoint.
    """

    measured: bool
    schedulers: int
    chunk_tokens: int
    forward: Pass
    backward: Pass


@dataclasses.dataclass(frozen=True)
class ScanPlan:
    """The tiles and segments of one scan."""

    chunk_tokens: int
    forward: Tile
    backward: Tile
    forward_segments: int
    backward_segments: int


def choose(b: int, t: int, e: int) -> ScanPlan:
    """Returns the plan for a scan of b rows, t tokens and e channels on this machine's GPU."""
    return plan_for(this_tuning(), b, t, e)


def this_tuning() -> CardTuning:
    """Returns the table's entry for this machine's GPU."""
    return table().get(this_card(), table()[DEFAULT_CARD])


def plan_for(row: CardTuning, b: int, t: int, e: int) -> ScanPlan:
    """Returns the plan that an entry of the table gives."""
    return ScanPlan(
        chunk_tokens=row.chunk_tokens,
        forward=row.forward.tile,
        backward=row.backward.tile,
        forward_segments=row.forward.segments(b, t, e, row.schedulers),
        backward_segments=row.backward.segments(b, t, e, row.schedulers),
    )


def this_card() -> str:
    """Returns the name of the first GPU, such as "NVIDIA H200", or "default" without one."""
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else DEFAULT_CARD


def user_table_path() -> pathlib.Path:
    """Returns where ``autotune`` writes and this module looks."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "mamba_jax" / "selective_scan_tuning.json"


@functools.cache
def table() -> dict[str, CardTuning]:
    """Returns the rows by card.

    Raises:
      ValueError: if the user's file is not such a table; the message names it.
    """
    rows = read(pathlib.Path(__file__).with_suffix(".json"))
    path = user_table_path()
    return rows | read(path) if path.is_file() else rows


def read(path: pathlib.Path) -> dict[str, CardTuning]:
    """Reads a table. Raises: ValueError, naming the file, if it is damaged."""
    try:
        return {card: _parse(row) for card, row in json.loads(path.read_text()).items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a tuning table ({type(error).__name__}: {error}); delete it "
            "(mamba-jax autotune writes a new one)"
        ) from error


def write(path: pathlib.Path, rows: dict[str, CardTuning]) -> None:
    """Writes a table for ``read``; a run that starts at the same time reads the old or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({card: dataclasses.asdict(row) for card, row in rows.items()}, indent=2)
    write_atomic(path, text + "\n")


def _parse(row: dict[str, Any]) -> CardTuning:
    _check({name: row[name] for name in ("schedulers", "chunk_tokens")})
    passes = {}
    for name in ("forward", "backward"):
        values = row[name]
        _check(values["tile"])
        _check({"warps_per_scheduler": values["warps_per_scheduler"]}, least=0)
        passes[name] = Pass(**(values | {"tile": Tile(**values["tile"])}))
    return CardTuning(**(row | passes))


def _check(sizes: dict[str, Any], least: int = 1) -> None:
    for name, value in sizes.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} is {value!r}, not a whole number of at least {least}")
        if name in ("block_channels", "num_warps") and value & (value - 1):
            raise ValueError(f"{name} is {value}, not a power of two")
