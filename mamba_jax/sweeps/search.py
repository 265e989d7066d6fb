"""``--search optuna``: chooses settings from earlier results, and stops poor jobs early.

The study is an SQLite file, from which the next call resumes the search; Optuna's own tools, such
as its dashboard, read the same file.
"""

import contextlib
import functools
import json
import pathlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.errors import UserError, first_line
from mamba_jax.runs import exit_status, metrics
from mamba_jax.runs.recorded import DONE, read_status
from mamba_jax.sweeps.hyper import JobSettings, Sweep
from mamba_jax.sweeps.jobs import Job, evaluations, measures

_STUDY = "sweep"
_SETTINGS = "settings"  # attribute of a trial: the settings of its job


class OptunaSearch:
    """A source of jobs: TPE proposes them, and a median pruner stops poor ones."""

    def __init__(
        self,
        sweep: Sweep,
        make: Callable[[JobSettings], Job],
        file: pathlib.Path,
        *,
        trials: int,
        metric: str,
        slots: int,
        seed: int = 0,
    ):
        """
        Args:
          sweep: the settings to choose from.
          make: turns settings into a job.
          file: of the study; created if it is missing.
          trials: total number of trials of the study, including those of earlier calls.
          metric: of an evaluation; lower is better.
          slots: jobs at a time.
          seed: of the proposals.

        Raises:
          UserError: if Optuna is missing, or the study is damaged.
        """
        self._optuna, self._file = _optuna(), file
        _check_intact(file)
        self._sweep, self._make, self._metric = sweep, make, metric
        self._trials: dict[pathlib.Path, Any] = {}
        # Modification time of the metrics file whose evaluations a trial already has.
        self._reported_mtime: dict[pathlib.Path, int] = {}
        with self._errors_as_one_line():
            self._open(trials, slots, seed)

    def _open(self, trials: int, slots: int, seed: int) -> None:
        states = self._optuna.trial.TrialState
        storage = self._optuna.storages.RDBStorage(f"sqlite:///{self._file.resolve()}")
        study = self._optuna.create_study(
            study_name=_STUDY, storage=storage, load_if_exists=True, direction="minimize"
        )
        earlier = study.get_trials()
        # Each call needs its own seed: the same one would repeat the proposals.
        study.sampler = self._optuna.samplers.TPESampler(
            seed=seed + len(earlier), constant_liar=slots > 1
        )
        study.pruner = self._optuna.pruners.MedianPruner(n_startup_trials=4)
        self._study = study
        # Resumes the trials that an earlier call did not finish, and retries the failed ones.
        self._resumable = [
            self._optuna.trial.Trial(study, trial._trial_id)
            for trial in earlier
            if trial.state == states.RUNNING
        ]
        retried = [trial for trial in earlier if trial.state == states.FAIL]
        for trial in retried:
            if not any(t.params == trial.params and t.number > trial.number for t in earlier):
                study.enqueue_trial(trial.params)
        finished = sum(trial.state in (states.COMPLETE, states.PRUNED) for trial in earlier)
        self._remaining = max(0, trials - finished - len(self._resumable))

    @contextlib.contextmanager
    def _errors_as_one_line(self) -> Iterator[None]:
        """Turns any error of the study's file into a one-line error."""
        from sqlalchemy.exc import SQLAlchemyError  # pyright: ignore[reportMissingImports]

        try:
            yield
        except (self._optuna.exceptions.OptunaError, SQLAlchemyError) as error:
            raise UserError(
                f"the study {self._file} cannot be used: {first_line(error)}; fix that, then run "
                "the same command to resume the sweep"
            ) from error

    def next(self) -> Job | None:
        with self._errors_as_one_line():
            return self._next()

    def _next(self) -> Job | None:
        while self._resumable or self._remaining:
            if self._resumable:
                trial = self._resumable.pop(0)
            else:
                trial, self._remaining = self._study.ask(), self._remaining - 1
            job = self._make(self._settings(trial))
            if job.folder in self._trials:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
                continue  # the same settings were proposed again and are already running
            self._trials[job.folder] = trial
            if read_status(job.folder).state != DONE:
                return job
            self.ended(job, 0, pruned=False)  # proposed again: the result exists
        return None

    def should_prune(self, job: Job) -> bool:
        with self._errors_as_one_line():
            return self._should_prune(job)

    def _should_prune(self, job: Job) -> bool:
        try:
            written = (job.folder / metrics.NAME).stat().st_mtime_ns
        except OSError:
            return False
        if self._reported_mtime.get(job.folder) == written:
            return False
        self._reported_mtime[job.folder] = written
        trial = self._trials[job.folder]
        try:
            reported = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
            for step, value in evaluations(job.folder, self._metric):
                if step not in reported:  # Optuna warns about a step that it already has
                    trial.report(value, step)
            return trial.should_prune()
        except self._optuna.exceptions.UpdateFinishedTrialError:  # another tool of Optuna ended it
            return False

    def ended(self, job: Job, code: int, *, pruned: bool) -> None:
        states = self._optuna.trial.TrialState
        trial = self._trials.pop(job.folder)
        value = measures(job.folder).get(self._metric)
        tell = functools.partial(self._study.tell, trial, skip_if_finished=True)
        with self._errors_as_one_line():
            if pruned:
                tell(state=states.PRUNED)
            elif code == 0 and value is not None:
                tell(value)
            elif code not in (exit_status.PREEMPTED, exit_status.PEER_LOST):
                tell(state=states.FAIL)  # the next call resumes the others

    def _settings(self, trial: Any) -> JobSettings:
        known = trial.user_attrs.get(_SETTINGS)
        if known is not None:
            return json.loads(known)
        try:
            settings = self._sweep.suggest(_Chooser(trial))
        except ValueError as error:
            raise UserError(
                f"the study does not match the sweep file ({error}); choose another --out"
            ) from error
        trial.set_user_attr(_SETTINGS, json.dumps(settings))
        return settings


class _Chooser:
    """Draws from an Optuna trial."""

    def __init__(self, trial: Any):
        self._trial = trial

    def real(self, name: str, low: float, high: float, *, log: bool) -> float:
        return self._trial.suggest_float(name, low, high, log=log)

    def choice(self, name: str, count: int) -> int:
        return self._trial.suggest_categorical(name, list(range(count)))


def _check_intact(file: pathlib.Path) -> None:
    """Refuses a damaged study before a job starts; Optuna may notice the damage late."""
    if not file.exists():
        return
    try:
        with contextlib.closing(
            sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True)
        ) as db:
            (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        raise UserError(
            f"the study {file} cannot be read ({first_line(found)}); if it is damaged, move it "
            "away to start a new search; the finished runs are kept"
        )


def _optuna() -> Any:
    try:
        import optuna  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError("--search=optuna needs optuna: pip install -e '.[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
