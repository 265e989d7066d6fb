"""``slurm.sbatch`` and ``sweep.py --executor slurm`` on a real SLURM of one node."""

import subprocess
import sys
import time

import pytest

from mamba_jax.runs import metrics
from tests.launch import slurm_cluster
from tests.launch.test_whole_runs import place  # noqa: F401  # fixtures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        cluster.environment |= {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
        yield cluster


def wait(what, secs=180):
    for _ in range(secs * 5):
        if what():
            return
        time.sleep(0.2)
    raise AssertionError("it never came")


def text(log):
    return log.read_text() if log.is_file() else ""


def test_a_job_saves_requeues_resumes_and_can_be_cancelled(cluster, place):  # noqa: F811
    cluster.environment["JAX_COMPILATION_CACHE_DIR"] = str(place / "compiled")
    (place / "pyproject.toml").touch()
    flags = ("--config=tiny.py", "--output_dir=slurm", "--config.training.max_steps=99999")
    job = cluster.call(
        "sbatch", "--parsable", "--cpus-per-task=1", "--time=10", "launch/slurm.sbatch", *flags,
        cwd=place,
    ).strip()  # fmt: skip
    log = place / f"logs/training_slurm_{job}.log"
    wait(lambda: " step 20/" in text(log))
    cluster.call("scancel", "--signal=TERM", job)  # what --signal=TERM@120 does before the limit
    wait(lambda: "continuing from slurm/step_" in text(log))
    wait(lambda: cluster.state(job) == "RUNNING" and text(log).count(" step ") > 40)
    output = (place / f"slurm-{job}.out").read_text()
    assert "exit status 75: back to the queue, to resume" in output
    assert len(list((place / "logs").glob("*.log"))) == 1  # the run opened no log of its own

    cluster.call("scancel", job)
    wait(lambda: cluster.state(job) in ("CANCELLED", "GONE"))
    time.sleep(8)  # longer than a requeued job has to wait
    assert cluster.state(job) in ("CANCELLED", "GONE")
    steps = [r["step"] for r in metrics.read(place / "slurm" / metrics.NAME) if "loss" in r]
    assert steps == list(range(1, len(steps) + 1))  # resumed: no step twice, none left out


def test_a_sweep_on_slurm(cluster, place):  # noqa: F811
    pytest.importorskip("submitit")
    (place / "seeds.py").write_text("def get_hyper(h): return h.sweep('seed', [1, 2])")
    done = subprocess.run(
        [
            *(sys.executable, "launch/sweep.py", "--config=tiny.py", "--sweep=seeds.py"),
            *("--out=on-slurm", "--executor=slurm", "--slurm", "time=10"),
            *("--slurm", "cpus_per_task=1"),
        ],
        cwd=place,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (1, 2):
        assert (place / f"on-slurm/seed={seed}/final").is_dir()
        assert (place / f"on-slurm/seed={seed}/exit_code").read_text().strip() == "0"
    assert (place / "on-slurm/sweep.html").is_file()
