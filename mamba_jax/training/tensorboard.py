"""TensorBoard event files, written in the caller's thread.

``tensorboardX.SummaryWriter`` hands events to a thread through a queue of ten. When the disk is
full that thread dies, the queue fills, and the training loop waits for it for ever. Here a failed
write is an ``OSError`` where it happens.
"""

import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2


class TensorBoard:
    """One event file in a folder of its own."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._events = EventsWriter(str(folder / "events"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each curve."""
        for tag, value in values.items():
            self._add(step, summary.scalar(tag, value))

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

    def close(self) -> None:
        self._events.close()

    def _add(self, step: int, values: "summary.Summary") -> None:
        made = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]  # made by protobuf
        event = made(step=step, wall_time=time.time(), summary=values)
        self._events.write_event(event)
