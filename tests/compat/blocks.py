"""The fenced blocks of the guide, and the commands that a shell runs in them.

``guide.md`` is a copy of the guide's text. A block's commands are run by a real shell in which
``./train_background.sh`` only records how it was called: loops, quotes, comments and
substitutions mean what they mean to a user.
"""

import dataclasses
import pathlib
import subprocess

GUIDE = pathlib.Path(__file__).with_name("guide.md")
_RECORDER = """\
#!/usr/bin/env bash
printf '%s\\n' $# "$@" >>"${0%/*}/calls"
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block."""

    heading: str  # the one it stands under
    language: str
    text: str

    @property
    def flag_lines(self) -> list[str]:
        """The lines that are flags alone, without a command."""
        return [line for line in self.text.splitlines() if line.startswith("--")]


def blocks() -> list[Block]:
    """Returns all blocks in order."""
    found, heading, language, lines = [], "", None, []
    for line in GUIDE.read_text().splitlines():
        if line.startswith("```"):
            if language is None:
                language = line[3:]
            else:
                found.append(Block(heading, language, "\n".join(lines)))
                language, lines = None, []
        elif language is not None:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def calls(text: str, folder: pathlib.Path) -> list[list[str]]:
    """Runs a block in ``folder`` and returns the arguments of each ``./train_background.sh``."""
    script, record = folder / "train_background.sh", folder / "calls"
    script.write_text(_RECORDER)
    script.chmod(0o755)
    record.write_text("")
    shell = ["bash", "-euo", "pipefail", "-c", text]
    ran = subprocess.run(shell, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    made, lines = [], record.read_text().splitlines()
    while lines:
        count = int(lines.pop(0))
        made.append(lines[:count])
        del lines[:count]
    return made
