"""A run as arrays, and the robust statistics that the rules use.

Legend: n records, l layers.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mamba_jax.config import RunConfig, from_dict, plan
from mamba_jax.errors import UserError
from mamba_jax.runs import metrics, recorded
from mamba_jax.runs.recorded import Run, Status

SCALARS = ("loss", "learning_rate", "gradient_norm", "eval_loss")
BY_LAYER = ("dt_mean", "dt_max", "A_min", "A_max", "depth_mean", "gates_closed", "gates_open")
RATES = ("tokens_per_sec", "data_wait", "memory_bytes")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A value over the steps.

    Attributes:
      steps: (n,) int64, rising.
      values: (n,) float64, or (l, n); finite.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, chosen: slice | np.ndarray) -> "Curve":
        """Returns the records of a slice, or those where a mask (n,) is true."""
        return Curve(self.steps[chosen], self.values[..., chosen])

    def after(self, step: int) -> "Curve":
        """Returns the records of later steps."""
        return self[self.steps > step]

    def between(self, first: int, last: int) -> "Curve":
        """Returns the records of steps first … last."""
        return self[(self.steps >= first) & (self.steps <= last)]

    def last(self, share: float, least: int = 1) -> "Curve":
        """Returns the last records: a share of all, but at least ``least``."""
        return self[-max(least, round(share * len(self))) :]

    @property
    def span(self) -> str:
        """The steps covered, for people."""
        if len(self) < 2:
            return f"step {self.steps[0]:,}"
        return f"steps {self.steps[0]:,} to {self.steps[-1]:,}"


EMPTY = Curve(np.zeros(0, np.int64), np.zeros(0))


@dataclasses.dataclass(frozen=True)
class RunSignals:
    """The curves of a ``recorded.Run``, and the facts that the rules use besides.

    Attributes:
      folder: its output_dir.
      config: that of the run's newest start; None: not recorded, or from another version.
      parameters: their number; 0: not recorded.
      unigram_nll: nats per token of a model that knows only token frequencies; None: not recorded.
      curves: name → curve of ``SCALARS``, ``BY_LAYER`` and ``RATES``; those never recorded are
        empty.
      not_finite: name → first step at which it was NaN or infinite.
      skipped: (n,) steps that were skipped as spikes.
      layout_step: the step of the last change of model, device or layout; rates and memory of
        earlier steps are not comparable.
      device_kind: the last device that it trained on, as JAX names it; "": not recorded.
      warnings: (step, text) of each.
      status: how it stands or ended.
    """

    folder: pathlib.Path
    config: RunConfig | None = None
    parameters: int = 0
    unigram_nll: float | None = None
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    not_finite: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    layout_step: int = 0
    device_kind: str = ""
    warnings: tuple[tuple[int, str], ...] = ()
    status: Status = recorded.NO_RUN

    def __getitem__(self, name: str) -> Curve:
        """Returns the curve of that name."""
        assert name in SCALARS + BY_LAYER + RATES
        return self.curves.get(name, EMPTY)

    @functools.cached_property
    def last_step(self) -> int:
        return max((int(c.steps[-1]) for c in self.curves.values() if len(c)), default=0)

    @functools.cached_property
    def warm_step(self) -> int:
        """The last step of the warm-up; without a config, the step of the highest rate.

        It is beyond the last step if the run is still warming up.
        """
        if self.config is not None:
            return self.config.training.resolved_warmup_steps
        rate = self["learning_rate"]
        return int(rate.steps[np.argmax(rate.values)]) if len(rate) else 0

    @property
    def peak_rate(self) -> float:
        """The highest learning rate so far; 0: none is recorded."""
        return float(self["learning_rate"].values.max(initial=0.0))

    @property
    def from_beginning(self) -> bool:
        """Whether the record covers the first step of the training."""
        return len(self["loss"]) > 0 and self["loss"].steps[0] <= 1


def read(folder: pathlib.Path) -> RunSignals:
    """Reads the run in a folder.

    Raises:
      UserError: if there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the output_dir of a run")
    file = folder / metrics.NAME
    run = recorded.read_run(folder) if file.is_file() else None
    if run is None or not run.records:
        state = "is empty or damaged" if run else "is missing"
        raise UserError(
            f"{folder}: {metrics.NAME} {state}; give the output_dir of a run that has started"
        )
    return of_run(run)


