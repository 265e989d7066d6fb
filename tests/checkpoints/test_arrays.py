"""A checkpoint is restored bit for bit or refused by name; a failed save damages no earlier one."""

import asyncio
import errno
import gc
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mamba_jax.checkpoints import arrays
from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata, restore, restore_params
from mamba_jax.checkpoints.folder import find_latest, read_metadata, verify
from mamba_jax.config import ModelConfig, RunConfig
from mamba_jax.errors import UserError
from mamba_jax.models import build

MODEL = ModelConfig(d_model=8, n_layers=1, d_state=2, vocab_size=16, dtype="float32")
CONFIG = RunConfig(name="tiny", model=MODEL)


class Moments(NamedTuple):
    mu: dict
    empty: tuple


def make_state(step: int) -> dict:
    """A stand-in with what a real state has: scalars, named tuples, empty leaves, odd floats."""
    row = jnp.arange(8.0) + step
    return {
        "step": jnp.int32(step),
        "params": {"layers": {"kernel": jnp.outer(row, row), "D": row.at[0].set(-0.0)}},
        "opt_state": (Moments({"kernel": jnp.full((8, 8), 1e-42)}, ()), ()),
        "gradient_norm_mean": jnp.float32(0.1),
    }


def abstract(state: dict, sharding=None) -> dict:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def assert_same_bits(got, wanted) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def open_writer(folder: pathlib.Path, keep_last: int = 3, keep_every: int = 0, log=None):
    log = log or (lambda _: None)
    return CheckpointWriter(folder, keep_last=keep_last, keep_every=keep_every, log=log)


