"""The command: what it writes, what it refuses, and that transformers gives the same answers."""

import dataclasses
import errno
import importlib.resources
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import yaml

from mamba_jax import export
from mamba_jax.checkpoints.arrays import Metadata
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError, need
from mamba_jax.exporting import hf, tensors
from mamba_jax.exporting.card import model_card
from mamba_jax.exporting.folder import new_folder
from mamba_jax.generation.chat import prompt_of
from tests.support import tiny
from tests.support.made import UNTIED, metadata_of, random_params, write_checkpoint
from tests.support.tiny_run import quick_compiles  # noqa: F401

ROOT = pathlib.Path(__file__).parents[2]
HF_FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "README.md"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, UNTIED, random_params(UNTIED))
    return folder


def run(checkpoint_dir, out, *more, form="hf"):
    arguments = ["--checkpoint", str(checkpoint_dir), "--format", form, "--out", str(out)]
    return export.main([*arguments, *more])


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_the_written_folder(checkpoint_dir, tmp_path, dtype):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    out = tmp_path / "model"
    assert run(checkpoint_dir, out, "--dtype", dtype) == 0
    assert {file.name for file in out.iterdir()} == HF_FILES
    written = load_file(str(out / "model.safetensors"))
    table = tensors.to_hf(random_params(UNTIED), UNTIED, 257)
    assert {str(a.dtype) for a in written.values()} == {hf.DTYPES[dtype]}
    for name, array in table.items():
        np.testing.assert_array_equal(written.pop(name), array.astype(hf.DTYPES[dtype]))
    assert not written
    config = json.loads((out / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "state_size", "time_step_rank")
    assert [config[name] for name in sizes] == [257, 32, 64, 16, 2]
    assert config["architectures"] == ["MambaForCausalLM"] and not config["tie_word_embeddings"]
    assert config["eos_token_id"] == 256 and config["dtype"] == hf.DTYPES[dtype]
    assert config["layer_norm_epsilon"] == 3e-4
    generation = json.loads((out / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256] * 3
    assert list(tmp_path.iterdir()) == [out]


def test_weights_alone(checkpoint_dir, tmp_path):
    pytest.importorskip("safetensors")
    assert run(checkpoint_dir, tmp_path / "model", form="safetensors") == 0
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_what_transformers_cannot_run_is_refused(tmp_path, capsys):
    model = dataclasses.replace(UNTIED, eigenvalues="signed")
    write_checkpoint(tmp_path, model, random_params(model))
    assert run(tmp_path, tmp_path / "model") == 2 and not (tmp_path / "model").exists()
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "eigenvalues=signed cannot" in line and "use --format onnx" in line
    hf.check(dataclasses.replace(model, family="hybrid"))


def test_a_folder_that_exists_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    assert run("nowhere", tmp_path) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("I/O error: File too large (os error 27)"), "file too large"),
        (OSError("1048576 requested and 519008 written"), "stored only part of a file"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, error, message):
    with (
        pytest.raises(UserError, match=f"cannot write .*/model: .*{message}"),
        new_folder(tmp_path / "model") as folder,
    ):
        (folder / "half").write_text("half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_partial_folder_never_has_the_final_name(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "half").write_text("half")
        assert not target.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_two_processes_cannot_write_one_folder(tmp_path):
    target, program = (
        tmp_path / "model",
        (
            "import sys, pathlib; from mamba_jax.exporting.folder import new_folder\n"
            "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
            "    (folder / 'theirs').write_text('half'); print(flush=True); input()"
        ),
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdin=pipe, stdout=pipe
    ) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="/model: another process is writing it"):
            new_folder(target).__enter__()
        assert [file.name for file in (tmp_path / ".part-model").iterdir()] == ["theirs"]
        other.kill()
    with new_folder(target) as folder:  # the leftovers of a killed process do not matter
        assert not list(folder.iterdir())
        (folder / "ours").write_text("whole")
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == [
        "model",
        "model/ours",
    ]
    with pytest.raises(UserError, match="/model exists"):
        new_folder(target).__enter__()


def test_a_missing_library_names_its_extra():
    with pytest.raises(UserError, match=r"nowhere is missing .*mamba_jax\[gguf\]"):
        need("nowhere.at_all", "gguf")


def test_the_model_card_states_only_what_was_measured():
    metadata = metadata_of(UNTIED)
    card = model_card(metadata, "bfloat16", "<|endoftext|>", "notes on chats")
    assert "| eval_loss | 1.5 |" in card and "poems; 24 windows" in card and "bfloat16" in card
    assert "None were measured" in model_card(Metadata(metadata.config, 3, 24, "x"), "f", "<s>", "")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("M,H", "A Hybrid Recursive Mamba language model trained with mamba_jax: 2 layers (plan"),
        ("M*2", "A Mamba language model trained with mamba_jax: 2 layers (plan M*2)"),
    ],
)
def test_the_model_card_names_the_family_of_the_layers(plan, words):
    metadata = metadata_of(dataclasses.replace(tiny.HYBRID, plan=plan))
    assert words in model_card(metadata, "bfloat16", "<|endoftext|>", "")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_transformers_gives_the_same_logits_and_greedy_text(
    checkpoint_dir, tmp_path, capsys, dtype
):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("torch", reason="needs torch")
    assert run(checkpoint_dir, tmp_path / "model", "--dtype", dtype, "--verify") == 0
    assert "256 of 256 greedy tokens" in capsys.readouterr().err


