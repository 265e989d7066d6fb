"""What is exported is the model: the table both ways, the tokenizer, and transformers itself."""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest

from mamba_jax import export
from mamba_jax.config import DataConfig, RunConfig
from mamba_jax.data.tokenizer import load_tokenizer
from mamba_jax.errors import UserError
from mamba_jax.exporting import hf, tensors
from mamba_jax.exporting.folder import new_folder
from mamba_jax.training.checkpoint import CheckpointWriter, Metadata
from tests.models import tiny

UNTIED = dataclasses.replace(tiny.MAMBA, vocab_size=257, tie_embeddings=False)


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    """A random untied model, whose greedy text is no single repeated token."""
    folder = tmp_path_factory.mktemp("run")
    config = RunConfig(
        name="tiny", model=UNTIED, data=DataConfig(tokenizer="bytes", data_dir="poems")
    )
    state = {"step": jax.numpy.int32(3), "params": tiny.params_of(UNTIED)}
    metadata = Metadata(config, 3, 24, "x", metrics={"eval_loss": 1.5})
    with CheckpointWriter(folder, keep_last=1, keep_every=0, log=lambda line: None) as writer:
        writer.save("final", state, metadata)
    return folder


def random_params(config):
    shapes = tensors_shapes(config)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


def tensors_shapes(config):
    from mamba_jax.models import build

    return build.abstract_params(config)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_there_and_back_is_the_identity(tied):
    config = dataclasses.replace(UNTIED, tie_embeddings=tied)
    params = random_params(config)
    back = tensors.from_hf(tensors.to_hf(params, config, 257), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_tensors_have_the_shapes_that_transformers_documents():
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 250)
    d, e, n, r, k = 32, 64, 16, 2, 4
    first = {
        name[len("backbone.layers.0.") :]: a.shape for name, a in table.items() if ".0." in name
    }
    assert first == {
        "norm.weight": (d,),
        "mixer.in_proj.weight": (2 * e, d),
        "mixer.conv1d.weight": (e, 1, k),
        "mixer.conv1d.bias": (e,),
        "mixer.x_proj.weight": (r + 2 * n, e),
        "mixer.dt_proj.weight": (e, r),
        "mixer.dt_proj.bias": (e,),
        "mixer.A_log": (e, n),
        "mixer.D": (e,),
        "mixer.out_proj.weight": (d, e),
    }
    assert table[tensors.EMBEDDING].shape == table[tensors.HEAD].shape == (250, d)
    assert all(a.flags.c_contiguous for a in table.values())


def test_missing_and_surplus_tensors_are_named():
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    with pytest.raises(UserError, match="backbone.layers.7.extra is not one"):
        tensors.from_hf(table | {"backbone.layers.7.extra": np.zeros(1)}, UNTIED)
    del table["backbone.layers.1.mixer.D"]
    with pytest.raises(UserError, match="backbone.layers.1.mixer.D is missing"):
        tensors.from_hf(table, UNTIED)


def test_merges_rebuild_every_token_of_gpt2_from_its_bytes():
    pieces = load_tokenizer("gpt2").pieces
    merges = hf.merges(pieces)
    assert merges[0] == (b" ", b"t") and merges[1] == (b" ", b"a")  # GPT-2's own first two
    longer = [piece for piece in pieces if len(piece) > 1]
    assert [a + b for a, b in merges] == longer


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_exported_tokenizer_gives_the_same_ids(name):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    ours = load_tokenizer(name)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hf.tokenizer_json(ours)))
    for text in ("Hello world's\n\n  end  ", "naïve 東京 🙂\tx = 12345", "", " "):
        assert theirs.encode(text).ids == [ours.eot_id, *ours.encode(text)]
        assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.get_vocab_size() == ours.vocab_size


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    arguments = ["--checkpoint", "nowhere", "--format", "hf", "--out", str(tmp_path)]
    assert export.main(arguments) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("IoError: No space left on device")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(UserError, match="no space left"),
        new_folder(tmp_path / "model") as folder,
    ):
        (folder / "half").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_hybrids_are_refused_with_the_reason(tmp_path, monkeypatch, capsys):
    from mamba_jax.training import checkpoint

    metadata = Metadata(RunConfig(name="h", model=tiny.HYBRID), 1, 1, "x")
    monkeypatch.setattr(checkpoint, "resolve", lambda path, log: path)
    monkeypatch.setattr(checkpoint, "read_metadata", lambda path: metadata)
    out = tmp_path / "model"
    assert export.main(["--checkpoint", "c", "--format", "hf", "--out", str(out)]) == 2
    assert 'model.family="hybrid" cannot be exported' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_model_card_tells_what_was_measured_and_no_more():
    config = RunConfig(name="n", model=UNTIED, data=DataConfig(data_dir="poems"))
    card = hf.model_card(Metadata(config, 3, 24, "x", metrics={"eval_loss": 1.5}), "bf16")
    assert "| eval_loss | 1.5 |" in card and "poems; 24 windows" in card and "bfloat16" in card
    assert "None were measured" in hf.model_card(Metadata(config, 3, 24, "x"), "f32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_transformers_gives_the_same_logits_and_greedy_text(
    checkpoint_dir, tmp_path, capsys, dtype
):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("torch", reason="needs torch")
    out = tmp_path / "model"
    arguments = ["--checkpoint", str(checkpoint_dir), "--format", "hf", "--out", str(out)]
    assert export.main([*arguments, "--dtype", dtype, "--verify"]) == 0
    assert "192 of 192 greedy tokens" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


@pytest.mark.slow
def test_verify_fails_loudly_on_a_wrong_tensor_and_writes_nothing(
    checkpoint_dir, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("torch", reason="needs torch")
    right = hf.write_weights

    def wrong(file, table, dtype):
        name = "backbone.layers.1.mixer.D"
        right(file, table | {name: table[name] * np.float32(1.1)}, dtype)

    monkeypatch.setattr(hf, "write_weights", wrong)
    out = tmp_path / "model"
    arguments = ["--checkpoint", str(checkpoint_dir), "--format", "hf", "--out", str(out)]
    assert export.main([*arguments, "--verify"]) == 2
    assert "verification failed: logits differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
