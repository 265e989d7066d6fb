"""From a folder to documents: text is read, everything else is skipped and counted.

No file may abort a run or add garbage to it. Files are read in the order of their sorted paths;
``data.sources.readers`` turns each one into documents. The rows of a dataset
(``data.sources.hub``) come after the files.
"""

import dataclasses
import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mamba_jax.data.document import CorpusPart, Piece
from mamba_jax.data.sources.decode import split_extension
from mamba_jax.data.sources.readers import EXTENSIONS, VERSION, is_readable, pieces
from mamba_jax.data.summary import DataSummary, shown
from mamba_jax.errors import UserError

# Folders that version control, package managers, editors and other tools create.
_SKIPPED_FOLDERS = (
    *(".git", ".hg", ".svn", ".bzr"),
    *(".venv", "node_modules", "site-packages", ".tox", ".nox", ".eggs"),
    *("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".cache"),
    *(".ipynb_checkpoints", ".idea", ".vscode", "__MACOSX"),
)
# Tests contain files that are broken on purpose; IDLE is an application, not part of the library.
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idlelib")


class RowSource(Protocol):
    """Documents besides files: ``data.sources.hub`` and ``data.sources.task_rows``."""

    @property
    def origin(self) -> str: ...

    def parts(self) -> Iterator[Any]: ...


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A file, cached as a whole."""

    path: str
    parallel: bool = True

    @property
    def name(self) -> str:
        return shown(self.path)

    @property
    def stat(self) -> tuple[str, int, int, int, int] | None:
        """Returns path, times, size and inode; the first of the times cannot be set by a user."""
        try:
            it = os.stat(self.path)
        except OSError:
            return None
        path = shown(os.path.realpath(self.path))
        return path, it.st_ctime_ns, it.st_mtime_ns, it.st_size, it.st_ino

    @property
    def size_bytes(self) -> int:
        stat = self.stat
        return stat[3] if stat else 0

    def key(self) -> str:
        how = f"{VERSION}\n{split_extension(self.path)}\n".encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(how, digest_size=16)
        try:
            with open(self.path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:  # reading it reports this in the summary
            digest.update(f"{error.errno} {self.name}".encode())
        return digest.hexdigest()

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        return pieces(self.path, summary)


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Files to read, found by ``open_source``, and possibly the rows of a dataset."""

    origin: str
    files: tuple[str, ...]
    found: DataSummary  # what the search for files skipped
    rows: RowSource | None = None

    def parts(self) -> Iterator[CorpusPart]:
        """Yields the files, then the parts of the dataset."""
        yield from map(FilePart, self.files)
        if self.rows:
            yield from self.rows.parts()

    def nothing(self, summary: DataSummary) -> UserError:
        """Returns the error for a source without text; ``summary`` says what was read."""
        needs = f"data.data_dir needs files with text, named {' '.join(EXTENSIONS)}"
        if self.rows and not self.files:
            needs = "name the text columns with data.text_column"
        return UserError(f"no text in {self.origin}{summary.why()}; {needs}")

    def with_rows(self, rows: RowSource) -> "TextSource":
        """Returns a source of these files and then the rows."""
        origin = f"{self.origin} and {rows.origin}"
        return TextSource(origin, self.files, dataclasses.replace(self.found, origin=origin), rows)


def open_source(data_dir: str, log: Callable[[str], None]) -> TextSource:
    """Finds the files of ``data_dir``: a folder, a single file, or "" for the default.

    The default is ``./data`` where it exists, else the source of Python's own standard library.

    Raises:
      UserError: if the path does not exist, cannot be read, or holds no file that is accepted.
    """
    if not data_dir and os.path.exists("data"):
        data_dir = "data"
    if not data_dir:
        library = sysconfig.get_path("stdlib")
        log(
            "no data.data_dir given and no ./data here: training on the source of Python's "
            f"standard library ({library})"
        )
        found = DataSummary("Python's standard library")
        files = find_files(
            library,
            lambda path: path.endswith(".py"),
            _NOT_STANDARD_LIBRARY + _SKIPPED_FOLDERS,
            found,
        )
        found = DataSummary(found.origin)  # the user did not ask for the other files there
        remedy = "set data.data_dir to a folder with text"
    else:
        root = os.path.expanduser(data_dir)
        found = DataSummary(shown(root))
        remedy = "give data.data_dir a file or folder with " + " ".join(EXTENSIONS)
        if not os.path.exists(root):
            raise UserError(f"data.data_dir={shown(root)} does not exist; {remedy}")
        files = find_files(root, is_readable, _SKIPPED_FOLDERS, found)
    if not files:
        raise UserError(f"no files to read in {found.origin}{found.why()}; {remedy}")
    return TextSource(found.origin, tuple(files), found)


def find_files(
    root: str,
    accepts: Callable[[str], bool],
    skipped_folders: tuple[str, ...],
    summary: DataSummary,
) -> list[str]:
    """Returns the regular files below ``root`` (or ``root`` itself) whose names are accepted.

    Links to files are followed, and each real file is used once; links to folders are not followed.
    """
    candidates: list[str] = []
    folders = [root]
    if not os.path.isdir(root):
        candidates, folders = [root], []
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        candidates.append(entry.path)
                    elif entry.name in skipped_folders:
                        summary.skip(f"folder {entry.name}", entry.path)
                    else:
                        folders.append(entry.path)
        except OSError as error:
            summary.skip(f"unreadable ({error.strerror})", folder)
    files: list[str] = []
    real_paths: set[str] = set()
    for path in sorted(candidates):
        reason = _reason_to_skip(path)
        real_path = os.path.realpath(path)
        if reason:
            summary.skip(reason, path)
        elif not accepts(path):
            summary.other_extensions[shown("".join(split_extension(path)))] += 1
        elif real_path in real_paths:
            summary.skip("another link to a file already listed", path)
        else:
            real_paths.add(real_path)
            files.append(path)
    return files


def _reason_to_skip(path: str) -> str:
    """Returns why a path that is not a folder is skipped; "" for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "broken link" if os.path.islink(path) else f"unreadable ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "link to a folder"
    return "" if stat.S_ISREG(mode) else "not a regular file"
