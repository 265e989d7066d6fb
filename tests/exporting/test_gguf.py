"""GGUF files, read back by the library and run by llama.cpp itself."""

import dataclasses

import numpy as np
import pytest

from mamba_jax import export
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.exporting import chat_format, gguf_file, tensors, tokenizer_files
from tests.exporting.test_tokenizer_files import json_file, other_encoding
from tests.support import tiny
from tests.support.made import UNTIED, metadata_of, random_params, write_checkpoint


def run(folder, model, *more):
    write_checkpoint(folder, model, random_params(model))
    arguments = ["--checkpoint", str(folder), "--format", "gguf", "--out", str(folder / "out")]
    return export.main([*arguments, *more])


def read(path):
    """Name → float32 array and type name; key → value."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    reader = gguf.GGUFReader(path)
    found = {
        one.name: (gguf.quants.dequantize(one.data, one.tensor_type), one.tensor_type.name)
        for one in reader.tensors
    }
    return found, {name: field.contents() for name, field in reader.fields.items()}


def expected(model):
    table = tensors.to_hf(random_params(model), model, model.vocab_size)
    layer = lambda i, name: table[f"backbone.layers.{i}.{name}"]
    wanted = {
        "token_embd.weight": table["backbone.embeddings.weight"],
        "output_norm.weight": table["backbone.norm_f.weight"],
    }
    if not model.tie_embeddings:
        wanted["output.weight"] = table["lm_head.weight"]
    for i in range(model.n_layers):
        wanted |= {
            f"blk.{i}.attn_norm.weight": layer(i, "norm.weight"),
            f"blk.{i}.ssm_in.weight": layer(i, "mixer.in_proj.weight"),
            f"blk.{i}.ssm_conv1d.weight": layer(i, "mixer.conv1d.weight").squeeze(1),
            f"blk.{i}.ssm_conv1d.bias": layer(i, "mixer.conv1d.bias"),
            f"blk.{i}.ssm_x.weight": layer(i, "mixer.x_proj.weight"),
            f"blk.{i}.ssm_dt.weight": layer(i, "mixer.dt_proj.weight"),
            f"blk.{i}.ssm_dt.bias": layer(i, "mixer.dt_proj.bias"),
            f"blk.{i}.ssm_a": -np.exp(layer(i, "mixer.A_log")),
            f"blk.{i}.ssm_d": layer(i, "mixer.D"),
            f"blk.{i}.ssm_out.weight": layer(i, "mixer.out_proj.weight"),
        }
    return wanted


# Half a unit of the last place, and of q8_0 half of 1/127 of a block's largest.
@pytest.mark.parametrize(("dtype", "error"), [("f32", 0), ("f16", 5e-4), ("bf16", 4e-3)])
def test_the_tensors_in_the_file(dtype, error, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    assert run(tmp_path, UNTIED, "--dtype", dtype) == 0
    found, fields = read(tmp_path / "out" / "model.gguf")
    wanted = expected(UNTIED)
    assert found.keys() == wanted.keys()
    for name, (array, kind) in found.items():
        is_factor = name.endswith(".weight") and "norm" not in name and "conv1d" not in name
        assert kind == (dtype.upper() if is_factor else "F32"), name
        limit = error if is_factor else 0
        np.testing.assert_allclose(array, wanted[name], rtol=limit, atol=1e-7 * (limit > 0))
    sizes = ("embedding_length", "block_count", "ssm.inner_size", "ssm.state_size")
    assert [fields[f"mamba.{name}"] for name in sizes] == [32, 2, 64, 16]
    assert fields["mamba.ssm.conv_kernel"] == 4 and fields["mamba.ssm.time_step_rank"] == 2
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 256
    assert len(fields["tokenizer.ggml.tokens"]) == 257
    assert fields["tokenizer.ggml.token_type"] == [1] * 256 + [3]
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["mamba.attention.layer_norm_rms_epsilon"] == np.float32(3e-4)
    assert fields["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32}[dtype]
    assert fields["tokenizer.chat_template"] == chat_format.jinja(begins=True)
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./model.gguf" in modelfile and 'stop "<|endoftext|>"' in modelfile


def test_q8_0_rounds_as_verification_assumes(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    model = dataclasses.replace(UNTIED, tie_embeddings=True)
    assert run(tmp_path, model, "--dtype", "q8_0") == 0
    found, _ = read(tmp_path / "out" / "model.gguf")
    table = tensors.to_hf(random_params(model), model, 257)
    held = gguf_file.renamed(gguf_file.rounded(table, "q8_0"))
    assert found["token_embd.weight"][1] == found["blk.1.ssm_in.weight"][1] == "Q8_0"
    assert found["blk.0.ssm_dt.weight"][1] == "F16"  # rows of two
    assert found["blk.0.ssm_a"][1] == "F32" and "output.weight" not in found
    for name, (array, kind) in found.items():
        np.testing.assert_array_equal(array, held[name][0])
        bound = np.abs(expected(model)[name]).max() * (0.5 / 127 + 1e-3) if kind != "F32" else 0
        assert np.abs(array - expected(model)[name]).max() <= bound


def test_what_llama_cpp_cannot_run_is_refused(tmp_path, capsys):
    assert run(tmp_path, dataclasses.replace(tiny.HYBRID, vocab_size=257)) == 2
    assert "depth gates and pooled attention; use --format hf" in capsys.readouterr().err
    planned = dataclasses.replace(tiny.HYBRID, n_layers=3)
    with pytest.raises(UserError, match="a hybrid cannot be exported to GGUF"):
        gguf_file.check(dataclasses.replace(planned, plan="M,A,M"))
    gguf_file.check(dataclasses.replace(planned, plan="M*3"))
    with pytest.raises(UserError, match="expand_factor=3 cannot be exported to GGUF"):
        gguf_file.check(dataclasses.replace(UNTIED, expand_factor=3))
    with pytest.raises(UserError, match=r"eigenvalues=signed cannot be .* GGUF.*--format onnx"):
        gguf_file.check(dataclasses.replace(UNTIED, eigenvalues="signed"))
    assert not (tmp_path / "out").exists()


def test_other_dtypes_are_refused(capsys):
    run = lambda form, dtype: export.main(
        ["--checkpoint", "c", "--out", "o", "--format", form, "--dtype", dtype]
    )
    assert run("gguf", "q4_k_m") == 2 and "llama-quantize" in capsys.readouterr().err
    assert run("hf", "q8_0") == 2 and "not one of f32, bf16, f16" in capsys.readouterr().err


def test_a_token_without_a_merge_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="needs gguf")
    tokenizer = load_tokenizer("bytes")
    record = tokenizer_files.record(tokenizer, False)
    record["model"]["vocab"]["nowhere"] = 257
    monkeypatch.setattr(tokenizer_files, "record", lambda tokenizer, fills_in: record)
    model = dataclasses.replace(tiny.MAMBA, vocab_size=258)
    table = tensors.to_hf(random_params(model), model, 258)
    with pytest.raises(UserError, match="bytes cannot be exported to GGUF"):
        gguf_file.write(tmp_path, table, metadata_of(model), tokenizer, "f32")


def test_tokenizers(tmp_path):
    """Those that llama.cpp would read differently are refused."""
    pytest.importorskip("gguf", reason="needs gguf")

    def write(tokenizer):
        model = dataclasses.replace(tiny.MAMBA, vocab_size=tokenizer.vocab_size)
        table = tensors.to_hf(random_params(model), model, tokenizer.vocab_size)
        gguf_file.write(tmp_path, table, metadata_of(model), tokenizer, "f32")
        return read(tmp_path / "model.gguf")[1]

    fields = write(load_tokenizer("gpt2"))
    assert fields["tokenizer.ggml.merges"][:2] == ["Ġ t", "Ġ a"]
    assert len(fields["tokenizer.ggml.merges"]) == 50_000
    assert len(write(json_file(tmp_path, "byte_level"))["tokenizer.ggml.tokens"]) == 400
    for refused in (other_encoding(tmp_path), json_file(tmp_path, "unigram")):
        with pytest.raises(UserError, match="cannot be exported to GGUF"):
            write(refused)


@pytest.mark.parametrize(
    ("dtype", "tied"), [("f32", False), ("f32", True), ("bf16", False), ("q8_0", False)]
)
def test_llama_cpp_gives_the_same_answers(dtype, tied, tmp_path, capsys):
    pytest.importorskip("gguf", reason="needs gguf")
    pytest.importorskip("xllamacpp", reason="needs xllamacpp")
    model = dataclasses.replace(UNTIED, tie_embeddings=tied)
    assert run(tmp_path, model, "--dtype", dtype, "--verify") == 0
    printed = capsys.readouterr().err
    assert "verified: largest difference" in printed
    if dtype == "f32":
        assert "256 of 256 greedy tokens" in printed


def test_verification_detects_another_chat_format_in_llama_cpp(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf", reason="needs gguf")
    pytest.importorskip("xllamacpp", reason="needs xllamacpp")
    wrong = chat_format.jinja(begins=True).replace("': '", "':  '")
    monkeypatch.setattr(chat_format, "jinja", lambda *, begins: wrong)
    assert run(tmp_path, UNTIED, "--verify") == 2
    assert (
        "verification failed: the tokenizers give different ids for 'system: "
        in capsys.readouterr().err
    )


def test_verification_detects_a_wrong_tensor_in_llama_cpp(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gguf", reason="needs gguf")
    pytest.importorskip("xllamacpp", reason="needs xllamacpp")
    right = gguf_file.write

    def wrong(folder, table, *more):
        name = "backbone.layers.1.mixer.D"
        right(folder, table | {name: table[name] * np.float32(1.1)}, *more)

    monkeypatch.setattr(gguf_file, "write", wrong)
    assert run(tmp_path, UNTIED, "--verify") == 2
    assert "verification failed: logits differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
