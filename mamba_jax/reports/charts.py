"""Curves as the pages hold them: thinned so far that a screen loses nothing, spikes included."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST_POINTS = 1_000  # of a curve: a screen has hardly more columns
MOST_LAYER_POINTS = 200  # of a curve by layer, of which a chart may hold dozens
_DIGITS = 6  # significant, of every number in a page


@dataclasses.dataclass(frozen=True)
class Points:
    """A curve of at most so many points, each of ``size`` values that follow one another.

    Of values that are no numbers only ``gaps`` tells; where a point has no other, ``mean``, ``low``
    and ``high`` are NaN.
    """

    size: int
    first: np.ndarray  # (p,) int64: step of the first value
    last: np.ndarray  # (p,) int64: of the last
    mean: np.ndarray  # (p,) float64
    low: np.ndarray  # (p,) float64: the least
    high: np.ndarray  # (p,) float64: the greatest
    gaps: list[tuple[int, int, str]]  # a point with NaN or inf: step of the first, number, what


def thin(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> Points:
    """Takes neighbours together until ``most`` points or fewer are left.

    Args:
      steps: (n,), ascending.
      values: (n,), any float.
      most: points to return at most.
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
    """Returns at each place the mean of the last ``width`` values that are numbers, (n,) float64.

    Fewer at the beginning; NaN where there is none.
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
    """Returns how many of so many steps the mean line of a loss takes together.

    More than 200 would make the line smoother than anyone needs, and late where the loss falls.
    """
    return max(1, min(count // 40, 200))


def curve(name: str, points: Points, look: str = "line", **about: Any) -> dict[str, Any]:
    """Returns a curve for ``charts.js``.

    Args:
      name: in the legend.
      points: of the curve.
      look: "line", "faint" (behind another one), "level" (what to be held against) or "dots".
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
      unit: of its values; "bytes" and "share" are shown as MiB … and as per cent.
      note: a sentence below the title.
      log: whether the vertical axis begins logarithmic; a button changes that.
      by_layer: whether each curve is a layer.
      skips: whether to mark skipped steps.
      robust: whether a few values far above the others run out of a linear axis, which names the
        highest.
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
    """Rounds to significant digits; what is no number becomes null."""
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()]
