"""``python -m mamba_jax.explain DIR``: what is wrong with a run, and what to do about it."""

import argparse
import json
import pathlib
import shutil
import sys

from mamba_jax.cli.terminal import has_colours
from mamba_jax.errors import command

_ABOUT = """\
Reads what a run has recorded (metrics.jsonl in its output_dir), finished or still going, and says
in plain words what is wrong, by which figures, and what to do. It only reads.
"""
_EPILOG = """\
exit status: 0 whatever is found ("severity" in --json tells how bad it is); 2 where there is no
such run. In a terminal the text is coloured, unless NO_COLOR is set.
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
    # Here, so that --help is answered at once.
    from mamba_jax.doctor import rules, signals, text

    run = signals.read(arguments.folder)
    diagnosis = rules.examine(run)
    if arguments.json:
        said = json.dumps(text.to_json(run, diagnosis), indent=2, ensure_ascii=False)
    else:
        # Wider lines than these are hard to read.
        width = min(100, shutil.get_terminal_size().columns or 80)
        said = text.render(run, diagnosis, text.TextPage(width, has_colours(sys.stdout)))
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
