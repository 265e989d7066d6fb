"""``mamba-jax sweep``: many runs of one config, with their results in a table and a page."""

import argparse
import contextlib
import csv
import functools
import io
import json
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from mamba_jax.cli import train_arguments
from mamba_jax.cli.terminal import print_table
from mamba_jax.config import RunConfig, to_dict
from mamba_jax.config.schema import flatten
from mamba_jax.errors import UserError, command
from mamba_jax.files import write_atomic
from mamba_jax.pages.document import number
from mamba_jax.runs import lock
from mamba_jax.runs import metrics as history
from mamba_jax.runs.exit_status import PREEMPTED
from mamba_jax.runs.lock import RunLock
from mamba_jax.runs.recorded import DONE, PRUNED, read_status
from mamba_jax.sweeps import jobs, sweep_page
from mamba_jax.sweeps.executors import Executor, Local, Slurm, gpus
from mamba_jax.sweeps.hyper import Hyper, JobSettings, Sweep, load
from mamba_jax.sweeps.queue import JobList, JobQueue, JobSource

_EPILOG = """\
All other flags are passed to `mamba-jax train` for every run.

examples:
  mamba-jax sweep --config=configs/hybrid_small.py --sweep=configs/sweeps/lr.py --out sweeps/lr
  mamba-jax sweep … --slots 2                 two runs at a time, one GPU each
  mamba-jax sweep … --search optuna --trials 30
  mamba-jax sweep … --executor slurm --slurm partition=gpu --slurm gpus_per_node=1

Running the same command again skips finished runs, resumes stopped ones and retries failed ones.
Only one sweep at a time can use a folder. Ctrl-C asks the runs to save and stop; a second Ctrl-C
kills them.
Exit status: 0 all runs are done, 1 some are not, 2 wrong usage, 75 stopped, 130 killed.
"""
_MANIFEST = "sweep.json"  # the config that all runs in a sweep's folder share
_MANY = 64  # jobs to submit to SLURM at a time, without --slots


@command
def main(argv: list[str]) -> int:
    """Runs a sweep."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax sweep",
        description="Trains one run for each of the settings that a sweep file returns.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--sweep", metavar="FILE", required=True, help="such as configs/sweeps/lr.py"
    )
    parser.add_argument(
        "--out", metavar="DIR", required=True, type=pathlib.Path, help="folder of results"
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument(
        "--slots", metavar="N", type=int, help="runs at a time (default: one per GPU)"
    )
    parser.add_argument("--search", choices=("optuna",), help="choose settings by earlier results")
    parser.add_argument(
        "--trials", metavar="N", type=int, help="number of trials of a search (default 20)"
    )
    parser.add_argument(
        "--metric", choices=jobs.METRICS, default="eval_loss", help="metric to rank by"
    )
    parser.add_argument(
        "--slurm",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a parameter of sbatch; repeatable",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the runs without starting any")
    own, flags = parser.parse_known_args(argv)
    base = _base(flags)
    sweep = load(own.sweep, Hyper())
    make = functools.partial(jobs.make_job, base=base, flags=flags, out=own.out)
    listed: list[jobs.Job] = []
    if own.search is None:
        if own.trials is not None:
            raise UserError(f"--trials={own.trials} has no effect without --search")
        listed = _jobs(sweep, make, own.sweep)
        if own.dry_run:
            for job in listed:
                print(f"{job.folder.name}: {read_status(job.folder).state}")
            return 0
    elif own.dry_run:
        raise UserError("--dry_run cannot list a search: each run depends on earlier results")
    with _lock(own.out):
        _check_same_sweep(own.out, base)
        complete = _run(own, sweep, make, listed)
        _write_run_pages(own.out)
        rows = jobs.read_rows(own.out, own.metric)
        _report(rows, own.out, own.metric)
    if not complete:
        _say("stopped; run the same command again to resume the sweep")
        return PREEMPTED
    return 0 if all(row.state in (DONE, PRUNED) for row in rows) else 1


def _run(
    own: argparse.Namespace,
    sweep: Sweep,
    make: Callable[[JobSettings], jobs.Job],
    listed: Sequence[jobs.Job],
) -> bool:
    """Runs the jobs; False if it was interrupted."""
    executor, slots = _executor(own)
    if own.search is None:
        source: JobSource = JobList(listed)
    else:
        from mamba_jax.sweeps.search import OptunaSearch

        trials = 20 if own.trials is None else own.trials
        if trials < 1:
            raise UserError(f"--trials={trials} must be at least 1")
        source = OptunaSearch(
            sweep, make, own.out / "study.db", trials=trials, metric=own.metric, slots=slots
        )
    # Other ways to stop a sweep let its runs save too, as Ctrl-C does.
    for signal_number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, _interrupt)
    return JobQueue(source, executor, slots, _say).run()


def _lock(out: pathlib.Path) -> RunLock:
    """Takes the lock of a sweep's folder; two sweeps would end each other's trials.

    Raises:
      UserError: if another sweep holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        return RunLock.acquire(out, log=_say)
    except UserError as error:
        holder = lock.read_holder(out)
        if holder is None:
            raise error from None
        raise UserError(
            f"--out={out} is in use by a sweep {holder.where}; wait until it ends, stop it with "
            "Ctrl-C, or choose another --out"
        ) from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, flush=True)