def metadata(step: int, **metrics: float) -> Metadata:
    return Metadata(CONFIG, step, 8 * step, "fingerprint", metrics)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """A run's folder with step_6 and step_8; read only."""
    folder = tmp_path_factory.mktemp("saved")
    with open_writer(folder) as writer:
        for step in (6, 8):
            writer.save(f"step_{step}", make_state(step), metadata(step))
    return folder


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
    """A copy of it to damage."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(path: pathlib.Path) -> list[str]:
    return sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())


def kinds_of_files(path: pathlib.Path) -> list[str]:
    """One file of each kind: array data have names of hexadecimal digits."""
    kinds = {}
    for name in files_of(path):
        folder, _, base = name.rpartition("/")
        kinds.setdefault((folder, base if len(base) < 32 else "data"), name)
    return list(kinds.values())


# --- round trip -----------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 4])
def test_restores_the_same_bits_on_another_number_of_devices(saved, devices):
    mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = make_state(8)
    target = abstract(state, NamedSharding(mesh, PartitionSpec()))
    target["params"] = abstract(state["params"], split)
    got = restore(saved / "step_8", target)
    assert_same_bits(got, state)
    assert got["params"]["layers"]["kernel"].sharding == split


def test_a_sharded_state_is_saved_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = make_state(1)
    with open_writer(tmp_path) as writer:
        writer.save(
            "step_1", state | {"params": jax.device_put(state["params"], split)}, metadata(1)
        )
    assert_same_bits(restore(tmp_path / "step_1", abstract(state)), state)


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, monkeypatch):
    # 4 MB: large enough to be worth reusing.
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * -2 + 1, tree), donate_argnums=0)
    state = {"params": {"kernel": jnp.arange(2.0**20)}, "step": jnp.int32(1)}
    wanted = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    held = []
    write = CheckpointWriter._write
    monkeypatch.setattr(
        CheckpointWriter, "_write", lambda self, *args: (held.append(args[1]), write(self, *args))
    )
    with open_writer(tmp_path) as writer:
        writer.save("step_1", state, metadata(1))
        for _ in range(3):
            state = update(state)
        jax.block_until_ready(state)
    assert_same_bits(held[0], wanted)
    assert_same_bits(restore(tmp_path / "step_1", abstract(state)), wanted)


def test_config_json_alone_rebuilds_the_run(saved):
    got = read_metadata(saved / "step_8")
    assert got == metadata(8)
    record = json.loads((saved / "step_8/config.json").read_text())
    assert record["tokenizer"] == CONFIG.data.tokenizer
    assert record["versions"]["jax"] == jax.__version__
    assert set(record["versions"]) == {"jax", "flax", "orbax-checkpoint", "mamba_jax"}


def test_parameters_alone_from_the_folder_alone(tmp_path):
    params = build.init(MODEL, jax.random.key(0))
    with open_writer(tmp_path) as writer:
        writer.save("final", {"params": params, "step": jnp.int32(1)}, metadata(1))
    shutil.rmtree(tmp_path / "final/optimizer")  # not needed for it
    assert_same_bits(restore_params(tmp_path / "final"), params)


def test_arrays_of_another_model_are_refused(saved):
    target = abstract(make_state(8))
    target["params"]["layers"]["D"] = jax.ShapeDtypeStruct((9,), jnp.float32)
    with pytest.raises(UserError, match=r"step_8 does not hold the arrays of this model"):
        restore(saved / "step_8", target)


def test_a_path_is_a_checkpoint_or_the_run_that_holds_it(run):
    assert arrays.resolve(run / "step_6", print) == run / "step_6"
    assert arrays.resolve(run, print) == run / "step_8"
    with pytest.raises(UserError, match="does not exist"):
        arrays.resolve(run / "step_7", print)
    with pytest.raises(UserError, match="no checkpoint in"):
        arrays.resolve(run / "step_8/params", print)


def test_a_newer_format_is_named(run):
    file = run / "step_8/config.json"
    record = file.read_text()
    file.write_text(record.replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match=r"format 3.*update it"):
        read_metadata(run / "step_8")
    file.write_text(record.replace('"format": 2', '"format": 1'))
    with pytest.raises(UserError, match=r"format 1, made by .* no longer reads: continue with"):
        read_metadata(run / "step_8")


# --- damage ---------------------------------------------------------------------------------------


def assert_refused(run: pathlib.Path, name: str) -> None:
    """step_8 is refused, naming the file; step_6 is used instead, and the log says so."""
    with pytest.raises(UserError) as refusal:
        restore(run / "step_8", abstract(make_state(8)))
    assert str(run / "step_8") in str(refusal.value) and name in str(refusal.value)
    output: list[str] = []
    assert find_latest(run, output.append) == run / "step_6"
    assert len(output) == 1 and output[0] == f"skipped: {refusal.value}"


def test_one_flipped_bit_in_any_kind_of_file(run):
    kinds = kinds_of_files(run / "step_8")
    assert {"config.json", "MANIFEST.json"} <= set(kinds) and len(kinds) >= 10
    for name in kinds:
        file = run / "step_8" / name
        good = file.read_bytes()
        if not good:
            continue
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 4
        file.write_bytes(bad)
        if name == "MANIFEST.json":  # the hash or the name in it no longer fits a file
            assert_refused(run, "")
        else:
            assert_refused(run, name)
        file.write_bytes(good)
    assert find_latest(run, print) == run / "step_8"


def test_any_flipped_bit_of_the_manifest(run):
    file = run / "step_8/MANIFEST.json"
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 29):  # coprime to 8: each bit of a byte has its turn
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(UserError, match="step_8"):
            verify(run / "step_8")


def test_a_missing_file(run):
    for name in kinds_of_files(run / "step_8"):
        file = run / "step_8" / name
        file.rename(run / "elsewhere")
        assert_refused(run, "no MANIFEST.json" if name == "MANIFEST.json" else f"{name} is missing")
        (run / "elsewhere").rename(file)


def test_a_surplus_file(run):
    (run / "step_8/params/d/stray").write_text("")
    assert_refused(run, "params/d/stray")


def test_a_truncated_manifest(run):
    file = run / "step_8/MANIFEST.json"
    file.write_bytes(file.read_bytes()[:100])
    assert_refused(run, "MANIFEST.json")


def test_an_empty_folder_is_not_a_checkpoint(run):
    (run / "step_10").mkdir()
    output: list[str] = []
    assert find_latest(run, output.append) == run / "step_8"
    assert output == [
        f"skipped: checkpoint {run / 'step_10'} is incomplete: it has no MANIFEST.json"
    ]


def test_leftovers_of_a_killed_save(run):
    (run / "step_8").rename(run / ".tmp-step_8")
    output: list[str] = []
    assert find_latest(run, output.append) == run / "step_6"
    assert output == [f"skipped {run / '.tmp-step_8'}: an interrupted save"]
    with open_writer(run):
        assert not (run / ".tmp-step_8").exists()


def test_final_is_found_by_its_step(run):
    with open_writer(run) as writer:
        writer.save("final", make_state(7), metadata(7))
    assert find_latest(run, print) == run / "step_8"
    with open_writer(run) as writer:
        writer.save("final", make_state(8), metadata(8))
    assert find_latest(run, print) == run / "final"
    assert find_latest(run, print, before=8) == run / "step_7"  # the former `final`
    (run / "final/config.json").write_text("{")
    output: list[str] = []
    assert find_latest(run, output.append) == run / "step_8"
    assert "final is damaged: config.json" in output[0]


def test_a_replaced_final_is_renamed_to_its_step(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in (4, 9):
            writer.save("final", make_state(step), metadata(step))
    assert read_metadata(tmp_path / "final").step == 9
    assert_same_bits(restore(tmp_path / "step_4", abstract(make_state(4))), make_state(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step_4"]


# --- what is kept ---------------------------------------------------------------------------------


def test_retention(tmp_path):
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: 1.7, 5: 1.8, 6: 1.9, 7: 1.6}
    with open_writer(tmp_path, keep_last=2, keep_every=3) as writer:
        for step, loss in losses.items():
            writer.save(f"step_{step}", make_state(step), metadata(step, eval_loss=loss))
        writer.save("final", make_state(8), metadata(8, eval_loss=1.55))
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"step_2", "step_3", "step_6", "step_7", "final"}
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == {"checkpoint": "step_2", "step": 2, "eval_loss": 1.5}


def test_later_damaged_checkpoints_do_not_push_out_good_ones(tmp_path):
    for step in (20, 30):
        (tmp_path / f"step_{step}").mkdir()
    with open_writer(tmp_path, keep_last=2) as writer:
        for step in (1, 2, 3):
            writer.save(f"step_{step}", make_state(step), metadata(step))
    assert {path.name for path in tmp_path.iterdir()} == {"step_2", "step_3", "step_20", "step_30"}


# --- saves that fail ------------------------------------------------------------------------------


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, publish = checkpoint_folder.fsync, arrays.publish
    monkeypatch.setattr(
        checkpoint_folder, "fsync", lambda path: (events.append(str(path)), fsync(path))
    )
    monkeypatch.setattr(
        arrays, "publish", lambda *paths: (events.append("publish"), publish(*paths))
    )
    with open_writer(tmp_path) as writer:
        writer.save("step_1", make_state(1), metadata(1))
    before, after = events[: events.index("publish")], events[events.index("publish") + 1 :]
    unfinished = tmp_path / ".tmp-step_1"
    wanted = {str(unfinished / name) for name in files_of(tmp_path / "step_1")}
    wanted |= {str(unfinished), str(unfinished / "params"), str(unfinished / "optimizer/d")}
    assert wanted <= {path.rstrip("/") for path in before}
    assert after == [str(tmp_path)]


@pytest.mark.parametrize("failing", ["_save_tree", "write_metadata", "write_manifest", "publish"])
def test_a_full_disk_damages_no_earlier_checkpoint(tmp_path, monkeypatch, failing):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = open_writer(tmp_path)
    writer.save("step_1", make_state(1), metadata(1))
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(arrays, failing, full)
        writer.save("step_2", make_state(2), metadata(2))  # the error is not here yet …
        with pytest.raises(UserError, match=r"step_2: no space left on the device.*untouched"):
            writer.save("step_3", make_state(3), metadata(3))  # … but here
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert find_latest(tmp_path, print) == tmp_path / "step_1"
    writer.save("step_4", make_state(4), metadata(4))  # room was made
    writer.wait()
    assert find_latest(tmp_path, print) == tmp_path / "step_4"


def test_exiting_the_context_reports_the_last_save_but_hides_no_other_error(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "publish", lambda *_: 1 / 0)
    with (
        pytest.raises(UserError, match="ZeroDivisionError"),
        open_writer(tmp_path) as writer,
    ):
        writer.save("step_1", make_state(1), metadata(1))
    with pytest.raises(KeyError), open_writer(tmp_path) as writer:
        writer.save("step_1", make_state(1), metadata(1))
        raise KeyError


def test_check_reports_a_failed_save_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "publish", lambda *_: 1 / 0)
    writer = open_writer(tmp_path)
    writer.save("step_1", make_state(1), metadata(1))
    writer.check() if not writer._pending.done() else None
    writer._executor.shutdown(wait=True)
    with pytest.raises(UserError, match="step_1"):
        writer.check()
    writer.check()  # reported once


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 256 KiB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_really_full_disk(tiny_disk):
    small = make_state(1)
    with open_writer(tiny_disk) as writer:
        writer.save("step_1", small, metadata(1))
        writer.wait()
        with pytest.raises(UserError, match=rf"{tiny_disk}/step_2: no space left on the device"):
            # Random numbers: a constant array would be compressed to nothing.
            kernel = jax.random.normal(jax.random.key(0), (512, 512))
            writer.save("step_2", small | {"params": {"kernel": kernel}}, metadata(2))
            writer.wait()
    assert [path.name for path in tiny_disk.iterdir()] == ["step_1"]
    assert_same_bits(restore(tiny_disk / "step_1", abstract(small)), small)


def test_a_kill_during_a_save_keeps_the_earlier_checkpoint(tmp_path):
    script = """
        import pathlib, sys, time
        import numpy as np
        from mamba_jax.config import RunConfig
        from mamba_jax.checkpoints import arrays
        folder = pathlib.Path(sys.argv[1])
        writer = arrays.CheckpointWriter(folder, keep_last=1, keep_every=0, log=print)
        data = lambda step: arrays.Metadata(RunConfig(), step, step, "")
        writer.save("step_1", {"params": {"w": np.ones(9)}, "step": np.int32(1)}, data(1))
        writer.wait()
        def stuck(path):
            print("in mid-save", flush=True)
            time.sleep(60)
        arrays.write_manifest = stuck
        writer.save("step_2", {"params": {"w": np.ones(9)}, "step": np.int32(1)}, data(2))
        writer.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line == "in mid-save\n":
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / ".tmp-step_2/params").is_dir()
    output: list[str] = []
    assert find_latest(tmp_path, output.append) == tmp_path / "step_1"
    assert output == [f"skipped {tmp_path / '.tmp-step_2'}: an interrupted save"]


