"""A folder that Hugging Face transformers loads; writing needs no torch."""

import importlib.resources
import json
import pathlib
from typing import Any

import ml_dtypes  # comes with jax
import numpy as np

from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, need
from mamba_jax.exporting import chat_format, tokenizer_files
from mamba_jax.exporting.card import model_card

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
WEIGHTS = "model.safetensors"
MODELING = "modeling_hybrid_mamba.py"  # what transformers runs a hybrid with
OLDEST_TRANSFORMERS = "5.0.0"  # that a hybrid runs in, as its program checks
HYBRID_TYPE = "hybrid_mamba"
HYBRID_FIELDS = (  # of the same name in both configs
    *("recursion_depth", "recursion_expand", "recursion_reads_attention"),
    *("attention_scales", "attention_window", "attention_head_size", "fusion"),
)
# Likewise; folders exported before there were these lack them, and mean their defaults.
LATER_FIELDS = ("eigenvalues", "gate", "shared_gate", "pass_embedding")


def check(config: ModelConfig) -> None:
    """Refuses what transformers cannot run.

    Raises:
      UserError: with the reason and the alternatives.
    """
    if config.is_plain and config.eigenvalues != "positive":
        raise UserError(
            f"model.eigenvalues={config.eigenvalues} cannot be exported to Hugging Face without "
            "hybrid layers: the Mamba of transformers only knows positive; use --format onnx, or "
            "mamba-jax generate"
        )


def write_weights(file: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes a safetensors file.

    Args:
      file: to write.
      tensors: by name; float32.
      dtype: "f32", "f16" or "bf16".

    Raises:
      UserError: if safetensors is not installed.
    """
    cast = {name: round_to(array, dtype) for name, array in tensors.items()}
    save_file = need("safetensors.numpy", "export").save_file
    save_file(cast, str(file), metadata={"format": "pt"})


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Casts to "f32", "f16" or "bf16"; the result is C-contiguous."""
    kinds = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    # safetensors writes wrong values, silently, from arrays that are not C-contiguous.
    return np.ascontiguousarray(array.astype(kinds[dtype]))


def write_companions(
    folder: pathlib.Path,
    metadata: Metadata,
    tokenizer: Tokenizer,
    dtype: str,
    chat_template: str = "",
) -> None:
    """Writes all but the weights: configs, tokenizer, model card, the hybrid's program.

    Args:
      folder: the folder to write to.
      metadata: the checkpoint's metadata.
      tokenizer: the model's tokenizer.
      dtype: dtype of the weights.
      chat_template: as in ``tokenizer_files.files``.

    Raises:
      UserError: as in ``tokenizer_files.files``.
    """
    fills_in = metadata.config.data.fim_rate > 0
    n_ids = tokenizer_files.id_count(tokenizer, fills_in)
    end = end_ids(tokenizer)
    config = model_config(metadata.config.model, n_ids, dtype)
    files = tokenizer_files.files(tokenizer, fills_in, chat_template)
    contents: dict[str, dict[str, Any]] = {
        "config.json": config | end,
        "generation_config.json": end | {"use_cache": True},
        **files,
    }
    write_json(folder, contents)
    name = tokenizer_files.end_name(tokenizer)
    notes = chat_format.notes(
        "transformers",
        name,
        is_ours=not chat_template,
        begins=tokenizer_files.begins_chats(files),
        keeps_text=tokenizer_files.keeps_text(tokenizer, files),
    )
    card = model_card(metadata, DTYPES[dtype], name, notes)
    (folder / "README.md").write_text(card, "utf-8")
    if not metadata.config.model.is_plain:
        source = importlib.resources.files("mamba_jax.exporting").joinpath("assets", MODELING)
        (folder / MODELING).write_bytes(source.read_bytes())


def end_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids that begin, end and pad a text: one and the same."""
    return {f"{name}_token_id": tokenizer.eot_id for name in ("bos", "eos", "pad")}


def write_json(folder: pathlib.Path, contents: dict[str, dict[str, Any]]) -> None:
    """Writes files by name."""
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, "utf-8")


def model_config(config: ModelConfig, n_ids: int, dtype: str) -> dict[str, Any]:
    """Returns transformers' ``config.json`` without the ids of special tokens."""
    shared = {
        "vocab_size": n_ids,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "state_size": config.d_state,
        "num_hidden_layers": config.n_layers,
        "conv_kernel": config.d_conv,
        "expand": config.expand_factor,
        "time_step_rank": config.resolved_dt_rank,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": DTYPES[dtype],
    }
    if config.is_plain:
        return {"architectures": ["MambaForCausalLM"], "model_type": "mamba", **shared}
    module = MODELING.removesuffix(".py")
    return {
        "architectures": ["HybridMambaForCausalLM"],
        "model_type": HYBRID_TYPE,
        "transformers_version": OLDEST_TRANSFORMERS,
        "auto_map": {
            "AutoConfig": f"{module}.HybridMambaConfig",
            "AutoModelForCausalLM": f"{module}.HybridMambaForCausalLM",
        },
        **shared,
        **{name: getattr(config, name) for name in HYBRID_FIELDS + LATER_FIELDS},
        "attention_scales": list(config.attention_scales),
        "attention_window": config.resolved_attention_window,
        "attention_head_size": config.head_size,
        "layer_pattern": "".join(config.kinds),
    }
