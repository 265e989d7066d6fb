"""Errors that a user can fix: one line, the offending value and the remedy, no traceback."""

import difflib
import functools
import importlib
import os
import select
import sys
from collections.abc import Callable, Iterable
from typing import IO, Any

from mamba_jax.paths import expand_arguments

INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell reports Ctrl-C


class UserError(Exception):
    """A mistake of the user or a fault of their machine.

    Commands print it as a single line ``error: <message>`` and exit with status 2. The message
    names the offending value and the remedy.
    """


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns ``; did you mean "x"?`` for the candidate nearest to ``name``, else ``""``.

    Those that begin with the name come first.
    """
    known = list(candidates)
    nearest = lambda among: difflib.get_close_matches(name, among, n=1, cutoff=0.5)
    near = nearest([one for one in known if one.startswith(name)]) or nearest(known)
    return f'; did you mean "{near[0]}"?' if near else ""


def first_line(error: BaseException | str) -> str:
    """Returns the first line of an error's message, or its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def need(name: str, extra: str) -> Any:
    """Imports a module.

    Raises:
      UserError: if it is not installed, naming the extra of this package that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is missing ({error}): pip install 'mamba_jax[{extra}]'"
        ) from error


def handle_broken_pipe() -> None:
    """Silences standard output after its reader, such as ``head``, has exited.

    Python flushes it once more at exit and would complain about the closed pipe.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main: Callable[[list[str]], int]) -> Callable[..., int]:
    """Wraps a command's ``main(argv) -> exit status``.

    In its ``argv`` the home folder replaces ``~``. An error that the user can fix is printed as one
    line and ends with status 2; a Ctrl-C with one line, the message of the ``KeyboardInterrupt`` if
    it has one, and 130. If the reader of the output, such as ``head``, exits, the command ends
    without a message.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            return main(expand_arguments(sys.argv[1:] if argv is None else argv))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            if _has_reader(sys.stdout) and _has_reader(sys.stderr):
                raise  # another pipe: a failure
            return 0
        except OSError as error:  # a disk, a permission, a name too long: a fault of the machine
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted", file=sys.stderr)
            return INTERRUPTED
        finally:
            try:
                sys.stdout.flush()
            except BrokenPipeError:  # no error, and it changes no exit status
                handle_broken_pipe()

    return wrapped


def _has_reader(stream: IO[str]) -> bool:
    """Returns whether a process still reads an output stream, as far as the system can tell."""
    poll = select.poll()
    try:
        poll.register(stream, 0)  # errors are always reported
    except (OSError, ValueError):  # not a file of the operating system
        return True
    return not poll.poll(0)
