"""A folder that appears under its name whole or not at all."""

import contextlib
import errno
import pathlib
import shutil
from collections.abc import Iterator

from mamba_jax.errors import UserError


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder beside ``target``, which takes its name when all went well.

    Raises:
      UserError: if ``target`` exists, or the disk is full.
    """
    if target.exists():
        raise UserError(f"--out {target} exists; give a folder that does not, or remove it")
    aside = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # what a killed export left
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    except Exception as error:
        # safetensors wraps the system's error in its own, so the words are looked at as well.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise UserError(f"cannot write {target}: no space left on the device") from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
