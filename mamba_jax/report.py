"""Reports on sizes and runs: ``mamba-jax report {presets,flops,run,compare} …``."""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from mamba_jax.cli.terminal import print_table
from mamba_jax.config import freeze, preset_config, presets
from mamba_jax.errors import UserError, command
from mamba_jax.files import write_atomic
from mamba_jax.reports import flops


@command
def main(argv: list[str]) -> int:
    """Runs the report that the first argument names."""
    parser = argparse.ArgumentParser(
        prog="mamba-jax report", description="Reports on model sizes and runs."
    )
    reports = parser.add_subparsers(metavar="report", required=True)
    sizes = reports.add_parser("presets", help="the model sizes with their actual parameter counts")
    sizes.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    sizes.set_defaults(run=print_presets)
    costs = reports.add_parser(
        "flops",
        help="FLOPs and bytes of each part of a model size; MFU and share of the floor of a run",
        description=flops.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flops.add_arguments(costs)
    costs.set_defaults(run=flops.print_flops)
    one = reports.add_parser(
        "run",
        help="one run as a self-contained HTML page: curves, samples, warnings, config",
        description="Writes everything that a run has recorded as one self-contained HTML file, "
        "which needs no network. It also works while the run is training: run the command again "
        "to update the page.",
    )
    one.add_argument("folder", metavar="DIR", type=pathlib.Path, help="the run's output_dir")
    one.add_argument(
        "--out", metavar="FILE", type=pathlib.Path, help="the page (default: DIR/report.html)"
    )
    one.set_defaults(run=write_run_page)
    several = reports.add_parser(
        "compare",
        help="several runs: a table of their differences and results, and overlaid curves",
        description="Prints a table of several runs (the config fields that differ, and the "
        "results of each run) and writes an HTML page with their curves.",
    )
    several.add_argument(
        "folders", metavar="DIR", nargs="+", type=pathlib.Path, help="the output_dir of each run"
    )
    several.add_argument(
        "--out",
        metavar="FILE",
        type=pathlib.Path,
        default=pathlib.Path("compare.html"),
        help="the page (default: compare.html)",
    )
    several.add_argument("--json", action="store_true", help="print JSON instead of a table")
    several.set_defaults(run=compare_runs)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def print_presets(arguments: argparse.Namespace) -> int:
    """Prints all sizes; it counts the parameters of the model with the default tokenizer."""
    rows = [preset_row(name) for name in presets.SIZES]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    cells = [[f"{x:,}" if isinstance(x, int) else x for x in row.values()] for row in rows]
    print_table(list(rows[0]), cells, n_text_columns=2)
    return 0


def preset_row(name: str) -> dict[str, Any]:
    """Returns the row of one size; "nominal" is its label, "parameters" the actual count."""
    from mamba_jax.costs.parameters import parameter_count
    from mamba_jax.data.tokenizers.load import load_tokenizer

    size, run = presets.SIZES[name], freeze(preset_config(name))
    vocab_size = load_tokenizer(run.data.tokenizer).vocab_size
    count = parameter_count(dataclasses.replace(run.model, vocab_size=vocab_size))
    columns = ("name", "family", "d_model", "n_layers", "depth", "nominal")
    row = {column: getattr(size, column) for column in columns}
    return row | {"parameters": count.total, "non_embedding": count.non_embedding}


def write_run_page(arguments: argparse.Namespace) -> int:
    """Writes the page of a run."""
    from mamba_jax.reports import run_page
    from mamba_jax.runs import recorded

    run = recorded.read_run(arguments.folder)
    _write(arguments.out or arguments.folder / "report.html", run_page.render(run))
    return 0


def compare_runs(arguments: argparse.Namespace) -> int:
    """Prints the table of several runs and writes their page."""
    from mamba_jax.reports import compare
    from mamba_jax.runs import recorded

    if len(arguments.folders) < 2:
        raise UserError(
            f"only one run to compare: {arguments.folders[0]}; give two or more, or use "
            "`mamba-jax report run` for one"
        )
    comparison = compare.Comparison([recorded.read_run(folder) for folder in arguments.folders])
    if arguments.json:
        print(json.dumps(comparison.record(), indent=2, allow_nan=False))
    else:
        header, *rows = comparison.lines()
        print_table(header, rows, n_text_columns=1)
        for note in comparison.notes():
            print(note)
    _write(arguments.out, compare.render(comparison))
    return 0


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a page and prints its path to standard error, because standard output may be JSON."""
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write the page {path}: {error.strerror}; choose another --out"
        ) from error
    print(f"page: {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
