"""What a rule reports about a run."""

import dataclasses
import enum


class Severity(enum.IntEnum):
    """How bad it is; higher is worse."""

    NOTE = 1  # worth knowing
    WARNING = 2  # costs quality, time or money
    CRITICAL = 3  # the run does not learn, or has ended


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One way to fix it.

    Attributes:
      text: in plain words.
      command: a command to run unchanged, or flags to add to the run's command; "": neither.
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
      remedies: what to do, the most promising first.
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
    """Returns that the run has not recorded enough of something yet."""
    return Unchecked(f"needs {needed} {what}; the run has {max(0, have):,}")


Verdict = Finding | Unchecked | None  # None: checked, found nothing
