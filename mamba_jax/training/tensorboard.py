"""TensorBoard event files, written in the caller's thread.

``tensorboardX.SummaryWriter`` hands events to a thread through a queue of ten. When the disk is
full that thread dies, the queue fills, and the training loop waits for it forever. Here a failed
write raises ``OSError`` where it happens.
"""

import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

_JUDGED_BY = ("eval/loss", "train/loss", "train/tokens_per_sec")


class TensorBoard:
    """One event file in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        for tag, value in values.items():
            self._add(step, summary.scalar(tag, value))

    def hyperparameters(self, values: Mapping[str, bool | int | float | str]) -> None:
        """Fills the tab HPARAMS: the config's fields, and the metrics to compare them by."""
        experiment, start, _ = summary.hparams(dict(values), dict.fromkeys(_JUDGED_BY, 0.0))
        self._add(0, experiment)
        self._add(0, start)

    def text(self, step: int, tag: str, text: str) -> None:
        """Adds a text to the tab TEXT, unformatted."""
        indented = "\n".join("    " + line for line in text.splitlines())  # Markdown for code
        self._add(step, summary.text(tag, indented))

    def histogram(
        self, step: int, tag: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Adds a histogram; ``edges`` has one entry more than ``counts``."""
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        weighted = [count * middle for count, middle in zip(counts, middles, strict=True)]
        squares = [value * middle for value, middle in zip(weighted, middles, strict=True)]
        event = summary.histogram_raw(
            tag,
            edges[0],
            edges[-1],
            sum(counts),
            sum(weighted),
            sum(squares),
            list(edges[1:]),
            list(counts),
        )
        self._add(step, event)

    def flush(self) -> None:
        self._events.flush()

    def close(self, succeeded: bool) -> None:
        if succeeded:
            _, _, end = summary.hparams({}, {})
            self._add(0, end)
        self._events.close()

    def _add(self, step: int, values: "summary.Summary") -> None:
        made = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf
        event = made(step=step, wall_time=time.time(), summary=values)
        self._events.write_event(event)