def _base(flags: Sequence[str]) -> RunConfig:
    """Returns the config that all runs share."""
    for flag in ("--output_dir", "--resume", "--config.output_dir", "--profile"):
        if any(word.partition("=")[0] == flag for word in flags):
            raise UserError(
                f"{flag} has no effect in a sweep: each run has its own folder in --out"
            )
    return train_arguments.read(list(flags)).config


def _jobs(sweep: Sweep, make: Any, file: str) -> list[jobs.Job]:
    """Returns the jobs of a sweep without duplicates, after checking all of them."""
    if sweep.length is None:
        raise UserError(
            f"sweep file {file} never ends: wrap it in h.zipit([…], length=N), or search with "
            "--search optuna"
        )
    unique = {job.folder: job for job in map(make, sweep)}
    if not unique:
        raise UserError(f"sweep file {file} has no settings")
    for job in unique.values():
        train_arguments.read([flag for flag in job.command[3:] if flag != "--resume=auto"])
    return list(unique.values())


def _check_same_sweep(out: pathlib.Path, base: RunConfig) -> None:
    """Refuses a folder whose runs have another config: their results are not comparable."""
    config = _as_json(base)
    file = out / _MANIFEST
    if file.is_file():
        # A config that an older version wrote may lack fields; they have their defaults.
        before = flatten(_as_json(RunConfig())) | flatten(_read_manifest(file))
        now = flatten(config)
        changed = [name for name in now if before[name] != now[name]]
        if changed:
            raise UserError(
                f"--out={out} holds a sweep of another config ({', '.join(changed[:4])} differ); "
                "choose another --out"
            )
        return
    write_atomic(file, json.dumps(config, indent=2) + "\n")


def _as_json(config: RunConfig) -> dict[str, Any]:
    """Returns a config as it looks when read from JSON."""
    return json.loads(json.dumps(to_dict(config)))


def _read_manifest(file: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        if isinstance(config, dict):
            return config
    except ValueError:
        pass
    raise UserError(
        f"{file} is damaged; delete it if the sweep's config is still the same (its runs are "
        "kept), or choose another --out"
    )


def _executor(own: argparse.Namespace) -> tuple[Executor, int]:
    if own.slots is not None and own.slots < 1:
        raise UserError(f"--slots={own.slots} must be at least 1")
    pairs = dict(text.partition("=")[::2] for text in own.slurm)
    if own.executor == "slurm":
        return Slurm(own.out / "submitit", pairs), own.slots or _MANY
    if pairs:
        raise UserError(f"--slurm {own.slurm[0]} has no effect without --executor=slurm")
    devices = gpus()
    slots = own.slots or max(1, len(devices))
    if devices and slots > len(devices):
        raise UserError(f"--slots={slots} exceeds the {len(devices)} GPUs: each slot needs one")
    return Local(devices), slots


def _write_run_pages(out: pathlib.Path) -> None:
    """Writes the page of each run whose metrics are newer than its page."""
    from mamba_jax.reports import run_page
    from mamba_jax.runs import recorded

    for metrics in out.glob(f"*/{history.NAME}"):
        page_file = metrics.with_name(jobs.PAGE)
        if page_file.is_file() and page_file.stat().st_mtime >= metrics.stat().st_mtime:
            continue
        with contextlib.suppress(UserError, OSError):  # the results table does not depend on it
            write_atomic(page_file, run_page.render(recorded.read_run(metrics.parent)))


def _report(rows: Sequence[jobs.SweepRow], out: pathlib.Path, metric: str) -> None:
    """Prints the table, and writes it as a page and as CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row.settings))
    columns = [metric, "train_loss", "step", "tokens_per_sec"]
    header = ["", *(name.rpartition(".")[2] for name in names), *columns, "state"]
    table = [
        [
            str(place) if row.state == DONE else "–",
            *(number(row.settings.get(name, "")) for name in names),
            *(number(row.measures.get(column, "")) for column in columns),
            row.state,
        ]
        for place, row in enumerate(rows, 1)
    ]
    print_table(header, table, n_text_columns=0)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["run", *names, *columns, "state", "why"])
    for row in rows:
        values = [row.settings.get(name, "") for name in names]
        found = [row.measures.get(column, "") for column in columns]
        writer.writerow([row.name, *values, *found, row.state, row.why])
    write_atomic(out / "results.csv", stream.getvalue())
    write_atomic(out / "sweep.html", sweep_page.render(rows, metric, title=out.name))
    print(f"{out / 'sweep.html'}, {out / 'results.csv'}")


if __name__ == "__main__":
    sys.exit(main())
