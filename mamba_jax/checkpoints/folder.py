"""A checkpoint as a folder: its names, its two JSON files, and how it appears atomically.

::

    <output_dir>/step_5000/          also final/
        params/                      orbax: the parameters; generation reads nothing else
        optimizer/                   orbax: everything else of the training state
        config.json                  what is needed to rebuild model, tokenizer and run
        tokenizer.json, …            files of a tokenizer that is not part of the package
        MANIFEST.json                a hash of every other file; its presence means "complete"

Nothing here knows about arrays, so looking for a checkpoint costs no import of JAX.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import xxhash

import mamba_jax
from mamba_jax.config import RunConfig, from_dict, to_dict
from mamba_jax.errors import UserError
from mamba_jax.files import fsync, write_atomic

FORMAT = 2  # of the checkpoint folder; increased when an older program can no longer read it
_OLDEST = 2  # readable format: earlier token tables had no padding rows
FINAL = "final"
PARAMS = "params"
OPTIMIZER = "optimizer"
_CONFIG = "config.json"
_MANIFEST = "MANIFEST.json"
_UNFINISHED = ".tmp-"
_STEP_NAME = re.compile(r"step_(\d+)")


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What ``config.json`` holds."""

    config: RunConfig  # as requested, with the tokenizer's real vocab_size
    step: int  # optimizer steps taken
    samples_seen: int  # windows consumed: the position in the data
    data_fingerprint: str  # of the corpus that they came from
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of this very step
    # What the planner chose for the device: group → field → value.
    layout: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    device: str = ""  # for which it was chosen
    tokenizer_identity: str = ""  # as in ``data.tokenizer.Tokenizer``

    @property
    def laid_out(self) -> RunConfig:
        """The config with the layout that the run had."""
        return self.lay_out(self.config)

    def lay_out(self, config: RunConfig) -> RunConfig:
        """Returns a run with the layout that this one had."""
        values = to_dict(config)
        for group, fields in self.layout.items():
            values[group] |= fields
        return from_dict(values)


