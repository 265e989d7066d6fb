"""What a rule says of a run."""

import dataclasses
import enum


class Severity(enum.IntEnum):
    """How bad it is; higher is worse."""

    NOTE = 1  # worth knowing
    WARNING = 2  # costs quality, time or money
    CRITICAL = 3  # the run learns nothing, or has ended


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One thing to do about it.

    Attributes:
      text: in plain words.
      command: what to run as it stands, or flags to add to the command of the run; "": neither.
    """

    text: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
      severity: how bad it is.
      title: in a few words.
      evidence: what was measured, with figures and steps.
      why: what it means.
      remedies: what to do, the likeliest first.
    """

    severity: Severity
    title: str
    evidence: tuple[str, ...]
    why: str
    remedies: tuple[Remedy, ...]


@dataclasses.dataclass(frozen=True)
class Unchecked:
    """A rule could not judge the run.

    Attributes:
      reason: what is missing.
    """

    reason: str


def too_few(have: int, needed: int, what: str) -> Unchecked:
    """Says that there is not enough of something yet."""
    return Unchecked(f"{max(0, have):,} of the {needed} {what} that it takes")


Verdict = Finding | Unchecked | None  # None: looked, and found nothing
