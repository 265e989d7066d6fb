"""Runs in the background: starting, watching and stopping them, and what remains if they die."""

import contextlib
import errno
import json
import os
import pathlib
import pty
import signal
import socket
import subprocess
import sys
import time

import pytest

from mamba_jax import background
from mamba_jax.errors import UserError
from mamba_jax.runs import exit_status, supervisor
from mamba_jax.runs import lock as run_lock
from mamba_jax.runs.background import NAME, Record, is_running, read
from mamba_jax.runs.lock import RunLock

FAKE = [sys.executable, str(pathlib.Path(__file__).with_name("fake_run.py"))]
OUT = pathlib.Path("out")
SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder in which training is the fake run; no process outlives the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(background, "_training", lambda flags: [*FAKE, *flags])
    monkeypatch.setattr(supervisor, "_PAUSE_SECS", 0.0)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for folder in tmp_path.rglob(NAME):
        if is_running(folder.parent):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(read(folder.parent)["pid"], signal.SIGKILL)


def launch(behaviour, *flags):
    pathlib.Path("behaviour").write_text(behaviour)
    return background.main(["--output_dir=out", *flags])


def wait(what, secs=30):
    for _ in range(secs * 50):
        if what():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def starts():
    """How often the run was started."""
    file = pathlib.Path("starts")
    return len(file.read_text().splitlines()) if file.is_file() else 0


def log_text():
    (log,) = pathlib.Path("logs").glob("training_medium_*.log")
    return log.read_text()


def ended(behaviour, *flags):
    """Starts a run that ends by itself; returns its record."""
    assert launch(behaviour, *flags) == 0
    wait(lambda: not is_running(OUT))
    return read(OUT)


def test_start_prints_the_next_commands_and_only_one_run_uses_a_folder(place, capfd):
    assert launch("run") == 0
    output = capfd.readouterr().out
    pid = read(OUT)["pid"]
    (log,) = pathlib.Path("logs").glob("*.log")
    assert f"started: pid {pid}, output_dir out\n" in output
    assert f"log:     {log}\n" in output and f"view_training_log.sh {log}\n" in output
    assert "train_background.sh --output_dir out --stop" in output
    assert os.getsid(pid) == pid and os.getpgid(pid) == pid  # a session and a group of its own
    wait(lambda: "eval loss" in log.read_text())

    assert launch("run", "--seed=7") == 2
    error = capfd.readouterr().err
    assert error.startswith(
        f"error: output_dir out is in use by a run on {socket.gethostname()} (pid {pid}, since "
    )
    assert error.count("\n") == 1 and "--force" in error
    assert background.main(["--status"]) == 0
    told = capfd.readouterr().out
    assert f"out: running on {socket.gethostname()} (pid {pid}, since " in told
    assert "step 1/10  loss 4.2500" in told and "step 1: eval loss 4.5000" in told
    assert (OUT / "exit_code").read_text().strip() == "running"


def test_a_background_run_holds_the_lock_until_its_end(place, capfd):
    assert launch("run", "--requeue") == 0
    wait(lambda: starts() == 1)
    with pytest.raises(UserError, match=rf"out is in use by a run on .* \(pid {read(OUT)['pid']}"):
        RunLock.acquire(OUT)
    text = (OUT / NAME).read_text()
    (OUT / NAME).write_text(text.replace(f'"host": "{socket.gethostname()}"', '"host": "node7"'))
    assert background.main(["--stop"]) == 2  # its process numbers are those of others here
    assert "the run in out is on host node7, not on " in capfd.readouterr().err
    (OUT / NAME).write_text(text)
    assert background.main(["--stop"]) == 0
    wait(lambda: not (OUT / run_lock.NAME).exists())
    RunLock.acquire(OUT).release()


def test_force_takes_the_folder_and_is_not_handed_to_the_run(place):
    with RunLock.acquire(OUT) as lock:
        assert launch("run") == 2
        assert launch("run", "--force") == 0
        wait(lambda: starts() == 1)  # by then the lock names the run, not this process
        with pytest.raises(UserError, match="was taken over by"):
            lock.check()
        assert "--force" not in pathlib.Path("starts").read_text()
        assert background.main(["--stop"]) == 0


