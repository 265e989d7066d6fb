"""``background.json`` in a run's output_dir: its processes, its log, how it ended.

The processes of the run hold the kernel's lock on the file; the kernel drops it with the last of
them, so neither a kill nor a reused process id can make a dead run look alive. The file is written
in place, with room to spare, so that the end of a run can be recorded on a full disk as well.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from typing import Any

from mamba_jax.errors import UserError
from mamba_jax.files import write_atomic
from mamba_jax.runs import lock

NAME = "background.json"
EXIT_CODE = "exit_code"  # a file beside it: "running", then the exit status as a number
_ROOM = 2048  # bytes reserved in the file for later facts
_CODE_WIDTH = len("running")


class Record:
    """The record of a run, which this process has locked."""

    def __init__(self, output_dir: pathlib.Path, descriptor: int):
        """Takes over a locked file; ``claim`` locks it.

        Args:
          output_dir: of the run.
          descriptor: of the open and locked file; the processes of the run inherit it.
        """
        self.output_dir = output_dir
        self.descriptor = descriptor
        self.facts = read(output_dir)  # of the previous run, until ``begin``
        self._size = os.fstat(descriptor).st_size

    @classmethod
    def claim(cls, output_dir: pathlib.Path, *, force: bool = False) -> "Record":
        """Makes the folder and takes the lock.

        A file system without kernel locks leaves it to ``run.lock`` to refuse a second run.

        Args:
          output_dir: of the run.
          force: start a new record where an active run has locked the old one.

        Raises:
          UserError: if a run is active there, or the folder cannot be written.
        """
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if force:
                (output_dir / NAME).unlink(missing_ok=True)
            descriptor = os.open(output_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(output_dir, error, "choose another --output_dir") from error
        if lock.try_lock(descriptor, fcntl.LOCK_EX) is False:
            os.close(descriptor)
            pid = read(output_dir).get("pid", "unknown")
            raise UserError(
                f"output_dir {output_dir} is in use by a run (pid {pid}); stop that run, or choose "
                "another --output_dir"
            )
        return cls(output_dir, descriptor)

    def begin(self, **facts: Any) -> None:
        """Replaces the record of the previous run by that of a new one.

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
        """Adds facts, in the space reserved for them."""
        self.facts |= facts
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            self._write()

    def end(self, exit_code: int, why: str) -> None:
        """Records how the run ended, here and in the file ``exit_code``."""
        self.add(exit_code=exit_code, why=why[: _ROOM // 8])
        with contextlib.suppress(OSError):
            if lock.is_at(self.output_dir / NAME, self.descriptor):  # else another run's (--force)
                _write_code(self.output_dir, str(exit_code))

    def release(self) -> None:
        """Gives up the lock; processes that inherited it keep it."""
        os.close(self.descriptor)

    def _write(self) -> None:
        text = _encoded(self.facts)[: self._size - 1]
        os.pwrite(self.descriptor, text.ljust(self._size - 1) + b"\n", 0)


def _encoded(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False).encode()


def _write_code(output_dir: pathlib.Path, text: str) -> None:
    path, line = output_dir / EXIT_CODE, text.ljust(_CODE_WIDTH) + "\n"
    if path.is_file() and path.stat().st_size == len(line):
        with path.open("r+") as file:  # one write of the same length: needs no space, never partial
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
    """Returns whether a background run is active in that folder."""
    try:
        with (output_dir / NAME).open("rb") as file:
            is_free = lock.try_lock(file.fileno(), fcntl.LOCK_SH)
    except OSError:
        return False
    return lock.is_held(output_dir) if is_free is None else not is_free
