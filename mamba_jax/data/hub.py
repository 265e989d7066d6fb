"""From a dataset of the Hugging Face Hub, or a folder laid out like one, to documents: one a row.

Everything goes through the library ``datasets``, imported when it is needed: it takes seconds.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mamba_jax.config import DataConfig
from mamba_jax.data.sources import Summary, text_of_record
from mamba_jax.errors import UserError, did_you_mean

# Where no column was named: the first of these that the dataset has, whole.
_USUAL_COLUMNS = (
    ("text",),
    ("content",),
    ("code",),
    ("messages",),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "completion"),
    ("query", "response"),
)
_USUAL_CONFIG = "main"
_ROWS_AT_A_TIME = 1_000  # read row by row a table is ten times slower
_PATIENCE_SECS = 1.5  # for the Hub's first sign of life; the library itself would wait for 24


@dataclasses.dataclass(frozen=True)
class Rows:
    """A split of a dataset, on disk."""

    origin: str
    table: Any  # datasets.Dataset of the columns below alone
    columns: tuple[str, ...]

    def texts(self, summary: Summary) -> Iterator[str]:
        """Yields the text of each row: its columns in order, joined by a blank line."""
        row = 0
        for batch in self.table.iter(_ROWS_AT_A_TIME):
            for values in zip(*(batch[column] for column in self.columns), strict=True):
                text = "\n\n".join(filter(str.strip, map(_text, values)))
                if text:
                    summary.rows += 1
                    yield text
                else:
                    summary.skip("row without text", f"{self.origin} row {row}")
                row += 1


def _text(value: Any) -> str:
    """Returns a column's text: itself, a number's digits, rendered messages, or all its strings."""
    if isinstance(value, str | int | float):
        return str(value)
    return text_of_record({"messages": value})


def open_dataset(config: DataConfig, log: Callable[[str], None]) -> Rows:
    """Finds the split and the columns that ``config`` names; downloads what is not in the cache.

    Raises:
      UserError: if the dataset cannot be had, or has no such configuration, split or column.
    """
    name = os.path.expanduser(config.dataset)
    if not is_folder(name):
        _check_within_reach(name, log)
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _library_errors(name):
        builder = _builder(datasets, name, config.dataset_config, log)
        known = list(builder.info.splits or ())
        _check_split(name, config.dataset_split, known)
        builder.download_and_prepare()
        _check_split(name, config.dataset_split, list(builder.info.splits or ()))
        table = builder.as_dataset(split=config.dataset_split)
    columns = _columns(name, config.text_column, table.features, log)
    return Rows(
        f"dataset {name}, split {config.dataset_split}", table.select_columns(columns), columns
    )


@contextlib.contextmanager
def _library_errors(name: str) -> Iterator[None]:
    """Turns whatever ``datasets`` raises into one line: it has dozens of exceptions."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        cause = error.__cause__ or error  # the library wraps the cause of a failed build
        words = (str(cause) or type(cause).__name__).strip().splitlines()[0]
        raise UserError(f"dataset {name} cannot be loaded: {words}") from error


def _builder(datasets: Any, name: str, config: str, log: Callable[[str], None]) -> Any:
    """Returns the library's builder of one configuration.

    Where there are several and none was named, it takes the one called "default" (the library
    does that by itself) or "main".
    """
    try:
        return datasets.load_dataset_builder(name, config or None)
    except ValueError as error:
        choices = datasets.get_dataset_config_names(name)
        if config or len(choices) < 2:
            if config in choices:
                raise
            raise UserError(
                f'dataset {name} has no configuration "{config}"{did_you_mean(config, choices)} '
                f"(choices: {', '.join(choices)})"
            ) from error
    if _USUAL_CONFIG not in choices:
        raise UserError(
            f"dataset {name} has several configurations; choose one by --dataset_config: "
            + ", ".join(choices)
        )
    log(f"dataset {name} has configurations {', '.join(choices)}: taking {_USUAL_CONFIG}")
    return datasets.load_dataset_builder(name, _USUAL_CONFIG)


def _check_split(name: str, split: str, known: Sequence[str]) -> None:
    """Refuses a split that is not there, slices such as ``train[:10%]+test`` included."""
    for part in split.split("+"):
        base = re.split(r"[\[(]", part)[0].strip()
        if known and base not in (*known, "all"):
            raise UserError(
                f'dataset {name} has no split "{base}"{did_you_mean(base, known)} '
                f"(choices: {', '.join(known)}); give one by --dataset_split"
            )


def _columns(name: str, wanted: str, features: Any, log: Callable[[str], None]) -> tuple[str, ...]:
    columns = tuple(column.strip() for column in wanted.split(",") if column.strip())
    there = ", ".join(features)
    for column in columns:
        if column not in features:
            near = did_you_mean(column, features)
            raise UserError(f'dataset {name} has no column "{column}"{near} (it has: {there})')
    if columns:
        return columns
    strings = [
        column
        for column, feature in features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    only = [(strings[0],)] if len(strings) == 1 else []
    for usual in (*_USUAL_COLUMNS, *only):
        if all(column in features for column in usual):
            if usual != _USUAL_COLUMNS[0]:
                log(f"dataset {name} has no column text: taking {', '.join(usual)} (of {there})")
            return usual
    raise UserError(
        f"dataset {name} has no column text; name its columns with text by --text_column, "
        f"separated by commas (it has: {there})"
    )


def is_folder(dataset: str) -> bool:
    """Says whether a dataset is a folder here; else it is an id of the Hub.

    Raises:
      UserError: if it reads like a folder, and there is none.
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


def _check_within_reach(name: str, log: Callable[[str], None]) -> None:
    """Refuses at once what is neither on the Hub now nor in the cache: retries take long."""
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE or _is_true(os.environ.get("HF_DATASETS_OFFLINE"))
    if not offline and _answers(constants.ENDPOINT):
        return
    why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer"
    if not _is_cached(name, pathlib.Path(constants.HF_HOME)):
        raise UserError(
            f"dataset {name} is neither a folder here nor in the cache, and the Hugging Face Hub "
            f"is out of reach ({why}); go online once, or give a folder"
        )
    log(f"the Hugging Face Hub is out of reach ({why}): taking dataset {name} from the cache")
    if "datasets" not in sys.modules:  # which reads it once, when it is imported
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def _is_true(text: str | None) -> bool:
    return (text or "").upper() in ("1", "ON", "YES", "TRUE")


def _answers(endpoint: str) -> bool:
    """Says whether the host takes a connection; through a proxy there is no telling."""
    url = urllib.parse.urlsplit(endpoint)
    if urllib.request.getproxies().get(url.scheme):
        return True
    port = url.port or (443 if url.scheme == "https" else 80)
    connected = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((url.hostname, port), timeout=_PATIENCE_SECS).close()
            connected.set()

    # In a thread, since looking up a name knows no timeout.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE_SECS)
    return connected.is_set()


def _is_cached(name: str, hf_home: pathlib.Path) -> bool:
    """Says whether the library has built this dataset before: ``<namespace>___<snake_case>``."""
    cache = pathlib.Path(os.environ.get("HF_DATASETS_CACHE") or hf_home / "datasets")
    plain = lambda text: re.sub(r"[_/]", "", text).lower()
    return cache.is_dir() and any(plain(path.name) == plain(name) for path in cache.iterdir())
