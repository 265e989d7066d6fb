"""Fields that inference may choose; a scan that this machine cannot run is refused in one line."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

import mamba_jax.checkpoints.arrays
from mamba_jax import evaluate, generate, serve, train
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig, for_inference
from mamba_jax.errors import UserError
from mamba_jax.modules.mamba import resolve_scan
from tests.support import naive
from tests.support.tiny import HYBRID, MAMBA, assert_close, params_of

QUICKSTART = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
REFUSED = 'error: model.scan="pallas_{0}" cannot be used: the pallas_{0} scan runs on a {1}, '


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_train_refuses_a_kernel_of_another_machine(device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mamba_jax.data.pipeline.prepare", lambda *_, **__: pytest.fail("slow"))
    flags = [f"--config={QUICKSTART}", f"--output_dir={tmp_path}"]
    assert train.main([*flags, f"--config.model.scan=pallas_{device}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(REFUSED.format(device, device.upper())) and error.count("\n") == 1
    assert "auto" in error


SHARED = dataclasses.replace(HYBRID, shared_gate=True)
BY_CHANNEL = dataclasses.replace(HYBRID, gate="channel")


def write_checkpoint(folder, model):
    config = RunConfig(name="tiny", model=model, data=DataConfig(tokenizer="bytes"))
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=lambda _: None) as writer:
        state = {"params": jax.jit(params_of, static_argnums=0)(model), "step": jax.numpy.int32(1)}
        writer.save("final", state, Metadata(config, 1, 0, "none"))
    return [f"--checkpoint={folder}", "--prompt=a", "--max_tokens=2"]


def test_generate_refuses_it_and_takes_another(tmp_path, capsys, monkeypatch):
    model = dataclasses.replace(MAMBA, vocab_size=257, scan="pallas_gpu")
    flags = write_checkpoint(tmp_path, model)
    assert generate.main([*flags, "--scan=auto"]) == 0
    assert capsys.readouterr().out.startswith("a")
    reading = lambda *_, **__: pytest.fail("slow")
    monkeypatch.setattr(mamba_jax.checkpoints.arrays, "restore_params", reading)
    assert generate.main(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(REFUSED.format("gpu", "GPU")) and "--scan=auto" in last
    assert generate.main([*flags, "--scan=chunkd"]) == 2
    assert 'did you mean "chunked"?' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "flag", "error"),
    [
        (HYBRID, "gate_skip_threshold=1.5", "model.gate_skip_threshold=1.5 must be at least 0 and"),
        (MAMBA, "recursion_depth=3", "recursion_depth=3 has no effect on a model without"),
        (MAMBA, "gate_skip_threshold=0.5", "gate_skip_threshold=0.5 has no effect on a model"),
        (BY_CHANNEL, "gate_skip_threshold=0.5", "model.gate_skip_threshold=0.5 skips steps by"),
        (HYBRID, "recursion_depth=3", "recursion_depth=3 cannot be used: only a model trained"),
        (SHARED, "recursion_depth=0", "recursion_depth=0 cannot be used: only a model trained"),
        (SHARED, "recursion_depth=-1", "model.recursion_depth=-1 must not be negative"),
    ],
)
def test_a_value_that_cannot_work_is_one_line(model, flag, error, tmp_path, capsys):
    flags = write_checkpoint(tmp_path, dataclasses.replace(model, vocab_size=257))
    assert generate.main([*flags, f"--{flag}"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'final'}: {error}")


@pytest.mark.parametrize("value", [{"gate_skip_threshold": "0.1"}, {"recursion_depth": 2.5}])
def test_a_value_of_another_type_is_named(value):
    ((name, given),) = value.items()
    with pytest.raises(UserError, match=f"model.{name}={given!r} is not a"):
        for_inference(SHARED, **value)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (generate, ["--prompt=a"]),
        (evaluate, ["--tasks=recall:1"]),
        (serve, ["--port=0"]),
    ],
)
def test_every_command_passes_the_flags_on(command, flags, tmp_path, capsys, monkeypatch):
    checkpoint, *_ = write_checkpoint(tmp_path, dataclasses.replace(SHARED, vocab_size=257))
    given = {"scan": "chunked", "gate_skip_threshold": 0.25, "recursion_depth": 5}

    def refuse(model, **chosen):
        raise UserError(f"asked for {chosen}")

    monkeypatch.setattr("mamba_jax.generation.load.for_inference", refuse)
    words = [f"--{name}={value}" for name, value in given.items()]
    assert command.main([checkpoint, *flags, *words]) == 2
    assert f"asked for {given}" in capsys.readouterr().err


def test_a_threshold_replaces_the_checkpoints(tmp_path):
    model = dataclasses.replace(HYBRID, vocab_size=257, gate_skip_threshold=0.9)
    write_checkpoint(tmp_path, model)
    logits = lambda **chosen: mamba_jax.load_model(tmp_path, **chosen).logits("some text")
    np.testing.assert_array_equal(logits(), logits(gate_skip_threshold=0.9))
    assert abs(logits() - logits(gate_skip_threshold=0.0)).max() > 1e-3


def test_a_model_with_a_shared_gate_runs_more_steps_than_trained(tmp_path):
    model = dataclasses.replace(SHARED, vocab_size=257)
    write_checkpoint(tmp_path, model)
    loaded = mamba_jax.load_model(tmp_path, recursion_depth=5)
    deeper = dataclasses.replace(model, recursion_depth=5)
    tokens_t = [loaded.tokenizer.eot_id, *loaded.tokenizer.encode("some text").tolist()]
    truth = naive.logits(loaded.params, deeper, np.array(tokens_t))[:, : model.vocab_size]
    logits = loaded.logits("some text")
    assert_close(logits, truth, 3e-5)  # as in tests/models/test_laws.py
    assert abs(logits - mamba_jax.load_model(tmp_path).logits("some text")).max() > 1e-3


def test_a_shape_without_a_kernel_is_refused_on_the_right_machine(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = dataclasses.replace(MAMBA, d_state=5, scan="pallas_gpu")
    with pytest.raises(UserError, match=r"d_state of 8, 16, 32, not 5.*auto"):
        resolve_scan(model, jax.numpy.dtype("bfloat16"))
    auto = dataclasses.replace(model, scan="auto")
    assert resolve_scan(auto, jax.numpy.dtype("bfloat16")) == "chunked"
    assert resolve_scan(dataclasses.replace(auto, d_state=16), jax.numpy.dtype("bfloat16")) == (
        "pallas_gpu"
    )
