"""Files that are written completely or not at all."""

import contextlib
import os
import pathlib
import re
import secrets

_PART = re.compile(r"\.part-[0-9a-f]{16}")
_ABANDONED_SECS = 3600  # a living writer renames its file within seconds


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a temporary file and renames it, so no reader and no kill finds half of the content.

    A link remains; the file that it names is replaced. Devices and pipes are written directly.
    Temporary files that killed writers left in the folder are removed.

    Raises:
      OSError: with ``path`` as its file name; the previous content is untouched then.
    """
    named = pathlib.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if str(named).startswith("/dev/") or (named.exists() and not named.is_file()):
        named.write_bytes(data)
        return
    target = pathlib.Path(os.path.realpath(named))
    aside = target.with_name(f".part-{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:
            _remove_abandoned(target.parent, os.fstat(file.fileno()).st_mtime)
            if target.exists():
                os.chmod(aside, target.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else the file may be empty after the machine crashes
        aside.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(named)) from error
    finally:
        with contextlib.suppress(OSError):  # it still exists only after an error
            aside.unlink()


def _remove_abandoned(folder: pathlib.Path, now: float) -> None:
    """Removes old temporary files.

    Args:
      folder: to clean.
      now: by the clock of its file system, which may differ from this machine's.
    """
    for aside in folder.glob(".part-*"):
        with contextlib.suppress(OSError):  # another writer removed it, or this one has no right to
            if _PART.fullmatch(aside.name) and now - aside.lstat().st_mtime > _ABANDONED_SECS:
                aside.unlink()  # fails on a folder


def fsync(path: str | os.PathLike[str]) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
