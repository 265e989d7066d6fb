"""Finds trained models on disk and loads them."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from mamba_jax.checkpoints import arrays
from mamba_jax.checkpoints.arrays import Metadata
from mamba_jax.config import ModelConfig, for_inference
from mamba_jax.data.tokenizers.base import Tokenizer
from mamba_jax.data.tokenizers.load import load_saved
from mamba_jax.errors import UserError
from mamba_jax.generation.ensemble import Model
from mamba_jax.models.language_model import matmul_dtype
from mamba_jax.modules.mamba import resolve_scan


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint whose weights have not been read."""

    path: pathlib.Path
    metadata: Metadata
    tokenizer: Tokenizer

    def runnable(self, **chosen: Any) -> ModelConfig:
        """Returns the model's structure.

        Args:
          chosen: as in ``config.for_inference``; None: the checkpoint's.

        Raises:
          UserError: if a value cannot be used, or the scan does not run here.
        """
        try:
            model = for_inference(self.metadata.config.model, **chosen)
        except UserError as error:  # of an ensemble, which member
            raise UserError(f"{self.path}: {error}") from None
        resolve_scan(model, matmul_dtype(model))
        return model

    def load(self, **chosen: Any) -> Model:
        """Reads the weights, after the checks of ``runnable``."""
        model = self.runnable(**chosen)
        return Model(arrays.restore_params(self.path), model, self.tokenizer)


def find(folder: str, log: Callable[[str], None]) -> Found:
    """Finds a checkpoint and logs its path and step.

    Args:
      folder: a checkpoint, or a run's folder for its newest intact checkpoint.
      log: takes a line.

    Raises:
      UserError: if there is none.
    """
    path = arrays.resolve(folder, log)
    metadata = arrays.read_metadata(path)
    log(f"{path}: {metadata.config.name}, step {metadata.step}")
    return Found(path, metadata, load_saved(path, metadata.config.data.tokenizer))