def test_stop_lets_the_run_save_and_reports(place, capfd):
    assert launch("run") == 0
    wait(lambda: "step 1/10" in log_text())
    assert background.main(["--stop"]) == 0
    output = capfd.readouterr().out
    assert "out: ended with exit status 75: stopped by a signal and saved" in output
    assert (OUT / "exit_code").read_text().strip() == "75"
    assert "stopped by SIGTERM and saved at step 1" in log_text()
    assert background.main(["--status", "--output_dir=out"]) == 3
    assert background.main(["--stop", "--output_dir", "out"]) == 2
    assert "nothing to stop: no background run is active in out" in capfd.readouterr().err


def test_a_run_in_the_foreground_is_shown_but_not_stopped(place, capfd):
    """Whether or not an earlier run of that folder was in the background."""
    for earlier in (None, {"log": "log", "exit_code": 75, "why": "stopped"}):
        OUT.mkdir(exist_ok=True)
        if earlier:
            (OUT / NAME).write_text(json.dumps(earlier))
        where = f"on {socket.gethostname()} (pid {os.getpid()}, since "
        with RunLock.acquire(OUT):
            assert background.main(["--status", "--output_dir=out"]) == 0
            assert f"out: running {where}" in capfd.readouterr().out
            assert background.main(["--stop", "--output_dir=out"]) == 2
            error = capfd.readouterr().err
            assert f"the run in out, {where}" in error and error.count("\n") == 1
        assert background.main(["--status", "--output_dir=out"]) == 3
        assert "running" not in capfd.readouterr().out


def test_stop_needs_a_choice_between_several_runs(place, capfd):
    assert launch("run") == 0 and launch("run", "--output_dir=other") == 0
    wait(lambda: starts() == 2)
    assert background.main(["--stop"]) == 2
    assert "2 runs are active: out, other; choose one" in capfd.readouterr().err
    assert background.main(["--stop", "--output_dir=other"]) == 0
    assert is_running(OUT) and not is_running(pathlib.Path("other"))


@pytest.mark.parametrize(
    ("behaviour", "code", "why"),
    [
        ("quick", 0, "done"),
        ("crash", 1, "crashed: RuntimeError: the bolt came loose"),
        ("mistake", 1, "crashed: error: training diverged at step 1"),
        ("killed", 137, "killed by SIGKILL: manually, or by the system because memory ran out"),
        ("abort", 134, "killed by SIGABRT"),
    ],
)
def test_how_a_run_ended_is_in_the_record_the_code_file_and_the_log(
    place, capfd, behaviour, code, why
):
    facts = ended(behaviour)
    assert facts["exit_code"] == code and facts["why"].startswith(why)
    assert (OUT / "exit_code").read_text().strip() == str(code)
    assert log_text().splitlines()[-1].endswith(f"ended with exit status {code}: {facts['why']}")
    assert background.main(["--status"]) == 3
    assert f"out: ended with exit status {code}: {why}" in capfd.readouterr().out
    if behaviour == "crash":
        assert "Traceback (most recent call last)" in log_text()


def test_a_refused_command_starts_nothing(place, capfd):
    assert launch("refused") == 1
    assert capfd.readouterr().err == "the plan\nerror: nothing fits\n"
    assert launch("run", "--modelsize=small") == 2
    assert 'did you mean "--model_size"?' in capfd.readouterr().err
    assert not OUT.exists() and not pathlib.Path("logs").exists()


def test_dry_run_shows_the_plan_and_starts_nothing(place, capfd):
    assert launch("run", "--dry_run") == 0
    assert capfd.readouterr().out == "the plan\n"
    assert not OUT.exists()


