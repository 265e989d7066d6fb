"""The fenced blocks and links of the README and of ``docs/``."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
)
_EXCUSE = re.compile(r"<!-- not run: (.+) -->")


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: pathlib.Path
    line: int
    language: str
    text: str
    excuse: str  # why no test runs it; "": a test does

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: pathlib.Path) -> list[Block]:
    """Returns all fenced blocks of a page in order."""
    found, start, language, lines, excuse = [], 0, None, [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                start, language = number, line[3:]
            else:
                found.append(Block(page, start, language, "\n".join(lines), excuse))
                language, lines, excuse = None, [], ""
        elif language is not None:
            lines.append(line)
        elif line.lstrip().startswith(("```", "~~~")):
            raise AssertionError(f"{page}:{number}: no test finds an indented block, or one of ~~~")
        elif match := _EXCUSE.fullmatch(line):
            excuse = match[1]
        elif line.strip():
            excuse = ""
    assert language is None, f"{page}: the block of line {start} has no end"
    return found


def anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: pathlib.Path) -> list[str]:
    """Returns the targets of all links and images outside of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))
