"""A run as its folder shows it; ``Status`` alone determines its state and how it ended.

Sources: ``metrics.jsonl``, else the config of the newest checkpoint; ``run.lock`` and
``background.json`` for a run that is active or whose process was killed.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import signal
import statistics
from collections.abc import Mapping
from typing import Any

from mamba_jax.checkpoints.folder import Metadata, list_checkpoints, read_metadata
from mamba_jax.config import RunConfig, to_dict
from mamba_jax.config.schema import Value, flatten
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.errors import INTERRUPTED, UserError
from mamba_jax.runs import background, exit_status, lock, metrics

DONE, RUNNING, FAILED, STOPPED, PRUNED, NEW, UNKNOWN = (
    *("done", "running", "failed", "stopped", "pruned", "new", "not finished"),
)
_STOPPED_BY = ("KeyboardInterrupt", "StoppedEarly", "SystemExit")  # a user or the system asked
_STOPPED_CODES = (
    *(exit_status.PREEMPTED, exit_status.PEER_LOST, INTERRUPTED),
    exit_status.exit_code(-signal.SIGTERM),
)


@dataclasses.dataclass(frozen=True)
class RunError:
    """The exception that ended a run."""

    step: int
    kind: str  # its class
    message: str  # "": it has none

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.kind, self.message)))


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run stands or ended."""

    state: str  # DONE …
    why: str = ""  # "": the state needs no reason; of a running one: where it runs
    error: RunError | None = None  # that ended it, if it recorded one
    exit_code: int | None = None  # None: nobody waited for it
    log: str = ""  # its file; "": not recorded


NO_RUN = Status(NEW)


