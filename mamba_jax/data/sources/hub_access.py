"""Whether a dataset can be reached, and one-line messages for the errors of its library."""

import contextlib
import csv
import json
import os
import pathlib
import re
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from mamba_jax.errors import UserError, first_line

_PATIENCE_SECS = 1.5  # for the Hub's first answer; the library itself would wait 24 seconds
PARQUET_COPY = "refs/convert/parquet"  # the branch on which the Hub keeps its own conversion
# Datasets that tutorials and papers name but that no longer exist, or only as a script.
_MOVED = {
    "hendrycks/competition_math": "EleutherAI/hendrycks_math",
    "competition_math": "EleutherAI/hendrycks_math",
    "wikipedia": "wikimedia/wikipedia",
    "EleutherAI/pile": "monology/pile-uncopyrighted",
    "the_pile": "monology/pile-uncopyrighted",
}


class LoadingScript(Exception):
    """A dataset is a loading script, which the library no longer supports."""


def is_folder(dataset: str) -> bool:
    """Returns whether a dataset is a local folder; otherwise it is an id of the Hub.

    Raises:
      UserError: if the name looks like a folder that does not exist.
    """
    path = os.path.expanduser(dataset)
    if os.path.isdir(path):
        return True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"dataset folder {path} does not exist; give a folder, or an id of the Hugging Face "
            "Hub such as openai/gsm8k"
        )
    return False


def is_saved(name: str) -> bool:
    """Returns whether ``save_to_disk`` wrote a folder."""
    has = lambda file: os.path.isfile(os.path.join(name, file))
    return has("dataset_dict.json") or (has("dataset_info.json") and has("state.json"))


@contextlib.contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turns the exceptions of ``datasets``, of which there are dozens, into one-line errors."""
    try:
        yield
    except (UserError, LoadingScript, KeyboardInterrupt):
        raise
    except Exception as error:
        if "scripts are no longer supported" in str(error):
            raise LoadingScript(name) from error
        raise UserError(_explained(name, error)) from error


def _explained(name: str, error: Exception) -> str:
    cause = error.__cause__ or error  # the library wraps the cause of a failed build
    words = first_line(cause)
    kinds = {kind.__name__ for link in (error, cause) for kind in type(link).__mro__}
    if "CastError" in kinds:
        return _different_columns(name, cause)
    if os.path.isdir(name):
        return f"dataset {name} cannot be loaded: {words}"
    if "GatedRepoError" in kinds or "gated dataset" in str(error):
        return (
            f"dataset {name} is gated: accept its terms on https://huggingface.co/datasets/{name}, "
            "then log in on this machine with `hf auth login` (or set HF_TOKEN)"
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "DefunctDatasetError"}:
        remedy = moved(name) or "check its id; if it is private, log in with `hf auth login`"
        return f"the Hugging Face Hub has no dataset {name}, or it is private; {remedy}"
    if kinds & {
        "ConnectionError",
        "OfflineModeIsEnabled",
        "TransportError",
        "LocalEntryNotFoundError",
    }:
        return f"dataset {name}: the Hugging Face Hub is out of reach ({words}); try again later"
    return f"dataset {name} cannot be loaded: {words}"


def _different_columns(name: str, error: Any) -> str:
    """Returns the error message for files that the library cannot join to one table."""
    what = f"dataset {name} cannot be loaded: its files have different columns"
    if not os.path.isdir(name):
        expected, found = (
            ", ".join(columns)
            for columns in (error.requested_column_names, error.table_column_names)
        )
        return f"{what} ({expected}; then {found}): load a part of it with --dataset_config"
    kinds = {}  # columns → the first file that has them
    for path in sorted(pathlib.Path(name).rglob("*")):
        with contextlib.suppress(OSError, ValueError, ImportError, csv.Error):
            kinds.setdefault(_columns_of(path), path.relative_to(name))
    kinds.pop((), None)
    shown = "; ".join(f"{path}: {', '.join(columns)}" for columns, path in kinds.items())
    return (
        f"{what} ({shown}): give all files the same columns, or read each on its own with "
        f"--data_dir {name} instead of --dataset (.json, .jsonl, .parquet)"
    )


def _columns_of(path: pathlib.Path) -> tuple[str, ...]:
    """Returns the columns of a file; for JSON lines and CSV, those of the first line."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return tuple(parquet.read_schema(path).names)
    if path.suffix in (".csv", ".tsv"):
        with path.open(newline="") as file:
            lines = csv.reader(file, "excel" if path.suffix == ".csv" else "excel-tab")
            return tuple(next(lines, ()))
    if path.suffix in (".json", ".jsonl"):
        with path.open() as file:
            record = json.loads(file.readline())
        return tuple(record) if isinstance(record, dict) else ()
    return ()


