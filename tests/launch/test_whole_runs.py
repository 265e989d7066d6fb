"""Real runs of a tiny model, by the scripts that a user calls."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mamba_jax.checkpoints.folder import read_metadata
from mamba_jax.runs import metrics
from mamba_jax.runs.background import is_running, read

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from mamba_jax.config import default_config

def get_config():
    config = default_config()
    config.update(name="tiny", output_dir="out")
    config.data.update(tokenizer="bytes", data_dir="texts", cache_dir="cache")
    config.model.update(d_model=16, n_layers=1, max_seq_len=32)
    config.training.update(
        warmup_steps=2, max_steps=6, eval_steps=3, save_steps=10**6, eval_windows=16, log_steps=1
    )
    config.vram.update(effective_batch_size=8, batch_size=8)
    return config
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project's folder with the scripts, this Python as its .venv, a config and some text."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / ".venv/bin").mkdir(parents=True)
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "texts").mkdir()
    for source in (ROOT / "mamba_jax").glob("*.py"):
        shutil.copy(source, folder / "texts")
    yield folder
    for record in folder.rglob("background.json"):
        if is_running(record.parent):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(read(record.parent)["pid"], signal.SIGKILL)


@pytest.fixture
def call(place, monkeypatch):
    monkeypatch.chdir(place)
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        "PYTHONPATH": str(ROOT),
    }

    def call(*words, timeout=300, cwd="."):
        return subprocess.run(
            words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
        )

    return call


def test_a_background_run_is_started_watched_stopped_and_resumed(call):
    train = ("./launch/train_background.sh", "--config=tiny.py", "--config.training.max_steps=9999")
    started = call(*train)
    assert started.returncode == 0, started.stderr
    out = pathlib.Path("out")
    (log,) = pathlib.Path("logs").glob("training_tiny_*.log")
    for _ in range(600):
        if "step 20/" in log.read_text():
            break
        time.sleep(0.1)
    second = call("./train_background.sh", "--config=tiny.py", cwd="launch")
    assert second.returncode == 2 and "is in use by a run" in second.stderr
    watched = call("./view_training_log.sh", "logs/training_*.log", cwd="launch").stdout
    assert "/9999, loss " in watched.splitlines()[-1] and "eval loss" in watched.splitlines()[-1]

    stopped = call("./launch/train_background.sh", "--stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "out: ended with exit status 75: stopped by a signal and saved" in stopped.stdout
    (saved,) = out.glob("step_*")
    step = read_metadata(saved).step
    text = log.read_text()
    assert f"stopped by SIGTERM and saved at step {step}" in text
    # Everything once, with its time: the log is also the run's standard output.
    steps = [line for line in text.splitlines() if f" step {step}/" in line]
    assert len(steps) == 1 and steps[0][:2] == "20"
    assert len(list(pathlib.Path("logs").glob("*.log"))) == 1

    again = call(*train[:2], "--resume=auto", f"--config.training.max_steps={step + 2}")
    assert again.returncode == 0, again.stderr
    for _ in range(600):
        if not is_running(out):
            break
        time.sleep(0.1)
    assert read(out)["exit_code"] == 0
    records = metrics.read(out / metrics.NAME)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, step + 3))


def test_a_mistake_in_the_command_is_reported_at_once(call):
    flags = ("--config=tiny.py", "--output_dir=new", "--data_dir=absent")
    done = call("./launch/train_background.sh", *flags)
    assert done.returncode == 2 and "absent" in done.stderr and not pathlib.Path("new").exists()


def test_a_sweep_of_real_runs(call):
    pathlib.Path("rates.py").write_text(
        "def get_hyper(h): return h.sweep('config.training.learning_rate', [1e-2, 1e-9])"
    )
    command = (sys.executable, "launch/sweep.py", "--config=tiny.py", "--sweep=rates.py")
    done = call(*command, "--out=sweep", "--slots=2")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (head,) = [i for i, line in enumerate(lines) if "learning_rate  eval_loss" in line]
    assert lines[head + 1].split()[1] == "0.01" and lines[head + 2].split()[1] == "1e-09"
    metadata = read_metadata(pathlib.Path("sweep/learning_rate=0.01/final"))
    assert metadata.config.training.learning_rate == 0.01 and metadata.step == 6
    assert lines[head + 1].split()[2] == f"{metadata.metrics['eval_loss']:.5g}"
    assert call(*command, "--out=sweep").stdout.count("started") == 0