def layout_of(requested: RunConfig, planned: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns the fields of groups in which a planned run differs from the requested one."""
    before, after = to_dict(requested), to_dict(planned)
    changed = {
        group: {name: new for name, new in fields.items() if new != before[group][name]}
        for group, fields in after.items()
        if isinstance(fields, dict)
    }
    return {group: fields for group, fields in changed.items() if fields}


def step_name(step: int) -> str:
    """Returns the folder's name for the checkpoint of a step."""
    return f"step_{step}"


def unfinished_path(output_dir: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the folder in which a checkpoint is written until it is complete."""
    return output_dir / f"{_UNFINISHED}{name}"


def unfinished_saves(output_dir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the leftovers of killed saves."""
    return sorted(output_dir.glob(f"{_UNFINISHED}*"))


def list_checkpoints(output_dir: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """Returns (step, folder), newest first, intact or not; ``final`` before an equal step.

    A ``final`` whose step is unreadable comes first, so that the search reports its damage.
    """
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        if not path.is_dir():
            continue
        if match := _STEP_NAME.fullmatch(path.name):
            found.append((int(match[1]), False, path))
        elif path.name == FINAL:
            found.append((_read_step(path), True, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _read_step(path: pathlib.Path) -> int:
    try:
        return int(json.loads((path / _CONFIG).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 2**62


def write_metadata(path: pathlib.Path, metadata: Metadata) -> None:
    """Writes ``config.json`` into the folder."""
    record = {
        "format": FORMAT,
        "step": metadata.step,
        "samples_seen": metadata.samples_seen,
        "data_fingerprint": metadata.data_fingerprint,
        "tokenizer": metadata.config.data.tokenizer,
        "tokenizer_identity": metadata.tokenizer_identity,
        "metrics": dict(metadata.metrics),
        "layout": dict(metadata.layout),
        "device": metadata.device,
        "versions": {
            "mamba_jax": mamba_jax.__version__,
            **{name: _version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        },
        "config": to_dict(metadata.config),
    }
    (path / _CONFIG).write_text(json.dumps(record, indent=2) + "\n")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # built from source without metadata
        return "unknown"


def read_metadata(path: pathlib.Path) -> Metadata:
    """Reads ``config.json`` of a checkpoint folder.

    Raises:
      UserError: if it is missing, unreadable or of a newer format.
    """
    file = path / _CONFIG
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint: it has no {_CONFIG}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged: {_CONFIG} is unreadable") from error
    try:
        if record["format"] > FORMAT:
            raise UserError(
                f"checkpoint {path} has format {record['format']}, made by mamba_jax "
                f"{record['versions']['mamba_jax']}; this one, {mamba_jax.__version__}, reads "
                f"up to format {FORMAT}: update it"
            )
        if record["format"] < _OLDEST:
            raise UserError(
                f"checkpoint {path} has format {record['format']}, made by mamba_jax "
                f"{record['versions']['mamba_jax']}, which this one, {mamba_jax.__version__}, no "
                "longer reads: continue with the version that made it, or train again"
            )
        return Metadata(
            config=from_dict(record["config"]),
            step=int(record["step"]),
            samples_seen=int(record["samples_seen"]),
            data_fingerprint=record["data_fingerprint"],
            metrics=record["metrics"],
            layout=record.get("layout", {}),  # older checkpoints lack it
            device=record.get("device", ""),
            tokenizer_identity=record.get("tokenizer_identity", ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {path}: in {_CONFIG}, {error} is missing or invalid"
        ) from error


def write_manifest(path: pathlib.Path) -> None:
    """Writes ``MANIFEST.json``, then forces every file and folder in ``path`` to the disk."""
    files = {name: _hash(path / name) for name in _files(path)}
    record = {"format": FORMAT, "hash": "xxh3_128", "files": files}
    (path / _MANIFEST).write_text(json.dumps(record, indent=1) + "\n")
    for folder, _, names in os.walk(path):
        for name in (*names, ""):  # "": the folder itself, for its entries
            fsync(pathlib.Path(folder) / name)


def verify(path: pathlib.Path, only: tuple[str, ...] = ("",)) -> None:
    """Compares the files of a checkpoint with its manifest.

    Orbax restores a flipped bit silently; this function reports it.

    Args:
      path: the checkpoint folder.
      only: prefixes of the names to compare; every file by default.

    Raises:
      UserError: naming the folder and the first missing, damaged or surplus file.
    """
    if not (path / _MANIFEST).is_file():
        raise UserError(f"checkpoint {path} is incomplete: it has no {_MANIFEST}")
    try:
        record = json.loads((path / _MANIFEST).read_text())
        listed: dict[str, str] = dict(record["files"])
        known = record["format"] == FORMAT and record["hash"] == "xxh3_128"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {_MANIFEST} is unreadable") from error
    if not known:
        raise UserError(f"checkpoint {path}: {_MANIFEST} is damaged or of a newer mamba_jax")
    present = set(_files(path))
    for name in sorted(listed.keys() | present):
        if not name.startswith(only):
            continue
        if name not in present:
            raise UserError(f"checkpoint {path} is damaged: {name} is missing")
        if name not in listed:
            raise UserError(f"checkpoint {path} is damaged: {name} is not in its {_MANIFEST}")
        try:
            intact = _hash(path / name) == listed[name]
        except OSError as error:
            raise UserError(f"checkpoint {path} cannot be read: {name}: {error}") from error
        if not intact:
            raise UserError(f"checkpoint {path} is damaged: {name} does not match its hash")


def _files(path: pathlib.Path) -> list[str]:
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if name != _MANIFEST)


def _hash(file: pathlib.Path) -> str:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def publish(unfinished: pathlib.Path, target: pathlib.Path) -> None:
    """Gives a complete, fsynced folder its name: after a crash it exists completely or not at all.

    An existing ``final`` of a shorter run is renamed to its ``step_N``, unless an intact ``step_N``
    exists: at every moment one of the two does. An existing ``step_N`` is an older save of the same
    step and is replaced.
    """
    if target.exists() and target.name == FINAL:
        as_step = target.with_name(step_name(_read_step(target)))
        if _is_intact(as_step):
            shutil.rmtree(target)
        else:
            if as_step.exists():
                shutil.rmtree(as_step)
            target.rename(as_step)
    elif target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    fsync(target.parent)


def _is_intact(path: pathlib.Path) -> bool:
    try:
        verify(path)
    except (UserError, OSError):
        return False
    return True


def find_latest(
    output_dir: pathlib.Path, log: Callable[[str], None], before: int | None = None
) -> pathlib.Path | None:
    """Returns the newest intact checkpoint of a run, or None.

    Args:
      output_dir: the run's folder.
      log: receives each damaged or partial checkpoint that was skipped.
      before: consider only checkpoints of earlier steps.
    """
    for path in unfinished_saves(output_dir):
        log(f"skipped {path}: an interrupted save")
    for step, path in list_checkpoints(output_dir):
        if before is not None and step >= before:
            continue
        try:
            verify(path)
        except UserError as error:
            log(f"skipped: {error}")
        else:
            return path
    return None


def retain(output_dir: pathlib.Path, newest: int, *, keep_last: int, keep_every: int) -> None:
    """Deletes surplus ``step_N`` folders and records the best checkpoint in ``best.json``.

    Kept are the ``keep_last`` newest, multiples of ``keep_every``, the one of lowest eval loss, and
    ``final`` always.

    Args:
      output_dir: the run's folder.
      newest: the step just saved. Later ones, remains of a damaged end, are not touched: counting
        them could delete the last good one.
    """
    steps = [(step, path) for step, path in list_checkpoints(output_dir) if step <= newest]
    best = _write_best(output_dir, steps)
    ordinary = [(step, path) for step, path in steps if path.name != FINAL]
    for step, path in ordinary[keep_last:]:
        if path != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path)


def _write_best(
    output_dir: pathlib.Path, steps: list[tuple[int, pathlib.Path]]
) -> pathlib.Path | None:
    losses: dict[pathlib.Path, tuple[float, int]] = {}
    for step, path in steps:
        try:
            record: dict[str, Any] = json.loads((path / _CONFIG).read_text())
            losses[path] = (float(record["metrics"]["eval_loss"]), step)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not evaluated at its step, or damaged
    if not losses:
        return None
    best = min(losses, key=lambda path: losses[path])
    eval_loss, step = losses[best]
    text = json.dumps({"checkpoint": best.name, "step": step, "eval_loss": eval_loss})
    write_atomic(output_dir / "best.json", text + "\n")
    return best
