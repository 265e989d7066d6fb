"""A folder that appears under its name whole or not at all."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from mamba_jax.errors import UserError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside ``target``, which takes its name when all went well.

    Raises:
      UserError: if ``target`` exists, or the disk is full.
    """
    if target.exists():
        raise UserError(f"--out {target} exists; give a folder that does not, or remove it")
    # Not as checkpoints are called while they are written: a run removes such ones of its own.
    aside = target.with_name(f".part-{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed export left
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    except Exception as error:
        if reason := _disk_reason(error):
            raise UserError(f"cannot write {target}: {reason}") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_room(folder: pathlib.Path, n_bytes: int) -> None:
    """Refuses to begin what cannot end.

    Raises:
      UserError: if fewer bytes are free where the folder lies.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UserError(
            f"no room in {folder.parent}: {n_bytes / 1e6:,.0f} MB are needed, "
            f"{free / 1e6:,.0f} MB are free"
        )


def _disk_reason(error: Exception) -> str | None:
    """Returns what a disk would not do, None for other errors."""
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return os.strerror(error.errno).lower()
    # safetensors puts the system's error into words of its own; numpy keeps only the lengths.
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1])).lower()
    if re.fullmatch(r"\d+ requested and \d+ written", str(error)):
        return "the disk took only a part of a file; is it full?"
    return None
