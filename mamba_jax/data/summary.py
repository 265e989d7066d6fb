"""What was read and what was skipped, for messages."""

import dataclasses
from collections import Counter
from typing import Any

_EXAMPLES = 3  # paths shown per reason
_EXTENSIONS_SHOWN = 8


@dataclasses.dataclass
class DataSummary:
    """What was used from which source, and what was not.

    Attributes:
      origin: where the text comes from, for messages.
      files: files with at least one document.
      rows: rows of a dataset with a document.
      records: records of files and rows of datasets that were read, used or not.
      documents: different documents.
      duplicates: documents left out because they equal an earlier one.
      near_duplicates: other documents left out because they are similar to an earlier one.
      text_bytes: UTF-8 bytes of the different documents.
      tokens: tokens of all documents, each with its separator; 0 until tokenised.
      skipped: reason → number of files, folders or rows left out.
      skipped_bytes: reason → their size, of files.
      lost: reason → number of records with text that were left out.
      repaired: reason → number of files and records used with a warning, such as files with an
        uncertain encoding.
      examples: reason → the first few paths.
      other_extensions: extension → number of files skipped because of it.
    """

    origin: str
    files: int = 0
    rows: int = 0
    records: int = 0
    documents: int = 0
    duplicates: int = 0
    near_duplicates: int = 0
    text_bytes: int = 0
    tokens: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    lost: Counter[str] = dataclasses.field(default_factory=Counter)
    repaired: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    other_extensions: Counter[str] = dataclasses.field(default_factory=Counter)

    def skip(self, reason: str, path: str, size_bytes: int = 0) -> None:
        self.skipped[reason] += 1
        self.skipped_bytes[reason] += size_bytes
        self._example(reason, path)

    def lose(self, reason: str, where: str) -> None:
        self.lost[reason] += 1
        self._example(reason, where)

    def repair(self, reason: str, path: str) -> None:
        self.repaired[reason] += 1
        self._example(reason, path)

    def _example(self, reason: str, path: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(shown(path))

    def add(self, other: "DataSummary") -> None:
        """Adds the counts of another summary."""
        for field in dataclasses.fields(self):
            theirs = getattr(other, field.name)
            if isinstance(theirs, int):
                setattr(self, field.name, getattr(self, field.name) + theirs)
            elif isinstance(theirs, Counter):
                getattr(self, field.name).update(theirs)
        for reason, paths in other.examples.items():
            for path in paths:
                self._example(reason, path)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields that are not empty, as plain JSON types."""
        # Not dataclasses.asdict, which breaks a Counter.
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DataSummary":
        """Inverts ``to_json``."""
        made = cls("")
        for name, value in values.items():
            setattr(made, name, type(getattr(made, name))(value))
        return made

    def lines(self) -> list[str]:
        """Returns the summary as lines of text, one per fact."""
        counts = {"files": self.files, "rows": self.rows, "documents": self.documents}
        units = [f"{count:,} {unit}" for unit, count in counts.items() if count]
        taken = f"{self.origin}: {', '.join(units)}, {self.text_bytes / 1e6:,.2f} MB of text"
        if self.tokens:
            taken += f", {self.tokens:,} tokens"
        if self.duplicates:
            taken += f"; {self.duplicates:,} exact duplicates left out"
        if self.near_duplicates:
            taken += f"; {self.near_duplicates:,} near duplicates left out"
        return [taken, *self._exceptions()]

    def why(self) -> str:
        """Returns what was skipped, in brackets, for a single-line error message."""
        exceptions = "; ".join(self._exceptions())
        return f" ({exceptions})" if exceptions else ""

    def _exceptions(self) -> list[str]:
        lines = [
            f"{verb} {count:,} × {reason}{share(reason)}: "
            + ", ".join(self.examples[reason])
            + (", …" if count > len(self.examples[reason]) else "")
            for verb, counts, share in (
                ("skipped", self.skipped, self._size),
                ("warning: left out", self.lost, self._share),
                ("warning:", self.repaired, lambda _: ""),
            )
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

    def _size(self, reason: str) -> str:
        size_bytes = self.skipped_bytes[reason]
        return f" ({size_bytes / 1e6:,.2f} MB)" if size_bytes >= 10_000 else ""

    def _share(self, reason: str) -> str:
        return f" ({self.lost[reason] / max(self.records, 1):.2%} of all records)"


def shown(path: str) -> str:
    """Returns a path that can be printed on one line: file names can hold bytes that are not
    Unicode, and control characters."""
    text = path.encode("utf-8", "backslashreplace").decode("utf-8")
    escaped = lambda character: character.encode("unicode_escape").decode("ascii")
    return "".join(c if c.isprintable() else escaped(c) for c in text)
