"""Curves as pages store them: thinned to what a screen can show, with every spike kept."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 1_000  # of a curve: few screens have more columns
MOST_LAYER_POINTS = 200  # of a curve by layer; a chart may have dozens of them
_DIGITS = 6  # significant, of every number in a page


@dataclasses.dataclass(frozen=True)
class Points:
    """A curve whose points each combine ``size`` consecutive values.

    Only ``gaps`` records values that are not finite; if a point has no others, its ``mean``,
    ``low`` and ``high`` are NaN.
    """

    size: int
    first: np.ndarray  # (p,) int64: step of the first value
    last: np.ndarray  # (p,) int64: of the last
    mean: np.ndarray  # (p,) float64
    low: np.ndarray  # (p,) float64: the minimum
    high: np.ndarray  # (p,) float64: the maximum
    gaps: list[tuple[int, int, str]]  # a point with NaN or inf: step of the first, number, what


def thin(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> Points:
    """Combines neighbouring values until at most ``most`` points remain.

    Args:
      steps: (n,), ascending.
      values: (n,), any float.
      most: the maximum number of points.
    """
    x_n, y_n = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    size = max(1, -(-len(x_n) // most))
    begins = np.arange(0, len(x_n), size)
    ends = np.minimum(begins + size, len(x_n))
    if not len(x_n):
        none = np.zeros(0)
        return Points(size, x_n, x_n, none, none, none, [])
    good_n = np.isfinite(y_n)
    y_or_nan = np.where(good_n, y_n, np.nan)
    count = np.add.reduceat(good_n, begins, dtype=np.int64)
    total = np.add.reduceat(np.where(good_n, y_n, 0.0), begins)
    mean = np.divide(total, count, out=np.full(len(begins), np.nan), where=count > 0)
    gaps = []
    for point in np.flatnonzero(count < ends - begins):
        bad = np.flatnonzero(~good_n[begins[point] : ends[point]]) + begins[point]
        kinds = dict.fromkeys(f"{y_n[i]:.0f}" for i in bad)  # "nan", "inf", "-inf"
        gaps.append((int(x_n[bad[0]]), len(bad), ", ".join(kinds)))
    return Points(
        size=size,
        first=x_n[begins],
        last=x_n[ends - 1],
        mean=mean,
        low=np.fmin.reduceat(y_or_nan, begins),
        high=np.fmax.reduceat(y_or_nan, begins),
        gaps=gaps,
    )


def trailing_mean(values: Sequence[float], width: int) -> np.ndarray:
    """Returns at each place the mean of the finite ones of the last ``width`` values, (n,) float64.

    There are fewer values at the start; the mean of none is NaN.
    """
    y_n = np.asarray(values, np.float64)
    good_n = np.isfinite(y_n)
    totals, counts = (
        np.concatenate([[0.0], np.cumsum(column)]) for column in (np.where(good_n, y_n, 0), good_n)
    )
    ends = np.arange(1, len(y_n) + 1)
    begins = np.maximum(ends - width, 0)
    count = counts[ends] - counts[begins]
    total = totals[ends] - totals[begins]
    return np.divide(total, count, out=np.full(len(y_n), np.nan), where=count > 0)


def smoothing_width(count: int) -> int:
    """Returns over how many steps to average the loss of a run of ``count`` steps.

    An average over more than 200 would lag behind a falling loss.
    """
    return max(1, min(count // 40, 200))


def curve(name: str, points: Points, look: str = "line", **about: Any) -> dict[str, Any]:
    """Returns a curve for ``charts.js``.

    Args:
      name: in the legend.
      points: the curve's points.
      look: "line", "faint" (behind another one), "level" (a reference) or "dots".
      about: ``colour``, a number; or ``share``, from 0 (the first layer) to 1; ``run``, its number
        in a comparison.
    """
    made = {
        "name": name,
        "look": look,
        "size": points.size,
        "x": points.last.tolist(),
        "y": _plain(points.mean),
        **about,
    }
    if points.size > 1:
        made |= {
            "from": points.first.tolist(),
            "low": _plain(points.low),
            "high": _plain(points.high),
        }
    if points.gaps:
        made["gaps"] = points.gaps
    return made


def chart(
    key: str,
    title: str,
    curves: list[dict[str, Any]],
    *,
    unit: str = "",
    note: str = "",
    log: bool = False,
    by_layer: bool = False,
    skips: bool = False,
    robust: bool = False,
) -> dict[str, Any]:
    """Returns a chart for ``charts.js``.

    Args:
      key: its name in the page.
      title: above it.
      curves: as ``curve`` makes them.
      unit: the unit of its values; "bytes" are shown in MiB or GiB, "share" in percent.
      note: a sentence below the title.
      log: whether the vertical axis is logarithmic at first; a button changes that.
      by_layer: whether each curve is a layer.
      skips: whether to mark skipped steps.
      robust: whether a linear axis leaves out a few values far above the others; the chart then
        names the highest.
    """
    return {
        "key": key,
        "title": title,
        "unit": unit,
        "note": note,
        "log": log,
        "by_layer": by_layer,
        "skips": skips,
        "robust": robust,
        "curves": curves,
    }


def _plain(values: np.ndarray) -> list[float | None]:
    """Rounds to significant digits; a value that is not finite becomes null."""
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]
