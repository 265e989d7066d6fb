"""Which character each byte belongs to, by Python's own decoder."""

import codecs

_lengths: list[int] = []  # of the bytes that are not a character


def _replace(error):
    _lengths.append(error.end - error.start)
    return "\ufffd", error.end


codecs.register_error("replace_and_note", _replace)


def text_and_owners(data):
    """Returns the text of bytes, broken ones replaced, and for each byte the index of its
    character. A character that is cut at the end has an index and is not in the text."""
    _lengths.clear()
    text = data.decode(errors="replace_and_note")
    sizes = [_lengths.pop(0) if char == "\ufffd" else len(char.encode()) for char in text]
    owners = [i for i, size in enumerate(sizes) for _ in range(size)]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data), owners
