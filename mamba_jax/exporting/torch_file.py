"""Tensors of a ``pytorch_model.bin``, read without torch and without running what it names.

The file is a zip: ``<name>/data.pkl``, a pickle of names and shapes, and ``<name>/data/<key>``, the
bytes of each storage. A pickle can name any function to be called; this reads the few that make
tensors and refuses the file at the first other one.
"""

import collections
import io
import pathlib
import pickle
import re
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mamba_jax.errors import UserError, first_line

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    # Not weights of a model, but loading them lets an error name the tensor.
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


_DTYPE = re.compile(r"(b?float|u?int|complex)\d\w*|bool|per_\w+_affine\w*")


class _Unsupported(NamedTuple):
    """Replaces a tensor or storage whose dtype numpy does not have."""

    dtype: str


def unsupported(what: str, dtype: str) -> UserError:
    """Returns the error for weights whose dtype numpy does not have."""
    return UserError(
        f"{what} has dtype {dtype}, which is not supported; convert the weights to bfloat16 or "
        "float32, or give the model from before it was quantised"
    )


def load_file(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors by name.

    Raises:
      UserError: if the file is not such a zip, is damaged, or holds anything but plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (index,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            reader = _Reader(archive, index.removesuffix("data.pkl"), path)
            found = reader.load()
    except UserError:
        raise
    except Exception as error:  # a pickle's damage can become any error at all
        if isinstance(error, OSError) and error.filename:
            raise
        raise UserError(
            f"{path} is damaged or was not saved by torch ≥ 1.6 ({first_line(error)}); download it "
            "again, or give a model.safetensors"
        ) from error
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, _Unsupported):
            raise unsupported(f"{path}: tensor {name}", value.dtype)
    if not isinstance(found, dict) or not all(isinstance(a, np.ndarray) for a in found.values()):
        raise UserError(f"{path} does not map names to tensors; give a file of weights alone")
    return dict(found)


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, prefix: str, path: pathlib.Path):
        super().__init__(io.BytesIO(archive.read(f"{prefix}data.pkl")))
        self._archive, self._prefix, self._path = archive, prefix, path
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            # For dtypes without a storage class of their own, such as float8.
            ("torch.storage", "UntypedStorage"): np.uint8,
            ("torch._utils", "_rebuild_tensor_v3"): lambda *given: given[6],
            ("torch._utils", "_rebuild_qtensor"): lambda storage, *_: storage,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name.endswith("Storage"):
            return _STORAGES.get(name, _Unsupported(name.removesuffix("Storage")))
        if module == "torch" and _DTYPE.fullmatch(name):
            return _Unsupported(name)
        raise UserError(
            f"{self._path} refers to {module}.{name}, which tensors do not need; the file may run "
            "code and was not loaded: give a model.safetensors"
        )

    def persistent_load(self, pid: Any) -> np.ndarray | _Unsupported:
        _, dtype, key, _, _ = pid
        if isinstance(dtype, _Unsupported):
            return dtype
        if key not in self._storages:
            data = self._archive.read(f"{self._prefix}data/{key}")
            self._storages[key] = np.frombuffer(data, np.dtype(dtype))
        return self._storages[key]


def _tensor(
    storage: np.ndarray | _Unsupported,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: Any,
) -> np.ndarray | _Unsupported:
    """Cuts a tensor out of its storage; strides are in elements."""
    if isinstance(storage, _Unsupported):
        return storage
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if offset < 0 or min((*shape, *strides), default=0) < 0 or last >= len(storage):
        raise ValueError("a tensor is outside its storage")
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()