FULL = """
import pathlib, resource, sys
import jax, numpy as np
from mamba_jax.config import RunConfig
from mamba_jax.errors import UserError
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
noise = np.random.default_rng(0)
state = {f"array_{i}": noise.random(9_999, np.float32) for i in range(40)} | {"params": {}}
state["params"] = {name: values for name, values in state.items() if name != "params"}
folder = pathlib.Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=print) as writer:
        writer.save("step_1", state, Metadata(RunConfig(), 1, 8, "data"))
except UserError as error:
    sys.exit(f"error: {error}")
"""


def test_a_full_disk_is_one_line(tmp_path):
    """Without tracebacks of orbax's threads; in a process of its own, whose threads end."""
    # The limit on file sizes would apply to compiled programs too, and JAX would warn.
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 1 and not ran.stdout
    assert ran.stderr.startswith(f"error: cannot save checkpoint {tmp_path / 'step_1'}: ")
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_error_that_nothing_awaits_is_not_logged(tmp_path, caplog):
    """As tensorstore leaves behind when several writes fail; the save raises the first."""
    with CheckpointWriter(tmp_path, keep_last=1, keep_every=0, log=print):
        loop = asyncio.new_event_loop()
        loop.create_future().set_exception(ValueError("late"))
        gc.collect()
        loop.close()
    assert "late" not in caplog.text
