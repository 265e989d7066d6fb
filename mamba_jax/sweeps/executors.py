"""Where the jobs of a sweep run: on this machine, one device each, or on a SLURM cluster."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mamba_jax.errors import UserError
from mamba_jax.runs import exit_status, log_file
from mamba_jax.runs.background import Record
from mamba_jax.sweeps.jobs import Job

_SAVE_SECS = 80.0  # of the 90 that submitit gives a job between its signal and its end


class JobHandle(Protocol):
    """A started job."""

    def poll(self) -> int | None:
        """Returns its exit code; None: it is still running."""
        ...

    def stop(self) -> None:
        """Asks it to save and exit."""
        ...

    def kill(self) -> None:
        """Kills it without saving."""
        ...


class Executor(Protocol):
    """Starts jobs."""

    def start(self, job: Job, slot: int, record: Record) -> JobHandle:
        """Starts a job on a slot, and records how to find it again."""
        ...


def gpus() -> list[str]:
    """Returns the GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


class Local:
    """Runs jobs on this machine, each on the device of its slot."""

    def __init__(self, devices: Sequence[str]):
        """
        Args:
          devices: a GPU for each slot; empty: the jobs share all devices.
        """
        self._devices = devices

    def start(self, job: Job, slot: int, record: Record) -> "_Process":
        visible = {"CUDA_VISIBLE_DEVICES": self._devices[slot]} if self._devices else {}
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **log_file.environment(job.log), **visible},
                pass_fds=[record.descriptor],  # the lock: a job may outlive a killed sweep
                start_new_session=True,  # Ctrl-C is for the sweep, which stops jobs gently
            )
        record.add(pid=process.pid, child=process.pid)
        return _Process(process)


class _Process:
    def __init__(self, process: "subprocess.Popen[bytes]"):
        self._process = process

    def poll(self) -> int | None:
        status = self._process.poll()
        return None if status is None else exit_status.exit_code(status)

    def stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Slurm:
    """Submits jobs to SLURM with submitit, which requeues them after a time limit or preemption."""

    def __init__(self, folder: pathlib.Path, parameters: Mapping[str, str]):
        """
        Args:
          folder: for submitit's files, on a disk that the nodes share.
          parameters: of ``sbatch``, e.g. {"partition": "gpu", "time": "600"}.

        Raises:
          UserError: if submitit or SLURM is missing.
        """
        self._submitit = _submitit()
        self._folder = folder
        try:
            self._executor = self._submitit.AutoExecutor(folder=folder, cluster="slurm")
        except RuntimeError as error:
            raise UserError(
                "--executor=slurm: SLURM is not available (no sbatch on the PATH); run the sweep "
                "on a login node, or use --executor=local"
            ) from error
        values = {name: int(text) if text.isdigit() else text for name, text in parameters.items()}
        try:
            self._executor.update_parameters(
                name="mamba-sweep", **{f"slurm_{name}": value for name, value in values.items()}
            )
        except (NameError, ValueError, TypeError) as error:
            given = " ".join(f"--slurm {name}={value}" for name, value in values.items())
            raise UserError(f"{given}: submitit rejected it: {error}") from error

    def start(self, job: Job, slot: int, record: Record) -> "_Submitted":
        number = record.facts.get("slurm_job")  # of an earlier sweep whose job continued
        if number is None:
            task = TrainingTask(job.command, str(job.log))
            number = self._executor.submit(task).job_id
            record.add(slurm_job=number)
        return _Submitted(self._submitit.SlurmJob(self._folder, number))


class TrainingTask:
    """The task on the node: runs the training process until it ends."""

    def __init__(self, command: Sequence[str], log: str):
        self._command = tuple(command)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        with open(self._log, "ab") as log:
            process = self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **log_file.environment(pathlib.Path(self._log))},
            )
        # Not wait(): the signal handler would run inside it and could not poll the status.
        while process.poll() is None:
            time.sleep(0.5)
        return exit_status.exit_code(process.returncode)

    def checkpoint(self) -> Any:
        """Lets the run save, and requeues it; submitit calls this at a time limit or preemption.

        SLURM has sent the signal to the run as well.
        """
        started = time.monotonic()
        while self._process and self._process.poll() is None:
            if time.monotonic() - started > _SAVE_SECS:
                break
            time.sleep(0.2)
        return _submitit().helpers.DelayedSubmission(TrainingTask(self._command, self._log))

    __submitit_checkpoint__ = checkpoint  # the name in newer versions


class _Submitted:
    def __init__(self, job: Any):
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return self._job.result()
        except Exception:  # anything that submitit raises for a cancelled job or a lost node
            return 1

    def stop(self) -> None:
        if self._job.state in ("PENDING", "REQUEUED"):
            self._job.cancel(check=False)
        else:
            subprocess.run(["scancel", "--signal=TERM", str(self._job.job_id)], check=False)

    def kill(self) -> None:
        self._job.cancel(check=False)


def _submitit() -> Any:
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise UserError("--executor=slurm needs submitit: pip install -e '.[sweep]'") from error
    return submitit
