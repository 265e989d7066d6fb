"""The sweep command: its queue, what it skips and retries, its table, page and search."""

import csv
import json
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.parse

import pytest

from mamba_jax import sweep
from mamba_jax.config import RunConfig
from mamba_jax.runs.background import Record, is_running, read
from mamba_jax.runs.recorded import read_status
from mamba_jax.sweeps import executors, jobs, sweep_page

FAKE = (sys.executable, "-u", str(pathlib.Path(__file__).with_name("fake_job.py")))
RATES = """
def get_hyper(h):
    return h.sweep("config.training.learning_rate", [1e-1, 1e-2, 1e-3, 2e-5])
"""
OUT = pathlib.Path("out")


def columns(file, number):
    """Job → a number that it wrote into a file as it began or ended."""
    lines = (OUT / file).read_text().splitlines()
    return {line.split()[0]: float(line.split()[number]) for line in lines}


def with_fake_jobs(settings, **where):
    job = MAKE(settings, **where)
    return jobs.Job(job.settings, job.folder, (*FAKE, *job.command[3:]))


MAKE = jobs.make_job


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder in which jobs are fake runs, on a machine without GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs, "make_job", with_fake_jobs)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "rates.py").write_text(RATES)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(*flags):
    return sweep.main(["--sweep=rates.py", "--out=out", *flags])


def states():
    return {row.name: row.state for row in jobs.read_rows(OUT, "eval_loss")}


def starts():
    return [line.split()[0] for line in (OUT / "starts").read_text().splitlines()]


# --- the queue ------------------------------------------------------------------------------------


def test_every_setting_runs_once_and_the_best_is_listed_first(place, capsys):
    assert run() == 0
    told = capsys.readouterr().out.splitlines()
    (head,) = [i for i, line in enumerate(told) if line.lstrip().startswith("learning_rate  eval")]
    rows = [line.split() for line in told[head + 1 : head + 5]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row[1] for row in rows] == ["0.001", "0.01", "2e-05", "0.1"]
    assert [row[2] for row in rows] == ["0", "1", "2.8865", "4"]
    assert {row[-1] for row in rows} == {"done"}
    names = [f"learning_rate={rate}" for rate in (0.1, 0.01, 0.001, 2e-05)]
    assert sorted(starts()) == sorted(names)
    best = next(csv.DictReader((OUT / "results.csv").open()))
    assert best["training.learning_rate"] == "0.001" and float(best["eval_loss"]) == 0
    assert read(OUT / "learning_rate=0.01")["exit_code"] == 0


def test_a_second_call_skips_finished_runs_and_retries_failed_ones(place, capsys):
    OUT.mkdir()
    (OUT / "fail").write_text("0.01")
    assert run() == 1
    assert states()["learning_rate=0.01"] == "failed"
    assert "learning_rate=0.01: crashed: error: no luck" in capsys.readouterr().out
    assert "error: no luck" in (OUT / "sweep.html").read_text()
    assert run() == 0
    assert starts()[4:] == ["learning_rate=0.01"]  # and no other
    assert "learning_rate=0.01: started (failed before)" in capsys.readouterr().out
    assert run() == 0 and len(starts()) == 5
    assert set(states().values()) == {"done"}


def spans():
    """(begin, end) of each job, as the jobs themselves saw it."""
    begun = columns("starts", 2)
    ended = columns("ends", 1)
    return [(begun[name], ended[name]) for name in begun]


@pytest.mark.parametrize("slots", [1, 2])
def test_there_are_never_more_jobs_than_slots(place, slots):
    OUT.mkdir()
    (OUT / "slow").touch()
    assert run(f"--slots={slots}") == 0
    together = max(sum(a <= begin < b for a, b in spans()) for begin, _ in spans())
    assert together == slots


