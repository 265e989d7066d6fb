"""From a folder to documents: what is text is taken, everything else is skipped and counted.

Nothing that lies in a folder may end a run or slip in as garbage. A file is one document; a JSON
file is one document per record. The order is that of the sorted paths. Rows of a dataset
(``data.hub``) come after the files.
"""

import codecs
import copy
import dataclasses
import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from mamba_jax.data.tokenizer import well_formed
from mamba_jax.errors import UserError

EXTENSIONS = (".txt", ".py", ".md", ".json", ".jsonl")
_SKIPPED_FOLDERS = (".git", ".venv", "node_modules", "__pycache__")
# Tests hold files that are broken on purpose; IDLE is an application, not the library.
_NOT_STANDARD_LIBRARY = ("site-packages", "dist-packages", "test", "tests", "idlelib")
_PROBE_BYTES = 8_192  # of a file's start decide whether it is binary
_MOST_CONTROL_SHARE = 0.01  # compressed data has about 10% control characters, text has none
_EXAMPLES = 3  # paths shown per reason
_EXTENSIONS_SHOWN = 8
_BOMS = (  # UTF-32's begins with UTF-16's, so it comes first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# The text of a JSON record, best first.
_TEXT_KEYS = ("text", "content")


@dataclasses.dataclass
class Summary:
    """What was taken from where, and what was not.

    Attributes:
      origin: where the text comes from, for people.
      files: files that gave at least one document.
      rows: rows of a dataset that gave one.
      documents: different documents.
      duplicates: documents left out because an equal one came before.
      text_bytes: UTF-8 bytes of the different documents.
      tokens: of all documents, each with its end-of-text marker; 0 until tokenised.
      skipped: reason → number of files or folders left out.
      repaired: reason → number of files taken although their encoding is doubtful.
      examples: reason → the first few paths.
      other_extensions: extension → number of files not looked at because of it.
    """

    origin: str
    files: int = 0
    rows: int = 0
    documents: int = 0
    duplicates: int = 0
    text_bytes: int = 0
    tokens: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    repaired: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    other_extensions: Counter[str] = dataclasses.field(default_factory=Counter)

    def skip(self, reason: str, path: str) -> None:
        self.skipped[reason] += 1
        self._example(reason, path)

    def repair(self, reason: str, path: str) -> None:
        self.repaired[reason] += 1
        self._example(reason, path)

    def _example(self, reason: str, path: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(shown(path))

    def lines(self) -> list[str]:
        """Returns the summary for people, one line per fact."""
        counts = {"files": self.files, "rows": self.rows, "documents": self.documents}
        units = [f"{count:,} {unit}" for unit, count in counts.items() if count]
        taken = f"{self.origin}: {', '.join(units)}, {self.text_bytes / 1e6:,.2f} MB of text"
        if self.tokens:
            taken += f", {self.tokens:,} tokens"
        if self.duplicates:
            taken += f"; {self.duplicates:,} exact duplicates left out"
        return [taken, *self._exceptions()]

    def why(self) -> str:
        """Returns what was skipped in brackets, as a part of an error's single line."""
        exceptions = "; ".join(self._exceptions())
        return f" ({exceptions})" if exceptions else ""

    def _exceptions(self) -> list[str]:
        lines = [
            f"{verb} {count:,} × {reason}: {', '.join(self.examples[reason])}"
            + (", …" if count > len(self.examples[reason]) else "")
            for verb, counts in (("skipped", self.skipped), ("warning:", self.repaired))
            for reason, count in sorted(counts.items())
        ]
        if self.other_extensions:
            common = self.other_extensions.most_common(_EXTENSIONS_SHOWN)
            lines.append(
                f"skipped {self.other_extensions.total():,} × other extension: "
                + ", ".join(f"{extension or 'none'} ({count:,})" for extension, count in common)
                + (", …" if len(self.other_extensions) > len(common) else "")
            )
        return lines


class Rows(Protocol):
    """What else gives documents: ``data.hub``."""

    @property
    def origin(self) -> str: ...

    def parts(self) -> Iterator[Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Files to read, found by ``open_source``, and the rows of a dataset."""

    origin: str
    files: tuple[str, ...]
    found: Summary  # what the search for files skipped
    rows: Rows | None = None

    def documents(self) -> Iterator[tuple[bytes, str]]:
        """Yields (digest, text) of every different document, in order."""
        return self._documents(Summary(self.origin))

    def read(self) -> tuple[list[bytes], Summary]:
        """Reads everything once and keeps only the documents' digests.

        Raises:
          UserError: if there is no text at all.
        """
        summary = copy.deepcopy(self.found)
        digests = [digest for digest, _ in self._documents(summary)]
        if not digests:
            needs = f"data.data_dir needs files with text, named {' '.join(EXTENSIONS)}"
            if self.rows and not self.files:
                needs = "name the columns with text by data.text_column"
            raise UserError(f"no text in {self.origin}{summary.why()}; {needs}")
        return digests, summary

    def _documents(self, summary: Summary) -> Iterator[tuple[bytes, str]]:
        seen: set[bytes] = set()
        for text in self._texts(summary):
            encoded = text.encode("utf-8")
            digest = hashlib.blake2b(encoded, digest_size=16).digest()
            if digest in seen:
                summary.duplicates += 1
                continue
            seen.add(digest)
            summary.documents += 1
            summary.text_bytes += len(encoded)
            yield digest, text

    def _texts(self, summary: Summary) -> Iterator[str]:
        for path in self.files:
            texts = _read_file(path, summary)
            summary.files += bool(texts)
            yield from texts
        if self.rows:
            for part in self.rows.parts():
                yield from _joined(part.pieces(summary))

    def with_rows(self, rows: Rows) -> "Source":
        """Returns a source of these files and then the rows."""
        origin = f"{self.origin} and {rows.origin}"
        return Source(origin, self.files, dataclasses.replace(self.found, origin=origin), rows)


def _joined(pieces: Iterator[Any]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        if piece.begins and text:
            yield text
            text = ""
        text += piece.text
    if text:
        yield text


def open_source(data_dir: str, log: Callable[[str], None]) -> Source:
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
        found = Summary("Python's standard library")
        files = find_files(library, (".py",), _NOT_STANDARD_LIBRARY + _SKIPPED_FOLDERS, found)
        found = Summary(found.origin)  # what else lies there was not asked for
        remedy = "set data.data_dir to a folder with text"
    else:
        root = os.path.expanduser(data_dir)
        found = Summary(shown(root))
        remedy = "give data.data_dir a file or folder with " + " ".join(EXTENSIONS)
        if not os.path.exists(root):
            raise UserError(f"data.data_dir={shown(root)} does not exist; {remedy}")
        files = find_files(root, EXTENSIONS, _SKIPPED_FOLDERS, found)
    if not files:
        raise UserError(f"no files to read in {found.origin}{found.why()}; {remedy}")
    return Source(found.origin, tuple(files), found)


def find_files(
    root: str, extensions: tuple[str, ...], skipped_folders: tuple[str, ...], summary: Summary
) -> list[str]:
    """Returns the regular files below ``root`` (or ``root`` itself) with one of the extensions.

    Links to files are followed, each real file is taken once; links to folders are not followed.
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
        extension = os.path.splitext(path)[1].lower()
        real_path = os.path.realpath(path)
        if reason:
            summary.skip(reason, path)
        elif extension not in extensions:
            summary.other_extensions[shown(extension)] += 1
        elif real_path in real_paths:
            summary.skip("another link to a file already taken", path)
        else:
            real_paths.add(real_path)
            files.append(path)
    return files


def _reason_to_skip(path: str) -> str:
    """Judges a path that is not a folder by its kind alone; "" if it is a file."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "broken link" if os.path.islink(path) else f"unreadable ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "link to a folder"
    return "" if stat.S_ISREG(mode) else "not a regular file"


def _read_file(path: str, summary: Summary) -> list[str]:
    """Returns the documents of a file; none, and an entry in the summary, if it has no text."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        summary.skip(f"unreadable ({error.strerror})", path)
        return []
    text, repaired = _decode(data)
    if text is None:
        summary.skip("binary", path)
        return []
    if not text.strip():
        summary.skip("empty", path)
        return []
    texts = [text]
    if os.path.splitext(path)[1].lower() in (".json", ".jsonl"):
        records = _parse_json(text)
        if isinstance(records, int):
            summary.skip("broken JSON", f"{path}:{records}")
            return []
        texts = [well_formed(text) for text in map(text_of_record, records) if text.strip()]
        if not texts:
            summary.skip("JSON without text", path)
    if repaired and texts:
        summary.repair(repaired, path)
    return texts


def _decode(data: bytes) -> tuple[str | None, str]:
    """Returns (text, doubt): text is None if the data is binary; doubt is "" if there is none."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            text = data[len(bom) :].decode(encoding, "replace")
            damaged = "\ufffd" in text and not _decodes(data[len(bom) :], encoding)
            return text, f"damaged {encoding.upper()}, bad parts replaced" if damaged else ""
    probe = data[:_PROBE_BYTES]
    if b"\0" in probe:
        return None, ""
    try:
        return data.decode("utf-8"), ""
    except UnicodeDecodeError:
        pass
    control = sum(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in probe)
    if control > _MOST_CONTROL_SHARE * len(probe):
        return None, ""  # compressed data without a NUL in its first 8 KB
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    not_ascii = len(text) - len(text.encode("ascii", "ignore"))
    if not_ascii > 2 * bad:  # most of what is not ASCII is sound UTF-8
        return text, "damaged UTF-8, bad parts replaced"
    return data.decode("cp1252", "replace"), "not UTF-8, read as cp1252"


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _parse_json(text: str) -> list[Any] | int:
    """Returns the records of a JSON text or of JSON lines, else the number of the bad line."""
    try:
        whole = _loads(text)
        return whole if isinstance(whole, list) else [whole]
    except json.JSONDecodeError as error:
        bad_line = error.lineno
    except (ValueError, RecursionError):
        return 1
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(_loads(line))
            except (ValueError, RecursionError):
                # A first line that is no JSON: the file is one value, broken where it said.
                return number if records else bad_line
    return records


def _loads(text: str) -> Any:
    # Numbers are not text; as floats they need no limit on their number of digits.
    return json.loads(text, parse_int=float)


def text_of_record(record: Any) -> str:
    """Returns a record's text: its text key, its messages, or all its strings in order.

    Messages are rendered ``role: content``, separated by a blank line.
    """
    if isinstance(record, dict):
        for key in _TEXT_KEYS:
            if isinstance(record.get(key), str):
                return record[key]
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return "\n\n".join(_strings(record))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _strings(value: Any) -> Iterator[str]:
    """Yields the string leaves in order; an explicit stack, for JSON nests deeper than Python."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack.extend(reversed(value.values()))
        elif isinstance(value, list):
            stack.extend(reversed(value))


def shown(path: str) -> str:
    """Returns a path that can be printed: names on disk need not be valid Unicode."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
