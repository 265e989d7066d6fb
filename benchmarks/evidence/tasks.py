"""The tasks: rows of tokens, answers and levels of difficulty, on the fly from a random stream.

Every row has the same length and vocabulary, so that one program per model serves all tasks. Token
0 separates documents: the models see nothing across it.

Legend: n rows, t time.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Callable

import numpy as np

from mamba_jax.data import tasks as text_tasks
from mamba_jax.data.tasks.names import choose_names
from mamba_jax.data.tasks.problem import split_of

LENGTH = 48
VOCABULARY = 256
SEPARATOR = 0
NONE = -1  # no answer here
SIDES = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one task, each array (n, t) int32.

    Attributes:
      tokens: what a model reads.
      targets: the answer after each token; NONE: no answer is asked for here, no loss.
      levels: the difficulty of each answer; NONE where there is none.
    """

    tokens: np.ndarray
    targets: np.ndarray
    levels: np.ndarray


# (random stream, rows, side, step) → Rows
Maker = Callable[[np.random.Generator, int, str, float], Rows]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      make: makes rows of a side at a step of training, which only a curriculum looks at.
      level: what a level counts.
      steps: how long a cell trains.
      beyond: makes rows that ask beyond what was trained on; None: there are none.
      score: what plans are compared by, "accuracy" or "bits per byte".
    """

    make: Maker
    level: str
    steps: int
    beyond: Maker | None = None
    score: str = "accuracy"

    @property
    def higher_is_better(self) -> bool:
        return self.score == "accuracy"


# --- lookups over several hops


def p_hop(
    rng: np.random.Generator, n: int, side: str, step: float, *, nodes: int, hops: int
) -> Rows:
    """A permutation as pairs (x, f(x)), then queries (x, h): the answer is f applied h times.

    Rows of the sides come from different streams; there are far too many for them to meet.
    """
    queries = (LENGTH - 2 * nodes) // 2
    f_nx = np.argsort(rng.random((n, nodes)), axis=1)
    order_nx = np.argsort(rng.random((n, nodes)), axis=1)
    start_nq = rng.integers(0, nodes, (n, queries))
    hops_nq = rng.integers(1, hops + 1, (n, queries))
    here_nq = start_nq
    for hop in range(1, hops + 1):
        here_nq = np.where(hop <= hops_nq, np.take_along_axis(f_nx, here_nq, axis=1), here_nq)
    rows = _blank(n, LENGTH)
    facts, asked = slice(0, 2 * nodes), slice(2 * nodes + 1, None, 2)
    rows.tokens[:, facts] = 1 + np.stack(
        [order_nx, np.take_along_axis(f_nx, order_nx, axis=1)], axis=2
    ).reshape(n, -1)
    rows.tokens[:, 2 * nodes :: 2] = 1 + start_nq
    rows.tokens[:, asked] = 32 + hops_nq
    rows.targets[:, asked] = 1 + here_nq
    rows.levels[:, asked] = hops_nq
    return rows


# --- words over a permutation group: the state after each token


@functools.cache
def _group(things: int) -> np.ndarray:
    """Returns (states, tokens): the state that a token leads to; token 0 changes nothing, the
    others swap two places each. A state is the index of an arrangement."""
    arrangements = list(itertools.permutations(range(things)))
    number = {arrangement: i for i, arrangement in enumerate(arrangements)}
    places = [tuple(range(things))]
    for a, b in itertools.combinations(range(things), 2):
        swapped = list(range(things))
        swapped[a], swapped[b] = b, a
        places.append(tuple(swapped))
    return np.array([[number[tuple(arr[i] for i in by)] for by in places] for arr in arrangements])


def group_words(
    rng: np.random.Generator,
    n: int,
    side: str,
    step: float,
    *,
    things: int,
    length: int = LENGTH,
    asked_from: int = 0,
) -> Rows:
    """Tokens "nothing" or a swap of two places; after each, which arrangement is it?

    The level is the sixth of a trained row in which the token stands, from 1; beyond it, 7 to 12.
    Tokens before ``asked_from`` are not asked about.
    """
    table = _group(things)
    moves_nt = rng.integers(0, table.shape[1], (n, length))
    state_n, rows = np.zeros(n, int), _blank(n, length)
    for t in range(length):
        state_n = table[state_n, moves_nt[:, t]]
        rows.targets[:, t] = 64 + state_n
    rows.tokens[:] = 1 + moves_nt
    rows.levels[:] = 1 + np.arange(length) * 6 // LENGTH
    rows.targets[:, :asked_from] = rows.levels[:, :asked_from] = NONE
    return rows


# --- problems of mamba_jax.data.tasks as words

_WORD = re.compile(r"[a-z]{2}|\[[A-Z]+|\d-\d|\S")
WORDS = (
    *sorted(choose_names(np.random.default_rng(0), 100)),
    *("[MAX", "[MIN", "[MED", "[SM"),
    *(f"{a}-{b}" for a, b in itertools.combinations(range(1, 6), 2)),
    *"0123456789abcde;>=()+-*]",
)
_NUMBER = {word: number for number, word in enumerate(WORDS, 1)}
assert len(WORDS) < VOCABULARY


def words(text: str) -> list[int]:
    """Returns the tokens of a problem's text; digits are tokens of their own."""
    return [_NUMBER[word] for word in _WORD.findall(text)]


