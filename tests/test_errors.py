"""What every command does with errors, closed pipes and Ctrl-C."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from mamba_jax.errors import UserError, command
@command
def main(argv):
    print("line\\n" * int(argv[0]))
    sys.stdin.read()  # until the reader of the output has exited
    {ending}
sys.exit(main())
"""


@pytest.mark.parametrize("lines", [1, 100_000], ids=["buffered", "written"])
@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise UserError('x=1; give another x')", 2, "error: x=1; give another x\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise KeyboardInterrupt('stopped; resume it')", 130, "stopped; resume it\n"),
        ("sys.exit(4)", 4, ""),
    ],
)
def test_a_reader_that_exits_hides_no_failure(lines, ending, status, error):
    """As in ``command | head -n 1``."""
    command = [sys.executable, "-c", PROGRAM.format(ending=ending), str(lines)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(command, text=True, env=buffered, **pipes) as process:
        process.stdout.close()
        _, printed = process.communicate()
    if lines > 1:  # the print itself failed: the command went no further
        status, error = 0, ""
    assert (process.returncode, printed) == (status, error)


def test_another_closed_pipe_is_a_failure():
    program = PROGRAM.format(ending="r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    command = [sys.executable, "-c", program, "1"]
    ran = subprocess.run(command, input="", capture_output=True, text=True)
    assert ran.returncode == 1 and "BrokenPipeError" in ran.stderr
