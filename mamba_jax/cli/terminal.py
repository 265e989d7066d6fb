"""Terminal output that commands share: tables and colours."""

import os
from typing import TextIO


def has_colours(stream: TextIO) -> bool:
    """Whether to write in colours: if the terminal has them and the user allows them."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") != "dumb"
    return wanted and stream.isatty()


def print_table(header: list[str], rows: list[list[str]], n_text_columns: int) -> None:
    """Prints aligned columns: the first ones, text, to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            f"{cell:<{width}}" if column < n_text_columns else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
