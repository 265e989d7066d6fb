"""What an exit status means, and what a log says about how its run ended."""

import os
import pathlib
import re
import signal

from mamba_jax.errors import INTERRUPTED

# Saved; the same command with --resume auto resumes. 75 is EX_TEMPFAIL.
PREEMPTED, PEER_LOST = 75, 76
_TAIL_BYTES = 1 << 16
_TIME = r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)?\s*"
_REPORTED = re.compile(_TIME + r"(error: .*)$")  # the program's own message
_RAISED = re.compile(_TIME + r"((?:\w+\.)*\w*(?:Error|Exception)\b.*|Fatal Python error: .*)$")
_MEANINGS = {
    0: "done",
    1: "crashed",
    2: "could not continue",
    PREEMPTED: "stopped by a signal and saved",
    PEER_LOST: "another process of the run was lost",
    INTERRUPTED: "stopped at once by Ctrl-C",
}


def exit_code(status: int) -> int:
    """Turns ``subprocess``'s status into the one that a shell would show: −9 becomes 137."""
    return 128 - status if status < 0 else status


def meaning(code: int) -> str:
    """Returns the meaning of an exit code, in a few words."""
    if code in _MEANINGS:
        return _MEANINGS[code]
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return "failed"
    if name == "SIGKILL":
        return "killed by SIGKILL: manually, or by the system because memory ran out (see dmesg)"
    if name == "SIGTERM":
        return "stopped by SIGTERM before it had anything to save"
    return f"killed by {name}"


def reason(log: pathlib.Path) -> str:
    """Returns the line of a log that says why its run ended; "" if there is none.

    That is the program's last error message, else the last exception: a thread may print an
    exception after that message.
    """
    lines = tail(log)
    for pattern in (_REPORTED, _RAISED):
        found = [match[1] for line in lines if (match := pattern.match(line))]
        if found:
            return found[-1]
    return ""


def last(log: pathlib.Path, pattern: str) -> str:
    """Returns the last line of a log in which the pattern is found; "" where there is none."""
    found = [line for line in tail(log) if re.search(pattern, line)]
    return found[-1] if found else ""


def tail(log: pathlib.Path) -> list[str]:
    """Returns the last lines of a log; none where it cannot be read."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def full_disk(*folders: pathlib.Path) -> str:
    """Returns a message on the first of these folders whose disk is full; "" if none is."""
    for folder in folders:
        try:
            disk = os.statvfs(folder)
        except OSError:
            continue
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes < 1 << 20:
            return f"the disk of {folder} is full ({free_bytes:,} bytes free)"
    return ""