def test_a_folder_with_checkpoints_is_not_overwritten(place, capfd):
    (OUT / "step_5").mkdir(parents=True)
    assert launch("run") == 2
    assert "already holds checkpoints of a run (step_5); continue it with --resume auto" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize(
    ("flags", "resumed"),
    [
        ([], "--output_dir=out --resume auto"),
        (["--resume=auto", "--seed=1"], "--output_dir=out --seed=1 --resume auto"),
    ],
)
def test_requeue_starts_again_with_resume(place, flags, resumed):
    pathlib.Path("behaviour").write_text("75 76 0")
    command = [*FAKE, "--output_dir=out", *flags]
    assert supervise(command) == 0
    starts = pathlib.Path("starts").read_text().splitlines()
    assert starts == [" ".join(["--output_dir=out", *flags]), resumed, resumed]
    assert read(OUT)["exit_code"] == 0


def supervise(command):
    """Runs a command under a supervisor that starts it again; returns its exit code."""
    with RunLock.acquire(OUT) as lock:
        record = Record.claim(OUT)
        record.begin(log="log")
        code = supervisor.Supervisor(record, lock, pathlib.Path("log"), requeue=True).run(command)
        record.release()
    return code


def supervised(behaviour):
    """Runs the fake under a supervisor that starts it again; returns its code and its starts."""
    pathlib.Path("behaviour").write_text(behaviour)
    return supervise([*FAKE, "--output_dir=out"]), starts()


def test_requeue_gives_up_without_progress(place, capfd):
    assert supervised("75 75 75 75 75 75 0") == (75, 5)  # the first saves; three more gain nothing
    assert "restarted 3 times without a new checkpoint: giving up" in capfd.readouterr().out
    assert read(OUT)["exit_code"] == 75


def test_requeue_continues_while_new_checkpoints_appear(place):
    assert supervised("75+ 75+ 76+ 75+ 75+ 76+ 75+ 0") == (0, 8)


def test_a_run_resumed_from_another_folder_restarts_in_its_own(place):
    command = ["train", "--resume", "old/step_5", "--output_dir=out"]
    assert supervisor.resumed(command, OUT) == command  # nothing of its own yet
    (OUT / "step_9").mkdir(parents=True)
    assert supervisor.resumed(command, OUT) == ["train", "--output_dir=out", "--resume", "out"]


def test_without_requeue_and_after_a_stop_there_is_no_second_start(place):
    assert ended("75 0")["exit_code"] == 75
    assert starts() == 1
    assert launch("run", "--requeue", "--resume=auto") == 0
    wait(lambda: starts() == 2)
    assert background.main(["--stop"]) == 0
    assert starts() == 2
    newest = pathlib.Path(read(OUT)["log"]).read_text()
    assert "saved at step 1" in newest and "starting again" not in newest


def test_an_immediate_stop_is_not_lost(place):
    assert launch("run") == 0
    background.main(["--stop"])
    assert read(OUT)["exit_code"] in (75, 143)  # the supervisor lived to see the end


def test_a_run_outlives_its_supervisor_and_is_still_found(place, capfd):
    assert launch("run") == 0
    wait(lambda: "step 1/10" in log_text())
    facts = read(OUT)
    os.kill(facts["pid"], signal.SIGKILL)
    wait(lambda: not pathlib.Path(f"/proc/{facts['pid']}/cwd").exists())
    assert launch("run") == 2  # still one run in the folder
    assert background.main(["--stop"]) == 1  # saved, but nobody saw its status
    assert "out: stopped: killed before its exit status was recorded" in capfd.readouterr().out
    assert "saved at step 1" in log_text()


def test_the_record_of_a_dead_run_does_not_block_its_folder(place):
    OUT.mkdir()
    (OUT / NAME).write_text(json.dumps({"pid": os.getpid(), "log": "log"}))  # a pid that lives
    assert not is_running(OUT)
    assert ended("quick")["exit_code"] == 0


TERMINAL = """
import sys, time
from mamba_jax import background
fake = sys.argv[1:]
background._training = lambda flags: [*fake, *flags]
assert background.main(["--output_dir=out"]) == 0
time.sleep(600)  # the shell that the user left open
"""


