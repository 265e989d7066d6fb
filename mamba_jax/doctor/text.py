"""A diagnosis as text for a terminal, and as plain JSON types."""

import dataclasses
import textwrap
from typing import Any

from mamba_jax.doctor.finding import Finding, Remedy, Severity
from mamba_jax.doctor.rules import Diagnosis
from mamba_jax.doctor.signals import RunSignals

_COLOURS = {Severity.CRITICAL: "1;31", Severity.WARNING: "1;33", Severity.NOTE: "1;36"}
_DIM, _GREEN, _BOLD = "2", "1;32", "1"
_LABELS = ("seen", "why", "do")
_INDENT = 8  # of the text after a label


@dataclasses.dataclass(frozen=True)
class TextPage:
    """How to format: the width in columns, and whether to use colours."""

    width: int = 80
    colours: bool = False

    def paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self.colours else text

    def wrap(self, text: str, indent: int = _INDENT, bullet: str = "") -> list[str]:
        """Breaks a text into lines; long words, such as paths, stay whole."""
        return textwrap.wrap(
            text,
            self.width,
            initial_indent=" " * indent + bullet,
            subsequent_indent=" " * (indent + len(bullet)),
            break_long_words=False,
            break_on_hyphens=False,
        )

    def labelled(self, label: str, lines: list[str]) -> list[str]:
        """Puts a label into the margin of the first line."""
        margin = "  " + self.paint(f"{label:<{_INDENT - 2}}", _DIM)
        return [margin + lines[0][_INDENT:], *lines[1:]]


def render(run: RunSignals, diagnosis: Diagnosis, page: TextPage) -> str:
    """Returns the whole text, without a newline at its end."""
    lines = _head(run, page)
    printed: set[Remedy] = set()
    for _, finding in diagnosis.findings:
        lines += ["", *_finding(finding, printed, page)]
        printed |= set(finding.remedies)
    lines += ["", *_foot(diagnosis, page)]
    return "\n".join(lines)


def _head(run: RunSignals, page: TextPage) -> list[str]:
    name = run.config.name if run.config is not None else run.folder.name
    progress = f"step {run.last_step:,}"
    if run.config is not None:
        progress += f" of {run.config.training.max_steps:,}"
    latest = [run.status.state, progress]
    for key, text in (
        ("loss", "loss {:.3f}"),
        ("eval_loss", "evaluation {:.3f}"),
        ("tokens_per_sec", "{:,.0f} tokens/s"),
    ):
        if len(run[key]):
            latest.append(text.format(run[key].values[-1]))
    title = page.paint(name, _BOLD) + f"  ({run.folder})"
    return [title, *page.wrap(" · ".join(latest), indent=0)]


def _finding(finding: Finding, printed: set[Remedy], page: TextPage) -> list[str]:
    """Formats a finding; it does not repeat remedies that are printed already."""
    severity = finding.severity
    new = [remedy for remedy in finding.remedies if remedy not in printed]
    if len(new) < len(finding.remedies):
        new = [Remedy("See above"), *new]
    mark = page.paint(f"{severity.name} ", _COLOURS[severity])
    lines = [f"{mark} {page.paint(finding.title, _BOLD)}"]
    for label, blocks in zip(
        _LABELS,
        (
            [page.wrap(line) for line in finding.evidence],
            [page.wrap(finding.why)],
            [_remedy(remedy, page) for remedy in new],
        ),
        strict=True,
    ):
        lines += page.labelled(label, [line for block in blocks for line in block])
    return lines


def _remedy(remedy: Remedy, page: TextPage) -> list[str]:
    lines = page.wrap(remedy.text + (":" if remedy.command else "."))
    return lines + [page.paint(line, _GREEN) for line in _command(remedy.command, page.width)]


def _command(command: str, width: int) -> list[str]:
    """Breaks a command before its flags; a backslash continues each line, as a shell needs it."""
    lines: list[str] = []
    for word in _arguments(command):
        room = width - 2  # for the backslash
        if lines and len(lines[-1]) + 1 + len(word) <= room:
            lines[-1] += " " + word
        else:
            lines.append(" " * (_INDENT + (4 if lines else 2)) + word)
    return [line + " \\" for line in lines[:-1]] + lines[-1:]


def _arguments(command: str) -> list[str]:
    """Returns the words, each flag with its value."""
    head, *flags = command.split(" --")
    return ([head] if head else []) + ["--" + flag for flag in flags]


def _foot(diagnosis: Diagnosis, page: TextPage) -> list[str]:
    lines = []
    clear, unchecked = diagnosis.clear, diagnosis.unchecked
    if not diagnosis.findings:
        lines.append(page.paint("No problems found.", _GREEN))
    elif any(r.command.startswith("--") for _, f in diagnosis.findings for r in f.remedies):
        lines += page.wrap(
            "Flags without a command are for a new run: add them to its command, together with "
            "another --output_dir.",
            indent=0,
        )
    if clear:
        lines += page.wrap(f"Checked, no problem found: {', '.join(clear)}.", indent=0)
    if unchecked:
        lines.append("Not enough data to judge:")
        longest = max(map(len, unchecked))
        for name, reason in unchecked.items():
            lines += page.wrap(f"{name:<{longest}}  {reason}", indent=2)
    return lines


def to_json(run: RunSignals, diagnosis: Diagnosis) -> dict[str, Any]:
    """Returns everything as plain JSON types."""
    max_steps = run.config.training.max_steps if run.config is not None else None
    return {
        "run": str(run.folder),
        "name": run.config.name if run.config is not None else None,
        "state": run.status.state,
        "step": run.last_step,
        "max_steps": max_steps,
        "findings": [
            {
                "rule": rule,
                "severity": finding.severity.name.lower(),
                "title": finding.title,
                "evidence": list(finding.evidence),
                "why": finding.why,
                "remedies": [dataclasses.asdict(remedy) for remedy in finding.remedies],
            }
            for rule, finding in diagnosis.findings
        ],
        "in_order": list(diagnosis.clear),
        "too_little_recorded": dict(diagnosis.unchecked),
    }
