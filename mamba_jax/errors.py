"""Errors that a user can mend: one line, the offending value and the remedy, no traceback."""

import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from mamba_jax.paths import expand_arguments


class UserError(Exception):
    """A mistake of the user's or a fault of their machine.

    Commands print it as a single line ``error: <message>`` and exit with status 2. The message
    names the offending value and the remedy.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns ``; did you mean "x"?`` for the candidate nearest to ``name``, else ``""``."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""


def first_line(error: BaseException | str) -> str:
    """Returns the first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def need(name: str, extra: str) -> Any:
    """Imports a module.

    Raises:
      UserError: if it is not installed, naming the extra of this package that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is missing ({error}): pip install 'mamba_jax[{extra}]'"
        ) from error


def handle_broken_pipe() -> None:
    """Ends the output quietly: its reader, such as ``head``, has seen enough.

    Python flushes stdout once more at exit; into the closed pipe it would complain.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Wraps a command's ``main(argv) -> exit status``.

    Its ``argv`` has the home folder in place of ``~``. A mistake that the user can mend is one
    line and status 2; a Ctrl-C that the command does not handle itself is one line and 130; a
    reader that has seen enough, such as ``head``, ends the command without a word.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            try:
                return main(expand_arguments(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()  # here, where a closed pipe is no error
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            handle_broken_pipe()
            return 0
        except OSError as error:  # a disk, a permission, a name too long: the machine's, not ours
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return wrapped