def test_a_closed_terminal_ends_the_shell_but_not_the_run(place):
    pathlib.Path("behaviour").write_text("run")
    shell, terminal = pty.fork()
    if shell == 0:
        os.execv(sys.executable, [sys.executable, "-c", TERMINAL, *FAKE])
    wait(lambda: is_running(OUT) and "child" in read(OUT))
    wait(lambda: "step 1/10" in log_text())
    os.close(terminal)  # the kernel hangs up on the whole session
    _, status = os.waitpid(shell, 0)
    assert os.WTERMSIG(status) == signal.SIGHUP
    for process in (read(OUT)["pid"], read(OUT)["child"]):
        assert os.getsid(process) == read(OUT)["pid"] != shell
        os.kill(process, signal.SIGHUP)  # and by name, as some systems do at a log-out
    time.sleep(0.2)
    assert is_running(OUT)
    assert background.main(["--stop"]) == 0
    assert read(OUT)["exit_code"] == 75


def test_a_full_disk_is_reported(place, capfd):
    OUT.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(OUT)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        facts = ended("fill", f"--config.log_dir={OUT}")
        assert facts["exit_code"] == 2  # noted although nothing more can be written
        assert facts["why"] == "could not continue: the disk of out is full (0 bytes free)"
        assert (OUT / "exit_code").read_text().strip() == "2"
        assert launch("quick", f"--config.log_dir={OUT}") == 2
        error = capfd.readouterr().err
        assert "No space left on device" in error and error.count("\n") == 1
    finally:
        subprocess.run(["umount", "--lazy", str(OUT)], check=True)


def test_the_exit_status_is_written_into_reserved_space(tmp_path):
    record = Record.claim(tmp_path)
    record.begin(log="x")
    before = [(tmp_path / name).stat() for name in (NAME, "exit_code")]
    record.end(137, "ä" * 9999)
    after = [(tmp_path / name).stat() for name in (NAME, "exit_code")]
    assert [(s.st_size, s.st_blocks, s.st_ino) for s in before] == [
        (s.st_size, s.st_blocks, s.st_ino) for s in after
    ]
    assert read(tmp_path)["exit_code"] == 137 and set(read(tmp_path)["why"]) == {"ä"}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["2026-01-02 03:04:05 step 1/2  loss 1", "all is well"], ""),
        (["Traceback (most recent call last):", "a.b.XlaRuntimeError: INTERNAL: x"], "a.b.Xla"),
        (["2026-01-02 03:04:05 error: first", "error: second", "KeyError: 1"], "error: second"),
        (
            ["Traceback (most recent call last):", " error: no space", "RuntimeError: y"],
            "error: no",
        ),
        (["jaxlib raised no Error here", "ValueError: 1", "ValueError: 2"], "ValueError: 2"),
    ],
)
def test_the_reason_is_the_programs_last_line_or_the_last_exception(tmp_path, lines, reason):
    log = tmp_path / "log"
    log.write_text("\n".join(lines) + "\n")
    found = exit_status.reason(log)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_the_end_of_a_run_that_lost_its_folder_is_not_recorded_for_the_other(tmp_path):
    first = Record.claim(tmp_path)
    first.begin(pid=1)
    second = Record.claim(tmp_path, force=True)
    second.begin(pid=2)
    first.end(2, "taken over")
    assert (tmp_path / "exit_code").read_text().strip() == "running"
    assert "exit_code" not in read(tmp_path)


def test_a_file_system_without_kernel_locks_is_no_error(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    Record.claim(tmp_path).begin(pid=1)
    assert not is_running(tmp_path)
    with RunLock.acquire(tmp_path):
        assert is_running(tmp_path)


def test_full_disk_names_the_folder(monkeypatch, tmp_path):
    assert exit_status.full_disk(tmp_path / "absent", tmp_path) == ""
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert exit_status.full_disk(tmp_path) == f"the disk of {tmp_path} is full (0 bytes free)"


def test_help_needs_no_training(capsys):
    with pytest.raises(SystemExit) as end:
        background.main(["--help"])
    assert end.value.code == 0
    output = capsys.readouterr().out
    assert all(flag in output for flag in ("--requeue", "--status", "--stop", "--dry_run"))
