"""Stop strings: texts that end a generated text."""

from collections.abc import Sequence


class StopFinder:
    """Passes on a streamed text up to the first stop in it.

    Text that may be the beginning of a stop is held back until that is decided, so that emitted
    text never has to be withdrawn.
    """

    def __init__(self, stops: Sequence[str]):
        """Takes the stops; empty ones are ignored."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None  # the stop that ended the text
        self.beyond = ""  # the text after the stop in the piece that completed it

    def push(self, text: str) -> str:
        """Returns the text that now certainly precedes any stop; "" once one was found."""
        if self.found is not None:
            return ""
        text = self._held + text
        # The stop that is complete first; if several are at once, the longest.
        ends = [(text.find(s) + len(s), -len(s), s) for s in self._stops if s in text]
        if ends:
            end, _, self.found = min(ends)
            self._held, self.beyond = "", text[end:]
            return text[: end - len(self.found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Ends the text; returns what was held back and is not part of a stop."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
