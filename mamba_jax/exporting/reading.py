"""Reads a Mamba model in Hugging Face's or the original format, from a folder or from the Hub."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mamba_jax.config import ModelConfig, checks, from_dict
from mamba_jax.config.plan import KINDS
from mamba_jax.data.sources import hub_access
from mamba_jax.errors import UserError, first_line, need
from mamba_jax.exporting import hf, tensors, torch_file

_SAFE, _TORCH = "model.safetensors", "pytorch_model.bin"
_TOO_LARGE = 1 << 31  # for any size or count; arithmetic with it would fail in odd ways
# First bytes of a file that replaces the real one → what it is and what to do.
_STAND_INS = {
    b"version https://git-lfs": "a git-LFS pointer, not the file itself; run git lfs pull there",
    b"<!doctype html": "a web page, not the file itself; download the file that the page shows",
    b"<html": "a web page, not the file itself; download the file that the page shows",
}
_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# safetensors' names of the dtypes that numpy has.
_DTYPES = {"F16", "BF16", "F32", "F64", "BOOL", *(f"{k}{n}" for k in "IU" for n in (8, 16, 32, 64))}
_ORIGINAL_EMBEDDING = "backbone.embedding.weight"  # all other names are Hugging Face's


class ImportedModel(NamedTuple):
    """A model in our structure and with our parameters."""

    model: ModelConfig
    params: dict[str, Any]


def find(name: str) -> pathlib.Path:
    """Returns a folder unchanged, or the local copy of a Hub model, downloaded if necessary.

    Raises:
      UserError: if there is none.
    """
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        weights = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
        for file in sorted((*path.glob("*.json"), *weights)):
            refuse_stand_in(file)
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model folder {name} does not exist; give a folder, or a Hugging Face Hub id such as "
            "state-spaces/mamba-130m-hf"
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
        reason = f"the Hub is out of reach: {why}" if why else first_line(error)
        raise UserError(
            f"model {name} is neither a folder nor in the cache, and cannot be downloaded "
            f"({reason}); check the name, or give a folder"
        ) from error
    return folder


def refuse_stand_in(file: pathlib.Path) -> None:
    """Checks the first bytes of a file, if it exists.

    Raises:
      UserError: if it is a git-LFS pointer or a web page instead of a model's file.
    """
    if file.is_file():
        with file.open("rb") as stream:
            first = stream.read(64).lstrip().lower()
        for beginning, what in _STAND_INS.items():
            if first.startswith(beginning):
                raise UserError(f"{file} is {what}")


def read(folder: pathlib.Path) -> ImportedModel:
    """Reads config and weights.

    Raises:
      UserError: if a file is missing or damaged, a weight is not a finite floating-point number,
        or mamba_jax cannot represent the model.
    """
    record = _json(folder / "config.json")
    _refuse_quantized(record)
    table = _tensors(folder)
    for name, array in table.items():
        _check_values(name, array)
    if _ORIGINAL_EMBEDDING in table:
        table[tensors.EMBEDDING] = table.pop(_ORIGINAL_EMBEDDING)
    if tensors.EMBEDDING not in table:
        raise UserError(f"{folder} has no {tensors.EMBEDDING}; give a Mamba language model")
    model = model_config(record, n_ids=len(table[tensors.EMBEDDING]))
    if model.tie_embeddings:
        head = table.pop(tensors.HEAD, table[tensors.EMBEDDING])
        if not np.array_equal(head, table[tensors.EMBEDDING]):
            raise UserError(
                f"{folder}: config.json ties the embeddings, but lm_head.weight is another matrix; "
                "correct one of the two"
            )
    return ImportedModel(model, tensors.from_hf(table, model))


def model_config(record: Mapping[str, Any], n_ids: int) -> ModelConfig:
    """Returns the structure that a ``config.json`` describes.

    Args:
      record: a config in Hugging Face's or the original format.
      n_ids: rows of the embedding; the file's own number may exclude padding.

    Raises:
      UserError: if mamba_jax has no such structure.
    """
    try:
        if record.get("model_type") == "mamba":
            fields = _hugging_face(record)
        elif record.get("model_type") == hf.HYBRID_TYPE:
            hybrid = {name: record[name] for name in hf.HYBRID_FIELDS}
            hybrid |= {name: record[name] for name in hf.LATER_FIELDS if name in record}
            fields = _hugging_face(record) | hybrid
            fields |= {"family": "hybrid", "plan": _plan(record)}
        elif "d_model" in record and "n_layer" in record:
            fields = _original(record)
        else:
            kind = record.get("model_type", "unknown")
            raise UserError(
                f'a model of type "{kind}" cannot be imported; give one of type "mamba"'
            )
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; give the model's complete config") from error
    for name, value in fields.items():
        if isinstance(value, int) and value >= _TOO_LARGE:
            raise UserError(f"config.json: {name}={value} is too large for a model; correct it")
    run = from_dict({"model": fields | {"vocab_size": n_ids}})  # checks the types
    checks.check(run)
    return run.model.normalised()


def _plan(record: Mapping[str, Any]) -> str:
    if "layer_pattern" not in record:  # exported before there were plans
        return ""
    pattern, n_layers = record["layer_pattern"], record["num_hidden_layers"]
    if not isinstance(pattern, str) or set(pattern) - set(KINDS) or len(pattern) != n_layers:
        raise UserError(
            f"config.json: layer_pattern={pattern} is not num_hidden_layers={n_layers} letters of "
            f"{', '.join(KINDS)}; correct it"
        )
    return ",".join(pattern)


def _refuse_quantized(record: Mapping[str, Any]) -> None:
    found = record.get("quantization_config") or record.get("compression_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else found
        raise UserError(
            f"config.json: quantization_config ({method}): quantised weights cannot be imported; "
            "give the model before it was quantised, in float32, float16 or bfloat16"
        )


def _check_values(name: str, array: np.ndarray) -> None:
    if array.dtype not in _FLOATS:
        raise UserError(
            f"tensor {name} has dtype {array.dtype}, which is not a floating-point type; give a "
            "model whose weights are float32, float16 or bfloat16"
        )
    with np.errstate(over="ignore"):  # of float64
        n_bad = int((~np.isfinite(np.asarray(array, np.float32))).sum())
    if n_bad:
        raise UserError(
            f"tensor {name}: {n_bad} of {array.size} values are NaN or infinite in float32; the "
            "file is damaged or the model diverged; give an earlier checkpoint of it"
        )


def _hugging_face(record: Mapping[str, Any]) -> dict[str, Any]:
    for name, wanted in (("use_bias", False), ("use_conv_bias", True), ("hidden_act", "silu")):
        if record.get(name, wanted) != wanted:
            raise UserError(
                f"config.json: {name}={record[name]} cannot be imported; only {wanted} can"
            )
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
        raise UserError(f"config.json: ssm_cfg={ssm} is not an object; correct it")
    unlike = {
        "ssm_cfg.layer": ssm.get("layer", "Mamba1") != "Mamba1",
        "rms_norm": not record.get("rms_norm", True),
        "attn_layer_idx": bool(record.get("attn_layer_idx")),
        "d_intermediate": bool(record.get("d_intermediate")),
        "ssm_cfg.bias": bool(ssm.get("bias")),
        "ssm_cfg.conv_bias": not ssm.get("conv_bias", True),
    }
    for name in (name for name, differs in unlike.items() if differs):
        raise UserError(
            f"config.json: {name} has a value that cannot be imported; give another model"
        )
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
    # In the order of transformers.
    for name in (_SAFE, _TORCH):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            shards = [name]
        elif index.is_file():
            shards = _shards(index)
        else:
            continue
        table: dict[str, np.ndarray] = {}
        for shard in shards:
            found = _load(folder / shard)
            for twice in sorted(table.keys() & found.keys()):
                raise UserError(
                    f"tensor {twice} is in {shard} and in another shard; download the model again"
                )
            table |= found
        return table
    others = [f.name for kind in ("*.safetensors", "*.bin") for f in sorted(folder.glob(kind))]
    found = f" (it contains {', '.join(others[:3])})" if others else ""
    raise UserError(
        f"{folder} contains neither {_SAFE} nor {_TORCH}, nor an index ({_SAFE}.index.json) of "
        f"shards{found}; download the missing files"
    )


def _shards(index: pathlib.Path) -> list[str]:
    files = _json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(
            f"{index} is damaged: its weight_map does not name a file for each tensor; download it "
            "again"
        )
    return sorted(set(files.values()))


def _load(file: pathlib.Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file} is missing; download it again")
    refuse_stand_in(file)
    if file.suffix != ".safetensors":
        return torch_file.load_file(file)
    safe_open = need("safetensors", "export").safe_open
    try:
        with safe_open(str(file), framework="np") as opened:
            names = list(opened.keys())
            for name in names:
                kind = opened.get_slice(name).get_dtype()
                if kind not in _DTYPES:
                    kind = kind.replace("F8_", "float8_").lower()
                    raise torch_file.unsupported(f"{file}: tensor {name}", kind)
            return {name: opened.get_tensor(name) for name in names}
    except UserError:
        raise
    except Exception as error:  # the library has one of its own
        raise UserError(f"{file} is damaged: {first_line(error)}; download it again") from error


def _json(file: pathlib.Path) -> dict[str, Any]:
    refuse_stand_in(file)
    try:
        record = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; download it again") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {first_line(error)}; download it again") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} is not a JSON object; download it again")
    return record
