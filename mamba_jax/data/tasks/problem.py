"""What all tasks share: a problem, its side of the split, its exact check."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np

SPLITS = ("train", "test")
_TEST_SHARE = 10  # one problem in this many is for tests
_MOST_DRAWS = 2_000  # failed draws before a split counts as used up; a test problem takes ten draws


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with one right answer.

    Attributes:
      task: name of its task.
      difficulty: as the task defines it.
      prompt: ends with "=".
      answer: what follows the prompt and a space.
    """

    task: str
    difficulty: int
    prompt: str
    answer: str

    def is_solved_by(self, text: str) -> bool:
        """Returns whether the first line of ``text`` is the answer, up to white space around it."""
        lines = text.strip().splitlines()
        return bool(lines) and lines[0].strip() == self.answer


class Task(Protocol):
    """A module that makes problems."""

    @property
    def HARDEST(self) -> int:
        """The largest difficulty; the smallest is 1."""
        ...

    def make(self, rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
        """Returns (prompt, answer)."""
        ...


def split_of(prompt: str) -> str:
    """Returns the split that a prompt belongs to, whatever seed or difficulty it came from."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % _TEST_SHARE else "test"


def draw(
    name: str, task: Task, difficulty: int, split: str, words: tuple[int, ...], count: int
) -> Iterator[Problem]:
    """Yields distinct problems of one split, the same ones for the same arguments.

    If the split has fewer than ``count``, it stops when new ones become rare.

    Args:
      name: the task's name.
      task: the module that makes them.
      difficulty: 1 to ``task.HARDEST``.
      split: one of ``SPLITS``.
      words: seeds of the randomness.
      count: how many at most.
    """
    rng = np.random.default_rng((*words, difficulty, *name.encode()))
    seen: set[str] = set()
    in_vain = 0
    while len(seen) < count:
        prompt, answer = task.make(rng, difficulty)
        if split_of(prompt) != split or prompt in seen:
            in_vain += 1
            if in_vain > _MOST_DRAWS:
                return
            continue
        in_vain = 0
        seen.add(prompt)
        yield Problem(name, difficulty, prompt, answer)
