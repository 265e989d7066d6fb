"""``mamba-jax explain DIR``: what is wrong with a run, and what to do about it."""

import argparse
import json
import pathlib
import shutil
import sys

from mamba_jax.cli.terminal import has_colours
from mamba_jax.errors import command

_ABOUT = """\
Reads what a run has recorded (metrics.jsonl in its output_dir) and explains in plain words what is
wrong, which figures show it, and what to do. Works on finished and on running runs, and changes
nothing.
"""
_EPILOG = """\
exit status: 0 with or without problems ("severity" in --json says how bad each is); 2 if there is
no such run. The text is coloured in a terminal unless NO_COLOR is set.
"""


@command
def main(argv: list[str]) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax explain",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=pathlib.Path, help="a run's output_dir")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    # Imported here so that --help is fast.
    from mamba_jax.doctor import rules, signals, text

    run = signals.read(arguments.folder)
    diagnosis = rules.examine(run)
    if arguments.json:
        output = json.dumps(text.to_json(run, diagnosis), indent=2, ensure_ascii=False)
    else:
        # Longer lines are hard to read.
        width = min(100, shutil.get_terminal_size().columns or 80)
        output = text.render(run, diagnosis, text.TextPage(width, has_colours(sys.stdout)))
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
