"""Creates a folder that appears under its name complete or not at all."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from mamba_jax.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside ``target``, and renames it to ``target`` if all went well.

    Raises:
      UserError: if ``target`` exists, another process is writing it, or the disk is full.
    """
    # Named unlike unfinished checkpoints, which a run removes.
    aside = target.with_name(f".part-{target.name}")
    try:
        with _claim(target, aside):
            try:
                yield aside
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except Exception as error:
        if reason := _disk_reason(error):
            raise UserError(f"cannot write {target}: {reason}") from error
        raise


@contextlib.contextmanager
def _claim(target: pathlib.Path, aside: pathlib.Path) -> Iterator[None]:
    """Makes ``aside`` empty and locks it; the system releases the lock when this process ends."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    while True:
        if target.exists():
            raise UserError(f"--out {target} exists; give a folder that does not, or remove it")
        is_new = True
        try:
            aside.mkdir()
        except FileExistsError:  # a killed process left it, or another one is at work
            is_new = False
        try:
            descriptor = os.open(aside, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its writer has just finished
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # Some network file systems cannot lock a folder. A new one is certainly ours; an
                # old one may have a writer.
                if not is_new or isinstance(error, BlockingIOError):
                    raise UserError(
                        f"--out {target}: another process is writing it; give another folder, or "
                        f"wait for it (if none is, remove {aside})"
                    ) from error
            if not _is_at(aside, descriptor):
                continue  # its writer has finished since we opened it
            for file in () if is_new else aside.iterdir():
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
            yield
            return
        finally:
            os.close(descriptor)


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    """Returns whether a path names the folder that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_room(folder: pathlib.Path, n_bytes: int) -> None:
    """Refuses to start writing what does not fit on the disk.

    Raises:
      UserError: if fewer bytes are free on the folder's disk.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"not enough disk space in {folder.parent}: {n_bytes / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free; free some, or give another --out"
        )


def _disk_reason(error: Exception) -> str | None:
    """Returns the reason if the disk caused an error, else None."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno).lower()
    # safetensors rephrases the system's error; numpy keeps only the lengths.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1])).lower()
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return "the disk stored only part of a file; is it full?"
    return None