def test_each_slot_has_a_gpu_of_its_own(place, monkeypatch, capsys):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    OUT.mkdir()
    (OUT / "slow").touch()
    assert run() == 0  # as many slots as GPUs
    lines = [line.split() for line in (OUT / "starts").read_text().splitlines()]
    assert {device for _, device, _ in lines} == {"3", "5"}
    begun = {name: (device, float(at)) for name, device, at in lines}
    ended = columns("ends", 1)
    for device in "35":
        own = sorted((at, ended[name]) for name, (of, at) in begun.items() if of == device)
        assert len(own) == 2 and own[0][1] <= own[1][0]
    assert run("--slots=3") == 2
    assert "--slots=3 exceeds the 2 GPUs: each slot needs one" in capsys.readouterr().err


def test_gpus_are_those_of_the_driver_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert executors.gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0\necho 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert executors.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert executors.gpus() == []


PROCESS = """
import sys
from mamba_jax import sweep
from mamba_jax.sweeps import jobs
fake, make = {fake!r}, jobs.make_job
def with_fake(settings, **where):
    job = make(settings, **where)
    return jobs.Job(job.settings, job.folder, (*fake, *job.command[3:]))
jobs.make_job = with_fake
sys.exit(sweep.main(["--sweep=rates.py", "--out=out", *sys.argv[1:]]))
"""


def start_process(*flags):
    """The command in a process of its own, on slow jobs, once two of them run."""
    OUT.mkdir(exist_ok=True)
    (OUT / "slow").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROCESS).format(fake=FAKE), "--slots=2", *flags],
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(1000):
        if len(list(OUT.glob("*/steps"))) == 2:
            return process
        time.sleep(0.02)
    raise AssertionError("no two jobs began")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_sweep_lets_its_jobs_save_and_the_next_call_resumes(place, number):
    process = start_process()
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopping 2 runs; each finishes its step and saves" in told
    begun = states()
    assert set(begun.values()) == {"stopped"} and len(begun) == 2
    steps = {name: int((OUT / name / "steps").read_text()) for name in begun}
    assert all(0 < step < 10 for step in steps.values())
    (OUT / "slow").unlink()
    assert run() == 0 and set(states().values()) == {"done"}
    for name in begun:  # each step once: they resumed and did not start again
        records = [json.loads(line) for line in (OUT / name / "metrics.jsonl").open()]
        assert [record["step"] for record in records] == list(range(1, 11))


def test_a_second_ctrl_c_ends_the_jobs_at_once(place):
    process = start_process()
    pids = [read(folder.parent)["pid"] for folder in OUT.glob("*/steps")]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # they will not save
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    for _ in range(500):
        if not any(is_running(folder.parent) for folder in OUT.glob("*/steps")):
            return
        time.sleep(0.02)
    raise AssertionError("a job lives on")


@pytest.mark.parametrize("search", [[], ["--search=optuna", "--trials=2"]])
def test_a_second_call_beside_an_active_sweep_is_refused(place, capsys, search):
    if search:
        pytest.importorskip("optuna")
    process = start_process(*search)
    begun = starts()
    assert run(*search) == 2
    error = capsys.readouterr().err
    host = socket.gethostname()
    assert f"--out=out is in use by a sweep on {host} (pid {process.pid}, since" in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert starts() == begun
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in told
    assert set(states().values()) == {"done"}
    if search:
        assert [trial.state.name for trial in study().trials] == ["COMPLETE"] * 2
    assert run(*search) == 0  # the lock is free


def test_jobs_that_outlived_a_killed_sweep_are_not_started_twice(place, capsys):
    process = start_process()
    process.kill()
    process.wait()
    process.stdout.close()
    assert list(states().values()).count("running") == 2
    assert run("--slots=4") == 1
    assert capsys.readouterr().out.count("skipped: output_dir out/") == 2
    for _ in range(1000):
        if "running" not in states().values():
            break
        time.sleep(0.02)
    assert run() == 0 and len(starts()) == 6 and len(set(starts())) == 4
    assert set(states().values()) == {"done"}


# --- jobs -----------------------------------------------------------------------------------------


