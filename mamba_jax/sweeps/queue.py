"""The queue of a sweep: runs one job per slot until no jobs are left."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from mamba_jax.errors import UserError
from mamba_jax.runs import exit_status
from mamba_jax.runs.background import Record
from mamba_jax.runs.recorded import DONE, FAILED, read_status
from mamba_jax.sweeps.executors import Executor, JobHandle
from mamba_jax.sweeps.jobs import Job

_POLL_SECS = 0.2


class JobSource(Protocol):
    """Provides jobs."""

    def next(self) -> Job | None:
        """Returns the next job to run; None: no jobs are left."""
        ...

    def should_prune(self, job: Job) -> bool:
        """Returns whether to stop a running job early."""
        ...

    def ended(self, job: Job, code: int, *, pruned: bool) -> None:
        """Receives how a job ended."""
        ...


class JobList:
    """Provides the jobs of a list that are not done yet."""

    def __init__(self, jobs: Iterable[Job]):
        self._jobs: Iterator[Job] = (job for job in jobs if read_status(job.folder).state != DONE)

    def next(self) -> Job | None:
        return next(self._jobs, None)

    def should_prune(self, job: Job) -> bool:
        return False

    def ended(self, job: Job, code: int, *, pruned: bool) -> None:
        pass


@dataclasses.dataclass
class _Running:
    job: Job
    handle: JobHandle
    record: Record
    prune_requested: bool = False


class JobQueue:
    """Runs the jobs of a source on a number of slots."""

    def __init__(
        self, source: JobSource, executor: Executor, slots: int, say: Callable[[str], None]
    ):
        self._source = source
        self._executor = executor
        self._slots = slots
        self._say = say
        self._running: dict[int, _Running] = {}

    def run(self) -> bool:
        """Runs all jobs; a KeyboardInterrupt lets them save and stop, a second one kills them.

        Returns:
          False if it was interrupted.
        """
        try:
            while self._fill():
                time.sleep(_POLL_SECS)
                self._collect()
            return True
        except KeyboardInterrupt:
            self._stop()
            return False
        except Exception:  # such as a study that cannot be written: stop all jobs
            for running in self._running.values():
                running.handle.stop()
                running.record.release()
            raise

    def _fill(self) -> bool:
        """Starts jobs on free slots; returns False if no job is running."""
        for slot in range(self._slots):
            while slot not in self._running:
                job = self._source.next()
                if job is None:
                    break
                self._start(job, slot)
        return bool(self._running)

    def _start(self, job: Job, slot: int) -> None:
        before = read_status(job.folder).state
        try:
            record = Record.claim(job.folder)
        except UserError as error:
            self._say(f"{job.folder.name}: skipped: {error}")
            # Not failed: a job that outlived an earlier sweep may be running there.
            self._source.ended(job, exit_status.PREEMPTED, pruned=False)
            return
        record.begin(
            **({"slurm_job": record.facts["slurm_job"]} if _still_submitted(record) else {}),
            settings=job.settings,
            log=str(job.log),
            started=time.strftime("%Y-%m-%d %H:%M:%S"),
            command=" ".join(job.command),
        )
        self._running[slot] = _Running(job, self._executor.start(job, slot, record), record)
        again = {FAILED: " (failed before)"}.get(before, "")
        self._say(f"{job.folder.name}: started{again}")

    def _collect(self) -> None:
        for slot, running in list(self._running.items()):
            code = running.handle.poll()
            if code is not None:
                del self._running[slot]
                self._end(running, code)
            elif not running.prune_requested and self._source.should_prune(running.job):
                running.prune_requested = True
                running.handle.stop()

    def _end(self, running: _Running, code: int) -> None:
        job, record = running.job, running.record
        pruned = running.prune_requested and code == exit_status.PREEMPTED
        why = "pruned: other runs were better at that step" if pruned else exit_status.meaning(code)
        if code not in (0, exit_status.PREEMPTED):
            reason = exit_status.reason(job.log) or exit_status.full_disk(job.folder)
            why = ": ".join(part for part in (why, reason) if part)
        if pruned:
            record.add(pruned=True)
        record.end(code, why)
        record.release()
        self._say(f"{job.folder.name}: {why}")
        self._source.ended(job, code, pruned=pruned)

    def _stop(self) -> None:
        self._say(
            f"stopping {len(self._running)} runs; each finishes its step and saves "
            "(press Ctrl-C again to kill them)"
        )
        for running in self._running.values():
            running.handle.stop()
        try:
            while self._running:
                time.sleep(_POLL_SECS)
                self._collect()
        except KeyboardInterrupt:
            for running in self._running.values():
                running.handle.kill()
            raise


def _still_submitted(record: Record) -> bool:
    return "slurm_job" in record.facts and "exit_code" not in record.facts
