"""Writes a folder with two ONNX graphs, their weights, and all files that generation needs."""

import importlib.resources
import pathlib
from collections.abc import Mapping

import numpy as np

from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.exporting import chat_format, hf, onnx_model, tensors, tokenizer_files
from mamba_jax.exporting.card import model_card
from mamba_jax.exporting.onnx_graph import WeightsFile

ROW, STEP, WEIGHTS = "model.onnx", "step.onnx", "model.onnx.data"
EXAMPLE = "generate_onnx.py"
_FILES = f"""
## Files

- `{ROW}`: `input_ids` int64 (batch, sequence) → `logits` float32 (batch, sequence, ids) and the
  cache after the last token, `present.…`. Each row starts from an empty cache, and rows take no
  padding.
- `{STEP}`: one token per row, `input_ids` (batch, 1), and the cache before it, `past.…`, whose size
  does not grow → `logits` (batch, 1, ids) and `present.…`. The first axis of a cache is the batch;
  an empty row has a cache of zeros.
- `{WEIGHTS}`: the weights of both; keep it in the same folder.
- `{EXAMPLE}`: generates text with onnxruntime, numpy and tokenizers; with `--chat` the prompt is a
  user's turn.
"""


def write(
    folder: pathlib.Path,
    table: Mapping[str, np.ndarray],
    metadata: Metadata,
    tokenizer: Tokenizer,
    chat_template: str = "",
) -> None:
    """Writes graphs, weights (float32), tokenizer, ``config.json``, model card and example.

    Args:
      folder: to write into.
      table: what ``tensors.to_hf`` gave.
      metadata: of the checkpoint.
      tokenizer: of the model.
      chat_template: as in ``tokenizer_files.files``.

    Raises:
      UserError: if the library onnx is missing, or as in ``tokenizer_files.files``.
    """
    config = metadata.config.model
    weights = WeightsFile(folder / WEIGHTS)
    for name, one_token in ((ROW, False), (STEP, True)):
        graph = onnx_model.make(table, config, one_token=one_token)
        weights.save(graph, folder / name, f"{metadata.config.name}, trained with mamba_jax")
    described = hf.model_config(config, len(table[tensors.EMBEDDING]), "f32")
    described.pop("auto_map", None)  # for transformers only: its program is not in this folder
    fills_in = metadata.config.data.fim_rate > 0
    files = tokenizer_files.files(tokenizer, fills_in, chat_template)
    hf.write_json(folder, {"config.json": described | hf.end_ids(tokenizer), **files})
    end = tokenizer_files.end_name(tokenizer)
    keeps_text = tokenizer_files.keeps_text(tokenizer, files)
    notes = chat_format.notes("onnx", end, is_ours=not chat_template, keeps_text=keeps_text)
    card = model_card(metadata, "float32", end, notes, "onnx")
    (folder / "README.md").write_text(card + _FILES, "utf-8")
    example = importlib.resources.files("mamba_jax.exporting").joinpath("assets", EXAMPLE)
    (folder / EXAMPLE).write_bytes(example.read_bytes())
