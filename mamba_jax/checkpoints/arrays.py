"""Saves a training state while training continues, and restores it exactly.

Why a host copy and our own thread, not orbax's asynchronous checkpointer: the state is donated to
the next step, so it must be copied off the device before that step anyway; hash, fsync and rename
must follow the write as one unit, and an error in any of them must reach the loop.
"""

import concurrent.futures
import functools
import logging
import pathlib
import shutil
import sys
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mamba_jax.checkpoints.folder import (
    OPTIMIZER,
    PARAMS,
    Metadata,
    find_latest,
    publish,
    read_metadata,
    retain,
    unfinished_path,
    unfinished_saves,
    verify,
    write_manifest,
    write_metadata,
)
from mamba_jax.errors import UserError, first_line
from mamba_jax.models import build

__all__ = [
    "CheckpointWriter",
    "Metadata",
    "read_metadata",
    "resolve",
    "restore",
    "restore_params",
]

_LATE_WRITES_SECS = 5.0  # after a failed save, tensorstore's threads may still create files


class CheckpointWriter:
    """Writes checkpoints of one run in the background, one at a time; a context manager.

    Leaving the context waits for the save in progress.
    """

    def __init__(
        self,
        output_dir: pathlib.Path,
        *,
        keep_last: int,
        keep_every: int,
        log: Callable[[str], None],
        files: Mapping[str, bytes] = types.MappingProxyType({}),
    ):
        """
        Args:
          output_dir: exists and is locked by this run: leftovers of killed saves in it are removed.
          keep_last: as in ``TrainingConfig``.
          keep_every: as in ``TrainingConfig``.
          log: receives each completed save, from the writer's thread.
          files: name → content of further files in each checkpoint.
        """
        self._output_dir = output_dir
        self._keep = {"keep_last": keep_last, "keep_every": keep_every}
        self._log = log
        self._files = files
        self._executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        _quiet_failed_saves()
        for leftover in unfinished_saves(output_dir):
            _remove(leftover)

    def save(self, name: str, state: dict[str, Any], metadata: Metadata) -> None:
        """Copies the state to the host and starts to write it; first waits for the previous save.

        Args:
          name: the folder's name: ``step_N`` or ``final``.
          state: any pytree of arrays in a dict with the key ``params``. It may be donated as soon
            as this returns.
          metadata: for ``config.json``.

        Raises:
          UserError: if the previous save failed.
        """
        self.wait()
        # np.array copies. np.asarray and device_get only borrow the buffer on CPU, and a donated
        # step that finds it borrowed would have to copy the state itself.
        host_state = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        self._pending = self._executor.submit(self._write, name, host_state, metadata)

    def check(self) -> None:
        """Raises the error of a save that has already failed; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
          UserError: if it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown(wait=True)
        if error_type is None:
            self.wait()

    def _write(self, name: str, state: dict[str, Any], metadata: Metadata) -> None:
        target = self._output_dir / name
        unfinished = unfinished_path(self._output_dir, name)
        try:
            unfinished.mkdir()
            params = {PARAMS: state[PARAMS]}
            for part, tree in (*params.items(), (OPTIMIZER, _without_params(state))):
                _save_tree(unfinished / part, tree)
            for file, data in self._files.items():
                (unfinished / file).write_bytes(data)
            write_metadata(unfinished, metadata)
            write_manifest(unfinished)
            publish(unfinished, target)
        except (
            Exception
        ) as error:  # orbax and tensorstore report a full disk with many exception classes
            _remove(unfinished)
            raise UserError(
                f"cannot save checkpoint {target}: {_reason(error)}; earlier checkpoints are "
                "untouched: free disk space or choose another --output_dir, then --resume auto"
            ) from error
        self._log(f"saved {target}")
        try:
            retain(self._output_dir, metadata.step, **self._keep)
        except OSError as error:  # this checkpoint is complete nevertheless
            self._log(f"warning: cannot remove older checkpoints: {_reason(error)}")


@functools.cache
def _quiet_failed_saves() -> None:
    """From now on, keeps a failed save's tracebacks off standard error: its error is raised.

    Orbax logs the error in each of its threads; tensorstore prints one for every other pending
    write, because the event loop that waited for it is closed, or asyncio logs that nothing
    awaited it.
    """
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in str(record.msg))
    unawaited = "exception was never retrieved"
    logging.getLogger("asyncio").addFilter(lambda record: unawaited not in str(record.msg))
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = quiet


def _without_params(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != PARAMS}


def _save_tree(path: pathlib.Path, tree: Any) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.StandardSave(tree))


def _reason(error: Exception) -> str:
    if "No space left on device" in str(error):
        return "no space left on the device"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, as far as possible: what stays is removed by the next run."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    deadline = time.monotonic() + _LATE_WRITES_SECS
    while path.exists() and time.monotonic() < deadline:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            time.sleep(0.05)


def restore(path: pathlib.Path, abstract_state: dict[str, Any]) -> dict[str, Any]:
    """Reads a training state back, onto the devices that the shardings name.

    Args:
      path: the checkpoint folder.
      abstract_state: the tree that was saved, of ``jax.ShapeDtypeStruct``. A leaf without a
        sharding goes to the first device.

    Returns:
      The tree of ``jax.Array``, equal to the saved one bit for bit.

    Raises:
      UserError: if a file is damaged or missing (named), or the arrays are of another structure.
    """
    verify(path)
    params = _load_tree(path / PARAMS, abstract_state[PARAMS])
    return {PARAMS: params, **_load_tree(path / OPTIMIZER, _without_params(abstract_state))}


def restore_params(path: pathlib.Path | str, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Reads only the parameters, given only the folder: ``config.json`` describes the model.

    Args:
      path: a checkpoint folder (see ``resolve``).
      sharding: the sharding of every array; the first device by default.

    Returns:
      Nested dict of float32 arrays, as ``models.build.init`` makes it.

    Raises:
      UserError: if a file is damaged or missing (named).
    """
    path = pathlib.Path(path)
    verify(path, only=("config.json", f"{PARAMS}/"))
    abstract = build.abstract_params(read_metadata(path).config.model)
    if sharding is not None:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
        )
    return _load_tree(path / PARAMS, abstract)


def _load_tree(path: pathlib.Path, abstract: Any) -> Any:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    # ShapeDtypeStructs, not numpy arrays: with those orbax silently accepts a wrong shape.
    targets = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or first
        ),
        abstract,
    )
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path.absolute(), args=ocp.args.StandardRestore(targets))
    except ValueError as error:
        raise UserError(
            f"checkpoint {path.parent} does not hold the arrays of this model: {first_line(error)}"
        ) from error


def resolve(path: pathlib.Path | str, log: Callable[[str], None]) -> pathlib.Path:
    """Returns the checkpoint that a path means: itself, or the newest intact one of a run in it.

    Raises:
      UserError: if there is none.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist; give a step_N or final folder")
    if (path / "config.json").is_file() and (path / PARAMS).is_dir():
        return path
    latest = find_latest(path, log)
    if latest is None:
        raise UserError(f"no checkpoint in {path}; give a step_N or final folder or their parent")
    return latest
