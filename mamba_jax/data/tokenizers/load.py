"""From a name or a folder to a tokenizer."""

import dataclasses
import functools
import os
import pathlib

import numpy as np

from mamba_jax.config import RunConfig
from mamba_jax.data.text_cuts import well_formed
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.errors import UserError, did_you_mean


class _Bytes(Tokenizer):
    """One token per UTF-8 byte."""

    def __init__(self):
        pieces = [bytes([value]) for value in range(256)]
        super().__init__("bytes", identity="bytes", eot_id=256, pieces=[*pieces, b""])

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(well_formed(text).encode("utf-8"), np.uint8).astype(np.int32)


@functools.cache
def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called ``name``, built once per process.

    Args:
      name: "gpt2", "bytes", an encoding of tiktoken such as "cl100k_base", a ``tokenizer.json`` or
        a folder with one, or an id of the Hugging Face Hub such as "EleutherAI/pythia-160m".

    Raises:
      UserError: if there is no such tokenizer, it cannot be reached, or its file is damaged.
    """
    if name == "bytes":
        return _Bytes()
    from mamba_jax.data.tokenizers import (
        tiktoken_encodings,  # tiktoken is not needed by the bytes tokenizer
    )

    if name == tiktoken_encodings.GPT2:
        return tiktoken_encodings.packaged_gpt2()
    path = pathlib.Path(os.path.expanduser(name))
    if path.is_dir() and (found := _in_folder(path, name)):  # a checkpoint's folder as well
        return found
    if os.path.sep in name or name.endswith(".json") or path.exists():
        from mamba_jax.data.tokenizers import json_tokenizer

        return json_tokenizer.load(name)
    known = ("bytes", *tiktoken_encodings.names())
    if name in known:
        return tiktoken_encodings.load(name)
    hint = did_you_mean(name, known)
    raise UserError(
        f'data.tokenizer="{name}" is not one of {", ".join(known)}, nor a tokenizer.json or a '
        f"folder with one, nor an id of the Hugging Face Hub (OWNER/NAME){hint}"
    )


def load_saved(folder: pathlib.Path, name: str) -> Tokenizer:
    """Returns a checkpoint's tokenizer: from the file in its folder, else by its name.

    Args:
      folder: the checkpoint's folder.
      name: ``data.tokenizer`` of its run.

    Raises:
      UserError: as in ``load_tokenizer``.
    """
    return _in_folder(folder, name) or load_tokenizer(name)


def _in_folder(folder: pathlib.Path, name: str) -> Tokenizer | None:
    from mamba_jax.data.tokenizers import json_tokenizer, tiktoken_encodings

    for module in (json_tokenizer, tiktoken_encodings):
        if (folder / module.FILE_NAME).is_file():
            return module.from_file(name, folder / module.FILE_NAME)
    return None


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """Sets the model's vocabulary size to the tokenizer's, including the ids that
    fill-in-the-middle adds, if the config leaves it open.

    Raises:
      UserError: if the config has fewer ids than the tokenizer.
    """
    wanted, needed = config.model.vocab_size, tokenizer.vocab_size
    if config.data.fim_rate:
        needed = max(needed, *(token + 1 for token in tokenizer.fim_ids))
    if wanted and wanted < needed:
        raise UserError(
            f"model.vocab_size={wanted} is below the {needed} ids of "
            f'data.tokenizer="{tokenizer.name}"; set 0 to match it'
        )
    model = dataclasses.replace(config.model, vocab_size=wanted or needed)
    return dataclasses.replace(config, model=model)
