"""Only one process writes a run: who holds the lock, when it is released, who may take it."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from mamba_jax.errors import UserError
from mamba_jax.runs import lock as run_lock
from mamba_jax.runs.lock import NAME, Holder, RunLock

HERE = socket.gethostname()
# Takes the lock, prints the result, and holds it until its input ends.
HOLD = """
import pathlib, sys
from mamba_jax.errors import UserError
from mamba_jax.runs.lock import RunLock
try:
    with RunLock.acquire(pathlib.Path(sys.argv[1]), force="--force" in sys.argv) as lock:
        print("has it", flush=True)
        sys.stdin.read()
        lock.check()
except UserError as error:
    print("error:", error, flush=True)
"""


@contextlib.contextmanager
def process(folder, *flags, **options):
    """A process that runs HOLD."""
    command = [sys.executable, "-c", HOLD, str(folder), *flags]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **streams, **options) as made:
        try:
            yield made
        finally:
            made.kill()


def first_line(made):
    return made.stdout.readline().rstrip()


def end(made):
    """Lets it end; returns its last output."""
    return made.communicate()[0].rstrip()


def put_record(folder, renewed=None, **fields):
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(json.dumps(vars(Holder.this_process()) | fields))
    if renewed is not None:
        os.utime(folder / NAME, (renewed, renewed))


def refusal(folder, **options):
    with pytest.raises(UserError) as refused:
        RunLock.acquire(folder, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def quick(monkeypatch):
    """Another host's run renews its file, and is watched, in a moment."""
    monkeypatch.setattr(run_lock, "_BEAT_SECS", 0.02)
    monkeypatch.setattr(run_lock, "_WATCH_SECS", 0.3)


@pytest.fixture
def no_wait(monkeypatch):
    monkeypatch.setattr(run_lock.time, "sleep", None)


@pytest.fixture
def no_kernel_locks(monkeypatch):
    """A file system without kernel locks, like some network ones."""

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    with process(tmp_path) as first:
        assert first_line(first) == "has it"
        told = refusal(tmp_path)
        assert f"output_dir {tmp_path} is in use by a run on {HERE} (pid {first.pid}, since" in told
        assert "--force" in told and "--output_dir" in told
        with process(tmp_path) as second:
            assert first_line(second).startswith("error: output_dir")
        assert end(first) == ""
    assert not list(tmp_path.iterdir())  # nothing is left
    RunLock.acquire(tmp_path).release()


def test_one_of_many_concurrent_starts_gets_the_lock(tmp_path):
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(process(tmp_path / "new")) for _ in range(6)]
        told = [first_line(each) for each in made]
    assert told.count("has it") == 1
    assert sum("is in use by" in line for line in told) == 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_does_not_block(tmp_path, number):
    with process(tmp_path) as first:
        assert first_line(first) == "has it"
        first.send_signal(number)
        first.wait()
    assert (tmp_path / NAME).is_file()
    said = []
    RunLock.acquire(tmp_path, log=said.append).release()
    assert not said  # and nothing waits


def test_a_stopped_holder_keeps_the_lock(tmp_path):
    with process(tmp_path) as first:
        assert first_line(first) == "has it"
        first.send_signal(signal.SIGSTOP)
        assert f"pid {first.pid}" in refusal(tmp_path)
        first.send_signal(signal.SIGCONT)
        assert end(first) == ""


def test_force_takes_the_lock_and_the_other_run_notices(tmp_path):
    with process(tmp_path) as first:
        assert first_line(first) == "has it"
        said = []
        with RunLock.acquire(tmp_path, force=True, log=said.append) as lock:
            assert f"pid {first.pid}" in said[0]
            lock.check()
            told = end(first)
            by = f"a run on {HERE} (pid {os.getpid()}, since"
            assert told.startswith(f"error: output_dir {tmp_path} was taken over by {by}")
            assert f"pid {os.getpid()}" in refusal(tmp_path)  # its end did not release the lock


def test_a_run_notices_the_loss_of_its_folder_even_after_the_other_run_ended(tmp_path):
    with process(tmp_path) as first:
        assert first_line(first) == "has it"
        RunLock.acquire(tmp_path, force=True).release()
        assert "was taken over by" in end(first)


def test_force_on_a_free_folder_prints_nothing(tmp_path):
    said = []
    RunLock.acquire(tmp_path, force=True, log=said.append).release()
    assert not said


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": 1},  # lives, but the kernel says that it has no lock
        {"boot": "another", "process_start": "1", "renewed": 9e8},
        {"host": "renamed", "pid": 7},  # a container of this host
    ],
    ids=["process id given out again", "reboot", "container"],
)
def test_a_stale_record_on_this_host_does_not_block(tmp_path, fields):
    put_record(tmp_path, **fields)
    said = []
    RunLock.acquire(tmp_path, log=said.append).release()
    assert not said


def test_an_active_run_on_a_host_of_the_same_name_is_respected(tmp_path, quick):
    put_record(tmp_path, boot="another", pid=4711)
    with renewed(tmp_path / NAME):
        assert f"in use by a run on {HERE} (pid 4711, since" in refusal(tmp_path)


def another_host(folder, **fields):
    put_record(folder, host="node7", pid=4711, boot="another", **fields)


@contextlib.contextmanager
def renewed(path):
    """What a living run on another host does to its file."""
    ended = threading.Event()

    def renew():
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_an_active_run_on_another_host_is_respected(tmp_path, quick):
    another_host(tmp_path)
    said = []
    with renewed(tmp_path / NAME):
        told = refusal(tmp_path, log=said.append)
    assert "in use by a run on node7 (pid 4711, since" in told
    assert "node7" in said[0] and "--force" in said[0]