def test_a_job_is_a_training_command():
    job = jobs.make_job(
        {"training.learning_rate": 3e-4, "model.remat": "full", "seed": 7.2},
        base=RunConfig(),
        flags=["--model_size=small"],
        out=OUT,
    )
    folder = "out/learning_rate=0.0003,remat=full,seed=7"
    assert job.command == (
        *(sys.executable, "-m", "mamba_jax.train", "--model_size=small"),
        *("--config.training.learning_rate=0.0003", "--config.model.remat=full"),
        *("--config.seed=7", f"--output_dir={folder}", f"--config.log_dir={folder}"),
        *(f"--config.tensorboard_dir={folder}/runs", "--resume=auto"),
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"training.learning_rate": 1e-3}, "learning_rate=0.001"),
        ({"model.remat": "full", "data.x/y": "a b"}, "remat=full,x-y=a-b-"),
        ({"a.x": 1, "b.x": 2}, "a.x=1,b.x=2"),
        ({"a": 0.123456789}, "a=0.1235-"),
        ({"a": (1, 2)}, "a=-1,-2--"),
        ({"a": "x" * 300}, "a=" + "x" * 98 + "-"),
    ],
)
def test_names_of_folders(settings, name):
    made = jobs.job_name(settings)
    assert made.startswith(name) and len(made) <= 110
    assert made == jobs.job_name(dict(settings)) and "/" not in made
    assert made == name or jobs.job_name({key: "z" for key in settings}) != made


def test_numbers_that_look_alike_have_separate_folders():
    assert jobs.job_name({"a": 0.12345}) != jobs.job_name({"a": 0.12346})


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.training.max_step=5"], 'did you mean "training.max_steps"?'),
        (["--slot=2"], "unknown flag --slot"),
        (["--slots=0"], "--slots=0 must be at least 1"),
        (["--output_dir=x"], "--output_dir has no effect in a sweep"),
        (["--resume", "auto"], "--resume has no effect in a sweep"),
        (["--trials=3"], "--trials=3 has no effect without --search"),
        (["--slurm", "partition=x"], "--slurm partition=x has no effect without --executor=slurm"),
        (["--sweep=rate.py"], 'sweep file rate.py does not exist; did you mean "rates.py"?'),
    ],
)
def test_mistakes_are_one_line_and_start_nothing(place, capsys, flags, message):
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (OUT / "starts").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h.sweep('training.learning_rat', [1])", 'did you mean "training.learning_rate"?'),
        ("h.sweep('training.learning_rate', [1, -1])", "training.learning_rate=-1"),
        ("h.uniform('model.dropout', h.interval(0, 1))", "never ends"),
    ],
)
def test_every_setting_is_checked_before_the_first_run(place, capsys, text, message):
    (place / "rates.py").write_text(f"def get_hyper(h): return {text}")
    assert run() == 2
    assert message in capsys.readouterr().err and not (OUT / "starts").exists()


def test_a_folder_holds_one_sweep(place, capsys):
    assert run() == 0
    assert run("--config.training.max_steps=7") == 2
    assert "holds a sweep of another config (training.max_steps differ)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", '{"model": {"d_mo', "[1]", "\0\0\0", "null"])
def test_a_damaged_manifest_is_one_line(place, capsys, text):
    assert run() == 0
    (OUT / "sweep.json").write_text(text)
    capsys.readouterr()
    assert run() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out/sweep.json is damaged; delete it if")
    assert error.count("\n") == 1
    (OUT / "sweep.json").unlink()
    assert run() == 0 and json.loads((OUT / "sweep.json").read_text())["model"]


def test_a_folder_of_an_older_version_has_fewer_fields(place):
    assert run() == 0
    config = json.loads((OUT / "sweep.json").read_text())
    del config["training"]["skip_spikes"]
    (OUT / "sweep.json").write_text(json.dumps(config))
    assert run() == 0
    assert run("--config.training.skip_spikes=7") == 2


