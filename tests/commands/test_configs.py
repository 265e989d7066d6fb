"""The files under configs/: one per size, each described correctly."""

import dataclasses
import pathlib
import re

import pytest

from mamba_jax.config import freeze, load_config, preset_config, presets
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.data.tokenizers.load import load_tokenizer

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
SIZE_OF = {name.replace("-", "_"): name for name in presets.SIZES}


def test_there_is_one_file_for_each_size_and_the_quick_start():
    assert {file.stem for file in FILES} == {*SIZE_OF, "quickstart"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstrings_are_correct(file):
    run = freeze(load_config(str(file)))
    docstring = file.read_text().split('"""')[1]
    assert f"--config=configs/{file.name}" in docstring
    vocab_size = load_tokenizer(run.data.tokenizer).vocab_size
    count = parameter_count(dataclasses.replace(run.model, vocab_size=vocab_size))
    output = re.search(r"Parameters: ([\d,]+) with .* vocabulary, ([\d,]+) of them", docstring)
    assert output is not None
    assert output.groups() == (f"{count.total:,}", f"{count.non_embedding:,}")


@pytest.mark.parametrize("stem", SIZE_OF)
def test_a_size_is_its_row_of_the_table(stem):
    config = load_config(str(FOLDER / f"{stem}.py"))
    assert config.to_dict() == preset_config(SIZE_OF[stem]).to_dict()
    size = presets.SIZES[SIZE_OF[stem]]
    docstring = (FOLDER / f"{stem}.py").read_text().split('"""')[1]
    assert f"Parameters: {size.parameters:,} with" in docstring
    assert f'"{size.nominal}"' in docstring
    assert f"{size.d_model} wide, {size.n_layers} layers" in docstring
    assert (f"depth {size.depth}" in docstring) == (size.family == "hybrid")
    run, tokens = freeze(config), re.search(r"([\d.]+) billion tokens", docstring)
    n_tokens = run.training.max_steps * run.vram.effective_batch_size * run.model.max_seq_len
    assert tokens is not None and tokens[1] == f"{n_tokens / 1e9:.1f}"
    n_parameters = int(re.search(r"Parameters: ([\d,]+)", docstring)[1].replace(",", ""))
    output = re.findall(r"([\d.]+) GB", docstring)  # float32: weights and two moments, gradient
    assert output == [f"{n_parameters * n_bytes / 1e9:.1f}" for n_bytes in (12, 4)]


def test_quickstart_is_a_hybrid_with_a_closing_sample():
    run = freeze(load_config(str(FOLDER / "quickstart.py")))
    assert run.model.family == "hybrid"
    assert (run.name, run.output_dir) == ("quickstart", "checkpoints/quickstart")
    assert run.sample_prompt
