"""The ``h`` of ``get_hyper(h)``: settings to try, written as in sweep files of Flax projects.

::

    def get_hyper(h):
        return h.product([
            h.sweep("config.training.learning_rate", [1e-4, 3e-4, 1e-3]),
            h.zipit([
                h.loguniform("config.training.weight_decay", h.interval(0.01, 1.0)),
                h.uniform("config.model.dropout", h.interval(0.0, 0.3)),
            ], length=4),
        ])

A sweep is a list of settings (dicts of names and values); it is endless if it draws values, and
``zipit(…, length=n)`` gives it a length. The first part of a product varies slowest. A search
(``--search``) draws from the same description: lists and alternatives are choices, intervals are
ranges, and no length is needed.
"""

import collections
import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from mamba_jax.config.files import call_in_file
from mamba_jax.errors import UserError

JobSettings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from low to high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(
                f"h.interval({self.low}, {self.high}): the first number must be the smaller one"
            )


class Chooser(Protocol):
    """The source of a search's values. Each name identifies one choice of the sweep."""

    def real(self, name: str, low: float, high: float, *, log: bool) -> float:
        """Returns a number between low and high."""
        ...

    def choice(self, name: str, count: int) -> int:
        """Returns one of 0 … count − 1."""
        ...


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Settings to try, in order, and how a search draws one."""

    draw: Callable[[], Iterator[JobSettings]]
    suggest: Callable[[Chooser], JobSettings]
    length: int | None  # None: endless
    fields: tuple[str, ...]  # the fields that it sets

    def __iter__(self) -> Iterator[JobSettings]:
        return self.draw()


class Hyper:
    """Makes sweeps. Names may begin with ``config.`` or not."""

    def __init__(self, seed: int = 0):
        """
        Args:
          seed: of the values that ``uniform`` and ``loguniform`` draw.
        """
        self._seed = seed
        self._questions: collections.Counter[str] = collections.Counter()

    def interval(self, low: float, high: float) -> Interval:
        """The numbers from low to high, for ``uniform`` and ``loguniform``."""
        return Interval(low, high)

    def discrete(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """These values, usually numbers."""
        return tuple(values)

    def categorical(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """These values, which have no order."""
        return tuple(values)

    def sweep(self, name: str, values: Iterable[Any]) -> Sweep:
        """Each of the values in turn."""
        field, values = _field(name), _some(name, values)
        return self._listed([{field: value} for value in values], field)

    def fixed(self, name: str, value: Any, length: int = 1) -> Sweep:
        """One value, repeated ``length`` times for use in a zip."""
        settings = {_field(name): value}
        repeated = lambda: itertools.repeat(settings, length)
        return Sweep(repeated, lambda _: settings, length, tuple(settings))

    def uniform(self, name: str, domain: Interval | Iterable[Any]) -> Sweep:
        """An endless sequence of values drawn from an interval or a list."""
        if isinstance(domain, Interval):
            return self._real(_field(name), domain, log=False)
        field, values = _field(name), _some(name, domain)
        question = self._question(field)
        return Sweep(
            lambda: self._endless(field, lambda numbers: numbers.choice(values)),
            lambda chooser: {field: values[chooser.choice(question, len(values))]},
            None,
            (field,),
        )

    def loguniform(self, name: str, domain: Interval) -> Sweep:
        """An endless sequence of numbers whose logarithms are uniform."""
        if not isinstance(domain, Interval) or domain.low <= 0:
            raise UserError(f'h.loguniform("{name}", …) needs an h.interval above 0, not {domain}')
        return self._real(_field(name), domain, log=True)

    def product(self, sweeps: Sequence[Sweep], name: str = "") -> Sweep:
        """Every combination; with ``name``, the fields are below that part of the config."""
        under = "" if name in ("", "config") else f"{_field(name)}."
        lengths = [part.length for part in sweeps]
        length = None if None in lengths else math.prod(n for n in lengths if n is not None)

        def joined(parts: Iterable[JobSettings]) -> JobSettings:
            return {under + field: value for field, value in _merged(parts).items()}

        def draw() -> Iterator[JobSettings]:
            if length is None and len(sweeps) > 1:
                raise UserError(
                    "h.product of an endless h.uniform or h.loguniform: wrap it in "
                    "h.zipit([…], length=N), or search (--search)"
                )
            rows = itertools.product(*sweeps) if len(sweeps) != 1 else ([x] for x in sweeps[0])
            return (joined(row) for row in rows)

        return Sweep(
            draw,
            lambda chooser: joined([part.suggest(chooser) for part in sweeps]),
            length,
            tuple(under + field for part in sweeps for field in part.fields),
        )

    def zipit(self, sweeps: Sequence[Sweep], length: int | None = None) -> Sweep:
        """Joins the first settings of all sweeps, then the second …, until the shortest ends."""
        if not sweeps:
            raise UserError("h.zipit([]) has nothing to zip")
        listed = [part for part in sweeps if part.length is not None]
        drawn = [part for part in sweeps if part.length is None]
        counts = [part.length for part in listed if part.length is not None]
        limits = [*counts, *([] if length is None else [length])]
        shortest: int | None = min(limits) if limits else None
        rows = self._zipped_rows(listed, shortest) if listed else None

        def draw() -> Iterator[JobSettings]:
            return itertools.islice(map(_merged, zip(*sweeps, strict=False)), shortest)

        def suggest(chooser: Chooser) -> JobSettings:
            drawn_settings = [part.suggest(chooser) for part in drawn]
            return _merged([*([rows.suggest(chooser)] if rows else []), *drawn_settings])

        return Sweep(draw, suggest, shortest, tuple(f for part in sweeps for f in part.fields))

    def chainit(self, sweeps: Sequence[Sweep]) -> Sweep:
        """One sweep after the other."""
        if not sweeps:
            raise UserError("h.chainit([]) has nothing to chain")
        lengths = [part.length for part in sweeps]
        length = None if None in lengths else sum(n for n in lengths if n is not None)
        question = self._question("chain")

        def draw() -> Iterator[JobSettings]:
            if None in lengths[:-1]:
                raise UserError(
                    "h.chainit: sweeps after an endless h.uniform or h.loguniform are never "
                    "reached; wrap it in h.zipit([…], length=N), or search (--search)"
                )
            return itertools.chain.from_iterable(sweeps)

        def suggest(chooser: Chooser) -> JobSettings:
            return sweeps[chooser.choice(question, len(sweeps))].suggest(chooser)

        fields = dict.fromkeys(field for part in sweeps for field in part.fields)
        return Sweep(draw, suggest, length, tuple(fields))

    def _question(self, text: str) -> str:
        """Returns a unique name for a choice: two of the same name would get the same value."""
        self._questions[text] += 1
        count = self._questions[text]
        return text if count == 1 else f"{text} ({count})"

    def _listed(self, rows: Sequence[JobSettings], name: str) -> Sweep:
        question = self._question(name)

        def suggest(chooser: Chooser) -> JobSettings:
            return rows[chooser.choice(question, len(rows)) if len(rows) > 1 else 0]

        return Sweep(lambda: iter(rows), suggest, len(rows), tuple(rows[0]))

    def _zipped_rows(self, listed: Sequence[Sweep], count: int | None) -> Sweep:
        rows = map(_merged, itertools.islice(zip(*listed, strict=False), count))
        return self._listed(list(rows), " + ".join(f for part in listed for f in part.fields))

    def _real(self, field: str, domain: Interval, *, log: bool) -> Sweep:
        low, high = domain.low, domain.high

        def draw(numbers: random.Random) -> float:
            share = numbers.random()
            return low * (high / low) ** share if log else low + share * (high - low)

        question = self._question(field)
        return Sweep(
            lambda: self._endless(field, draw),
            lambda chooser: {field: chooser.real(question, low, high, log=log)},
            None,
            (field,),
        )

    def _endless(self, field: str, draw: Callable[[random.Random], Any]) -> Iterator[JobSettings]:
        """Draws the same values each time, so that a repeated sweep finds its finished runs."""
        numbers = random.Random(f"{self._seed}/{field}")
        while True:
            yield {field: draw(numbers)}


def _some(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    values = tuple(values)
    if not values:
        raise UserError(f'the sweep of "{name}" has no values')
    return values


def _field(name: str) -> str:
    return name.removeprefix("config.")


def _merged(parts: Iterable[JobSettings]) -> JobSettings:
    merged: JobSettings = {}
    for part in parts:
        for field, value in part.items():
            if field in merged:
                raise UserError(f"the sweep sets {field} twice: to {merged[field]} and to {value}")
            merged[field] = value
    return merged


def load(file: str, hyper: Hyper) -> Sweep:
    """Runs ``get_hyper(h)`` of a sweep file.

    Raises:
      UserError: if the file is missing, fails, or returns no sweep.
    """
    kind, result = "sweep file", "the result of h.sweep, h.product, h.zipit or h.chainit"
    return call_in_file(kind, file, "get_hyper", Sweep, result, h=hyper)