def test_a_dead_run_on_another_host_is_detected(tmp_path, quick):
    another_host(tmp_path)
    said = []
    with RunLock.acquire(tmp_path, log=said.append):
        assert "no update in" in said[-1]
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_force_does_not_wait_for_another_host(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_is_renewed", None)
    another_host(tmp_path)
    said = []
    with RunLock.acquire(tmp_path, force=True, log=said.append):
        assert len(said) == 1 and "node7 (pid 4711" in said[0]


def test_a_folder_that_another_host_took_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    """Two hosts watched the file of a dead run; the other one was faster."""
    another_host(tmp_path)

    def watch(path):
        path.unlink()
        put_record(tmp_path, pid=1)
        monkeypatch.undo()
        holders.append(os.open(path, os.O_RDONLY))
        run_lock.fcntl.flock(holders[0], run_lock.fcntl.LOCK_EX)
        return False

    holders = []
    monkeypatch.setattr(run_lock, "_is_renewed", watch)
    assert "(pid 1," in refusal(tmp_path)
    assert run_lock.read_holder(tmp_path).pid == 1
    os.close(holders[0])


def test_looking_up_the_holder_does_not_wait(tmp_path, no_wait):
    assert not run_lock.is_held(tmp_path)
    with RunLock.acquire(tmp_path):
        assert run_lock.is_held(tmp_path)
    assert not run_lock.is_held(tmp_path)
    put_record(tmp_path, pid=1)
    assert not run_lock.is_held(tmp_path)
    another_host(tmp_path)
    assert run_lock.is_held(tmp_path)
    another_host(tmp_path, renewed=9e8)
    assert not run_lock.is_held(tmp_path)


def test_the_holder_renews_its_file(tmp_path, quick):
    with RunLock.acquire(tmp_path):
        assert run_lock._is_renewed(tmp_path / NAME)


def test_without_kernel_locks_the_record_counts(tmp_path, no_kernel_locks, quick):
    with RunLock.acquire(tmp_path):
        assert f"pid {os.getpid()}" in refusal(tmp_path)
    assert not list(tmp_path.iterdir())
    put_record(tmp_path, pid=2**22 + 1)  # no such process
    said = []
    with RunLock.acquire(tmp_path, log=said.append):
        assert "no update in" in said[-1]
        with renewed(tmp_path / NAME):
            put_record(tmp_path, pid=2**22 + 1)  # its supervisor was killed; it lives
            assert "is in use by" in refusal(tmp_path)


def test_a_child_process_has_the_lock_that_it_inherits(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        inherits = {"pass_fds": [lock.descriptor], "env": {**os.environ, **lock.environment()}}
        for _ in range(2):  # as a supervisor starts it again
            with process(tmp_path, **inherits) as child:
                assert first_line(child) == "has it"
                assert end(child) == ""
            assert f"pid {os.getpid()}" in refusal(tmp_path)  # its end did not release the lock
        with process(
            tmp_path / "other", **inherits
        ) as child:  # another folder's lock does not count there
            assert first_line(child) == "has it"
        with process(tmp_path, env=inherits["env"]) as child:  # nor is a number alone
            assert first_line(child).startswith("error: ")


def test_a_run_that_outlives_its_supervisor_keeps_the_lock(tmp_path):
    lock = RunLock.acquire(tmp_path)
    environment = {**os.environ, **lock.environment()}
    with process(tmp_path, pass_fds=[lock.descriptor], env=environment) as child:
        assert first_line(child) == "has it"
        lock.hand_over()
        lock.release()
        refusal(tmp_path)
    RunLock.acquire(tmp_path).release()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    told = refusal(tmp_path / "file/out")
    assert "cannot write into output_dir" in told and "Not a directory" in told


def test_folders_that_stay_empty_are_removed_again(tmp_path):
    with RunLock.acquire(tmp_path / "a/b") as lock:
        lock.check()
    assert not (tmp_path / "a").exists()
    with RunLock.acquire(tmp_path / "a/b"):
        (tmp_path / "a/kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_removed_lock_file_does_not_end_the_run(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        lock.check()


def test_a_lock_file_removed_and_recreated_by_another_run_ends_the_first(tmp_path):
    with RunLock.acquire(tmp_path) as lock:
        (tmp_path / NAME).unlink()
        with process(tmp_path) as second:
            assert first_line(second) == "has it"
            with pytest.raises(UserError, match=rf"was taken over by .* \(pid {second.pid}, "):
                lock.check()
            assert end(second) == ""


def test_a_helper_of_a_run_does_not_inherit_its_lock(tmp_path):
    """Libraries start processes without closing what they have open."""
    with RunLock.acquire(tmp_path) as lock:
        program = (
            "import os, pathlib, sys; from mamba_jax.runs.lock import RunLock\n"
            "print(os.get_inheritable(RunLock.acquire(pathlib.Path(sys.argv[1])).descriptor))"
        )
        inherits = {"pass_fds": [lock.descriptor], "env": {**os.environ, **lock.environment()}}
        command = [sys.executable, "-c", program, tmp_path]
        assert subprocess.run(command, capture_output=True, text=True, **inherits).stdout == (
            "False\n"
        )


def test_looking_up_the_holder_takes_no_lock(tmp_path, quick):
    said = []
    run_lock.check_free(tmp_path, False, said.append)
    with RunLock.acquire(tmp_path):
        with pytest.raises(UserError, match=f"is in use by a run on {HERE}"):
            run_lock.check_free(tmp_path, False, said.append)
        run_lock.check_free(tmp_path, True, said.append)
        assert len(said) == 1 and HERE in said[0]
    another_host(tmp_path)
    run_lock.check_free(tmp_path, False, said.append)
    assert "node7" in said[1]
    put_record(tmp_path, pid=1)
    run_lock.check_free(tmp_path, False, said.append)
    assert len(said) == 2
