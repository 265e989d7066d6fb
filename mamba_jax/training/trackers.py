"""Where a run's measures go besides ``metrics.jsonl``: one small interface, several trackers.

TensorBoard is always one of them. ``config.trackers`` names others; each needs the extra of its
name and finds its server by its own environment variables (``WANDB_MODE``,
``MLFLOW_TRACKING_URI`` …). A tracker may raise any exception: the monitor then continues without
it.
"""

import html
import importlib.util
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from mamba_jax.config import RunConfig
from mamba_jax.config.schema import Value
from mamba_jax.errors import UserError, first_line

_PROJECT = "mamba_jax"  # unless the tracker's own environment variable names another
_MOST_PARAMETERS = 100  # that MLflow accepts in one call


class Tracker(Protocol):
    """What a run reports."""

    def hyperparameters(self, values: Mapping[str, Value]) -> None:
        """Takes the config's fields by dotted name, once."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve; steps never go back."""
        ...

    def text(self, step: int, tag: str, text: str) -> None:
        """Adds a text, such as a sample."""
        ...

    def close(self, succeeded: bool) -> None:
        """Ends the run there."""
        ...


class Wandb:
    """Weights & Biases; ``WANDB_MODE=offline`` writes below ``output_dir`` only."""

    def __init__(self, config: RunConfig):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        folder = pathlib.Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=config.name,
            dir=folder,
            settings=wandb.Settings(console="off"),  # the log file contains what is printed
        )

    def hyperparameters(self, values: Mapping[str, Value]) -> None:
        self._run.config.update(dict(values))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{html.escape(text)}</pre>")}, step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class Mlflow:
    """MLflow, at ``MLFLOW_TRACKING_URI``; without it, where MLflow itself puts runs."""

    def __init__(self, config: RunConfig):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        found = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(found, run_name=config.name).info.run_id

    def hyperparameters(self, values: Mapping[str, Value]) -> None:
        parameters = [self._entities.Param(name, str(value)) for name, value in values.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            batch = parameters[start : start + _MOST_PARAMETERS]
            self._client.log_batch(self._run_id, params=batch)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        points = [self._entities.Metric(tag, value, now, step) for tag, value in values.items()]
        self._client.log_batch(self._run_id, metrics=points)

    def text(self, step: int, tag: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{tag}/step_{step}.txt")

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if succeeded else "FAILED")


_TRACKERS: Mapping[str, Callable[[RunConfig], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}


def check_trackers(config: RunConfig) -> None:
    """Looks for the package of each tracker that ``config.trackers`` names; imports none.

    Raises:
      UserError: if one is not installed.
    """
    for name in config.tracker_names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is not a package
            raise _not_installed(config, name)


def _not_installed(config: RunConfig, name: str) -> UserError:
    return UserError(
        f'trackers="{config.trackers}": {name} is not installed; '
        f"pip install -e '.[{name}]', or leave it out"
    )


def open_trackers(config: RunConfig, warn: Callable[[str], None]) -> dict[str, Tracker]:
    """Starts a run in each tracker that ``config.trackers`` names.

    Args:
      config: the run's config.
      warn: receives a warning for each tracker that cannot start; the run continues without it.

    Raises:
      UserError: if the extra of one is not installed.
    """
    trackers = {}
    for name in config.tracker_names:
        try:
            trackers[name] = _TRACKERS[name](config)
        except ImportError as error:
            raise _not_installed(config, name) from error
        except Exception as error:  # any error of a tracker, its network or its server
            reason = f"{type(error).__name__}: {first_line(error)}"
            warn(f"{name} cannot start ({reason}); training continues without it")
    return trackers
