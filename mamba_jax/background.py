"""``python -m mamba_jax.background``: trains in the background; ``launch/train_background.sh``."""

import argparse
import contextlib
import itertools
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mamba_jax.checkpoints import resume
from mamba_jax.cli import train_arguments
from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError, command
from mamba_jax.runs import exit_status, log_file, recorded
from mamba_jax.runs import lock as run_lock
from mamba_jax.runs.background import Record, is_running, read
from mamba_jax.runs.lock import RunLock
from mamba_jax.runs.supervisor import FORWARDED_SIGNALS

_HELP = """\
Starts a training run that outlives the terminal. Takes every flag of `python -m mamba_jax.train`
(see its --help) and checks them first with --dry_run.

  --requeue   restart the run, with --resume auto, when it exits with 75 (stopped by a signal and
              saved) or 76 (lost another process)
  --status    show the state of the run in these flags' output_dir; without flags, of every run
              started from here. Exit status 0 if one of them is active, else 3
  --stop      stop that run: it finishes its step and saves; without flags, the only active run
  --dry_run   check the flags, show what would be run, and start nothing

Relative paths start at the folder above launch/. The log is logs/training_NAME_TIME.log; the
output_dir gets background.json (the process, and how it ended) and exit_code. Only one run at a
time can use an output_dir.
"""
_REGISTRY = "background_runs"  # in the log folder: the output_dirs of runs started here
_NOT_RUNNING = 3  # as for services


@command
def main(argv: list[str]) -> int:
    """Starts or stops background runs, or shows their state."""
    parser = argparse.ArgumentParser(
        prog="train_background.sh",
        usage="train_background.sh [--requeue | --status | --stop] [flags of training]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hidden = argparse.SUPPRESS  # the description lists them
    parser.add_argument("--scripts", default="./launch", help=hidden)
    parser.add_argument("--dry_run", action="store_true", help=hidden)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--requeue", action="store_true", help=hidden)
    what.add_argument("--status", action="store_true", help=hidden)
    what.add_argument("--stop", action="store_true", help=hidden)
    own, flags = parser.parse_known_args(argv)
    if own.status:
        return status(_folders(flags))
    if own.stop:
        return stop(_only_running(_folders(flags), own.scripts))
    if own.dry_run:
        return subprocess.run([*_training(flags), "--dry_run"]).returncode
    return start(flags, requeue=own.requeue, scripts=own.scripts)


def _training(flags: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mamba_jax.train", *flags]


def start(flags: Sequence[str], *, requeue: bool, scripts: str) -> int:
    """Checks the flags and starts a run with them.

    Args:
      flags: of ``mamba_jax.train``.
      requeue: whether to restart it after exit codes 75 and 76.
      scripts: the folder of the launch scripts as the user typed it, for the printed commands.
    """
    arguments = train_arguments.read(list(flags))
    config, output_dir = arguments.config, pathlib.Path(arguments.config.output_dir)
    run_lock.check_free(output_dir, arguments.force, lambda line: None)
    if not arguments.resume:
        resume.find_start(config, "", print)  # refuses a folder with another run's checkpoints
    checked = subprocess.run([*_training(flags), "--dry_run"], capture_output=True, text=True)
    if checked.returncode:
        print(checked.stdout + checked.stderr, file=sys.stderr, end="")
        return checked.returncode
    log = _new_log(config)
    run = _training([flag for flag in flags if flag != "--force"])  # it inherits the lock
    with RunLock.acquire(output_dir, force=arguments.force) as lock:
        record = Record.claim(output_dir, force=arguments.force)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            record.begin(
                log=str(log), started=started, host=socket.gethostname(), command=shlex.join(run)
            )
            supervisor = _supervise(record, lock, log, run, requeue=requeue)
            record.add(pid=supervisor)
        finally:
            record.release()  # the run holds it from here on
        lock.hand_over()
    which = f"--output_dir {shlex.quote(str(output_dir))}"
    print(
        f"started: pid {supervisor}, output_dir {output_dir}\n"
        f"log:     {log}\n"
        f"watch:   {scripts}/view_training_log.sh {shlex.quote(str(log))}\n"
        f"status:  {scripts}/train_background.sh {which} --status\n"
        f"stop:    {scripts}/train_background.sh {which} --stop    (it saves first)"
    )
    return 0


def _new_log(config: RunConfig) -> pathlib.Path:
    """Returns a log file that no other run has, including one started in the same second."""
    name = f"{config.name}_{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{count}" for count in itertools.count(2)))
    logs = (log_file.path(config.log_dir, name) for name in names)
    return next(log for log in logs if not log.exists())