def of_run(run: Run) -> RunSignals:
    """Returns the signals of a run."""
    records = run.records
    series = {name: metrics.series(records, name) for name in SCALARS + RATES}
    series |= {name: metrics.layer_series(records, name) for name in BY_LAYER}
    curves, not_finite = {}, {}
    for name, (steps, values) in series.items():
        curve, broken = _curve(steps, values)
        if len(curve):
            curves[name] = curve
        if broken is not None:
            not_finite[name] = broken
    return RunSignals(
        folder=run.folder,
        config=_config(run.about),
        parameters=run.parameters or 0,
        unigram_nll=run.unigram_nll,
        curves=curves,
        not_finite=not_finite,
        skipped=np.unique([r["step"] for r in records if r.get("skipped")]).astype(np.int64),
        layout_step=_layout_step(records),
        device_kind=next((r["device_kind"] for r in records[::-1] if "device_kind" in r), ""),
        warnings=tuple((r["step"], str(r["warning"])) for r in records if "warning" in r),
        status=run.status,
    )


def _curve(steps: Sequence[int], values: Sequence[Any]) -> tuple[Curve, int | None]:
    """Returns the finite part of a curve, and the first step at which it is not finite."""
    if not steps:
        return EMPTY, None
    steps_n, values_n = np.asarray(steps, np.int64), np.asarray(values, np.float64)
    # If a step is recorded twice, the later record counts.
    steps_n, backwards = np.unique(steps_n[::-1], return_index=True)
    values_n = values_n[..., ::-1][..., backwards]
    finite_n = np.all(np.isfinite(np.atleast_2d(values_n)), axis=0)
    broken = int(steps_n[~finite_n][0]) if not finite_n.all() else None
    return Curve(steps_n, values_n)[finite_n], broken


def _config(about: Mapping[str, Any]) -> RunConfig | None:
    try:
        config = from_dict(about["config"])
        plan.parse(config.model.plan)  # raises where the plan is of another version
        return config
    except (KeyError, UserError):
        return None


def _layout_step(records: list[dict[str, Any]]) -> int:
    """Returns the step of the last change of device, model or layout."""
    step, device, layout = 0, None, None
    for record in records:
        if "device_kind" in record:
            new = (record["device_kind"], record.get("device_count"))
            if device is not None and new != device:
                step = record["step"] - 1
            device = new
        elif isinstance(run := record.get("run"), dict):
            config = run.get("config", {})
            new = [config.get(group) for group in ("model", "vram", "parallel")]
            if layout is not None and new != layout:
                step = record["step"]
            layout = new
    return step


def windows(curve: Curve, most: int = 40, least_records: int = 10) -> list[Curve]:
    """Splits a curve into up to ``most`` equal parts of at least ``least_records`` records."""
    count = min(most, len(curve) // least_records)
    return [curve[part] for part in np.array_split(np.arange(len(curve)), count)] if count else []


def median(curve: Curve) -> float:
    """Returns the median of the values; the curve is not empty."""
    return float(np.median(curve.values))


def noise(values: np.ndarray) -> float:
    """Returns the standard deviation that a normal distribution of the same spread would have.

    1.4826 × the median distance from the median, which outliers do not affect.
    """
    return 1.4826 * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def above_recent(values: np.ndarray, memory: int, early: int) -> np.ndarray:
    """Returns how far each value is above the median of the ``memory`` values before it.

    For the first ``memory`` values it is the median of the ``early`` values before: a loss falls
    fast at first. The first ``early`` values have no past: 0.
    """
    rise = np.zeros(len(values))
    if early < memory:
        rise[:memory] = above_recent(values[:memory], early, early)
    if len(values) > memory:
        past = np.lib.stride_tricks.sliding_window_view(values[:-1], memory)
        for start in range(0, len(past), 10_000):  # in pieces that fit into the cache
            piece = slice(memory + start, memory + start + 10_000)
            rise[piece] = values[piece] - np.median(past[start : start + 10_000], axis=1)
    return rise


def groups(steps: np.ndarray, apart: int) -> list[np.ndarray]:
    """Splits rising steps where two neighbours are more than ``apart`` from each other."""
    if not len(steps):
        return []
    return np.split(steps, np.flatnonzero(np.diff(steps) > apart) + 1)