@pytest.mark.parametrize("variant", [name for name in tiny.VARIANTS if name != "mamba"])
def test_transformers_runs_hybrids_with_the_program_in_the_folder(tmp_path, capsys, variant):
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("torch", reason="needs torch")
    model = dataclasses.replace(tiny.VARIANTS[variant], vocab_size=257, tie_embeddings=False)
    write_checkpoint(tmp_path, model, random_params(model))
    assert run(tmp_path, tmp_path / "model", "--verify") == 0
    assert "256 of 256 greedy tokens" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mamba", "hybrid"])
def test_the_pipeline_answers_chats(checkpoint_dir, tmp_path, family):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    if family == "hybrid":
        model = dataclasses.replace(tiny.HYBRID, vocab_size=257, tie_embeddings=False)
        checkpoint_dir = tmp_path
        write_checkpoint(tmp_path, model, random_params(model))
    assert run(checkpoint_dir, tmp_path / "model") == 0
    pipe = transformers.pipeline(
        "text-generation", str(tmp_path / "model"), trust_remote_code=family == "hybrid"
    )
    messages = [{"role": "user", "content": "Is <|endoftext|> text? "}]
    tokenizer = load_tokenizer("bytes")
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt_of(messages)).tolist()]
    settings = {"max_new_tokens": 40, "do_sample": False}
    with torch.no_grad():
        found = pipe.model.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
    text = pipe.tokenizer.decode(found, skip_special_tokens=True)
    answer = pipe(messages, **settings)[0]["generated_text"]
    assert answer == [*messages, {"role": "assistant", "content": text}]
    assert 'stop_sequence="\\n\\nuser:"' in (tmp_path / "model" / "README.md").read_text()
    if family == "hybrid":
        return  # its text here is one token again and again, and stops are no work of the model
    # A stop ends the answer, as the card advises to do with "\n\nuser:".
    stop = next(character for character in text[1:] if character != "\ufffd")
    stopped = pipe(messages, stop_sequence=stop, **settings)[0]["generated_text"][-1]["content"]
    assert stopped == text[: text.index(stop) + len(stop)]


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
    assert run(checkpoint_dir, tmp_path / "model", "--verify") == 2
    assert "verification failed: logits differ" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_oldest_transformers_of_hybrids_is_the_same_everywhere():
    module = importlib.resources.files("mamba_jax.exporting") / "assets" / hf.MODELING
    assert f'OLDEST_TRANSFORMERS = "{hf.OLDEST_TRANSFORMERS}"' in module.read_text("utf-8")
    assert hf.model_config(tiny.HYBRID, 8, "f32")["transformers_version"] == hf.OLDEST_TRANSFORMERS
    nightly = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())
    job = nightly["jobs"]["engines"]
    assert (ROOT / job["steps"][-1]["run"].split()[0]).is_file()
    releases = job["strategy"]["matrix"]["transformers"]
    assert {f"transformers=={hf.OLDEST_TRANSFORMERS}", "transformers"} <= set(releases)
