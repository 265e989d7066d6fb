"""The values in a JSON file of any layout: a single value, an array, or one value per line.

Neither an array nor a file of lines is ever held as a whole. An array and a single value are parsed
once to their end before the first value is yielded, so that a broken one yields nothing. In a file
of lines, each broken line is left out and reported.

Why not ijson (3.6): its C parser rejects NaN, Infinity and integers above 64 bits, names no line in
its errors and does not limit the size of a value. Where only its Python parser is installed, it
takes five times as long as this module.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.data.sources.decode import Skip

# Python refuses integers of more digits (sys.get_int_max_str_digits); as floats they are infinite.
_MOST_DIGITS = 4_000
_DECODER = json.JSONDecoder(
    parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else float(digits)
)
_MOST_CHARACTERS = 1 << 28  # of one value: parsed, it takes several times its size
# A value that ends or fails this close to the end of the buffer may continue in the next block.
_MARGIN = 16
_BROKEN = "broken JSON"
_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


def read_values(
    open_text: Callable[[], Iterator[str]], lose: Callable[[str, int], None]
) -> Iterator[Any]:
    """Yields the elements of an array, the values of the lines, or the single value.

    Args:
      open_text: returns the text from its start, in pieces; called up to five times.
      lose: called with the reason and the number of a line that is left out.

    Raises:
      Skip: before the first value, if the text is not JSON.
    """
    is_array = _Buffer(open_text()).next_character() == "["
    # A whole array can be in the first line, which is then parsed as one value only if necessary.
    begins_with_value = lambda: _parses(next(_lines(open_text()), (0, ""))[1] or "")
    reader = _array if is_array else _single
    is_lines = not is_array and begins_with_value()
    if not is_lines:
        try:
            for _ in reader(open_text()):
                pass
        except Skip:
            if not ((is_array and begins_with_value()) or _are_mostly_values(open_text())):
                raise
            is_lines = True
    yield from _each_line(open_text(), lose) if is_lines else reader(open_text())


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
    if buffer.next_character():  # after the array
        raise Skip(_BROKEN, buffer.line_of(buffer.position))


def _single(texts: Iterator[str]) -> Iterator[Any]:
    buffer = _Buffer(texts)
    value = buffer.value()
    if buffer.next_character():
        raise Skip(_BROKEN, buffer.line_of(buffer.position))
    yield value


def _each_line(texts: Iterator[str], lose: Callable[[str, int], None]) -> Iterator[Any]:
    for number, line in _lines(texts):
        if line is None:
            lose(_too_large(), number)
            continue
        try:
            value = _DECODER.decode(line)
        except (ValueError, RecursionError):
            lose(f"{_BROKEN} line", number)
            continue
        yield value


def _are_mostly_values(texts: Iterator[str]) -> bool:
    """Returns whether most lines are values; those of a broken array end in commas."""
    sound = broken = 0
    for _, line in _lines(texts):
        is_sound = line is not None and _parses(line)
        sound, broken = sound + is_sound, broken + (not is_sound)
    return sound > broken


def _parses(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(texts: Iterator[str]) -> Iterator[tuple[int, str | None]]:
    """Yields (number, line) of those that are not blank; None for one that is too large.

    Only a line feed ends a line.
    """
    number, parts, size = 1, [], 0
    for text in texts:
        for index, piece in enumerate(text.split("\n")):
            if index:  # after a line feed
                yield from _line(number, parts, size)
                number, parts, size = number + 1, [], 0
            size += len(piece)
            if size <= _MOST_CHARACTERS:
                parts.append(piece)
            else:
                parts.clear()
    yield from _line(number, parts, size)


def _line(number: int, parts: list[str], size: int) -> Iterator[tuple[int, str | None]]:
    if size > _MOST_CHARACTERS:
        yield number, None
    elif (line := "".join(parts)).strip():
        yield number, line


def _check_size(characters: int, line: int) -> None:
    if characters > _MOST_CHARACTERS:
        raise Skip(_too_large(), line)


def _too_large() -> str:
    return f"a JSON value of more than {_MOST_CHARACTERS >> 20} million characters"


class _Buffer:
    """Text that is read on demand and dropped before ``position``."""

    def __init__(self, texts: Iterator[str]):
        self.position = 0
        self._text = ""
        self._line = 1  # of the first character
        self._texts = texts

    def line_of(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def next_character(self) -> str:
        """Moves to the next character that is not white space and returns it; "" at the end."""
        while True:
            blank = _WHITE_SPACE.match(self._text, self.position)
            self.position = blank.end() if blank else self.position
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """Returns the next value and moves past it."""
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
        """At least doubles the remaining text, so re-parsing stays linear; False at the end."""
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
