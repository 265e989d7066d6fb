"""Tuning on a make-believe card, the table on disk, and what a machine without a GPU is told."""

import dataclasses
import json

import pytest

from mamba_jax import autotune
from mamba_jax.ops.selective_scan.pallas_gpu import tuning
from mamba_jax.ops.selective_scan.pallas_gpu.shell import Tile


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.table.cache_clear()
    yield
    tuning.table.cache_clear()


def default_row():
    return tuning.table()["default"]


def test_without_a_gpu_it_is_one_line(capsys):
    assert autotune.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "found only cpu" in error
    assert not tuning.user_table_path().exists()


def pretend(row, shape, direction):
    """Seconds, least at (64, 2) and 4 warps forward, (32, 3) and 8 backward, chunks of 64."""
    forward = (row.forward.tile.block_channels != 64) + abs(row.forward.tile.group_tokens - 2)
    forward += abs(row.forward.warps_per_scheduler - 4)
    if direction == "forward":
        return shape[1] * (1.0 + forward)
    backward = (row.backward.tile.block_channels != 32) + abs(row.backward.tile.group_tokens - 3)
    backward += abs(row.backward.warps_per_scheduler - 8) + (row.chunk_tokens != 64)
    return shape[1] * (1.0 + forward + backward)


def test_tuning_finds_the_fastest():
    row = autotune.tune(default_row(), autotune.SHAPES, pretend, quick=False)
    assert row.forward == tuning.Pass(Tile(64, 2), 4)
    assert row.backward == tuning.Pass(Tile(32, 3), 8)
    assert row.chunk_tokens == 64
    quick = autotune.tune(default_row(), autotune.SHAPES[:1], pretend, quick=True)
    assert quick.forward.tile == Tile(64, 2) and quick.chunk_tokens == default_row().chunk_tokens


def test_what_does_not_run_is_not_chosen():
    only = lambda row, shape, direction: 1.0 if row == default_row() else float("inf")
    assert autotune.tune(default_row(), autotune.SHAPES, only, quick=True) == default_row()


def test_the_users_file_goes_before_the_table(monkeypatch):
    assert not default_row().measured
    row = dataclasses.replace(default_row(), chunk_tokens=64, measured=True)
    tuning.write(tuning.user_table_path(), {"NVIDIA H200": row})
    tuning.table.cache_clear()
    assert tuning.choose(8, 2048, 1536).chunk_tokens == 32  # this machine has no such card
    monkeypatch.setattr(tuning, "this_card", lambda: "NVIDIA H200")
    assert tuning.choose(8, 2048, 1536).chunk_tokens == 64


def test_a_damaged_file_is_named():
    path = tuning.user_table_path()
    path.parent.mkdir(parents=True)
    for text in ("{", json.dumps({"NVIDIA H200": {"chunk_tokens": 3}}), "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"selective_scan_tuning\.json is not a tuning table"):
            tuning.table()


def test_small_batches_are_split_until_the_card_is_busy():
    one = tuning.Pass(Tile(32, 4), warps_per_scheduler=2)
    assert one.segments(64, 2048, 1536, schedulers=528) == 1
    assert one.segments(8, 2048, 1536, schedulers=528) == 2  # 384 warps, 1056 wanted
    assert one.segments(1, 8192, 1536, schedulers=528) == 16  # 48 warps
    assert one.segments(1, 512, 1536, schedulers=528) == 4  # no segment under 128 tokens
    assert dataclasses.replace(one, warps_per_scheduler=0).segments(1, 8192, 1536, 528) == 1
