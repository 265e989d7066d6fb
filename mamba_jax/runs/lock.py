"""``run.lock`` in an output_dir: only one process at a time writes a run there.

Two signs tell that a run is alive, because neither is enough alone:

- the kernel's lock on the file. The kernel drops it with the last process that holds it, so neither
  a kill nor a reboot leaves it behind. Not every network file system passes it on to other hosts.
- a record in the file (host, process, since when), whose modification time the holder renews. A
  host that cannot see another one's kernel lock watches that time before it takes the folder.

A run that ends removes the file. Readers of a run never need the lock.

Packages such as filelock offer either sign, not both in one file, and do not pass a lock on to a
child process, which a supervisor has to do.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable

from mamba_jax.errors import UserError

NAME = "run.lock"
_INHERITED = "MAMBA_JAX_RUN_LOCK"  # variable: the descriptor that a parent process passes on
_BEAT_SECS = 10.0  # between renewals of the modification time
_WATCH_SECS = 60.0  # without a renewal: the holder is dead
_TRIES = 5  # a reader that asks who holds the lock has it for an instant
_NO_KERNEL_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")  # Linux; equal in all containers of a host


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that a record names."""

    host: str
    pid: int
    boot: str  # of the host; "": the system does not tell
    process_start: str  # of the process, in the system's own count; "": the system does not tell
    since: str  # local time, for people

    @classmethod
    def this_process(cls) -> "Holder":
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _read_text(_BOOT), _process_start(pid), since)

    @property
    def is_on_this_host(self) -> bool:
        boot = _read_text(_BOOT)
        return self.host == socket.gethostname() or (bool(boot) and self.boot == boot)

    @property
    def lives(self) -> bool:
        """Whether the process is there; it must be on this host."""
        if self.boot != _read_text(_BOOT) or self.process_start != _process_start(self.pid):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return True

    def __str__(self) -> str:
        return f"a run on {self.host} (pid {self.pid}, since {self.since})"


class RunLock:
    """The lock of an output_dir; a context manager that releases it."""

    def __init__(self, output_dir: pathlib.Path, descriptor: int, made: list[pathlib.Path] | None):
        """
        Args:
          output_dir: of the run.
          descriptor: of the open and locked file.
          made: folders to remove at the end if they are empty by then, inner ones first; None: the
            lock belongs to a parent process, which releases it.
        """
        self.output_dir = output_dir
        self.descriptor = descriptor
        self._made = made
        self._record = _read(descriptor)
        self._ended = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beats.start()

    @classmethod
    def acquire(
        cls,
        output_dir: pathlib.Path,
        *,
        force: bool = False,
        log: Callable[[str], None] = print,
    ) -> "RunLock":
        """Makes the folder and takes its lock, or the one that a parent process passes on.

        Args:
          output_dir: of the run.
          force: take it from another run.
          log: is told why this takes long, and what ``force`` did.

        Raises:
          UserError: if another run has it, or the folder cannot be written.
        """
        inherited = _inherited(output_dir / NAME)
        if inherited is not None:
            return cls(output_dir, inherited, None)
        made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            return cls(output_dir, _take(output_dir, force, log), made)
        except OSError as error:
            raise UserError(
                f"cannot write into output_dir {output_dir}: {error.strerror}; choose another "
                "--output_dir"
            ) from error

    def own(self) -> None:
        """Takes over from a parent process that ends: this one releases the lock from now on."""
        self._made = []
        _write(self.descriptor)
        self._record = _read(self.descriptor)

    def environment(self) -> dict[str, str]:
        """Returns the variable by which a child process finds the descriptor that it inherits."""
        return {_INHERITED: str(self.descriptor)}

    def check(self) -> None:
        """Refuses to write on where another run has taken the folder with ``--force``.

        Raises:
          UserError: if so.
        """
        try:
            record = _read(self.descriptor)
        except OSError:  # some network file systems lose a file that somebody removed
            record = b"" if (self.output_dir / NAME).exists() else self._record
        if record != self._record:
            raise UserError(
                f"output_dir {self.output_dir} was taken over by "
                f"{_parsed(record) or 'another run'}; nothing more is saved; choose another "
                "--output_dir to train beside it"
            )

    def hand_over(self) -> None:
        """Leaves the lock to the child process that inherited it, which calls ``own``."""
        self._made = None

    def release(self) -> None:
        """Gives up the lock, and leaves no trace of it."""
        self._ended.set()
        self._beats.join()
        path = self.output_dir / NAME
        if self._made is not None and _is_at(path, self.descriptor):
            path.unlink(missing_ok=True)
        os.close(self.descriptor)
        for folder in self._made or ():
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECS):
            with contextlib.suppress(OSError):
                os.utime(self.descriptor)


