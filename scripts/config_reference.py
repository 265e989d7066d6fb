"""Writes ``docs/reference/config.md`` from the fields of the config.

python scripts/config_reference.py
"""

import pathlib
from collections.abc import Iterable

from mamba_jax.config.fields import Field, describe, fields
from mamba_jax.config.schema import PhaseConfig, RunConfig, SourceConfig

FILE = pathlib.Path(__file__).parents[1] / "docs" / "reference" / "config.md"
_HEAD = """\
# Config reference

Made by `python scripts/config_reference.py` from `mamba_jax/config`; do not edit.

Every field can be set in a config file, or on the command line as `--config.GROUP.FIELD=VALUE`;
`mamba-jax train --help_config` prints this list.
"""


def page() -> str:
    """Returns the text of the page."""
    groups: dict[str, list[Field]] = {}
    for field in fields(RunConfig):
        groups.setdefault(field.name.rpartition(".")[0], []).append(field)
    parts = [
        _HEAD,
        *(_table(f"`{name}`" if name else "The run", group) for name, group in groups.items()),
    ]
    parts.append(_table("A source of `data.mixture`", fields(SourceConfig)))
    parts.append(_table("A phase of `data.curriculum`", fields(PhaseConfig)))
    return "\n".join(parts)


def _table(title: str, group: Iterable[Field]) -> str:
    rows = [f"## {title}", "", "| field | type | default | |", "|---|---|---|---|"]
    for field in group:
        kind = " ".join(f"`{choice}`" for choice in field.choices) or describe(field.type)
        default = f"`{field.default!r}`" if field.default != "" else ""
        words = field.help + (f" It {field.constraint.words}." if field.constraint else "")
        name = field.name.rpartition(".")[2]
        rows.append(f"| `{name}` | {kind} | {default} | {words.replace('|', chr(92) + '|')} |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE}")
