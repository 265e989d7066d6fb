"""Libraries that only some formats need."""

import importlib
from typing import Any

from mamba_jax.errors import UserError


def need(name: str, extra: str) -> Any:
    """Imports a module.

    Raises:
      UserError: if it is not installed, naming the extra of this package that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is missing ({error}): pip install 'mamba_jax[{extra}]'"
        ) from error
