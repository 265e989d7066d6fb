"""``python -m mamba_jax.runs.supervisor``: watches a background run until its end.

It starts the run, forwards signals to it, restarts it if requested, and records how it ended.
Standard output is the run's log.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from mamba_jax.checkpoints.folder import list_checkpoints
from mamba_jax.runs import exit_status
from mamba_jax.runs.background import Record
from mamba_jax.runs.lock import RunLock

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_PAUSE_SECS = 5.0  # before a restart: the cause may still persist
_MOST_IDLE_RESTARTS = 3  # in a row without a new checkpoint: the cause is permanent


class Supervisor:
    """Runs one command until it has ended for the last time."""

    def __init__(self, record: Record, lock: RunLock, log: pathlib.Path, *, requeue: bool):
        self._record = record
        self._lock = lock
        self._log = log
        self._requeue = requeue
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Runs the command, again after exit codes 75 and 76 if requested; returns its code."""
        # Ignored, not handled, so that the run ignores it as well: the terminal may close.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in FORWARDED_SIGNALS:
            signal.signal(number, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED_SIGNALS)  # blocked by the launcher
        arguments, idle = list(command), 0
        while True:
            before = _newest_step(self._record.output_dir)
            code = self._run_once(arguments)
            again = self._requeue and code in (exit_status.PREEMPTED, exit_status.PEER_LOST)
            if self._stopping or not again:
                break
            idle = idle + 1 if _newest_step(self._record.output_dir) == before else 0
            if idle > _MOST_IDLE_RESTARTS:
                self._say(
                    f"restarted {_MOST_IDLE_RESTARTS} times without a new checkpoint: giving up; "
                    "lower training.save_steps if the run is stopped before its first save"
                )
                break
            self._say(f"exit status {code} ({exit_status.meaning(code)}): starting again")
            time.sleep(_PAUSE_SECS)
            if self._stopping:
                break
            arguments = resumed(command, self._record.output_dir)
        self._end(code)
        return code

    def _run_once(self, command: Sequence[str]) -> int:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self._lock.environment()},
            pass_fds=[self._record.descriptor, self._lock.descriptor],
        )
        self._child = child
        if self._stopping:  # the signal came before the process existed
            child.terminate()
        self._record.add(child=child.pid)
        return exit_status.exit_code(child.wait())

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._child is not None:
            self._child.terminate()  # never SIGINT: a second one would abort the save

    def _end(self, code: int) -> None:
        why = exit_status.meaning(code)
        if code not in (0, exit_status.PREEMPTED):
            full = exit_status.full_disk(self._record.output_dir, self._log.parent)
            why = ": ".join(part for part in (why, exit_status.reason(self._log) or full) if part)
        self._record.end(code, why)
        self._say(f"ended with exit status {code}: {why}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log's disk is full; the record has the same text
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _newest_step(output_dir: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint; -1 if there is none."""
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[0][0] if checkpoints else -1


def resumed(command: Sequence[str], output_dir: pathlib.Path) -> list[str]:
    """Returns the command that resumes where this one stopped.

    A run that resumed another folder's checkpoint, perhaps with only that one's config, resumes
    from its own newest; before its first save it starts as it did.
    """
    if not list_checkpoints(output_dir):
        return list(command)
    kept, source, words = [], "", iter(command)
    for word in words:
        if word == "--resume":
            source = next(words, "")
        elif word.startswith("--resume="):
            source = word.partition("=")[2]
        else:
            kept.append(word)
    return [*kept, "--resume", str(output_dir) if source not in ("", "auto") else "auto"]


def main() -> int:
    """Runs what the launcher started; see ``background.start``."""
    parser = argparse.ArgumentParser(prog="supervisor")
    parser.add_argument("--output_dir", type=pathlib.Path, required=True)
    parser.add_argument("--log", type=pathlib.Path, required=True)
    parser.add_argument("--lock", type=int, required=True, help="descriptor of the locked record")
    parser.add_argument("--requeue", action="store_true")
    split = sys.argv.index("--")
    arguments = parser.parse_args(sys.argv[1:split])
    record = Record(arguments.output_dir, arguments.lock)
    record.add(pid=os.getpid())
    with RunLock.acquire(arguments.output_dir) as lock:
        lock.own()
        supervisor = Supervisor(record, lock, arguments.log, requeue=arguments.requeue)
        return supervisor.run(sys.argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main())
