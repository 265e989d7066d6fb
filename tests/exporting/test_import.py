"""Models in Hugging Face's and the original format become checkpoints to train further."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from mamba_jax import export, import_hf
from mamba_jax.checkpoints import arrays, resume
from mamba_jax.config import ParallelConfig, apply_overrides, default_config, freeze, load_json
from mamba_jax.config import merge as merge_fields
from mamba_jax.data.tokenizers.load import load_saved
from mamba_jax.errors import UserError
from mamba_jax.exporting import hf, reading, tensors, torch_file
from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.training.state import abstract_state
from tests.exporting.test_tensors import assert_same
from tests.exporting.test_tokenizer_files import json_file
from tests.support import tiny
from tests.support.made import UNTIED, metadata_of, random_params
from tests.support.tiny_run import quick_compiles  # noqa: F401

GOLDEN = pathlib.Path(__file__).parent / "golden" / "original.bin"
ORIGINAL = {
    **{"d_model": 16, "n_layer": 1, "vocab_size": 11, "pad_vocab_size_multiple": 4},
    **{"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True},
    "ssm_cfg": {"d_state": 4},
}


PLAN = dataclasses.replace(
    tiny.VARIANTS["plan A,M,H,M, signed"], gate="channel", pass_embedding=True
)
PLANNED = hf.model_config(PLAN, 64, "f32")


def exported(folder, model, params, tokenizer):
    folder.mkdir()
    hf.write_weights(folder / hf.WEIGHTS, tensors.to_hf(params, model, model.vocab_size), "f32")
    hf.write_companions(folder, metadata_of(model, tokenizer=tokenizer.name), tokenizer, "f32")


def same_structure(ours, theirs):
    apart = {"dt_rank": 0, "dtype": "auto"}
    return dataclasses.replace(ours, **apart) == dataclasses.replace(theirs, **apart)


@pytest.mark.parametrize(
    "model",
    [tiny.MAMBA, UNTIED, tiny.HYBRID, PLAN],
    ids=["tied", "untied", "hybrid", "plan"],
)
def test_export_then_import_is_the_identity(model, tmp_path):
    pytest.importorskip("safetensors")
    tokenizer = json_file(tmp_path, "byte_level")
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    params = random_params(model)
    source, out, again = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "again"
    exported(source, model, params, tokenizer)
    assert import_hf.main(["--model", str(source), "--out", str(out)]) == 0

    path = arrays.resolve(out, print)
    metadata = arrays.read_metadata(path)
    assert same_structure(metadata.config.model, model)
    assert_same(jax.tree.map(np.asarray, arrays.restore_params(path)), params)
    theirs = load_saved(path, metadata.config.data.tokenizer)
    text = "for x in 日本 <|endoftext|>"
    assert theirs.eot_id == tokenizer.eot_id
    assert theirs.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert not (path / "chat_template.jinja").exists()  # it is ours, and not kept apart
    # And back: the same bytes.
    exported(again, metadata.config.model, arrays.restore_params(path), theirs)
    assert {file.name for file in again.iterdir()} == {file.name for file in source.iterdir()}
    for file in source.iterdir():
        assert file.name == "README.md" or (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "a list", "chat_template.jinja"])
def test_another_chat_template_stays_with_the_imported_checkpoint_only(place, tmp_path, capsys):
    pytest.importorskip("safetensors")
    tokenizer, theirs = json_file(tmp_path, "byte_level"), "<|im_start|>{{ messages[0].content }}"
    model = dataclasses.replace(UNTIED, vocab_size=tokenizer.vocab_size)
    source, out, again = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "again"
    exported(source, model, random_params(model), tokenizer)
    if place == "chat_template.jinja":
        (source / place).write_text(theirs)
    else:
        file = source / "tokenizer_config.json"
        several = [{"name": "rag", "template": "x"}, {"name": "default", "template": theirs}]
        config = json.loads(file.read_text())
        config["chat_template"] = theirs if place == file.name else several
        file.write_text(json.dumps(config))
    assert import_hf.main(["--model", str(source), "--out", str(out)]) == 0
    assert "has a chat template of its own" in capsys.readouterr().err
    arguments = ["--checkpoint", str(out), "--format", "hf", "--out", str(again)]
    assert export.main(arguments) == 0
    config = json.loads((again / "tokenizer_config.json").read_text())
    assert config["chat_template"] == theirs and not config["split_special_tokens"]
    assert "copied here unchanged" in (again / "README.md").read_text()
    # A run that resumes from it writes no such file: it has seen chats in our format.
    assert "chat_template.jinja" not in load_saved(out / "step_0", "x").files
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    arguments = ["--checkpoint", str(out), "--format", "gguf", "--out", str(tmp_path / "gguf")]
    assert export.main(arguments) == 0
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == theirs
    assert "TEMPLATE {{ .Prompt }}" in (tmp_path / "gguf" / "Modelfile").read_text()


def test_training_continues_from_it(tmp_path):
    folder, out = tmp_path / "original", tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(GOLDEN, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(ORIGINAL))
    tokenizer = tmp_path / "tokenizer.json"
    small_word_level(tokenizer)
    arguments = ["--model", str(folder), "--out", str(out), "--tokenizer", str(tokenizer)]
    assert import_hf.main([*arguments, "--max_seq_len", "64"]) == 0
    tokenizer.unlink()

    requested = default_config()
    merge_fields(requested, load_json(str(out / "train.json")))
    apply_overrides(requested, {"output_dir": str(tmp_path / "new")})
    config = freeze(requested)
    assert config.model.max_seq_len == 64
    assert pathlib.Path(config.data.tokenizer) == out / "step_0"  # not the file that is gone
    start = resume.find_start(config, str(out), print)
    assert start is not None and start.metadata.step == start.metadata.samples_seen == 0
    from mamba_jax.data.tokenizers.load import load_tokenizer

    again = load_tokenizer(config.data.tokenizer)
    resume.check_same_tokenizer(start, again.name, again.identity)
    resume.check_same_data(start, "of whatever it is trained on")
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    state = arrays.restore(start.path, abstract_state(config, mesh))
    assert_same(jax.tree.map(np.asarray, state["params"]), reading.read(folder).params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state["opt_state"]))


def small_word_level(path):
    """A tokenizer of 12 ids, including the end-of-text that loading it adds."""
    words = {"[UNK]": 0} | {word: i + 1 for i, word in enumerate("abcdefghij")}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    none = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder"))
    record = {"version": "1.0", "added_tokens": [], "post_processor": None, "model": model, **none}
    path.write_text(json.dumps(record))


def test_the_tensors_of_a_file_by_torch_itself():
    found = torch_file.load_file(GOLDEN)
    head = found.pop("lm_head.weight")
    np.testing.assert_array_equal(head, found["backbone.embedding.weight"])
    assert len(found) == 12
    for place, (name, array) in enumerate(found.items()):
        value = np.arange(array.size, dtype=np.float32).reshape(array.shape) / 8 + place
        np.testing.assert_array_equal(array, value.astype(array.dtype), err_msg=name)
    assert found["backbone.layers.0.mixer.A_log"].dtype == ml_dtypes.bfloat16
    assert found["backbone.layers.0.mixer.out_proj.weight"].dtype == np.float16
    assert found["backbone.layers.0.mixer.in_proj.weight"].shape == (64, 16)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never_to_be_made",)


def test_a_file_that_would_run_something_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": _Evil()}, protocol=2))
    with pytest.raises(UserError, match=r"refers to \w+\.system, which tensors do not need"):
        torch_file.load_file(file)


def test_damaged_files_are_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for data in (b"", b"no zip", GOLDEN.read_bytes()[:-700]):
        file.write_bytes(data)
        with pytest.raises(UserError, match="is damaged or was not saved by torch"):
            torch_file.load_file(file)
    # Bytes of the index that are wrong lead to errors of every class.
    with zipfile.ZipFile(GOLDEN) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (index,) = (name for name in members if name.endswith("data.pkl"))
    rng, n_refused = np.random.default_rng(0), 0
    for _ in range(300):
        wrong = bytearray(members[index])
        for place in rng.integers(len(wrong), size=3):
            wrong[place] = rng.integers(256)
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in (members | {index: bytes(wrong)}).items():
                archive.writestr(name, data)
        try:
            torch_file.load_file(file)
        except UserError:
            n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"model_type": "gpt2"}, 'type "gpt2" cannot be imported; give one of type "mamba"'),
        ({"model_type": "mamba"}, "lacks 'hidden_size'"),
        ({"model_type": "mamba", "use_bias": True}, "use_bias=True cannot"),
        ({"model_type": "mamba", "hidden_size": "8", "num_hidden_layers": 1}, "d_model"),
        (ORIGINAL | {"ssm_cfg": {"layer": "Mamba2"}}, r"ssm_cfg\.layer has a value that cannot"),
        (ORIGINAL | {"rms_norm": False}, "rms_norm has a value that cannot"),
        (ORIGINAL | {"attn_layer_idx": [1]}, "attn_layer_idx has a value that cannot"),
        (ORIGINAL | {"ssm_cfg": 3}, "ssm_cfg=3 is not an object"),
        (ORIGINAL | {"ssm_cfg": {"d_state": 10**30}}, "d_state=1000.* is too large"),
        (ORIGINAL | {"n_layer": 0}, r"n_layers=0 must be greater"),
        (PLANNED | {"layer_pattern": "MXHM"}, "layer_pattern=MXHM is not num_hidden_layers=4 let"),
        (PLANNED | {"layer_pattern": "MH"}, "layer_pattern=MH is not num_hidden_layers=4 letters"),
        (PLANNED | {"layer_pattern": ["M"] * 4}, "layer_pattern=.* letters of M, A, H; correct it"),
    ],
)
def test_other_structures_are_refused(record, words):
    with pytest.raises(UserError, match=words):
        reading.model_config(record, 8)


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("eigenvalues", "signed", "positive"),
        ("gate", "channel", "token"),
        ("shared_gate", True, False),
        ("pass_embedding", True, False),
    ],
)
def test_a_hybrid_of_before_a_field_has_its_default(name, value, default):
    record = PLANNED | {"pass_embedding": False, name: value}
    assert getattr(reading.model_config(record, 64), name) == value
    assert getattr(reading.model_config({n: record[n] for n in record if n != name}, 64), name) == (
        default
    )


def test_numbers_of_the_original_that_are_not_its_defaults():
    record = ORIGINAL | {"ssm_cfg": {"d_state": 4, "d_conv": 3, "expand": 1, "dt_rank": 5}}
    model = reading.model_config(record | {"tie_embeddings": False}, 8)
    assert (model.d_state, model.d_conv, model.expand_factor, model.dt_rank) == (4, 3, 1, 5)
    assert (model.d_model, model.n_layers, model.vocab_size) == (16, 1, 8)
    assert not model.tie_embeddings
    for ssm in ({"conv_bias": False}, {"bias": True}):
        with pytest.raises(UserError, match=f"ssm_cfg.{next(iter(ssm))} has a value that cannot"):
            reading.model_config(ORIGINAL | {"ssm_cfg": ssm}, 8)


NAMED = "backbone.layers.1.mixer.D"
KEPT = tensors.to_hf(random_params(UNTIED), UNTIED, 257)


def with_values(*values, dtype=np.float32):
    """The tensor named above with these values first."""
    array = KEPT[NAMED].astype(dtype)
    array[: len(values)] = values
    return array


def write_safetensors(file, table):
    """Writes any dtype of ml_dtypes, float8 included."""
    names = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float32": "F32"}
    names |= {"bfloat16": "BF16", "float64": "F64", "float16": "F16", "int8": "I8", "int64": "I64"}
    header, data = {}, b""
    for name, array in table.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {
            **{"dtype": names[str(array.dtype)], "shape": array.shape, "data_offsets": offsets}
        }
        data += raw
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.fixture
def folder(tmp_path):
    """The folder of a model that can be imported."""
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / hf.WEIGHTS, KEPT)
    (tmp_path / "config.json").write_text(json.dumps(hf.model_config(UNTIED, 257, "f32")))
    return tmp_path


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_weights_of_every_floating_type(folder, dtype):
    table = {name: array.astype(dtype) for name, array in KEPT.items()}
    write_safetensors(folder / hf.WEIGHTS, table)
    truth = {name: array.astype(np.float32) for name, array in table.items()}
    assert_same(reading.read(folder).params, tensors.from_hf(truth, UNTIED))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (with_values(np.nan, np.inf, -np.inf), "3 of 64 values are NaN or infinite"),
        (with_values(np.nan, dtype=ml_dtypes.bfloat16), "1 of 64 values are NaN or infinite"),
        (with_values(np.inf, dtype=np.float16), "1 of 64 values are NaN or infinite"),
        (with_values(1e39, dtype=np.float64), "1 of 64 values are NaN or infinite in float32"),
        (with_values(3, dtype=np.int8), "has dtype int8, which is not a floating-point type"),
        (with_values(3, dtype=np.int64), "has dtype int64, which is not a floating-point type"),
        (
            with_values(dtype=ml_dtypes.float8_e4m3fn),
            "has dtype float8_e4m3, which is not supported",
        ),
        (with_values(dtype=ml_dtypes.float8_e5m2), "has dtype float8_e5m2, which is not supported"),
    ],
)
def test_invalid_weights_are_refused_by_name(folder, array, words):
    write_safetensors(folder / hf.WEIGHTS, KEPT | {NAMED: array})
    with pytest.raises(UserError, match=rf"tensor {NAMED}:? .*{words}.*[;:] (give|convert)"):
        reading.read(folder)


@pytest.mark.parametrize("value", [np.nan, 3])
def test_a_tied_head_is_refused_for_its_values(folder, value):
    tied = dataclasses.replace(UNTIED, tie_embeddings=True)
    table = tensors.to_hf(random_params(tied), tied, 257)
    wrong = np.full_like(table[tensors.EMBEDDING], value, np.float32 if value != 3 else np.int64)
    write_safetensors(
        folder / hf.WEIGHTS, table | dict.fromkeys((tensors.EMBEDDING, tensors.HEAD), wrong)
    )
    (folder / "config.json").write_text(json.dumps(hf.model_config(tied, 257, "f32")))
    with pytest.raises(UserError, match=r"embeddings\.weight.*(NaN or infinite|has dtype int64)"):
        reading.read(folder)


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        ("float8_e4m3fn", "has dtype float8_e4m3fn, which is not supported"),
        ("complex64", "has dtype ComplexFloat, which is not supported"),
        ("uint16", "has dtype uint16, which is not supported"),
        ("int64", "has dtype int64, which is not a floating-point type"),
        ("uint8", "has dtype uint8, which is not a floating-point type"),
        ("bool", "has dtype bool, which is not a floating-point type"),
    ],
)
def test_torch_files_without_weights_are_refused(folder, dtype, words):
    torch = pytest.importorskip("torch", reason="needs torch")
    table = {name: torch.from_numpy(array) for name, array in KEPT.items()}
    table[NAMED] = torch.zeros(64).to(getattr(torch, dtype))
    (folder / hf.WEIGHTS).unlink()
    torch.save(table, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=rf"tensor {NAMED} {words}"):
        reading.read(folder)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 9\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


@pytest.mark.parametrize(
    ("data", "words"), [(POINTER, "a git-LFS pointer.*git lfs pull"), (PAGE, "a web page")]
)
@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "tokenizer.json", hf.WEIGHTS, "pytorch_model.bin"),
        *("model.safetensors.index.json", "model-00002-of-00002.safetensors"),
    ],
)
def test_a_git_lfs_pointer_instead_of_a_file_is_named(folder, tmp_path, capsys, name, data, words):
    if name == "pytorch_model.bin":
        (folder / hf.WEIGHTS).unlink()
    (folder / name).write_bytes(data)
    out = folder / "out"
    assert import_hf.main(["--model", str(folder), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{name} is {words}", error) and error.count("\n") == 1
    assert not out.exists()


def test_a_git_lfs_pointer_that_is_not_needed_is_ignored(folder):
    (folder / "pytorch_model.bin").write_bytes(POINTER)  # beside the same model's safetensors
    assert_same(reading.read(reading.find(str(folder))).params, random_params(UNTIED))


@pytest.mark.parametrize(
    ("config", "method"),
    [({"quant_method": "fp8"}, "fp8"), ({"load_in_4bit": True}, "unknown"), ("int8", "int8")],
)
def test_quantised_models_are_refused(folder, config, method):
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"quantization_config": config}))
    with pytest.raises(UserError, match=rf"quantization_config \({method}\).*; give the model"):
        reading.read(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    (folder / hf.WEIGHTS).unlink()
    write_safetensors(folder / "a.safetensors", KEPT)
    write_safetensors(folder / "b.safetensors", {NAMED: KEPT[NAMED] + 1})
    files = dict.fromkeys(KEPT, "a.safetensors") | {NAMED: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match=rf"tensor {NAMED} is in b\.safetensors and in another"):
        reading.read(folder)


def test_shards_without_an_index_are_named(folder):
    (folder / hf.WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(
        UserError, match=r"nor an index .* of shards \(it contains model-00001-of-00001\.safeten"
    ):
        reading.read(folder)


def test_a_head_that_should_be_tied_and_is_not_is_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    save_file(table, tmp_path / "model.safetensors")
    record = hf.model_config(dataclasses.replace(UNTIED, tie_embeddings=True), 257, "f32")
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"lm_head\.weight is another matrix"):
        reading.read(tmp_path)


def test_a_tensor_outside_its_storage_is_refused():
    storage = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(torch_file._tensor(storage, 1, (2, 2), (1, 2)), [[1, 3], [2, 4]])
    for offset, shape, strides in ((1, (2, 3), (3, 1)), (-1, (1,), (1,)), (0, (2,), (-1,))):
        with pytest.raises(ValueError, match="outside its storage"):
            torch_file._tensor(storage, offset, shape, strides)


def test_incomplete_folders_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    run = lambda: import_hf.main(
        ["--model", str(tmp_path), "--out", str(out), "--tokenizer", "bytes"]
    )
    assert run() == 2 and "config.json is missing" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    assert run() == 2 and "contains neither model.safetensors nor" in capsys.readouterr().err
    shutil.copy(GOLDEN, tmp_path / "pytorch_model.bin")
    assert (
        run() == 2
        and "bytes has 257 ids and the model has rows for 12; give the model's own: --tokenizer"
        in capsys.readouterr().err
    )
    assert not out.exists() and not list(tmp_path.glob(".part*"))


def test_huge_sizes_in_a_config_take_no_time_and_no_memory(tmp_path):
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    too_deep = dataclasses.replace(UNTIED, n_layers=10**9)
    with pytest.raises(UserError, match=r"layers\.999999999\.norm\.weight is missing"):
        tensors.from_hf(table, too_deep)
    with pytest.raises(UserError, match=r"has shape .*; config.json requires .*1000000032"):
        tensors.from_hf(table, dataclasses.replace(UNTIED, d_state=10**9 // 2 + 15))


def test_an_import_that_cannot_finish_does_not_start(tmp_path, capsys, monkeypatch):
    shutil.copy(GOLDEN, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(ORIGINAL))
    small_word_level(tmp_path / "tokenizer.json")
    run = lambda *more: import_hf.main(
        ["--model", str(tmp_path), "--out", str(tmp_path / "out"), *more]
    )
    assert run("--max_seq_len=0") == 2 and "max_seq_len=0" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        assert run() == 2 and "0 MB are free" in capsys.readouterr().err
    interrupted = lambda folder: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(reading, "read", interrupted)
    assert run() == 130
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".part*"))


def test_shards_are_put_together(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    names = sorted(table)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: table[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(hf.model_config(UNTIED, 257, "f32")))
    assert_same(reading.read(tmp_path).params, random_params(UNTIED))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors is missing"):
        reading.read(tmp_path)
    for wrong in (3, ["a.safetensors"], {"a": None}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(UserError, match=r"index\.json is damaged: its weight_map"):
            reading.read(tmp_path)


def test_an_id_is_looked_up_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"neither a folder nor in the cache.*out of reach"):
        reading.find("someone/tiny-mamba")
    snapshot = tmp_path / "models--someone--tiny-mamba" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--someone--tiny-mamba" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    shutil.copy(GOLDEN, snapshot / "pytorch_model.bin")
    (snapshot / "config.json").write_text(json.dumps(ORIGINAL))
    found = reading.read(reading.find("someone/tiny-mamba"))
    assert (found.model.d_model, found.model.vocab_size, found.model.d_state) == (16, 12, 4)
    with pytest.raises(UserError, match="does not exist"):
        reading.find("./nowhere")
