"""A GGUF file for llama.cpp and all that is built on it, and a ``Modelfile`` for Ollama."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, need
from mamba_jax.exporting import chat_format, tensors, tokenizer_files
from mamba_jax.exporting.card import model_card

FILE_NAME = "model.gguf"
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # our names → the library's
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's numbers: "mostly …"
# As llama.cpp's converter writes for Mamba, which has no limit: its state does not grow.
_CONTEXT_TOKENS = 1 << 20
# Hugging Face's name of a layer's tensor → GGUF's, and whether it is a factor of a matrix product;
# all others are float32, as llama.cpp's kernels for them demand.
_LAYER = {
    "norm.weight": ("attn_norm.weight", False),
    "mixer.in_proj.weight": ("ssm_in.weight", True),
    "mixer.conv1d.weight": ("ssm_conv1d.weight", False),
    "mixer.conv1d.bias": ("ssm_conv1d.bias", False),
    "mixer.x_proj.weight": ("ssm_x.weight", True),
    "mixer.dt_proj.weight": ("ssm_dt.weight", True),
    "mixer.dt_proj.bias": ("ssm_dt.bias", False),
    "mixer.A_log": ("ssm_a", False),
    "mixer.D": ("ssm_d", False),
    "mixer.out_proj.weight": ("ssm_out.weight", True),
}
_OTHERS = {
    tensors.EMBEDDING: ("token_embd.weight", True),
    tensors.NORM: ("output_norm.weight", False),
    tensors.HEAD: ("output.weight", True),
}
# llama.cpp needs a non-empty list of merges. No UTF-8 text has the byte 255.
_NO_MERGE = "ÿ ÿ"


def check(config: ModelConfig) -> None:
    """Refuses what llama.cpp cannot run.

    Raises:
      UserError: with the reason and the alternatives.
    """
    if not config.is_plain:
        raise UserError(
            "a hybrid cannot be exported to GGUF: llama.cpp has no architecture with depth gates "
            "and pooled attention; use --format hf for transformers, or mamba-jax generate"
        )
    if config.eigenvalues != "positive":
        raise UserError(
            f"model.eigenvalues={config.eigenvalues} cannot be exported to GGUF: llama.cpp only "
            "knows positive; use --format onnx, or mamba-jax generate"
        )
    if config.expand_factor != 2:
        raise UserError(
            f"model.expand_factor={config.expand_factor} cannot be exported to GGUF: llama.cpp "
            "only runs Mamba with 2; use --format hf for transformers and vLLM"
        )


def renamed(table: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, bool]]:
    """Returns GGUF's tensors by name, float32, and whether each is a matrix product's factor.

    Args:
      table: what ``tensors.to_hf`` gave.
    """
    found = {}
    for name, array in table.items():
        if name in _OTHERS:
            theirs, is_factor = _OTHERS[name]
        else:
            number, _, rest = name.removeprefix("backbone.layers.").partition(".")
            part, is_factor = _LAYER[rest]
            theirs = f"blk.{number}.{part}"
        if name.endswith("A_log"):
            array = -np.exp(array)
        elif name.endswith("conv1d.weight"):
            array = array[:, 0]
        found[theirs] = np.ascontiguousarray(array), is_factor
    return found


def storage(array: np.ndarray, is_factor: bool, dtype: str) -> str:
    """Returns the dtype that a tensor is stored in; blocks of q8_0 need rows of 32 n numbers."""
    if not is_factor:
        return "f32"
    return "f16" if dtype == "q8_0" and array.shape[-1] % 32 else dtype


def rounded(table: Mapping[str, np.ndarray], dtype: str) -> dict[str, np.ndarray]:
    """Returns ``tensors.to_hf``'s tensors as a file of this dtype holds them, in float32."""
    quants, types = need("gguf.quants", "gguf"), need("gguf", "gguf").GGMLQuantizationType
    found = dict(table)
    for (name, array), (_, is_factor) in zip(table.items(), renamed(table).values(), strict=True):
        if is_factor:
            kind = types[TYPES[storage(array, is_factor, dtype)]]
            found[name] = quants.dequantize(quants.quantize(array, kind), kind)
    return found


def write(
    folder: pathlib.Path,
    table: Mapping[str, np.ndarray],
    metadata: Metadata,
    tokenizer: Tokenizer,
    dtype: str,
    chat_template: str = "",
) -> None:
    """Writes ``model.gguf``, ``Modelfile`` and the model card.

    Args:
      folder: the folder to write to.
      table: what ``tensors.to_hf`` gave.
      metadata: the checkpoint's metadata.
      tokenizer: the model's tokenizer.
      dtype: dtype of the factors of matrix products: "f32", "f16", "bf16" or "q8_0".
      chat_template: as in ``tokenizer_files.files``.

    Raises:
      UserError: if the library gguf is missing, or llama.cpp does not support the tokenizer.
    """
    gguf = need("gguf", "gguf")
    config = metadata.config.model
    writer = gguf.GGUFWriter(folder / FILE_NAME, "mamba")
    writer.add_name(metadata.config.name)
    writer.add_context_length(_CONTEXT_TOKENS)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.resolved_dt_rank)
    writer.add_file_type(_FILE_TYPES[dtype])
    fills_in = metadata.config.data.fim_rate > 0
    record = tokenizer_files.record(tokenizer, fills_in)
    _add_tokenizer(writer, record, tokenizer, n_ids=len(table[tensors.EMBEDDING]))
    # llama.cpp treats the separator at the start of the text as the token that it adds itself.
    writer.add_chat_template(chat_template or chat_format.jinja(begins=True))
    for name, (array, is_factor) in renamed(table).items():
        kind = gguf.GGMLQuantizationType[TYPES[storage(array, is_factor, dtype)]]
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    end = tokenizer_files.end_name(tokenizer)
    modelfile = chat_format.modelfile(FILE_NAME, end, renders_chats=not chat_template)
    (folder / "Modelfile").write_text(modelfile, "utf-8")
    notes = chat_format.notes("gguf", end, is_ours=not chat_template)
    (folder / "README.md").write_text(model_card(metadata, dtype, end, notes, "gguf"), "utf-8")


def _add_tokenizer(writer: Any, record: dict[str, Any], tokenizer: Tokenizer, n_ids: int) -> None:
    model, before = record["model"], record["pre_tokenizer"] or {}
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", ())]
    vocabulary: dict[str, int] = model["vocab"] if model["type"] == "BPE" else {}
    added = {word["id"]: word for word in record["added_tokens"]}
    reached = {merge.replace(" ", "") for merge in merges}
    known = (
        model["type"] == "BPE"
        and before.get("type") == "ByteLevel"
        and before.get("use_regex", True)
        and not before.get("add_prefix_space")
        and not record["normalizer"]
        # llama.cpp only makes such words by merges.
        and all(len(w) == 1 or w in reached for w, i in vocabulary.items() if i not in added)
    )
    if not known:
        raise UserError(
            f"the tokenizer {tokenizer.name} cannot be exported to GGUF: llama.cpp only supports "
            "gpt2, bytes, and a byte-level tokenizer.json with GPT-2's pattern; --format hf "
            "supports all"
        )
    types = need("gguf", "gguf").TokenType
    words, kinds = [f"[UNUSED{i}]" for i in range(n_ids)], [types.UNUSED] * n_ids
    for word, token in vocabulary.items():
        words[token], kinds[token] = word, types.NORMAL
    for token, word in added.items():
        words[token] = word["content"]
        kinds[token] = types.CONTROL if word["special"] else types.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [_NO_MERGE])
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(True)  # a document begins with the end of the one before it