def check_free(output_dir: pathlib.Path, force: bool, log: Callable[[str], None]) -> None:
    """Does what ``acquire`` does as far as that takes neither time nor the lock.

    Raises:
      UserError: if another run has the lock.
    """
    path = output_dir / NAME
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        holder, is_alive = _judge(path, descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)
    if is_alive and not force:
        raise _in_use(output_dir, holder)
    if is_alive is not False:
        log(f"output_dir {output_dir} has the lock of {holder or 'another run'}")


def _take(output_dir: pathlib.Path, force: bool, log: Callable[[str], None]) -> int:
    """Returns the descriptor of the lock file, locked and with this process's record in it."""
    path = output_dir / NAME
    while True:
        try:
            descriptor, is_new = _open(path)
        except FileNotFoundError:  # released in between
            continue
        try:
            holder, is_alive = _judge(path, descriptor, fcntl.LOCK_EX)
            if not _is_at(path, descriptor):  # released in between
                os.close(descriptor)
                continue
            if is_alive is False or (is_new and is_alive is None):
                _write(descriptor)
                return descriptor
            if force:
                log(f"--force: took output_dir {output_dir} from {holder or 'another run'}")
            elif is_alive:
                raise _in_use(output_dir, holder)
            else:
                log(
                    f"output_dir {output_dir} has the lock of {holder or 'another run'}, which may "
                    f"have been killed: watching it for {_WATCH_SECS:g} s (--force does not wait)"
                )
                if _is_renewed(path):
                    raise _in_use(output_dir, _holder(path) or holder)
                log("no sign of life: taking the output_dir over")
            # A new file. Whoever has the old one finds this record in it before its next save.
            _write(descriptor)
            path.unlink(missing_ok=True)
            os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _open(path: pathlib.Path) -> tuple[int, bool]:
    """Opens the lock file; returns its descriptor, and whether this made it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
    except FileExistsError:
        return os.open(path, os.O_RDWR), False


def _judge(path: pathlib.Path, descriptor: int, kind: int) -> tuple[Holder | None, bool | None]:
    """Tries the kernel's lock.

    Returns:
      The process that the record names, and whether it is alive: True, False (the lock is ours now)
      or None, which only time can tell.
    """
    locked = _lock(descriptor, kind)
    holder = _holder(path)
    if locked is False:
        return holder, True
    if holder is None:
        return None, None if locked is None else False
    if holder.is_on_this_host and locked:
        return holder, False
    return holder, True if holder.is_on_this_host and holder.lives else None


def _lock(descriptor: int, kind: int) -> bool | None:
    """Returns whether the kernel's lock is ours; None: the file system has none."""
    for remaining in reversed(range(_TRIES)):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if remaining:
                time.sleep(0.1)
        except OSError as error:
            if error.errno in _NO_KERNEL_LOCKS:
                return None
            raise
        else:
            return True
    return False


def _is_renewed(path: pathlib.Path) -> bool:
    """Watches the file; returns whether a run renewed it, False if it is gone."""
    before = _signature(path)
    end = time.monotonic() + _WATCH_SECS
    while time.monotonic() < end:
        time.sleep(_BEAT_SECS / 10)
        now = _signature(path)
        if now != before:
            return now is not None
    return False


def _signature(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        with path.open("rb") as stream:  # opened anew: NFS then asks the server
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _inherited(path: pathlib.Path) -> int | None:
    """Returns the descriptor of this very file that a parent process passed on, if there is one."""
    try:
        descriptor = int(os.environ.get(_INHERITED, ""))
        return descriptor if _is_at(path, descriptor) else None
    except (ValueError, OSError):
        return None


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    """Says whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: pathlib.Path) -> Holder | None:
    """Reads the record; None where there is none yet."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


def _parsed(record: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(record))
    except (ValueError, TypeError):
        return None


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, 4096, 0)


def _write(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(vars(Holder.this_process())).encode() + b"\n", 0)


def _in_use(output_dir: pathlib.Path, holder: Holder | None) -> UserError:
    return UserError(
        f"output_dir {output_dir} is in use by {holder or 'another run'}; stop that one, choose "
        "another --output_dir, or take it over with --force: the other run then ends at its next "
        "save, and until then each can damage the other's checkpoints and metrics"
    )


def _process_start(pid: int) -> str:
    """Returns when a process started, in ticks since the boot (field 22 of Linux's stat)."""
    fields = _read_text(pathlib.Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
