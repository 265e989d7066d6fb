"""Cuts long texts where no token crosses the cut, and repairs text that UTF-8 cannot express."""

from collections.abc import Iterator

# White space as the patterns' \s knows it (Unicode White_Space); str.isspace() has \x1c-\x1f too.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# Characters given to a tokenizer at once: bounds memory to about 90 MB more than the result.
_PIECE_CHARACTERS = 1 << 20
# tiktoken panics (a BaseException) on a run of 999,999 white-space characters before another one.
_LONGEST_WHITE_SPACE = 100_000


def well_formed(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which UTF-8 cannot express."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut_text(text: str) -> Iterator[str]:
    """Cuts text into pieces whose tokens, joined, are the tokens of the whole.

    No token of tiktoken's encodings extends from a non-space into a following space, nor from a
    letter or digit into a line feed; in GPT-2's encoding, none extends from any non-space into a
    line feed. A cut at these places is exact. Only extreme texts are cut elsewhere: a million
    characters without such a place, and a run of more than 100,000 white-space characters (on which
    tiktoken can panic). They still survive the round trip.
    """
    start = 0
    while start < len(text):
        end = min(start + _PIECE_CHARACTERS, len(text))
        if end < len(text):
            end = _last_exact_cut(text, start, end)
        yield from _chop_white_space(text[start:end])
        start = end


def _last_exact_cut(text: str, start: int, limit: int) -> int:
    """Returns the last good place in (start, limit] to cut before; ``limit`` if there is none."""
    ends_word = lambda character: character not in WHITE_SPACE
    # In o200k, a punctuation token can include the line feeds after it.
    for mark, may_precede in ((" ", ends_word), ("\n", str.isalnum), ("\n", ends_word)):
        cut = text.rfind(mark, start, limit)
        while cut > start:
            if may_precede(text[cut - 1]):
                return cut
            cut = text.rfind(mark, start, cut)
    return limit


def _chop_white_space(text: str) -> Iterator[str]:
    """Cuts the rare runs of white space that are too long for tiktoken."""
    start, step = 0, _LONGEST_WHITE_SPACE
    # A run longer than 2 steps covers a whole stretch between two multiples of the step: checking
    # those is enough, and costs nothing on ordinary text.
    for probe in range(0, len(text) - step + 1, step):
        if text[probe] in WHITE_SPACE and not text[probe : probe + step].strip(WHITE_SPACE):
            if probe > start:
                yield text[start:probe]
            yield text[probe : probe + step]
            start = probe + step
    yield text[start:]
