"""Tasks whose answers can be checked exactly: training text, and a test of what was learned.

Each problem belongs to "train" or "test" by the hash of its prompt alone: no seed and no difficulty
ever moves one to the other side.
"""

import re
from collections.abc import Iterator

from mamba_jax.data.tasks import arithmetic, list_operations, multi_hop, recall, state_tracking
from mamba_jax.data.tasks.problem import SPLITS, Problem, Task, draw
from mamba_jax.errors import UserError, did_you_mean

__all__ = ["SPLITS", "TASKS", "Problem", "parse", "problems"]

TASKS: dict[str, Task] = {
    "arithmetic": arithmetic,
    "list_operations": list_operations,
    "multi_hop": multi_hop,
    "recall": recall,
    "state_tracking": state_tracking,
}
_WORD = re.compile(r"(?P<name>[^:]*)(:(?P<low>\d{1,4})(-(?P<high>\d{1,4}))?)?")


def problems(
    name: str, difficulty: int, split: str, seed: int, count: int, stream: int = 0
) -> Iterator[Problem]:
    """Yields distinct problems, the same ones for the same arguments.

    An easy task has few problems: if a split has fewer than ``count``, nearly all of them are
    yielded.

    Args:
      name: a task in ``TASKS``.
      difficulty: 1 up to the task's ``HARDEST``; its module says what it means.
      split: one of ``SPLITS``.
      seed: 0 or more.
      count: how many at most.
      stream: tells apart streams with the same seed; they may share problems.

    Raises:
      UserError: if there is no such task or difficulty.
    """
    ((name, _),) = parse(f"{name}:{difficulty}")
    assert split in SPLITS, split
    return draw(name, TASKS[name], difficulty, split, (seed, stream), count)


def parse(spec: str) -> list[tuple[str, int]]:
    """Returns the pairs (task, difficulty) that a text such as "recall:4,arithmetic:1-3" names.

    Raises:
      UserError: on an unknown task or a difficulty that it does not have.
    """
    found = []
    for word in spec.split(","):
        match = _WORD.fullmatch(word.strip())
        name = match["name"] if match else word.strip()
        if name not in TASKS:
            raise UserError(
                f'task "{name}" is not one of {", ".join(TASKS)}{did_you_mean(name, TASKS)}'
            )
        hardest = TASKS[name].HARDEST
        low = int(match["low"] or 0) if match else 0
        high = int(match["high"] or low) if match else 0
        if not 1 <= low <= high <= hardest:
            raise UserError(
                f'task "{word.strip()}": give a difficulty from 1 to {hardest}, or a range of '
                f"them, as in {name}:1-{min(3, hardest)}"
            )
        found += [(name, difficulty) for difficulty in range(low, high + 1)]
    return found
