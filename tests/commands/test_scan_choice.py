"""A scan that this machine cannot run is refused in one line, before anything slow."""

import dataclasses
import pathlib

import jax
import pytest

import mamba_jax.checkpoints.arrays
from mamba_jax import generate, train
from mamba_jax.checkpoints.arrays import CheckpointWriter, Metadata
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.errors import UserError
from mamba_jax.modules.mamba import resolve_scan
from tests.support.tiny import MAMBA, params_of

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


def test_generate_refuses_it_and_takes_another(tmp_path, capsys, monkeypatch):
    model = dataclasses.replace(MAMBA, vocab_size=257, scan="pallas_gpu")
    config = RunConfig(name="tiny", model=model, data=DataConfig(tokenizer="bytes"))
    with CheckpointWriter(tmp_path, keep_last=1, keep_every=0, log=print) as writer:
        state = {"params": jax.jit(params_of, static_argnums=0)(model), "step": jax.numpy.int32(1)}
        writer.save("final", state, Metadata(config, 1, 0, "none"))
    capsys.readouterr()
    flags = [f"--checkpoint={tmp_path}", "--prompt=a", "--max_tokens=2"]
    assert generate.main([*flags, "--scan=auto"]) == 0
    assert capsys.readouterr().out.startswith("a")
    reading = lambda *_, **__: pytest.fail("slow")
    monkeypatch.setattr(mamba_jax.checkpoints.arrays, "restore_params", reading)
    assert generate.main(flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(REFUSED.format("gpu", "GPU")) and "--scan=auto" in last
    assert generate.main([*flags, "--scan=chunkd"]) == 2
    assert 'did you mean "chunked"?' in capsys.readouterr().err


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
