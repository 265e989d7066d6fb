"""Tuning on a simulated card, the table on disk, and the error on a machine without a GPU."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest

from mamba_jax import autotune
from mamba_jax.config import ModelConfig
from mamba_jax.errors import UserError
from mamba_jax.modules.mamba import resolve_scan
from mamba_jax.ops.selective_scan import chunked, pallas_gpu
from mamba_jax.ops.selective_scan.pallas_gpu import tuning
from mamba_jax.ops.selective_scan.pallas_gpu.kernel_io import Tile

CARD = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0", core_count=132
)


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


def test_nothing_is_written_where_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(jax, "devices", lambda: [CARD])
    monkeypatch.setattr(autotune, "measure", lambda *_: float("inf"))
    assert autotune.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "candidates for the forward pass" in error
    assert not tuning.user_table_path().exists()


def test_the_command_writes_this_cards_row_beside_the_others(monkeypatch, capsys):
    path = tuning.user_table_path()
    tuning.write(path, {"NVIDIA A100": default_row()})
    monkeypatch.setattr(jax, "devices", lambda: [CARD])
    monkeypatch.setattr(autotune, "measure", pretend)
    assert autotune.main(["--quick"]) == 0
    assert str(path) in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rows = tuning.read(path)
    assert rows["NVIDIA A100"] == default_row()
    row = rows["NVIDIA H200"]
    assert (row.measured, row.schedulers, row.forward.tile) == (True, 528, Tile(64, 2))


def test_an_old_card_is_refused(monkeypatch, capsys):
    old = types.SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
    monkeypatch.setattr(jax, "devices", lambda: [old])
    assert autotune.main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "8.0 or later, not 7.5" in error


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_tile_is_timed_if_it_runs_and_is_right(direction, monkeypatch, capsys):
    shape, scan = (1, 12, 16), pallas_gpu.scan
    measure = lambda: autotune.measure(default_row(), shape, direction)
    monkeypatch.setattr(pallas_gpu, "scan", functools.partial(scan, interpret=True))
    assert 0 < measure() < 60
    assert not capsys.readouterr().err
    assert measure_again_fails(measure, monkeypatch, lambda y_bte: y_bte * 1.03)
    assert measure_again_fails(measure, monkeypatch, lambda y_bte: y_bte * jnp.nan)
    assert capsys.readouterr().err.count("skipped: wrong results from ScanPlan(") == 2
    # No GPU here, so that the kernels themselves do not compile.
    monkeypatch.setattr(pallas_gpu, "scan", scan)
    assert measure() == float("inf") and "skipped: " in capsys.readouterr().err


def measure_again_fails(measure, monkeypatch, spoil):
    """Whether a scan whose y is spoilt, and the gradients with it, is refused."""

    def spoilt(*arrays, plan, **options):
        y_bte, state_ben = chunked.scan(*arrays, **options)
        return spoil(y_bte), state_ben

    monkeypatch.setattr(pallas_gpu, "scan", spoilt)
    return measure() == float("inf")


def test_the_users_file_takes_precedence_over_the_table(monkeypatch):
    assert not default_row().measured
    row = dataclasses.replace(default_row(), chunk_tokens=64, measured=True)
    tuning.write(tuning.user_table_path(), {"NVIDIA H200": row})
    tuning.table.cache_clear()
    assert tuning.choose(8, 2048, 1536).chunk_tokens == 32  # this machine has no such card
    monkeypatch.setattr(tuning, "this_card", lambda: "NVIDIA H200")
    assert tuning.choose(8, 2048, 1536).chunk_tokens == 64


DAMAGES = [
    "{",
    "[]",
    '{"NVIDIA H200": {"chunk_tokens": 3}}',
    '"block_channels": 33',
    '"block_channels": "32"',
    '"group_tokens": 0',
    '"chunk_tokens": 1.5',
    '"warps_per_scheduler": -1',
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_line_in_every_command(damage, monkeypatch, capsys):
    path = tuning.user_table_path()
    tuning.write(path, {"NVIDIA H200": default_row()})
    if ":" in damage and not damage.startswith("{"):
        name = damage.partition(":")[0]
        damage = re.sub(f"{name}: [0-9]+", damage, path.read_text())
    path.write_text(damage)
    tuning.table.cache_clear()
    words = r"selective_scan_tuning\.json is not a tuning table.*delete it"
    with pytest.raises(ValueError, match=words):
        tuning.table()
    monkeypatch.setattr(jax, "devices", lambda: [CARD])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for scan in ("auto", "pallas_gpu"):
        model = ModelConfig(scan=scan)
        with pytest.raises(UserError, match=words):
            resolve_scan(model, jnp.dtype("bfloat16"))
    assert autotune.main(["--quick"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_small_batches_are_split_until_the_card_is_busy():
    one = tuning.Pass(Tile(32, 4), warps_per_scheduler=2)
    assert one.segments(64, 2048, 1536, schedulers=528) == 1
    assert one.segments(8, 2048, 1536, schedulers=528) == 2  # 384 warps, 1056 wanted
    assert one.segments(1, 8192, 1536, schedulers=528) == 16  # 48 warps
    assert one.segments(1, 512, 1536, schedulers=528) == 4  # no segment under 128 tokens
    assert dataclasses.replace(one, warps_per_scheduler=0).segments(1, 8192, 1536, 528) == 1
