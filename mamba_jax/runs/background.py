"""``background.json`` in a run's output_dir: who runs there, where its log is, how it ended.

The file is locked by the processes of the run for as long as one of them lives; the kernel takes
the lock away with the last of them, so neither a kill nor a number of a process given out again can
make a dead run look alive. It is written in place, with room to spare, so that the end of a run can
still be noted when the disk is full.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from mamba_jax.errors import UserError
from mamba_jax.files import write_atomic

NAME = "background.json"
EXIT_CODE = "exit_code"  # a file beside it: "running", then the exit status as a number
_ROOM = 2048  # bytes kept free in the file for what comes later
_CODE_WIDTH = len("running")


class Record:
    """The record of a run that this process has the lock of."""

    def __init__(self, output_dir: pathlib.Path, descriptor: int):
        """Takes over a lock; see ``claim`` for getting it.

        Args:
          output_dir: of the run.
          descriptor: of the open and locked file; the processes of the run inherit it.
        """
        self.output_dir = output_dir
        self.descriptor = descriptor
        self.facts = read(output_dir)  # of the run before, until ``begin``
        self._size = os.fstat(descriptor).st_size

    @classmethod
    def claim(cls, output_dir: pathlib.Path, *, force: bool = False) -> "Record":
        """Makes the folder and takes the lock.

        Args:
          output_dir: of the run.
          force: begin a new record where a run that lives has the lock of the old one.

        Raises:
          UserError: if a run lives there, or the folder cannot be written.
        """
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if force:
                (output_dir / NAME).unlink(missing_ok=True)
            descriptor = os.open(output_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(output_dir, error, "choose another --output_dir") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            pid = read(output_dir).get("pid", "unknown")
            raise UserError(
                f"output_dir {output_dir} is in use by a run (pid {pid}); stop that one, or choose "
                "another --output_dir"
            ) from None
        return cls(output_dir, descriptor)

    def begin(self, **facts: Any) -> None:
        """Writes the record of a new run over that of the one before.

        Raises:
          UserError: if the disk is full.
        """
        self.facts = facts
        self._size = len(_encoded(facts)) + _ROOM
        try:
            os.ftruncate(self.descriptor, 0)
            self._write()
            _write_code(self.output_dir, "running")
        except OSError as error:
            raise _unwritable(self.output_dir, error, "free some space") from error

    def add(self, **facts: Any) -> None:
        """Adds facts, in the room that was kept for them."""
        self.facts |= facts
        with contextlib.suppress(OSError):  # no disk may stop a run, or hide how it ended
            self._write()

    def end(self, exit_code: int, why: str) -> None:
        """Notes how the run ended, here and in the file ``exit_code``."""
        self.add(exit_code=exit_code, why=why[: _ROOM // 8])
        with contextlib.suppress(OSError):
            _write_code(self.output_dir, str(exit_code))

    def release(self) -> None:
        """Gives up the lock; others that inherited it keep it."""
        os.close(self.descriptor)

    def _write(self) -> None:
        text = _encoded(self.facts)[: self._size - 1]
        os.pwrite(self.descriptor, text.ljust(self._size - 1) + b"\n", 0)


def _encoded(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode()


def _write_code(output_dir: pathlib.Path, text: str) -> None:
    path, line = output_dir / EXIT_CODE, text.ljust(_CODE_WIDTH) + "\n"
    if path.is_file() and path.stat().st_size == len(line):
        with path.open("r+") as file:  # one write of the same length: needs no room, is never half
            file.write(line)
    else:
        write_atomic(path, line)


def _unwritable(output_dir: pathlib.Path, error: OSError, remedy: str) -> UserError:
    return UserError(f"cannot write into output_dir {output_dir}: {error.strerror}; {remedy}")


def read(output_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the facts of the newest background run in a folder; empty where there was none."""
    try:
        facts = json.loads((output_dir / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def is_running(output_dir: pathlib.Path) -> bool:
    """Says whether a process of a background run in that folder lives."""
    try:
        descriptor = os.open(output_dir / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