def moved(name: str) -> str:
    """Returns what to use instead of a dataset that is known to be gone; "" for any other."""
    return f"use --dataset {_MOVED[name]} instead" if name in _MOVED else ""


def without_script(name: str) -> str:
    """Returns the error message for a dataset that is only a loading script."""
    if os.path.isdir(name):
        return (
            f"dataset {name} is a loading script, which is not supported; put its data there as "
            ".parquet or .jsonl files"
        )
    return (
        f"dataset {name} is a loading script, which is not supported, and the Hub has no parquet "
        f"copy of it ({PARQUET_COPY}); {moved(name) or 'use another dataset with the same data'}"
    )


def check_within_reach(name: str, log: Callable[[str], None]) -> None:
    """Rejects a dataset at once if it is neither reachable nor cached: retries take long."""
    from huggingface_hub import constants

    if not (why := out_of_reach()):
        return
    if not _is_cached(name, pathlib.Path(constants.HF_HOME)):
        raise UserError(unreachable(name, why))
    log(f"the Hugging Face Hub is out of reach ({why}): using dataset {name} from the cache")
    os.environ["HF_DATASETS_OFFLINE"] = "1"  # read once, when the library is imported
    if library := sys.modules.get("datasets"):
        library.config.HF_HUB_OFFLINE = True


def tokenizer_file(name: str, file: str, beside: str) -> pathlib.Path:
    """Returns the local path of a file of a model on the Hub, with ``beside`` in the same folder.

    Raises:
      UserError: if it is neither on the Hub nor in its cache.
    """
    import huggingface_hub
    from huggingface_hub import errors

    why = out_of_reach()
    get = lambda wanted: huggingface_hub.hf_hub_download(name, wanted, local_files_only=bool(why))
    what = f'data.tokenizer="{name}"'
    try:
        with contextlib.suppress(errors.EntryNotFoundError):  # also: not in the cache
            get(beside)
        return pathlib.Path(get(file))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what} is gated: accept its terms on https://huggingface.co/{name}, then log in on "
            "this machine with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{what}: the Hugging Face Hub has no such model, or it is private; check its id"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{what} is neither a file here nor in the cache, and the Hugging Face Hub is out of "
            f"reach ({why or first_line(error)}); go online once, or give a tokenizer.json"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{what}: that model has no {file}; take one that has, or convert its tokenizer"
        ) from error
    except (OSError, ValueError) as error:  # of the connection, the disk, the form of the id
        raise UserError(f"{what} cannot be downloaded: {first_line(error)}") from error


def unreachable(name: str, why: str) -> str:
    """Returns the error message for a dataset that is neither local, cached nor reachable."""
    return (
        f"dataset {name} is neither a folder here nor in the cache, and the Hugging Face Hub is "
        f"out of reach ({why}); go online once, or give a folder"
    )


def out_of_reach() -> str:
    """Returns why the Hub cannot be reached; "" if it can. Takes under two seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _is_true(os.environ.get("HF_DATASETS_OFFLINE")):
        return "HF_HUB_OFFLINE is set"
    return "" if _answers(constants.ENDPOINT) else f"{constants.ENDPOINT} does not answer"


def _is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")


def _answers(endpoint: str) -> bool:
    """Returns whether the host accepts a connection, through the proxy if one is set."""
    url = urllib.parse.urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and urllib.request.proxy_bypass(url.hostname or ""):
        proxy = None
    connected = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError, ValueError):
            if _connects(url.hostname, port, proxy if url.scheme == "https" else None):
                connected.set()

    if proxy and url.scheme == "http":
        return True  # such a proxy shows nothing before a page is requested
    # In a thread, since a name lookup has no timeout.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE_SECS)
    return connected.is_set()


def _connects(host: str | None, port: int, proxy: str | None) -> bool:
    if not proxy:
        socket.create_connection((host, port), timeout=_PATIENCE_SECS).close()
        return True
    via = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    with socket.create_connection((via.hostname, via.port or 80), _PATIENCE_SECS) as connection:
        connection.sendall(
            f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
        )
        status = connection.recv(64).split(maxsplit=2)[1:2]
    return status in ([b"200"], [b"407"])  # 407: it wants the password that we do not send


def _is_cached(name: str, hf_home: pathlib.Path) -> bool:
    """Returns whether the library has built this dataset before: ``<namespace>___<snake_case>``."""
    cache = pathlib.Path(os.environ.get("HF_DATASETS_CACHE") or hf_home / "datasets")
    plain = lambda text: re.sub(r"[_/]", "", text).lower()
    return cache.is_dir() and any(plain(path.name) == plain(name) for path in cache.iterdir())
