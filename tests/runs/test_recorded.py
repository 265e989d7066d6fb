"""What a run's folder records, against figures made by hand."""

import json
import math
import os
import socket

import pytest

from mamba_jax.checkpoints.folder import Metadata, write_metadata
from mamba_jax.config import from_dict
from mamba_jax.errors import UserError
from mamba_jax.runs import exit_status
from mamba_jax.runs.background import Record
from mamba_jax.runs.lock import RunLock
from mamba_jax.runs.recorded import read_run, read_status
from tests.support.made_run import config, evaluated, rate, started, trained, write

STEP_TOKENS = 8 * 100  # of made_run's config


def finished(folder):
    records = [started(), *trained(1, 40), rate(20, 400.0), rate(40, 1600.0), evaluated(40, 3.0)]
    return write(folder, records)


def test_a_finished_run(tmp_path):
    run = read_run(finished(tmp_path / "a"))
    assert (run.state, run.why) == ("done", "")
    assert (run.name, run.parameters, run.device) == ("hybrid-small", 1234, "2 × H200")
    assert (run.last_step, run.planned_steps) == (40, 40)
    assert run.tokens_at(40) == 40 * STEP_TOKENS
    assert run.train_loss == pytest.approx((3.15 + 3.1 + 3.05 + 3) / 4)  # the last four losses
    assert run.tokens_per_sec == 1000  # the median
    assert run.memory_bytes == 3 << 30
    assert run.training_secs == pytest.approx(20 * STEP_TOKENS / 400 + 20 * STEP_TOKENS / 1600)


def test_the_rate_is_that_of_the_last_device(tmp_path):
    records = [started(), *trained(1, 3), *(rate(s, 9.0, kind="cpu", count=1) for s in (1, 2))]
    run = read_run(write(tmp_path, [*records, rate(3, 500.0)]))
    assert run.tokens_per_sec == 500 and run.device == "2 × H200"


def test_tokens_change_slope_where_a_run_resumes_with_another_batch(tmp_path):
    changes = {"vram__effective_batch_size": 16, "vram__batch_size": 16}
    again = started(30, **changes)
    run = read_run(write(tmp_path, [started(), *trained(1, 30), again, *trained(31, 40)]))
    assert run.token_line == [(0, 0, 800), (30, 24_000, 1600)]
    assert [run.tokens_at(s) for s in (0, 10, 30, 35)] == [0, 8000, 24_000, 32_000]
    assert [start.step for start in run.starts] == [0, 30]
    assert run.config["vram.effective_batch_size"] == 16


def test_attempts_at_the_same_step_are_one_start(tmp_path):
    run = read_run(write(tmp_path, [started(), started(at="later"), *trained(1, 3)]))
    assert [start.started for start in run.starts] == ["later"]


@pytest.mark.parametrize(
    ("records", "state", "why"),
    [
        ([], "new", "no step is recorded yet"),
        ([started()], "new", "no step is recorded yet"),
        ([started(), *trained(1, 9)], "not finished", "stopped or killed"),
        ([started(), *trained(1, 40)], "not finished", "stopped or killed"),  # its evaluation lacks
        ([started(), {"step": 9, "ended": "UserError: diverged"}], "failed", "diverged"),
        ([started(), {"step": 9, "ended": "KeyboardInterrupt: "}], "stopped", "KeyboardInterrupt"),
        ([started(), {"step": 9, "ended": "StoppedEarly: saved after X"}], "stopped", "saved"),
        # An end before the run resumed no longer counts.
        ([{"step": 9, "ended": "OSError: x"}, started(9), *trained(10, 12)], "not finished", ""),
    ],
)
def test_the_state_of_a_run(records, state, why, tmp_path):
    run = read_run(write(tmp_path, records))
    assert run.state == state and run.why.startswith(why)


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        (75, "stopped", "stopped by a signal and saved"),
        (76, "stopped", "another process of the run was lost"),
        (130, "stopped", "Ctrl-C"),
        (137, "failed", "SIGKILL"),
        (143, "stopped", "SIGTERM"),
        (0, "done", ""),
        (None, "stopped", "killed before"),
    ],
)
def test_the_launchers_record_gives_the_exit_status(code, state, why, tmp_path):
    write(tmp_path, [started(), *trained(1, 9)])
    record = Record.claim(tmp_path)
    record.begin(pid=os.getpid(), log="log", started="2026-01-02 03:04:04")
    assert read_run(tmp_path).state == "running"
    if code is not None:
        record.end(code, exit_status.meaning(code))
    record.release()
    status = read_run(tmp_path).status
    assert (status.state, status.exit_code) == (state, code) and why in status.why
    assert read_status(tmp_path) == status
    assert status.log == "log"
    # A later attempt in the foreground: the launcher's record describes the one before.
    start = started(9, log="later")
    write(tmp_path, [started(log="log"), *trained(1, 9), start, *trained(10, 12)])
    status = read_run(tmp_path).status
    assert (status.state, status.why, status.log) == ("not finished", "stopped or killed", "later")
    # The other way round: the launcher's run has not recorded its start.
    start = started(9, at="2026-01-01 00:00:00", log="before")
    write(tmp_path, [start, *trained(1, 9), {"step": 9, "ended": "OSError: before"}])
    later = read_run(tmp_path).status
    assert (later.state, later.exit_code, later.error) == (state, code, None)
    assert why in later.why and later.log == "log"


