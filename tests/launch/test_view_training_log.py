"""The log viewer: in a pipe, on a terminal, without colours, and which log it chooses."""

import os
import pathlib
import pty
import shutil
import signal
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "view_training_log.sh"
LOG = """\
2026-01-02 03:04:05 small: 25,102,464 parameters on 1 × cpu; selective scan: sequential; compiling …
2026-01-02 03:04:06 step 10/100  loss 4.2500  lr 0.0003  gradient norm 0.8  1,234 tokens/s  ETA 0:00:09
2026-01-02 03:04:07 step 10: eval loss 4.5000, perplexity 90.02, 2.1000 bits per byte
2026-01-02 03:04:07 saved out/step_10
2026-01-02 03:04:08 warning: step 11: gradient norm 99 is a spike; step skipped
2026-01-02 03:04:09 step 20/100  loss 3.7500  lr 0.0003  gradient norm 0.7  2,345 tokens/s  0.5 TFLOP/s (MFU 12.3%)  ETA 0:00:08
Traceback (most recent call last):
  File "train.py", line 1
KeyError: 'bolt'
2026-01-02 03:04:10 ended with exit status 1: crashed: KeyError: 'bolt'
"""  # noqa: E501
SUMMARY = "step 20/100, loss 3.7500, 2,345 tokens/s, ETA 0:00:08, eval loss 4.5000 at step 10"


@pytest.fixture
def project(tmp_path):
    """A project's folder with two logs, the older one first in the alphabet."""
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch")
    (tmp_path / "logs").mkdir()
    for age, name in enumerate(["training_b.log", "training_a.log"]):
        (tmp_path / "logs" / name).write_text(LOG if age == 0 else "2026-01-01 00:00:00 old\n")
        os.utime(tmp_path / "logs" / name, (1e9 - age, 1e9 - age))
    return tmp_path


def view(project, *arguments, cwd=".", script="./launch/view_training_log.sh"):
    return subprocess.run(
        [script, *arguments], cwd=project / cwd, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("cwd", "script"),
    [(".", "./launch/view_training_log.sh"), ("launch", "./view_training_log.sh")],
)
@pytest.mark.parametrize("argument", [[], ["logs/training_*.log"]])
def test_in_a_pipe_it_prints_the_newest_log_and_a_summary(project, cwd, script, argument):
    done = view(project, *argument, cwd=cwd, script=script)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(LOG) and "\x1b" not in done.stdout
    assert done.stdout.removeprefix(LOG).endswith(f"logs/training_b.log: {SUMMARY}\n")


def test_it_shows_the_newest_of_several_files(project):
    old, new = "logs/training_a.log", "logs/training_b.log"
    assert view(project, old, new).stdout.startswith(LOG)
    assert view(project, new, old).stdout.startswith(LOG)
    assert view(project, old).stdout == f"2026-01-01 00:00:00 old\n{old}: no step yet\n"


def test_it_follows_the_shell_pipeline_to_its_end(project):
    line = "./launch/view_training_log.sh | head -n 1"
    done = subprocess.run(line, shell=True, cwd=project, capture_output=True, text=True)
    assert done.stdout == LOG.splitlines()[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["logs/none.log"], "error: no log logs/none.log"),
        (["--follow"], "error: unknown flag --follow (see --help)"),
        (["logs"], "error: logs is not a readable file"),
    ],
)
def test_mistakes_are_one_line(project, arguments, message):
    done = view(project, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_without_a_log_it_is_an_error(project):
    shutil.rmtree(project / "logs")
    done = view(project)
    assert done.returncode == 2 and "once a run has started" in done.stderr


def test_help(project):
    done = view(project, "--help")
    assert done.returncode == 0 and "NO_COLOR" in done.stdout


class Terminal:
    """The viewer on a terminal of its own."""

    def __init__(self, project, **environment):
        self._read, slave = pty.openpty()
        self._process = subprocess.Popen(
            ["./launch/view_training_log.sh"],
            cwd=project,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", **environment},
        )
        os.close(slave)
        self.text = ""

    def until(self, expected):
        while expected not in self.text:
            self.text += os.read(self._read, 4096).decode().replace("\r\n", "\n")

    def end(self):
        os.killpg(self._process.pid, signal.SIGINT)
        self._process.wait(timeout=30)
        os.close(self._read)


@pytest.fixture
def no_colour_wish(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_on_a_terminal_it_colours_by_severity_and_follows(project, no_colour_wish):
    terminal = Terminal(project)
    try:
        terminal.until("exit status 1: crashed")
        with (project / "logs/training_b.log").open("a") as log:
            log.write("error: a new one\n")
        terminal.until("a new one\x1b[0m")
    finally:
        terminal.end()
    lines = terminal.text.splitlines()
    assert lines[0].startswith("\x1b[1m") and SUMMARY in lines[0]
    red, yellow, green, cyan = "\x1b[1;31m", "\x1b[33m", "\x1b[32m", "\x1b[36m"
    colours = ["", "", cyan, green, yellow, "", red, red, red, red, red]
    for colour, line in zip(colours, lines[1:], strict=True):
        assert line.startswith("\x1b") == bool(colour), line
        assert line.endswith("\x1b[0m") == bool(colour), line
        assert not colour or line.startswith(colour), line


@pytest.mark.parametrize("wish", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_can_be_disabled(project, no_colour_wish, wish):
    terminal = Terminal(project, **wish)
    try:
        terminal.until("exit status 1: crashed")
    finally:
        terminal.end()
    assert "\x1b" not in terminal.text and SUMMARY in terminal.text
