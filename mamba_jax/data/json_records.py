"""The values in a JSON file, whichever way they lie: one, an array of them, or one a line.

Neither an array nor lines are ever held as a whole. Everything is parsed once to its end before
the first value is given, so that a file which is broken gives nothing.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.data.decode import Skip

# Numbers are not text; as floats they need no limit on their number of digits.
_DECODER = json.JSONDecoder(parse_int=float)
_MOST_CHARACTERS = 1 << 28  # of one value: parsed, it takes several times its size
# A value that ends, or goes wrong, so close to the end of what is read may go on beyond.
_MARGIN = 16
_BROKEN = "broken JSON"
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


def read_values(open_text: Callable[[], Iterator[str]]) -> Iterator[Any]:
    """Yields the elements of an array, the values of the lines, or the single value.

    Args:
      open_text: gives the text from its start, in pieces; called two or three times.

    Raises:
      Skip: before the first value, if there is something else than JSON.
    """
    reader = _reader(open_text)
    yield from reader(open_text())


def _reader(open_text: Callable[[], Iterator[str]]) -> Callable[[Iterator[str]], Iterator[Any]]:
    """Returns what reads all of the text."""
    if _Buffer(open_text()).next_character() == "[":
        if _runs_through(_array, open_text()):
            return _array
        first_line_is_json = True  # it is an array; behind it follow others
    else:
        first_line_is_json = _parses(next(_lines(open_text()), (0, ""))[1])
    if first_line_is_json:
        _runs_through(_each_line, open_text())
        return _each_line
    _runs_through(_single, open_text())
    return _single


def _runs_through(reader: Callable[[Iterator[str]], Iterator[Any]], texts: Iterator[str]) -> bool:
    """Says whether a reader takes all of a text; False if more follows behind an array."""
    try:
        for _ in reader(texts):
            pass
    except _MoreFollows:
        return False
    return True


class _MoreFollows(Exception):
    """Behind an array lies something else."""


def _array(texts: Iterator[str]) -> Iterator[Any]:
    buffer = _Buffer(texts)
    buffer.next_character()
    buffer.position += 1
    if buffer.next_character() != "]":
        yield buffer.value()
        while buffer.next_character() == ",":
            buffer.position += 1
            yield buffer.value()
    if buffer.next_character() != "]":
        raise Skip(_BROKEN, buffer.line_of(buffer.position))
    buffer.position += 1
    if buffer.next_character():
        raise _MoreFollows


def _single(texts: Iterator[str]) -> Iterator[Any]:
    buffer = _Buffer(texts)
    value = buffer.value()
    if buffer.next_character():
        raise Skip(_BROKEN, buffer.line_of(buffer.position))
    yield value


def _each_line(texts: Iterator[str]) -> Iterator[Any]:
    for number, line in _lines(texts):
        try:
            yield _DECODER.decode(line)
        except (ValueError, RecursionError):
            raise Skip(_BROKEN, number) from None


def _parses(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(texts: Iterator[str]) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of those that are not blank. Only a line feed ends a line."""
    number, parts, size = 1, [], 0
    for text in texts:
        first, *others = text.split("\n")
        parts.append(first)
        size += len(first)
        for other in others:
            line = "".join(parts)
            if line.strip():
                yield number, line
            number, parts, size = number + 1, [other], len(other)
        _check_size(size, number)
    line = "".join(parts)
    if line.strip():
        yield number, line


def _check_size(characters: int, line: int) -> None:
    if characters > _MOST_CHARACTERS:
        raise Skip(f"a JSON value of more than {_MOST_CHARACTERS >> 20} million characters", line)


class _Buffer:
    """Text that is read on when it is needed, and dropped behind ``position``."""

    def __init__(self, texts: Iterator[str]):
        self.position = 0
        self._text = ""
        self._line = 1  # of the first character
        self._texts = texts

    def line_of(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def next_character(self) -> str:
        """Moves to the next character that is no white space and returns it; "" at the end."""
        while True:
            blank = _WHITE_SPACE.match(self._text, self.position)
            self.position = blank.end() if blank else self.position
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """Moves behind the next value and returns it."""
        self.next_character()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self.position)
                if end + _MARGIN <= len(self._text) or not self._grow():
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                is_sound = "Unterminated string" in error.msg
                is_sound |= error.pos + _MARGIN > len(self._text)
                if not (is_sound and self._grow()):
                    raise Skip(_BROKEN, self.line_of(error.pos)) from None
            except RecursionError:
                raise Skip(_BROKEN, self.line_of(self.position)) from None

    def _grow(self) -> bool:
        """At least doubles what is left, for parsing it again to stay linear; False at the end."""
        left = len(self._text) - self.position
        _check_size(left, self.line_of(self.position))
        more, size = [], 0
        for text in self._texts:
            more.append(text)
            size += len(text)
            if size > left:
                break
        if not size:
            return False
        self._line = self.line_of(self.position)
        self._text = self._text[self.position :] + "".join(more)
        self.position = 0
        return True
