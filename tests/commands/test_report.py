"""The size report against the tables and against counts worked out by hand."""

import json

import pytest

from mamba_jax import presets, report

KEYS = [
    "name", "family", "d_model", "n_layers", "depth", "nominal", "parameters", "non_embedding",
]  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return {name: report.preset_row(name) for name in presets.SIZES}


def test_json_holds_every_size(rows, capsys):
    assert report.main(["presets", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == list(rows.values())
    assert len(printed) == 18
    for row in printed:
        assert list(row) == KEYS
        size = presets.SIZES[row["name"]]
        assert [row[key] for key in KEYS[:6]] == [getattr(size, key) for key in KEYS[:6]]


def test_table_holds_every_size(rows, capsys):
    assert report.main(["presets"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == KEYS
    for line, row in zip(lines, rows.values(), strict=True):
        cells = [f"{x:,}" if isinstance(x, int) else x for x in row.values()]
        assert line.split() == cells
    assert len({len(line) for line in lines}) == 1  # aligned


@pytest.mark.parametrize(
    "name", [name for name, size in presets.SIZES.items() if size.family == "mamba"]
)
def test_mamba_counts_by_hand(name, rows):
    d, layers = presets.SIZES[name].d_model, presets.SIZES[name].n_layers
    e, n, k, r = 2 * d, 16, 4, -(-d // 16)
    layer = (
        d  # norm
        + d * 2 * e  # in_proj
        + (k + 1) * e  # conv1d
        + e * (r + 2 * n)  # x_proj
        + (r + 1) * e  # dt_proj
        + e * n  # A_log
        + e  # D
        + e * d  # out_proj
    )
    assert rows[name]["non_embedding"] == layers * layer + d
    assert rows[name]["parameters"] == layers * layer + d + 50257 * d


def test_hybrids_cost_more_than_their_mamba(rows):
    for name, row in rows.items():
        if row["family"] == "hybrid":
            d, layers = row["d_model"], row["n_layers"]
            mixers = layers * (6 * d * d + d)  # in_proj, out_proj and norm alone
            assert row["non_embedding"] > mixers, name
            assert row["parameters"] - row["non_embedding"] == 50257 * d, name
