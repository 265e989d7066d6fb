"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import secrets


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file aside and renames it: no reader and no kill ever leaves half of it.

    A link stays one; the file that it names is replaced. Devices and pipes are written directly.

    Raises:
      OSError: with ``path`` as its file name; what was there before is untouched then.
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
            if target.exists():
                os.chmod(aside, target.stat().st_mode & 0o777)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may leave the new name empty
        aside.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(named)) from error
    finally:
        with contextlib.suppress(OSError):  # it is there only if something went wrong
            aside.unlink()