def _supervise(
    record: Record, lock: RunLock, log: pathlib.Path, run: list[str], *, requeue: bool
) -> int:
    """Starts the supervisor, which starts the run; returns the supervisor's process id."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(run)}\n".encode())
        _register(log.parent / _REGISTRY, record.output_dir)
    except OSError as error:
        raise UserError(
            f"cannot write the log {log}: {error.strerror}; choose another --config.log_dir"
        ) from error
    # A signal, even an immediate one, waits until the supervisor can forward it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED_SIGNALS)
    try:
        with log.open("ab") as stream:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "mamba_jax.runs.supervisor"),
                    *("--output_dir", str(record.output_dir), "--log", str(log)),
                    *("--lock", str(record.descriptor), *(["--requeue"] if requeue else [])),
                    *("--", *run),
                ],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **log_file.environment(log), **lock.environment()},
                pass_fds=[record.descriptor, lock.descriptor],
                start_new_session=True,  # out of the terminal's reach
            ).pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def status(folders: Sequence[pathlib.Path]) -> int:
    """Prints the state of each folder's newest run; returns 0 if one is active, else 3.

    That includes a run in the foreground, and one of a sweep.
    """
    if not folders:
        print("no run has been started here")
    statuses = {folder: recorded.read_status(folder) for folder in folders}
    for folder, now in statuses.items():
        print("\n".join(_status_lines(folder, now)))
    is_active = any(now.state == recorded.RUNNING for now in statuses.values())
    return 0 if is_active else _NOT_RUNNING


def _status_lines(output_dir: pathlib.Path, now: recorded.Status) -> list[str]:
    if now.state == recorded.RUNNING:
        line = f"running {now.why}".strip()
    elif now.exit_code is not None:
        why = read(output_dir).get("why") or exit_status.meaning(now.exit_code)
        line = f"ended with exit status {now.exit_code}: {why}"
    else:
        line = f"{now.state}: {now.why}" if now.why else now.state
    lines = [f"{output_dir}: {line}"]
    if now.log:
        log = pathlib.Path(now.log)
        kinds = (r" step \d+/\d+  ", r" step \d+: eval ")
        last = (exit_status.last(log, kind) for kind in kinds)
        lines += [*(f"  {line}" for line in last if line), f"  log: {log}"]
    return lines


def stop(output_dir: pathlib.Path) -> int:
    """Stops a run, waits until it has saved, and prints how it ended."""
    facts = read(output_dir)
    here = socket.gethostname()
    if (host := facts.get("host", here)) != here:  # its process ids belong to other processes here
        raise UserError(f"the run in {output_dir} is on host {host}, not on {here}; stop it there")
    with contextlib.suppress(ProcessLookupError):  # it ended in between
        os.kill(_recipient(facts), signal.SIGTERM)
    print(f"{output_dir}: stopping; the run finishes its step and saves (Ctrl-C: do not wait)")
    try:
        while is_running(output_dir):
            time.sleep(0.1)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the run is still saving; log: {facts['log']}") from None
    print("\n".join(_status_lines(output_dir, recorded.read_status(output_dir))))
    return 0 if read(output_dir).get("exit_code") in (0, exit_status.PREEMPTED) else 1


def _recipient(facts: dict[str, int]) -> int:
    """Returns the process to signal: the supervisor, or the run itself if that was killed.

    Never both: the second signal might reach a run that has saved and no longer handles it. The
    lock shows that one of them exists, and while one does, the system does not reuse the id of the
    session that they share.
    """
    session = facts["pid"]
    try:
        leads = os.getsid(session) == session and not _is_zombie(session)
    except ProcessLookupError:
        leads = False
    return session if leads else facts["child"]


def _is_zombie(process: int) -> bool:
    """Returns whether a process has ended but its parent has not collected its status yet."""
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except OSError:  # not Linux
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"


def _folders(flags: Sequence[str]) -> list[pathlib.Path]:
    """Returns the output_dir that the flags name; without flags, those of all runs started here."""
    if flags:
        return [pathlib.Path(train_arguments.read(list(flags)).config.output_dir)]
    registry = pathlib.Path(RunConfig().log_dir) / _REGISTRY
    known = registry.read_text().splitlines() if registry.is_file() else []
    return [folder for folder in map(pathlib.Path, known) if read(folder)]


def _only_running(folders: Sequence[pathlib.Path], scripts: str) -> pathlib.Path:
    running = [folder for folder in folders if is_running(folder)]
    if not running:
        which = f" in {folders[0]}" if len(folders) == 1 else ""
        for folder in folders:
            if run_lock.is_held(folder) and (holder := run_lock.read_holder(folder)):
                raise UserError(
                    f"the run in {folder}, {holder.where}, is not a background run; stop it with "
                    "Ctrl-C in its terminal"
                )
        raise UserError(f"nothing to stop: no background run is active{which} (see --status)")
    if len(running) > 1:
        raise UserError(
            f"{len(running)} runs are active: {', '.join(map(str, running))}; choose one with "
            f"{scripts}/train_background.sh --output_dir DIR --stop"
        )
    return running[0]


def _register(registry: pathlib.Path, output_dir: pathlib.Path) -> None:
    known = registry.read_text().splitlines() if registry.is_file() else []
    if str(output_dir) not in known:
        with registry.open("a") as stream:
            stream.write(f"{output_dir}\n")


if __name__ == "__main__":
    sys.exit(main())
