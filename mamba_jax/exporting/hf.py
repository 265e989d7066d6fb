"""A folder that Hugging Face transformers loads as ``MambaForCausalLM``; writing needs no torch."""

import json
import pathlib
from typing import Any

import numpy as np

from mamba_jax.config import ModelConfig
from mamba_jax.data.tokenizer import Tokenizer
from mamba_jax.errors import UserError
from mamba_jax.training.checkpoint_folder import Metadata

END_OF_TEXT = "<|endoftext|>"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def write_weights(file: pathlib.Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Writes a safetensors file.

    Args:
      file: to write.
      tensors: by name; C-contiguous float32.
      dtype: "f32", "f16" or "bf16".

    Raises:
      UserError: if safetensors is not installed.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise UserError('safetensors is missing: pip install "mamba_jax[export]"') from error
    cast = {name: round_to(array, dtype) for name, array in tensors.items()}
    save_file(cast, str(file), metadata={"format": "pt"})


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """Casts to "f32", "f16" or "bf16"."""
    import ml_dtypes  # comes with jax

    kinds = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    return np.ascontiguousarray(array.astype(kinds[dtype]))


def write_companions(
    folder: pathlib.Path, metadata: Metadata, tokenizer: Tokenizer, dtype: str
) -> None:
    """Writes all but the weights: configs, tokenizer, model card."""
    files: dict[str, Any] = {
        "config.json": model_config(metadata.config.model, tokenizer, dtype),
        "generation_config.json": {
            "bos_token_id": tokenizer.eot_id,
            "eos_token_id": tokenizer.eot_id,
            "pad_token_id": tokenizer.eot_id,
            "use_cache": True,
        },
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, "utf-8")
    (folder / "README.md").write_text(model_card(metadata, dtype), "utf-8")


def model_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """Returns transformers' ``config.json``."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": tokenizer.vocab_size,
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
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.eot_id,
        "dtype": DTYPES[dtype],
    }


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns a ``tokenizer.json`` with the same ids; it begins a text as training did.

    Raises:
      UserError: if the tokenizer is neither "gpt2" nor "bytes".
    """
    if tokenizer.name not in ("gpt2", "bytes"):
        raise UserError(
            f'the tokenizer "{tokenizer.name}" cannot be exported; "gpt2" and "bytes" can'
        )
    letters = _byte_letters()
    spell = lambda piece: "".join(letters[byte] for byte in piece)
    vocabulary = {spell(piece): i for i, piece in enumerate(tokenizer.pieces) if piece}
    vocabulary[END_OF_TEXT] = tokenizer.eot_id
    special = {"id": END_OF_TEXT, "type_id": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": tokenizer.eot_id,
                "content": END_OF_TEXT,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": special}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": special},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                END_OF_TEXT: {
                    "id": END_OF_TEXT,
                    "ids": [tokenizer.eot_id],
                    "tokens": [END_OF_TEXT],
                }
            },
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[spell(a), spell(b)] for a, b in merges(tokenizer.pieces)],
        },
    }


def merges(pieces: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Returns the merges of byte-pair encoding, in order, from its tokens in order of rank.

    A token's last merge joins the two pieces that the earlier merges make of it.
    """
    ranks = {piece: rank for rank, piece in enumerate(pieces) if piece}
    found = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            i = joined.index(min(joined))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found.append((parts[0], parts[1]))
    return found


def _byte_letters() -> list[str]:
    """GPT-2's printable letter of each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def model_card(metadata: Metadata, dtype: str) -> str:
    """Returns the README.md: data, measured metrics, limits; nothing that was not measured."""
    config = metadata.config
    model = config.model
    data = config.data.dataset or config.data.data_dir or "not recorded"
    measured = [f"| {name} | {value:.6g} |" for name, value in sorted(metadata.metrics.items())]
    table = ["| metric | value |", "|---|---|", *measured]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [mamba]",
            "---",
            f"# {config.name}",
            "",
            f"A Mamba language model trained with mamba_jax: {model.n_layers} layers, d_model "
            f"{model.d_model}, d_state {model.d_state}; weights in {DTYPES[dtype]}.",
            "",
            "## Data",
            f"{data}; {metadata.samples_seen} windows of {model.max_seq_len} tokens seen in "
            f"{metadata.step} steps. Tokenizer: {config.data.tokenizer}.",
            "",
            "## Metrics",
            *(table if measured else ["None were measured at this step."]),
            "",
            "## Limits",
            f"Trained on windows of {model.max_seq_len} tokens; longer texts were not tried. A "
            f"text must begin with {END_OF_TEXT}, as the tokenizer here sees to. Bare "
            "continuation of text: neither tuned to instructions nor checked for bias, truth or "
            "safety. Metrics are of the data's own held-out part alone.",
            "",
        ]
    )
