"""``run.lock`` in an output_dir: only one process at a time writes a run there.

Two signs show that a run is alive, because neither is enough alone:

- the kernel's lock on the file. The kernel drops it with the last process that holds it, so neither
  a kill nor a reboot leaves it behind. Not every network file system passes it on to other hosts.
- a record in the file (host, process, since when), whose modification time the holder renews. A
  host that cannot see another host's kernel lock watches that time before it takes the folder.

A run removes the file when it ends. Readers of a run never need the lock. A run whose file was
replaced, by ``--force`` or after somebody deleted it, finds that out before its next save.

Packages such as filelock offer either sign, not both in one file, and do not pass a lock on to a
child process, which a supervisor has to do.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import random
import threading
import time
from collections.abc import Callable

from mamba_jax.errors import UserError
from mamba_jax.runs.holder import Holder

NAME = "run.lock"
_INHERITED = "MAMBA_JAX_RUN_LOCK"  # variable: the descriptor that a parent process passes on
_BEAT_SECS = 10.0  # between renewals of the modification time
_WATCH_SECS = 60.0  # without a renewal: the holder is dead
_TRIES = 5  # a reader that checks the lock holds it for an instant
_NO_KERNEL_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """The lock of an output_dir; a context manager that releases it."""

    def __init__(self, output_dir: pathlib.Path, descriptor: int, made: list[pathlib.Path] | None):
        """
        Args:
          output_dir: of the run.
          descriptor: of the open and locked file.
          made: folders to remove at the end if they are empty then, inner ones first; None: the
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
          log: receives why this takes long, and what ``force`` did.

        Raises:
          UserError: if another run holds it, or the folder cannot be written.
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
        """Takes over from a parent process that exits: this process now releases the lock."""
        self._made = []
        _write(self.descriptor)
        self._record = _read(self.descriptor)

    def environment(self) -> dict[str, str]:
        """Returns the variable that names the inherited descriptor to a child process."""
        return {_INHERITED: str(self.descriptor)}

    def check(self) -> None:
        """Refuses to write where another run has taken the folder.

        That is the case where its record is in our file (``--force``), or in a newer file of the
        same name: somebody deleted ours, and the other run found the folder free.

        Raises:
          UserError: if another run has taken the folder.
        """
        for read in (lambda: _read(self.descriptor), (self.output_dir / NAME).read_bytes):
            try:
                record = read()
            except OSError:  # removed; some network file systems then lose the open one as well
                continue
            if record != self._record:
                raise UserError(
                    f"output_dir {self.output_dir} was taken over by "
                    f"{Holder.parse(record) or 'another run'}; this run saves nothing more; choose "
                    "another --output_dir to train at the same time"
                )

    def hand_over(self) -> None:
        """Leaves the lock to the child process that inherited it and calls ``own``."""
        self._made = None

    def release(self) -> None:
        """Gives up the lock and leaves no trace of it."""
        self._ended.set()
        self._beats.join()
        path = self.output_dir / NAME
        if self._made is not None and is_at(path, self.descriptor):
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


def is_held(output_dir: pathlib.Path) -> bool:
    """Returns whether a run appears to hold the lock; for readers, without waiting."""
    path = output_dir / NAME
    try:
        with path.open("rb") as stream:
            _, is_alive = _judge(path, stream.fileno(), fcntl.LOCK_SH)
            renewed = os.fstat(stream.fileno()).st_mtime
    except OSError:
        return False
    # Where only time can tell, assume that the clocks of both hosts agree.
    return time.time() - renewed < _WATCH_SECS if is_alive is None else is_alive