@dataclasses.dataclass(frozen=True)
class RunStart:
    """Where a run started or resumed."""

    step: int
    started: str  # local time; "": not recorded
    config: Mapping[str, Value]  # by dotted name; empty: not recorded

    @property
    def step_tokens(self) -> int | None:
        """Tokens that a step trains on; None: not known."""
        try:
            batch = self.config["vram.effective_batch_size"]
            return int(batch) * int(self.config["model.max_seq_len"])
        except (KeyError, ValueError):
            return None


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known about a run."""

    folder: pathlib.Path
    records: list[dict[str, Any]]
    starts: list[RunStart]  # at least one
    about: Mapping[str, Any]  # what the newest start recorded of the run; empty: nothing
    parameters: int | None
    unigram_nll: float | None  # loss by the corpus's token frequencies alone, nats per token
    device: str  # "": not recorded
    saved_step: int  # step of the newest checkpoint; 0: none is known
    checkpoints: list[tuple[int, pathlib.Path]]  # (step, folder), newest first
    status: Status = NO_RUN

    @property
    def state(self) -> str:
        return self.status.state

    @property
    def why(self) -> str:
        return self.status.why

    @property
    def config(self) -> Mapping[str, Value]:
        """By dotted name; empty: not recorded."""
        return self.starts[-1].config

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def last_step(self) -> int:
        """Optimizer steps taken, as far as they are recorded; without records, as saved."""
        return max((r["step"] for r in self.records), default=self.saved_step)

    @property
    def planned_steps(self) -> int | None:
        steps = self.config.get("training.max_steps")
        return int(steps) if isinstance(steps, (int, float)) else None

    @property
    def train_loss(self) -> float | None:
        """Mean of the last tenth of the steps; None: no step is recorded."""
        losses = metrics.series(self.records, "loss")[1]
        return metrics.mean_recent_loss(self.records) if losses else None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [r for r in self.records if "eval_loss" in r]

    @property
    def best_evaluation(self) -> dict[str, Any] | None:
        """The evaluation of lowest loss; NaN does not count."""
        losses = [r for r in self.evaluations if r["eval_loss"] == r["eval_loss"]]
        return min(losses, key=lambda r: r["eval_loss"], default=None)

    @property
    def best_checkpoint(self) -> tuple[int, pathlib.Path, float] | None:
        """Step, folder and evaluation loss of the best checkpoint that still exists."""
        losses = {r["step"]: r["eval_loss"] for r in self.evaluations}
        found = [
            (step, path, losses[step])
            for step, path in self.checkpoints
            if step in losses and not math.isnan(losses[step])
        ]
        return min(found, key=lambda each: each[2], default=None)

    @property
    def tokens_per_sec(self) -> float | None:
        """Median over the intervals on the device used last."""
        rated = [r for r in self.records if "tokens_per_sec" in r]
        here = [r for r in rated if _device(r) == _device(rated[-1])]
        return statistics.median(r["tokens_per_sec"] for r in here) if here else None

    @property
    def memory_bytes(self) -> float | None:
        """The recorded peak."""
        return max(metrics.series(self.records, "memory_bytes")[1], default=None)

    @property
    def skipped_steps(self) -> list[int]:
        return [r["step"] for r in self.records if r.get("skipped")]

    @property
    def training_secs(self) -> float | None:
        """Time spent on steps, without compilation, evaluation and saving; None: not known.

        An interval's rate counts for all of its steps.
        """
        steps, rates = metrics.series(self.records, "tokens_per_sec")
        ends = [self.tokens_at(step) for step in (0, *steps)]
        spans = zip(itertools.pairwise(ends), rates, strict=True)
        known = [
            (after - before) / rate
            for (before, after), rate in spans
            if before is not None and after is not None and rate > 0
        ]
        return sum(known) if known else None

    @property
    def token_line(self) -> list[tuple[int, int, int]] | None:
        """How tokens follow from steps: (step, tokens by then, tokens per step from there on).

        The line bends where a run resumed with another batch size or length. None: not known.
        """
        line: list[tuple[int, int, int]] = []
        for start in self.starts:
            if start.step_tokens is None:
                return None
            # Steps before the first record are assumed to have had the batch of that record.
            step, tokens, rate = line[-1] if line else (0, 0, start.step_tokens)
            line.append((start.step, tokens + (start.step - step) * rate, start.step_tokens))
        return line

    def tokens_at(self, step: int) -> int | None:
        """Returns the tokens trained on up to a step; None: not known."""
        line = self.token_line
        if line is None:
            return None
        place = max(0, bisect.bisect_right(line, step, key=lambda bend: bend[0]) - 1)
        bend, tokens, rate = line[place]
        return tokens + (step - bend) * rate


def read_run(folder: pathlib.Path) -> Run:
    """Reads a run's folder.

    Raises:
      UserError: if it is not a run's folder.
    """
    if not _is_run(folder):
        raise UserError(f"{folder} is not a run's folder: it {_lack(folder)}")
    return from_records(folder, metrics.read(folder / metrics.NAME))


def read_status(folder: pathlib.Path) -> Status:
    """Returns how the run in a folder stands or ended; NEW where there is none."""
    if _is_run(folder):
        return read_run(folder).status
    return _running(folder) or NO_RUN


def from_records(folder: pathlib.Path, records: list[dict[str, Any]]) -> Run:
    """Makes a run of what ``metrics.read`` returns, and of the rest of its folder."""
    checkpoints = list_checkpoints(folder)
    records = [r for r in records if type(r["step"]) is int]
    started = [r for r in records if isinstance(r.get("run"), dict)]
    saved = _newest_metadata(checkpoints)
    saved_config = flat_config(saved.laid_out) if saved else {}
    starts = [
        RunStart(r["step"], str(r["run"].get("started", "")), flatten(r["run"].get("config", {})))
        for r in started
    ]
    # Steps recorded by a version that did not record the run itself are those of the checkpoint.
    if not starts or starts[0].step > min(r["step"] for r in records):
        starts.insert(0, RunStart(0, "", saved_config))
    about = started[-1]["run"] if started else {}
    parameters, unigram_nll = about.get("parameters"), about.get("unigram_nll")
    if parameters is None and saved and saved.config.model.vocab_size:
        parameters = parameter_count(saved.config.model).total
    rated = [r for r in records if "device_kind" in r]
    device = saved.device if saved else ""
    if rated:
        kind, count = _device(rated[-1])
        device = f"{count} × {kind}"
    # Several starts at the same step: the earlier attempts trained no step.
    starts = list({start.step: start for start in starts}.values())
    saved_step = saved.step if saved else 0
    run = Run(
        folder,
        records,
        starts,
        about,
        parameters,
        unigram_nll,
        device,
        saved_step,
        checkpoints,
    )
    return dataclasses.replace(run, status=_status(run))


def _device(record: dict[str, Any]) -> tuple[Any, Any]:
    return record.get("device_kind"), record.get("device_count")


def _status(run: Run) -> Status:
    facts, error = background.read(run.folder), _last_error(run.records)
    log = str(run.about.get("log", ""))
    if facts and log not in ("", facts.get("log")):  # two attempts: the older one does not count
        if facts.get("started", "~") < run.starts[-1].started:
            facts = {}
        else:
            error = None
    status = _running(run.folder) or _ended(run, facts, error)
    return dataclasses.replace(status, log=str(facts.get("log", log)))


def _ended(run: Run, facts: Mapping[str, Any], error: RunError | None) -> Status:
    """Returns how a run ended, by its records and by the facts of ``background.json``."""
    code, why = facts.get("exit_code"), str(facts.get("why", ""))
    if error and error.kind in _STOPPED_BY and code not in (None, *_STOPPED_CODES):
        error = None  # it had stopped before; the launcher restarted it, and then it failed
    if facts.get("pruned"):
        return Status(PRUNED, why, error, code)
    if code == 0:
        return Status(DONE, exit_code=0)
    if code is not None or error:
        by_request = code in _STOPPED_CODES or (error is not None and error.kind in _STOPPED_BY)
        if error:
            is_plain = error.kind in (*_STOPPED_BY, "UserError")  # the message says it all
            why = (is_plain and error.message) or str(error)
        elif code is not None and not why:
            why = exit_status.meaning(code)
        return Status(STOPPED if by_request else FAILED, why, error, code)
    evaluated = {r["step"] for r in run.evaluations}
    if run.planned_steps is not None and run.planned_steps <= run.last_step in evaluated:
        return Status(DONE)
    if facts:
        reason = exit_status.reason(pathlib.Path(facts.get("log", "")))
        killed = "killed before its exit status was recorded"
        return Status(STOPPED, f"{killed}: {reason}" if reason else killed)
    if not run.records and run.saved_step:
        done = run.planned_steps is not None and run.planned_steps <= run.saved_step
        return Status(DONE if done else UNKNOWN, f"{metrics.NAME} is empty or missing")
    if not any("loss" in r for r in run.records):
        return Status(NEW, "no step is recorded yet")
    return Status(UNKNOWN, "stopped or killed")


def _running(folder: pathlib.Path) -> Status | None:
    """Returns the status of a run that is active, in the background or the foreground."""
    if lock.is_held(folder):
        holder = lock.read_holder(folder)
        return Status(RUNNING, holder.where if holder else "")
    if background.is_running(folder):  # and has not taken the lock yet
        return Status(RUNNING)
    return None


def _last_error(records: list[dict[str, Any]]) -> RunError | None:
    """Returns the error that ended a run; None: no error since its start."""
    start = max((i for i, r in enumerate(records) if isinstance(r.get("run"), dict)), default=0)
    for record in reversed(records[start:]):
        if "ended" in record:
            kind, _, message = str(record["ended"]).partition(": ")
            return RunError(record["step"], kind, message)
    return None


def _is_run(folder: pathlib.Path) -> bool:
    named = (folder / metrics.NAME).is_file() or background.read(folder)
    return bool(named or list_checkpoints(folder))


def _lack(folder: pathlib.Path) -> str:
    """Returns what the folder lacks, and which folder the user may have meant."""
    if not folder.is_dir():
        return "does not exist" if not folder.exists() else "is a file; give the output_dir"
    lack = f"has neither {metrics.NAME} nor a checkpoint; give the output_dir of a run"
    parent = folder.resolve().parent
    if (parent / metrics.NAME).is_file():
        return f"{lack}, here {folder.parent if folder.name else parent}"
    below = sorted(path.parent for path in folder.glob(f"*/{metrics.NAME}"))
    return f"{lack}, such as {below[0]}" if below else lack


def _newest_metadata(checkpoints: list[tuple[int, pathlib.Path]]) -> Metadata | None:
    """Returns the metadata of the newest checkpoint whose metadata can be read."""
    for _, path in checkpoints:
        with contextlib.suppress(UserError):  # damaged: try an older one
            return read_metadata(path)
    return None


def flat_config(config: RunConfig) -> dict[str, Value]:
    """Returns the fields by dotted name, as they look when read from ``metrics.jsonl``."""
    return flatten(json.loads(json.dumps(to_dict(config))))
