"""Tables about the project: ``python -m mamba_jax.report presets [--json]``."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from mamba_jax import presets
from mamba_jax.config import freeze, preset_config
from mamba_jax.errors import command


@command
def main(argv: list[str]) -> int:
    """Runs the report that the first argument names."""
    parser = argparse.ArgumentParser(prog="mamba-jax report", description="Tables on the project.")
    reports = parser.add_subparsers(metavar="report", required=True)
    sizes = reports.add_parser("presets", help="the model sizes with their true parameter counts")
    sizes.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    sizes.set_defaults(run=print_presets)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def print_presets(arguments: argparse.Namespace) -> int:
    """Prints all sizes; parameter counts are those of the structure with the default tokenizer."""
    rows = [preset_row(name) for name in presets.SIZES]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    cells = [[f"{x:,}" if isinstance(x, int) else x for x in row.values()] for row in rows]
    print_table(list(rows[0]), cells, n_text_columns=2)
    return 0


def preset_row(name: str) -> dict[str, Any]:
    """Returns the row of one size; "nominal" is its label, "parameters" the truth."""
    from mamba_jax.data.tokenizer import load_tokenizer
    from mamba_jax.models.cost import parameter_count

    size, run = presets.SIZES[name], freeze(preset_config(name))
    vocab_size = load_tokenizer(run.data.tokenizer).vocab_size
    count = parameter_count(dataclasses.replace(run.model, vocab_size=vocab_size))
    columns = ("name", "family", "d_model", "n_layers", "depth", "nominal")
    row = {column: getattr(size, column) for column in columns}
    return row | {"parameters": count.total, "non_embedding": count.non_embedding}


def print_table(header: list[str], rows: list[list[str]], n_text_columns: int) -> None:
    """Prints aligned columns: the first ones, text, to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            f"{cell:<{width}}" if column < n_text_columns else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