def side_of(prompt: str) -> str:
    """The side that a problem belongs to, by its text alone: no problem is ever on two."""
    if split_of(prompt) == "train":
        return "train"
    return "validation" if zlib.crc32(prompt.encode()) % 2 else "test"


def _continued(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The answer follows the prompt: each of its tokens is asked for by the token before it."""
    given, made = words(prompt), words(answer)
    return given + made, [NONE] * (len(given) - 1) + made + [NONE]


def _at_queries(prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Recall: each query asks for its own value (arXiv 2312.04927), and no answer follows."""
    given = words(prompt)[:-1]
    made = words(answer)
    return given, [NONE] * (len(given) - len(made)) + made


def problems(
    rng: np.random.Generator,
    n: int,
    side: str,
    step: float,
    *,
    name: str,
    difficulties: tuple[int, ...],
    layout: Callable[[str, str], tuple[list[int], list[int]]] = _continued,
    steps_per_level: int = 0,
) -> Rows:
    """Rows of problems of ``mamba_jax.data.tasks``, each after a separator, as many as fit.

    Args:
      rng, n, side, step: see ``Maker``.
      name: of the task.
      difficulties: that are drawn from, equally often; the level is the difficulty.
      layout: (prompt, answer) → tokens and targets.
      steps_per_level: a curriculum: training starts with the first difficulty, and gets one more
        after so many steps; 0: all from the start.
    """
    if steps_per_level and side == "train":
        difficulties = difficulties[: 1 + int(step // steps_per_level)]
    rows, make = _blank(n, LENGTH), text_tasks.TASKS[name].make
    for row in range(n):
        end = 0
        while True:
            difficulty = difficulties[rng.integers(len(difficulties))]
            prompt, answer = make(rng, difficulty)
            if side_of(prompt) != side:
                continue
            tokens, targets = layout(prompt, answer)
            if end + 1 + len(tokens) > LENGTH:
                if end:
                    break
                continue  # longer than a row
            place = slice(end + 1, end + 1 + len(tokens))
            rows.tokens[row, place], rows.targets[row, place] = tokens, targets
            rows.levels[row, place] = np.where(np.array(targets) >= 0, difficulty, NONE)
            end = place.stop
    return rows


# --- text


@functools.cache
def corpus(side: str) -> np.ndarray:
    """The bytes of one side of the standard library's source: each file is on one side."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    own = [
        file.read_bytes().replace(b"\0", b"")
        for file in sorted(folder.glob("*.py"))
        if _file_side(file.name) == side
    ]
    return np.frombuffer(b"".join(own), np.uint8)


@functools.cache
def corpus_digest() -> str:
    """Names the text that this Python has: other versions have other files."""
    digest = hashlib.blake2b(digest_size=8)
    for side in SIDES:
        digest.update(corpus(side).tobytes())
    return digest.hexdigest()


def _file_side(name: str) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=1).digest()[0]
    return {0: "validation", 1: "test"}.get(digest % 10, "train")


def text(rng: np.random.Generator, n: int, side: str, step: float) -> Rows:
    """Bytes of Python's own source; the level is the third of the row, from 1."""
    bytes_ = corpus(side)
    starts_n = rng.integers(0, len(bytes_) - LENGTH, n)
    windows = bytes_[starts_n[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    levels = np.broadcast_to(1 + np.arange(LENGTH) * 3 // LENGTH, (n, LENGTH))
    return Rows(windows[:, :-1], windows[:, 1:], levels.astype(np.int32))


def _blank(n: int, length: int) -> Rows:
    full = functools.partial(np.full, (n, length), dtype=np.int32)
    return Rows(full(SEPARATOR), full(NONE), full(NONE))


_part = functools.partial
TASKS = {
    "p_hop_3": Task(_part(p_hop, nodes=6, hops=3), "hops", 2400),
    "p_hop_6": Task(_part(p_hop, nodes=8, hops=6), "hops", 4000),
    "multi_hop": Task(
        _part(problems, name="multi_hop", difficulties=(1, 2, 3, 4, 5, 6), steps_per_level=300),
        "hops",
        4000,
    ),
    "mqar": Task(
        _part(problems, name="recall", difficulties=(4, 8, 12, 15), layout=_at_queries),
        "pairs",
        1500,
    ),
    "arithmetic": Task(
        _part(problems, name="arithmetic", difficulties=(1, 2, 3, 4, 5)), "operators", 3000
    ),
    "list_operations": Task(
        _part(problems, name="list_operations", difficulties=(1, 2, 3)), "depth", 3000
    ),
    "parity": Task(
        _part(group_words, things=2),
        "sixth of the row",
        1000,
        beyond=_part(group_words, things=2, length=2 * LENGTH, asked_from=LENGTH),
    ),
    "s3": Task(
        _part(group_words, things=3),
        "sixth of the row",
        1500,
        beyond=_part(group_words, things=3, length=2 * LENGTH, asked_from=LENGTH),
    ),
    "s5": Task(
        _part(problems, name="state_tracking", difficulties=tuple(range(1, 13))),
        "swaps",
        3000,
        beyond=_part(problems, name="state_tracking", difficulties=tuple(range(13, 36))),
    ),
    "text": Task(text, "third of the row", 4000, score="bits per byte"),
}