def check_free(output_dir: pathlib.Path, force: bool, log: Callable[[str], None]) -> None:
    """Refuses what ``acquire`` would refuse at once; does not wait and does not take the lock.

    Raises:
      UserError: if another run holds the lock.
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
        log(f"output_dir {output_dir} is locked by {holder or 'another run'}")


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
            if not is_at(path, descriptor):  # released in between
                os.close(descriptor)
                continue
            if is_alive is False or (is_new and is_alive is None):
                _write(descriptor)
                return descriptor
            if force:
                log(f"--force: took over output_dir {output_dir} from {holder or 'another run'}")
            elif is_alive:
                raise _in_use(output_dir, holder)
            else:
                log(
                    f"output_dir {output_dir} is locked by {holder or 'another run'}, which may "
                    f"have been killed: watching it for {_WATCH_SECS:g} s (--force skips this)"
                )
                if _is_renewed(path):
                    raise _in_use(output_dir, read_holder(path.parent) or holder)
                if not is_at(path, descriptor):  # released, or taken by another that watched
                    os.close(descriptor)
                    continue
                log(f"no update in {_WATCH_SECS:g} s: taking over output_dir {output_dir}")
            # A new file. A run that still has the old one finds this record in it at its next save.
            _write(descriptor)
            path.unlink(missing_ok=True)
            os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _open(path: pathlib.Path) -> tuple[int, bool]:
    """Opens the lock file; returns its descriptor, and whether this call created it."""
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
    locked = try_lock(descriptor, kind)
    holder = read_holder(path.parent)
    if locked is False:
        return holder, True
    if holder is None:
        return None, None if locked is None else False
    renewed = os.fstat(descriptor).st_mtime
    if locked and (holder.is_on_this_host or holder.was_ended_by_a_reboot(renewed)):
        return holder, False
    return holder, True if holder.is_on_this_host and holder.is_alive else None


def try_lock(descriptor: int, kind: int) -> bool | None:
    """Returns whether the kernel's lock is ours now; None: the file system has no such locks.

    Args:
      descriptor: of an open file.
      kind: ``fcntl.LOCK_EX``, or ``fcntl.LOCK_SH`` to check whether a run holds it.
    """
    for remaining in reversed(range(_TRIES if kind == fcntl.LOCK_EX else 1)):
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
    """Watches the file; returns whether a run renewed it, False if it was removed."""
    before = _signature(path)
    # Two that start to watch together must not end together, so that one sees the other's lock.
    end = time.monotonic() + _WATCH_SECS + random.uniform(0, _BEAT_SECS)
    while time.monotonic() < end:
        time.sleep(_BEAT_SECS / 10)
        now = _signature(path)
        if now != before:
            return now is not None
    return False


def _signature(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        with path.open("rb") as stream:  # opened again: NFS then asks the server
            status = os.fstat(stream.fileno())
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _inherited(path: pathlib.Path) -> int | None:
    """Returns the descriptor of this very file that a parent process passed on, if there is one."""
    try:
        descriptor = int(os.environ.get(_INHERITED, ""))
    except ValueError:
        return None
    if not is_at(path, descriptor):
        return None
    os.set_inheritable(descriptor, False)  # a helper process must not keep the lock after the run
    return descriptor


def is_at(path: pathlib.Path, descriptor: int) -> bool:
    """Returns whether an open file is the one with that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:  # removed; NFS may have lost the open one as well
        return False


def read_holder(output_dir: pathlib.Path) -> Holder | None:
    """Reads the record, which may be of a dead process; None where there is none."""
    try:
        return Holder.parse((output_dir / NAME).read_bytes())
    except OSError:
        return None


def _read(descriptor: int) -> bytes:
    return os.pread(descriptor, 4096, 0)


def _write(descriptor: int) -> None:
    record = Holder.this_process().record()
    os.pwrite(descriptor, record, 0)  # over the old one, whose space a full disk cannot take away
    os.ftruncate(descriptor, len(record))


def _in_use(output_dir: pathlib.Path, holder: Holder | None) -> UserError:
    return UserError(
        f"output_dir {output_dir} is in use by {holder or 'another run'}; stop that run, choose "
        "another --output_dir, or take the folder over with --force: the other run then ends at "
        "its next save, and until then each run can damage the other's checkpoints and metrics"
    )