def test_a_restarted_run_that_fails_is_not_a_stopped_one(tmp_path):
    stopped = {"step": 9, "ended": "StoppedEarly: saved after SIGTERM"}
    write(tmp_path, [started(log="log"), *trained(1, 9), stopped])
    record = Record.claim(tmp_path)
    record.begin(pid=os.getpid(), log="log")
    record.end(2, "could not continue: error: no data")
    record.release()
    run = read_run(tmp_path)
    assert (run.state, run.why) == ("failed", "could not continue: error: no data")


def test_the_error_explains_the_exit_code(tmp_path):
    write(tmp_path, [started(), {"step": 9, "ended": "OSError: no space"}])
    record = Record.claim(tmp_path)
    record.begin(pid=os.getpid())
    record.end(76, "another process of the run was lost")
    record.release()
    run = read_run(tmp_path)
    assert (run.state, run.why) == ("stopped", "OSError: no space")


def test_a_pruned_job_of_a_sweep(tmp_path):
    record = Record.claim(tmp_path)
    record.begin(settings={})
    record.add(pruned=True)
    record.end(75, "pruned: other runs were better")
    record.release()
    assert read_status(tmp_path).state == "pruned"


def test_an_empty_folder_has_no_run(tmp_path):
    assert read_status(tmp_path).state == read_status(tmp_path / "nowhere").state == "new"


def test_a_run_in_the_foreground_is_running(tmp_path):
    write(tmp_path, [started(), {"step": 9, "ended": "OSError: of an earlier attempt"}])
    with RunLock.acquire(tmp_path):
        run = read_run(tmp_path)
        assert run.state == "running" and run.status.error is None
        assert run.why.startswith(f"on {socket.gethostname()} (pid {os.getpid()}, since ")
    assert read_run(tmp_path).state == "failed"


def test_without_a_record_the_checkpoint_gives_the_config(tmp_path):
    write(tmp_path, trained(1, 40))
    for step in (20, 40):
        (tmp_path / f"step_{step}").mkdir()
        write_metadata(
            tmp_path / f"step_{step}",
            Metadata(
                *(from_dict(config()), step, 0, ""),
                layout={"vram": {"batch_size": 2}},  # chosen for the device
                device="1 × TPU",
            ),
        )
    (tmp_path / "step_40" / "config.json").write_text("{")  # damaged: the one before tells
    run = read_run(tmp_path)
    assert run.device == "1 × TPU" and run.tokens_at(40) == 40 * STEP_TOKENS
    assert run.config["model.d_model"] == 512 and run.config["vram.batch_size"] == 2
    # Counted by hand: d 512, 2 layers of the hybrid, by the README's figure for 8 of them.
    assert run.parameters == 320 * 512 + 512 + (34_559_704 - 512) // 8 * 2
    (tmp_path / "metrics.jsonl").unlink()
    run = read_run(tmp_path)
    assert run.last_step == 20 and run.state == "not finished" and "missing" in run.why


def test_an_old_run_without_either_has_few_facts(tmp_path):
    run = read_run(write(tmp_path / "old", trained(1, 5)))
    assert run.name == "old" and not run.config and run.parameters is None
    assert run.tokens_at(5) is None and run.training_secs is None and run.planned_steps is None


def test_a_nan_loss_is_never_the_best(tmp_path):
    records = [started(), evaluated(10, math.nan), evaluated(20, 3.0), evaluated(30, 4.0)]
    run = read_run(write(tmp_path, records))
    assert run.best_evaluation is not None and run.best_evaluation["step"] == 20


def test_a_truncated_line_ends_the_file(tmp_path):
    write(tmp_path, [started(), *trained(1, 5)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo\n' + json.dumps({"step": 7, "loss": 1}) + "\n")
    assert read_run(tmp_path).last_step == 5


def test_a_folder_that_is_not_a_run_is_refused_with_a_remedy(tmp_path):
    run = finished(tmp_path / "a")
    (run / "final").mkdir()
    (tmp_path / "file").touch()
    for folder, words in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "file": "is a file",
        tmp_path: f"such as {run}",
        run / "final": f"here {run}",
    }.items():
        with pytest.raises(UserError) as refused:
            read_run(folder)
        message = str(refused.value)
        assert message.startswith(f"{folder} is not a run's folder") and words in message
        assert "\n" not in message