def test_dry_run_lists(place, capsys):
    assert run("--dry_run") == 0
    assert "learning_rate=0.001: new" in capsys.readouterr().out.splitlines()
    assert not OUT.exists()


# --- the page -------------------------------------------------------------------------------------


def test_axes():
    numbers = sweep_page.axis("x", [1e-4, 1e-3, 1e-2])
    assert [numbers.places[v] for v in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    linear = sweep_page.axis("x", [0, 1, 4])
    assert [linear.places[v] for v in (0, 1, 4)] == [0, 0.25, 1]
    words = sweep_page.axis("x", ["b", "a", True])
    assert [words.places[v] for v in ("b", "a", True)] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert sweep_page.axis("x", [7, 7]).places == {7: 0.5}
    many = sweep_page.axis("x", [1.0, 2, 3, 4, 5, 6, 8])
    assert [label for _, label in many.ticks] == ["1", "2.75", "4.5", "6.25", "8"]


def row(name, state="done", why="", loss=None, **settings):
    return jobs.SweepRow(name, settings, state, why, {} if loss is None else {"eval_loss": loss})


def test_every_run_is_linked_to_its_page(place):
    OUT.mkdir()
    (OUT / "fail").write_text("0.01")
    assert run() == 1
    links = re.findall(r'<a href="([^"]*)"', (OUT / "sweep.html").read_text())
    targets = [OUT / urllib.parse.unquote(link) for link in links]
    assert len(set(targets)) == 4 and all(target.exists() for target in targets)
    pages = [target for target in targets if target.name == "report.html"]
    assert len(pages) == 3  # the one that failed has recorded nothing; the link is to its folder
    assert all('id="chart-loss"' in each.read_text() for each in pages)
    before = {each: each.stat().st_mtime_ns for each in pages}
    assert run() == 0
    assert before == {each: each.stat().st_mtime_ns for each in pages}  # nothing new to show
    odd = jobs.SweepRow('a"b#c?d', {"x": 1}, "failed", "why", {})
    assert 'href="a%22b%23c%3Fd/"' in sweep_page.render([odd], "eval_loss", "x")


def test_a_nan_metric_ranks_last_and_has_no_line(place):
    for name, loss in (("a", math.nan), ("b", 2.0), ("c", math.inf), ("d", 1.0), ("e", math.nan)):
        record = Record.claim(OUT / name)
        record.begin(settings={"x": name})
        (OUT / name / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": 1.0, "eval_loss": loss}) + "\n"
        )
        record.end(0, "")
        record.release()
    rows = jobs.read_rows(OUT, "eval_loss")
    assert [row.name for row in rows][:2] == ["d", "b"]
    text = sweep_page.render(rows, "eval_loss", "x")
    assert text.count("<polyline") == 2
    assert "nan" not in "".join(re.findall(r'points="[^"]*"', text))


def test_the_page_needs_no_network_and_shows_the_results():
    rows = [
        row("one", loss=1.0, rate=1e-3, kind="<b>"),
        row("two", loss=2.0, rate=1e-2, kind="x"),
        row("cut", state="pruned", loss=3.0, rate=1e-1, kind="x"),
        row("bad", state="failed", why="crashed: <oops>", rate=1.0, kind="x"),
    ]
    text = sweep_page.render(rows, "eval_loss", "a & b")
    assert "http" not in text and "src=" not in text and "@import" not in text
    assert (
        "<title>a &amp; b: sweep</title>" in text and "&lt;oops&gt;" in text and '<b>"' not in text
    )
    assert "2 of 4 runs done; best: rate 0.001, kind &lt;b&gt;, eval_loss 1" in text
    assert text.count("<polyline") == 3  # one without a measure has no line
    assert text.count("<tr data-run") == 4 and text.count("stroke-dasharray") == 1
    assert 'aria-label="3 runs over rate, kind, eval_loss (lower is better); the' in text
    assert text.index("<th>eval_loss") < text.index("<th>rate")
    assert sweep_page.render(rows[:1], "eval_loss", "x").count("<polyline") == 0
    assert "0 of 0 runs done" in sweep_page.render([], "eval_loss", "x")


# --- the search -----------------------------------------------------------------------------------

SPACE = """
def get_hyper(h):
    return h.product([
        h.loguniform("config.training.learning_rate", h.interval(1e-5, 1e-1)),
        h.sweep("config.model.dropout", [0.0, 0.5]),
    ])
"""


@pytest.fixture
def space(place):
    pytest.importorskip("optuna")
    (place / "rates.py").write_text(SPACE)
    return place


def study():
    import optuna

    return optuna.load_study(
        study_name="sweep", storage=f"sqlite:///{(OUT / 'study.db').resolve()}"
    )


def test_a_search_finds_the_best_of_a_grid_and_resumes_with_the_next_call(space):
    search = ["--search=optuna", "--slots=4"]
    for trials in (4, 12, 24):
        assert run(*search, f"--trials={trials}") == 0
        assert len(study().trials) == trials
    best = jobs.read_rows(OUT, "eval_loss")[0]
    assert best.settings["model.dropout"] == 0.0 and best.measures["eval_loss"] < 0.25
    assert study().best_value == pytest.approx(best.measures["eval_loss"])
    assert len(set(starts())) == 24  # each call proposes anew


def test_a_failed_trial_is_retried_and_a_stopped_one_resumes(space):
    import optuna

    assert run("--search=optuna", "--trials=2") == 0
    trial = study().ask()
    trial.set_user_attr("settings", json.dumps({"training.learning_rate": 1e-3}))
    failed = study().ask({})
    failed.suggest_float("training.learning_rate", 1e-5, 1e-1, log=True)
    failed.suggest_categorical("model.dropout", [0, 1])
    study().tell(failed, state=optuna.trial.TrialState.FAIL)
    assert run("--search=optuna", "--trials=4") == 0
    trials = study().trials
    assert trials[trial.number].state.name == "COMPLETE" and trials[trial.number].value == 0
    assert trials[-1].params == trials[failed.number].params
    assert trials[-1].state.name == "COMPLETE" and len(trials) == 5


def test_poor_trials_are_pruned(space):
    OUT.mkdir()
    (OUT / "slow").touch()
    (space / "rates.py").write_text(
        "def get_hyper(h): return h.sweep('training.learning_rate', [1e-1, 1e-3, 1e-5])"
    )
    import optuna

    # Five finished trials to compare with, all better than any rate but the best.
    made = optuna.create_study(
        study_name="sweep", storage=f"sqlite:///{(OUT / 'study.db').resolve()}"
    )
    for _ in range(5):
        made.add_trial(
            optuna.trial.create_trial(
                value=0.5, intermediate_values={step: 0.5 for step in range(1, 11)}
            )
        )
    assert run("--search=optuna", "--trials=8", "--slots=3") == 0
    found = states()
    assert found.get("learning_rate=0.1", "pruned") == "pruned"
    assert "pruned" in found.values()
    for name in (name for name, state in found.items() if state == "pruned"):
        assert int((OUT / name / "steps").read_text()) < 10  # it saved, and did not go to the end
    assert any(trial.state.name == "PRUNED" for trial in study().trials)


def test_each_evaluation_is_reported_once(space, recwarn):
    OUT.mkdir()
    (OUT / "slow").touch()
    assert run("--search=optuna", "--trials=1") == 0
    assert len(study().trials[0].intermediate_values) > 2  # it was looked at several times
    assert not [each for each in recwarn if "already reported" in str(each.message)]


def test_a_job_that_outlived_a_killed_search_keeps_its_trial(space):
    """Another call skips it; its trial does not fail, and a later call has its result."""
    process = start_process("--search=optuna", "--trials=2")
    process.kill()
    process.wait()
    process.stdout.close()
    living = {name for name, state in states().items() if state == "running"}
    assert len(living) == 2 and run("--search=optuna", "--trials=2") == 1
    assert [trial.state.name for trial in study().trials] == ["RUNNING"] * 2
    for _ in range(1000):
        if "running" not in states().values():
            break
        time.sleep(0.02)
    assert run("--search=optuna", "--trials=2") == 0
    assert [trial.state.name for trial in study().trials] == ["COMPLETE"] * 2
    assert set(states()) == living and set(starts()) == living


def test_a_trial_ended_by_another_tool_disturbs_nothing(space, monkeypatch):
    import optuna

    from mamba_jax.sweeps.search import OptunaSearch

    should_prune = OptunaSearch.should_prune

    def ended_elsewhere(self, job):
        other = study()
        (trial,) = [t for t in other.trials if t.state == optuna.trial.TrialState.RUNNING] or [None]
        if trial:
            other.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return should_prune(self, job)

    OUT.mkdir()
    (OUT / "slow").touch()
    monkeypatch.setattr(OptunaSearch, "should_prune", ended_elsewhere)
    assert run("--search=optuna", "--trials=1") == 0
    assert set(states().values()) == {"done"}


def damage(file, how):
    data = file.read_bytes()
    size = len(data)
    damaged = {
        "garbage": b"x" * size,
        "cut short": data[: size // 2],
        "zeros": bytes(size),
        "zeros within": data[: size // 4] + bytes(size // 2) + data[size - size // 4 :],
    }
    file.write_bytes(damaged[how])


@pytest.mark.parametrize("how", ["garbage", "cut short", "zeros", "zeros within"])
def test_a_damaged_study_is_one_line_and_starts_nothing(space, capsys, how):
    assert run("--search=optuna", "--trials=2") == 0
    before = starts()
    damage(OUT / "study.db", how)
    capsys.readouterr()
    assert run("--search=optuna", "--trials=4") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the study out/study.db cannot be read (")
    assert "move it away to start a new search" in error and error.count("\n") == 1
    assert starts() == before


def test_a_study_that_fails_midway_is_one_line_and_its_jobs_save(space, capsys, monkeypatch):
    import optuna

    from mamba_jax.sweeps.search import OptunaSearch

    def broken(self, job):
        raise optuna.exceptions.StorageInternalError("disk I/O error\nand more")

    OUT.mkdir()
    (OUT / "slow").touch()
    monkeypatch.setattr(OptunaSearch, "_should_prune", broken)
    assert run("--search=optuna", "--trials=3", "--slots=2") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the study out/study.db cannot be used: disk I/O error;")
    assert error.count("\n") == 1
    for _ in range(1000):
        if "running" not in states().values():
            break
        time.sleep(0.02)
    assert set(states().values()) == {"stopped"} and len(starts()) == 2


def test_a_search_needs_its_extra(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run("--search=optuna") == 2
    assert "needs optuna: pip install -e '.[sweep]'" in capsys.readouterr().err


def test_slurm_needs_its_extra(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run("--executor=slurm") == 2
    assert "needs submitit: pip install -e '.[sweep]'" in capsys.readouterr().err


def test_a_job_on_a_node_waits_for_the_save_before_it_requeues(tmp_path):
    pytest.importorskip("submitit")
    script = "import time, pathlib; time.sleep(1); pathlib.Path('saved').touch()"
    task = executors.TrainingTask([sys.executable, "-c", script], str(tmp_path / "log"))
    task._process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    again = task.checkpoint()
    assert (tmp_path / "saved").exists()
    assert isinstance(again.function, executors.TrainingTask)
    assert again.function._command == task._command and again.function._process is None


def test_records_of_jobs_are_not_considered_free(tmp_path):
    record = Record.claim(tmp_path)
    assert read_status(tmp_path).state == "running"
    record.begin(settings={})
    record.end(75, "")
    record.release()
    assert read_status(tmp_path).state == "stopped"
