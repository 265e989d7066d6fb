"""The training problems of tasks as a source of text, each one a document."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

from mamba_jax.data.document import Piece
from mamba_jax.data.sources.readers import VERSION, pieces_of_document
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tasks import parse, problems

# Increase it whenever a task would make different problems.
_FORMAT = 1
_PART_PROBLEMS = 5_000
_TYPICAL_BYTES = 60  # of a problem
_SEED = 0  # the same problems for every run; the run's seed gives their order


@dataclasses.dataclass(frozen=True)
class ProblemsPart:
    """Some thousand problems of one task and difficulty, cached as a whole."""

    task: str
    difficulty: int
    stream: int
    count: int
    stat: None = None
    parallel: bool = True

    @property
    def name(self) -> str:
        return f"task {self.task}:{self.difficulty}, part {self.stream + 1}"

    @property
    def size_bytes(self) -> int:
        return _TYPICAL_BYTES * self.count

    def key(self) -> str:
        words = ["problems", VERSION, _FORMAT, self.task, self.difficulty, self.stream, self.count]
        return hashlib.blake2b(json.dumps(words).encode(), digest_size=16).hexdigest()

    def pieces(self, summary: DataSummary) -> Iterator[Piece]:
        of = self.task, self.difficulty, "train", _SEED, self.count, self.stream
        for problem in problems(*of):
            summary.rows += 1
            yield from pieces_of_document([(problem.prompt, False), (f" {problem.answer}", True)])


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """Problems of several tasks."""

    origin: str
    tasks: tuple[tuple[str, int], ...]
    examples: int

    def parts(self) -> Iterator[ProblemsPart]:
        for task, difficulty in self.tasks:
            for stream, start in enumerate(range(0, self.examples, _PART_PROBLEMS)):
                count = min(_PART_PROBLEMS, self.examples - start)
                yield ProblemsPart(task, difficulty, stream, count)


def open_tasks(spec: str, examples: int) -> TaskRows:
    """Returns the training problems that ``data.tasks`` and ``data.task_examples`` name.

    Args:
      spec: as of ``tasks.parse``.
      examples: problems of each task and difficulty, at most as many as exist. Problems that
        several parts share are left out as duplicates.

    Raises:
      UserError: on an unknown task or difficulty.
    """
    return TaskRows(f"tasks {spec}", tuple(parse(spec)), examples)
