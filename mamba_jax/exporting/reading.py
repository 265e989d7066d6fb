"""A model's folder of Hugging Face's or of the original Mamba, here or on the Hub, as ours."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mamba_jax import config_checks
from mamba_jax.config import ModelConfig, from_dict
from mamba_jax.data import hub_access
from mamba_jax.errors import UserError, need, shortly
from mamba_jax.exporting import hf, tensors, torch_file

_SAFE, _TORCH = "model.safetensors", "pytorch_model.bin"
_TOO_LARGE = 1 << 31  # for any size or count; arithmetic with it would fail in odd ways
_ORIGINAL_EMBEDDING = "backbone.embedding.weight"  # all other names are Hugging Face's


class Read(NamedTuple):
    """What a folder held."""

    model: ModelConfig
    params: dict[str, Any]


def find(name: str) -> pathlib.Path:
    """Returns a folder as it is, or where a model of the Hub lies here, downloaded if need be.

    Raises:
      UserError: if there is none.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model folder {name} does not exist; give a folder, or an id of the Hugging Face Hub "
            "such as state-spaces/mamba-130m-hf"
        )
    import huggingface_hub

    why = hub_access.out_of_reach()
    get = lambda *files: pathlib.Path(
        huggingface_hub.snapshot_download(
            name, allow_patterns=list(files), local_files_only=bool(why)
        )
    )
    try:
        folder = get(
            "config.json", "*.safetensors", "*.index.json", "tokenizer*.json", "chat_template.jinja"
        )
        if not list(folder.glob("*.safetensors")):
            folder = get("*.bin")
    except (OSError, ValueError) as error:  # the library's errors are of these
        reason = f"the Hub is out of reach: {why}" if why else shortly(error)
        raise UserError(
            f"model {name} is neither a folder nor in the cache, and cannot be downloaded "
            f"({reason})"
        ) from error
    return folder


def read(folder: pathlib.Path) -> Read:
    """Reads config and weights.

    Raises:
      UserError: if a file is missing or damaged, or the model is not one that ours can be.
    """
    record = _json(folder / "config.json")
    table = _tensors(folder)
    if _ORIGINAL_EMBEDDING in table:
        table[tensors.EMBEDDING] = table.pop(_ORIGINAL_EMBEDDING)
    if tensors.EMBEDDING not in table:
        raise UserError(f"{folder} holds no {tensors.EMBEDDING}: it is no Mamba language model")
    model = model_config(record, n_ids=len(table[tensors.EMBEDDING]))
    if model.tie_embeddings:
        head = table.pop(tensors.HEAD, table[tensors.EMBEDDING])
        if not np.array_equal(head, table[tensors.EMBEDDING]):
            raise UserError(f"{folder}: tied embeddings, and yet lm_head.weight is another matrix")
    return Read(model, tensors.from_hf(table, model))


def model_config(record: Mapping[str, Any], n_ids: int) -> ModelConfig:
    """Returns the structure that a ``config.json`` tells.

    Args:
      record: of Hugging Face's or the original's.
      n_ids: rows of the embedding; the file's own number may be of those without padding.

    Raises:
      UserError: if ours has no such structure.
    """
    try:
        if record.get("model_type") == "mamba":
            fields = _hugging_face(record)
        elif record.get("model_type") == hf.HYBRID_TYPE:
            hybrid = {name: record[name] for name in hf.HYBRID_FIELDS}
            fields = _hugging_face(record) | hybrid | {"family": "hybrid"}
        elif "d_model" in record and "n_layer" in record:
            fields = _original(record)
        else:
            kind = record.get("model_type", "unknown")
            raise UserError(f'a model of type "{kind}" cannot be imported; "mamba" can')
    except KeyError as error:
        raise UserError(f"config.json lacks {error}") from error
    for name, value in fields.items():
        if isinstance(value, int) and value >= _TOO_LARGE:
            raise UserError(f"config.json: {name}={value} is no size of a model")
    run = from_dict({"model": fields | {"vocab_size": n_ids}})  # checks the types
    config_checks.check(run)
    return run.model


def _hugging_face(record: Mapping[str, Any]) -> dict[str, Any]:
    for name, wanted in (("use_bias", False), ("use_conv_bias", True), ("hidden_act", "silu")):
        if record.get(name, wanted) != wanted:
            raise UserError(f"config.json: {name}={record[name]} cannot be imported; {wanted} can")
    rank = record.get("time_step_rank", "auto")
    return {
        "d_model": record["hidden_size"],
        "n_layers": record["num_hidden_layers"],
        "d_state": record.get("state_size", 16),
        "d_conv": record.get("conv_kernel", 4),
        "expand_factor": record.get("expand", 2),
        "dt_rank": 0 if rank == "auto" else rank,
        "tie_embeddings": record.get("tie_word_embeddings", True),
        "norm_eps": record.get("layer_norm_epsilon", 1e-5),
    }


def _original(record: Mapping[str, Any]) -> dict[str, Any]:
    ssm = record.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise UserError(f"config.json: ssm_cfg={ssm} is no table of fields")
    unlike = {
        "ssm_cfg.layer": ssm.get("layer", "Mamba1") != "Mamba1",
        "rms_norm": not record.get("rms_norm", True),
        "attn_layer_idx": bool(record.get("attn_layer_idx")),
        "d_intermediate": bool(record.get("d_intermediate")),
        "ssm_cfg.bias": bool(ssm.get("bias")),
        "ssm_cfg.conv_bias": not ssm.get("conv_bias", True),
    }
    for name in (name for name, differs in unlike.items() if differs):
        raise UserError(f"config.json: a model with this {name} cannot be imported")
    rank = ssm.get("dt_rank", "auto")
    return {
        "d_model": record["d_model"],
        "n_layers": record["n_layer"],
        "d_state": ssm.get("d_state", 16),
        "d_conv": ssm.get("d_conv", 4),
        "expand_factor": ssm.get("expand", 2),
        "dt_rank": 0 if rank == "auto" else rank,
        "tie_embeddings": record.get("tie_embeddings", True),
    }


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    for name in (_SAFE, _TORCH):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
        elif (folder / name).is_file():
            shards = [name]
        else:
            continue
        table: dict[str, np.ndarray] = {}
        for shard in shards:
            table |= _load(folder / shard)
        return table
    raise UserError(f"{folder} holds neither {_SAFE} nor {_TORCH}")


def _shards(index: pathlib.Path) -> list[str]:
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"{index} is damaged: its weight_map does not name a file for each tensor")
    return sorted(set(files.values()))


def _load(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file} is missing")
    if file.suffix != ".safetensors":
        return torch_file.load_file(file)
    load_file = need("safetensors.numpy", "export").load_file
    try:
        return load_file(str(file))
    except Exception as error:  # the library has one of its own
        raise UserError(f"{file} is damaged: {shortly(error)}") from error


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {shortly(error)}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} holds no JSON object")
    return record
