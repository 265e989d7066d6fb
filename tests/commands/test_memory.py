"""The ``memory`` command, and a training run on a device that is too small."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import mamba_jax
from mamba_jax import memory, train
from mamba_jax.checkpoints.arrays import read_metadata
from mamba_jax.config.presets import SIZES
from mamba_jax.runs import metrics
from mamba_jax.training import elastic
from mamba_jax.training.step import make_train_step
from tests.support.tiny_run import quick_compiles  # noqa: F401


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def record(capsys, *argv):
    assert memory.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_by_part(no_gpu, capsys):
    assert memory.main(["--model_size", "hybrid-small-standard", "--vram", "16gb"]) == 0
    text = capsys.readouterr().out
    assert "not measured" in text and "RTX-4080" in text
    for part in ("weights", "optimizer", "gradients", "activations"):
        assert part in text
    found = record(capsys, "--model_size", "hybrid-small-standard", "--vram", "16gb")
    assert found["budget_bytes"] == 14 * 2**30 and found["fits"] and not found["measured"]
    assert found["batch_size"] * found["gradient_accumulation_steps"] == 32
    assert sum(found["parts_bytes"].values()) == found["needs_bytes"]


def test_a_named_device_has_its_own_memory_unless_vram_is_lower(no_gpu, capsys):
    assert record(capsys, "--device=RTX 4090")["total_bytes"] == 24 * 2**30
    assert record(capsys, "--device=RTX 4090", "--vram=20")["total_bytes"] == 20 * 2**30
    assert record(capsys, "--device=RTX 3070", "--vram", "16gb")["total_bytes"] == 8 * 2**30
    short, long = (record(capsys, "--seq_len", n)["parts_bytes"] for n in ("512", "8192"))
    assert short["weights"] == long["weights"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vram", "banana"], "banana"),
        (["--vram", "-3"], "-3"),
        (["--vram", "2", "--vram_safety_margin", "2048"], "leaves nothing"),
        (["--device", "RTX 4081"], 'did you mean "RTX-4080"?'),
        (["--device"], "--device"),
        (["--seq_len", "0"], "--seq_len=0"),
        (["--model_size", "hybrid-smal"], "hybrid-small"),
        (["--model_size", "xxlarge", "--device", "RTX 3070"], "largest size that fits"),
        (["--table", "--exact"], "--table"),
    ],
)
def test_a_mistake_is_one_line(no_gpu, capsys, flags, message):
    assert memory.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_tables(no_gpu, capsys):
    assert memory.main(["--table"]) == 0
    text = capsys.readouterr().out
    assert "Computed, not measured" in text and "RTX 4070 Ti" in text
    assert all(f"\n{size}" in text for size in SIZES)
    assert memory.main(["--table", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert list(tables["sizes"]) == list(SIZES) and len(tables["cards"]) == 10
    assert {"RTX 3060", "RTX 3070", "A100 40GB", "H100"} < tables["cards"].keys()
    for card in tables["cards"].values():
        assert list(card) == list(SIZES)
        fitting = [layout for layout in card.values() if layout]
        assert all(layout["needs_bytes"] <= layout["budget_bytes"] for layout in fitting)
    # What fits a card fits one with more memory.
    small, large = (tables["cards"][name] for name in ("RTX 3070", "RTX 4090"))
    assert {name for name in small if small[name]} < {name for name in large if large[name]}


# --- a run on a device that is too small ----------------------------------------------------------

CONFIG = """
from mamba_jax.config import default_config

def get_config():
    config = default_config()
    config.update(name="tiny", log_dir="logs", tensorboard_dir="runs", output_dir="out")
    config.data.update(tokenizer="bytes", data_dir="texts", cache_dir="cache")
    config.model.update(d_model=16, n_layers=1, max_seq_len=32)
    config.training.update(
        warmup_steps=2, max_steps=5, eval_steps=5, save_steps=2, eval_windows=16, log_steps=1
    )
    config.vram.update(effective_batch_size=32, batch_size=16)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "texts").mkdir()
    for source in pathlib.Path(mamba_jax.__file__).parent.glob("*.py"):
        shutil.copy(source, folder / "texts")
    return folder


def losses_of(folder: pathlib.Path) -> dict[int, float]:
    records = metrics.read(folder / metrics.NAME)
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def train_into(place, monkeypatch, name: str, *flags: str) -> dict[int, float]:
    monkeypatch.chdir(place)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))
    assert train.main(["--config=tiny.py", f"--output_dir={name}", *flags]) == 0
    return losses_of(place / name)


@pytest.mark.parametrize(("lost", "at"), [(False, 1), (True, 4)])
def test_a_run_continues_with_half_the_microbatch(place, monkeypatch, capsys, lost, at):
    whole = train_into(place, monkeypatch, f"whole-{lost}")
    calls = []

    def limited(config, mesh, eot_id):
        step = make_train_step(config, mesh, eot_id)
        if config.vram.batch_size <= 8:
            return step

        def once_full(state, batch):
            calls.append(1)
            if len(calls) >= at:
                if lost:
                    jax.tree.map(lambda leaf: leaf.delete(), state)
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return step(state, batch)

        return once_full

    monkeypatch.setattr(elastic, "make_train_step", limited)
    name = f"small-{lost}"
    capsys.readouterr()
    found = train_into(place, monkeypatch, name)
    assert found.keys() == whole.keys() == set(range(1, 6))
    np.testing.assert_allclose(list(found.values()), list(whole.values()), rtol=2e-5)
    output = capsys.readouterr()
    assert "out of memory with a microbatch of 16: continuing with 8 × 4" in output.err
    assert ("continuing from" in output.out and "step 2" in output.out) == lost
    saved = read_metadata(place / name / "final").laid_out.vram
    assert (saved.batch_size, saved.accumulation_steps) == (8, 4)
