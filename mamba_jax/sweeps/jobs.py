"""A job of a sweep: a training run in its own folder, which is named after its settings."""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from mamba_jax.checkpoints.folder import list_checkpoints, read_metadata
from mamba_jax.config import RunConfig, to_dict
from mamba_jax.config.schema import flatten
from mamba_jax.errors import UserError
from mamba_jax.runs import background, metrics
from mamba_jax.runs.recorded import (
    DONE,
    FAILED,
    NEW,
    PRUNED,
    RUNNING,
    STOPPED,
    UNKNOWN,
    read_status,
)
from mamba_jax.sweeps.hyper import JobSettings

METRICS = ("eval_loss", "eval_perplexity", "eval_bits_per_byte")  # lower is better
PAGE = "report.html"  # as ``report run`` names it
_FLAGS = (
    "model_size",
    "training_preset",
)  # flags that a sweep may set although they are not config fields
_LONGEST_NAME = 100  # a file system allows 255 bytes, a terminal's line less


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    settings: JobSettings
    folder: pathlib.Path  # its output_dir
    command: tuple[str, ...]

    @property
    def log(self) -> pathlib.Path:
        return self.folder / "training.log"


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """The result of a job."""

    name: str
    settings: JobSettings
    state: str
    why: str  # words on the state
    measures: dict[str, float]
    has_page: bool = False  # in its folder


def make_job(
    settings: JobSettings, base: RunConfig, flags: Sequence[str], out: pathlib.Path
) -> Job:
    """Makes a job.

    Args:
      settings: fields of the config and their values.
      base: the config that ``flags`` result in; a sweep rounds its values for integer fields.
      flags: for every run of the sweep.
      out: the sweep's folder.
    """
    fields = flatten(to_dict(base))
    settings = {name: _fitted(value, fields.get(name)) for name, value in settings.items()}
    folder = out / job_name(settings)
    command = (
        *(sys.executable, "-m", "mamba_jax.train", *flags),
        *(_flag(name, value) for name, value in settings.items()),
        f"--output_dir={folder}",
        f"--config.log_dir={folder}",
        f"--config.tensorboard_dir={folder / 'runs'}",
        "--resume=auto",
    )
    return Job(settings, folder, command)


def job_name(settings: JobSettings) -> str:
    """Returns the name of a job's folder: its settings, with a hash if they are shortened."""
    leaves = [name.rpartition(".")[2] for name in settings]
    names = leaves if len(set(leaves)) == len(leaves) else list(settings)
    texts = [_brief(value) for value in settings.values()]
    plain = ",".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
    name = re.sub(r"[^\w.,=+-]+", "-", plain)[:_LONGEST_NAME]
    exact = [text == _text(value) for text, value in zip(texts, settings.values(), strict=True)]
    if name == plain and all(exact):
        return name
    digest = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()
    return f"{name}-{digest[:8]}"


def _flag(name: str, value: Any) -> str:
    return f"--{name}={value}" if name in _FLAGS else f"--config.{name}={_text(value)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def _brief(value: Any) -> str:
    short = f"{value:.4g}" if isinstance(value, float) else ""
    return _text(value) if not short or float(short) == value else short


def _fitted(value: Any, default: Any) -> Any:
    """Converts NumPy scalars to Python's, lists to tuples, and floats to an integer field's."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, list):
        return tuple(value)
    whole = isinstance(default, int) and not isinstance(default, bool)
    return round(value) if whole and isinstance(value, float) else value


def measures(folder: pathlib.Path) -> dict[str, float]:
    """Returns the latest metrics of a run: its last evaluation, training loss, speed and step."""
    records = metrics.read(folder / metrics.NAME)
    found: dict[str, float] = {}
    for record in records:
        found |= {name: record[name] for name in (*METRICS, "tokens_per_sec") if name in record}
    if records:
        found |= {"step": records[-1]["step"], "train_loss": metrics.mean_recent_loss(records)}
    elif checkpoints := list_checkpoints(folder):
        with contextlib.suppress(UserError):
            metadata = read_metadata(checkpoints[0][1])
            found |= {**metadata.metrics, "step": metadata.step}
    return found


def evaluations(folder: pathlib.Path, metric: str) -> list[tuple[int, float]]:
    """Returns (step, value) of each evaluation of a run."""
    records = metrics.read(folder / metrics.NAME)
    return [(record["step"], record[metric]) for record in records if metric in record]


def read_rows(out: pathlib.Path, metric: str) -> list[SweepRow]:
    """Returns every job ever started in a sweep's folder: best first, unfinished last."""
    found = []
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        settings = background.read(folder).get("settings")
        if settings is not None:
            now, has_page = read_status(folder), (folder / PAGE).is_file()
            found.append(
                SweepRow(folder.name, settings, now.state, now.why, measures(folder), has_page)
            )
    order = [DONE, PRUNED, RUNNING, STOPPED, UNKNOWN, NEW, FAILED]
    return sorted(found, key=lambda row: (order.index(row.state), _rank(row.measures.get(metric))))


def _rank(value: float | None) -> float:
    """Returns a number to sort by; NaN has no order of its own, so it comes last."""
    return math.inf if value is None or math.isnan(value) else value
