"""What a run measured: ``metrics.jsonl``, one JSON object per line, and its loss curve."""

import io
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from mamba_jax.files import write_atomic

NAME = "metrics.jsonl"


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the records up to the first invalid line: a kill may truncate the last one."""
    records = []
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Returns the steps at which a number was recorded under a key, and the numbers.

    They are as recorded, NaN and infinity included.
    """
    found = [(r["step"], r[key]) for r in records if type(r.get(key)) in (int, float)]
    return [step for step, _ in found], [value for _, value in found]


def layer_series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[list[float]]]:
    """Returns the same for numbers recorded by layer: steps (n,), and a list per layer, (l, n).

    A record whose number of layers differs from the last one's is skipped.
    """
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), list)]
    layers = len(found[-1][1]) if found else 0
    found = [(step, values) for step, values in found if len(values) == layers]
    return [step for step, _ in found], [list(v) for v in zip(*(v for _, v in found), strict=True)]


class History:
    """Appends records. A run that resumes from step s drops the records after s, so that curves do
    not overlap."""

    def __init__(self, output_dir: pathlib.Path, step: int, source: pathlib.Path | None = None):
        """
        Args:
          output_dir: the run's folder.
          step: the step that the run resumes from; 0 at its beginning.
          source: the folder of the run that it resumes, if another.
        """
        self.path = output_dir / NAME
        records = read((source or output_dir) / NAME)
        kept = "".join(_line(record) for record in records if record["step"] <= step)
        write_atomic(self.path, kept)
        self._stream = self.path.open("a")

    def append(self, **record: Any) -> None:
        """Adds a record, which must have a ``step``."""
        self._stream.write(_line(record))

    def flush(self) -> None:
        """Passes the records to the operating system, so that a kill does not lose them."""
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def mean_recent_loss(records: list[dict[str, Any]]) -> float:
    """Returns the mean training loss of the last tenth of the steps; NaN where there are none."""
    losses = [record["loss"] for record in records if "loss" in record]
    recent = losses[-max(1, len(losses) // 10) :]
    return sum(recent) / len(recent) if recent else math.nan


def usual_top(losses: Any, others: Sequence[float]) -> float | None:
    """Returns where the axis ends if a few losses are far above the rest; None if none is.

    The same as in the reports' charts.js.

    Args:
      losses: (n,) in the order of the steps, finite; the first ones are on the axis.
      others: values that are on the axis in any case.
    """
    import numpy as np

    if len(losses) < 20:
        return None
    known = [value for value in others if math.isfinite(value)]
    top = max([*known, np.quantile(losses, 0.98), np.median(losses[:5])])
    low, high = losses.min(), losses.max()
    return float(top + 0.05 * (top - low)) if high > top + 0.3 * (top - low) else None


def draw_curve(
    records: list[dict[str, Any]], picture: pathlib.Path, *, title: str, unigram_nll: float
) -> None:
    """Draws training and evaluation loss over steps, with the unigram loss as the baseline.

    Args:
      records: as ``read`` returns them.
      picture: the PNG to write.
      title: above the plot.
      unigram_nll: loss of the corpus's unigram distribution, in nats per token.
    """
    # Imported here because it takes a second; without pyplot, which may look for a display.
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r]).reshape(-1, 2)
    evals = np.array([(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r])
    evals = evals.reshape(-1, 2)
    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if len(train):
        axes.plot(*train.T, color="#9ecae1", linewidth=0.8, label="training, each step")
        width = max(1, len(train) // 40)
        if width > 1:
            kernel = np.ones(width) / width
            smooth = np.convolve(train[:, 1], kernel, mode="valid")
            axes.plot(train[width - 1 :, 0], smooth, color="#2171b5", label=f"mean of {width}")
    if len(evals):
        axes.plot(*evals.T, color="#d94801", marker="o", markersize=4, label="evaluation")
        axes.annotate(
            f"{evals[-1, 1]:.2f}",
            evals[-1],
            xytext=(6, 4),
            textcoords="offset points",
            color="#d94801",
            annotation_clip=False,
        )
    axes.axhline(
        unigram_nll,
        color="#636363",
        linestyle="--",
        linewidth=1,
        label=f"unigram {unigram_nll:.2f}",
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    finite = train[np.isfinite(train[:, 1])]
    if (top := usual_top(finite[:, 1], [*evals[:, 1], unigram_nll])) is not None:
        step, highest = finite[finite[:, 1].argmax()]
        is_left = step < finite[-1, 0] / 2
        axes.set_ylim(top=top)
        axes.annotate(
            f"▲ {highest:.4g} at step {step:.0f}",
            (step, top),
            xytext=(6 if is_left else -6, -12),
            textcoords="offset points",
            ha="left" if is_left else "right",
            fontsize="small",
            color="#c9201d",
        )
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomic(picture, image.getvalue())
