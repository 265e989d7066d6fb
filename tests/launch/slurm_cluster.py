"""A SLURM of one node on this machine, from Debian's packages ``slurm-wlm`` and ``munge``.

All its files are in one folder, and it listens only on the loopback interface.
"""

import os
import pathlib
import shutil
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing() -> str:
    """Returns why no SLURM can be started here; "" if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "a SLURM of one's own needs root"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Starts with the context and ends with it."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o755)
        (folder / "munge/key").write_bytes(os.urandom(128))
        (folder / "munge/key").chmod(0o400)
        self._munge = folder / "munge/socket"
        config = folder / "slurm.conf"
        config.write_text(
            f"""
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self._munge},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MinJobAge=300
KillWait=15
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
        )
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(config)}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Cluster":
        folder = self._folder
        self._start(
            "munged", "--foreground", "--force", f"--socket={self._munge}",
            f"--key-file={folder}/munge/key", f"--pid-file={folder}/munge/pid",
            f"--seed-file={folder}/munge/seed", f"--log-file={folder}/munge/log",
        )  # fmt: skip
        self._wait(self._munge.exists)
        self._start("slurmctld", "-D", "-i")
        self._start("slurmd", "-D")
        self._wait(lambda: self.call("sinfo", "--noheader", "--format=%T").strip() == "idle")
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *words: str, **options) -> str:
        """Runs one of SLURM's commands; returns what it prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, **options
        )
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def state(self, job: str) -> str:
        """Returns a job's state, e.g. "RUNNING"."""
        words = self.call("scontrol", "show", "job", job).split()
        return next((w.partition("=")[2] for w in words if w.startswith("JobState=")), "GONE")

    def _start(self, *words: str) -> None:
        log = (self._folder / f"{words[0]}.out").open("wb")
        self._daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def _wait(self, what) -> None:
        for _ in range(300):
            if what():
                return
            time.sleep(0.1)
        logs = [file.read_text(errors="replace")[-1500:] for file in self._folder.glob("*.[ol]*")]
        raise AssertionError("the cluster did not come up:\n" + "\n".join(logs))
