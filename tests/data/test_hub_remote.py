"""Datasets over HTTP, from a Hub in this process: what is fetched and what is refused."""

import json
import pathlib
import time

import pyarrow
import pyarrow.parquet
import pytest

from mamba_jax.config import DataConfig
from mamba_jax.data.cache import store as data_store
from mamba_jax.data.cache.store import Store
from mamba_jax.data.sources import hub_stream, hub_table
from mamba_jax.data.sources.hub_stream import open_stream
from mamba_jax.data.sources.hub_table import open_table
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from tests.data.fake_hub import FakeHub
from tests.support.reading import texts_of

ROWS_PER_FILE = (150, 220, 90, 200, 110, 90)
TEXTS = [f"Row {i} says {i * i}." for i in range(sum(ROWS_PER_FILE))]


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A Hub, and this process's libraries pointed at it, with empty caches."""
    import datasets
    from huggingface_hub import constants

    remote = FakeHub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", remote.endpoint)
    template = f"{remote.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "built"))
    for name, value in {
        "HF_ENDPOINT": remote.endpoint,
        "HF_DATASETS_CACHE": str(tmp_path / "built"),
        "HF_HUB_OFFLINE": False,
        "STREAMING_READ_MAX_RETRIES": 1,
        "STREAMING_OPEN_MAX_RETRIES": 1,
        "STREAMING_READ_RETRY_INTERVAL": 0,
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    yield remote
    remote.close()


def serve(remote: FakeHub, name: str, revision: str = "main", extension: str = "parquet"):
    """Puts files of rows on the Hub; returns their folder."""
    folder = pathlib.Path("served", name, revision)
    folder.mkdir(parents=True)
    first = 0
    for number, count in enumerate(ROWS_PER_FILE):
        rows = [{"text": text, "n": 1} for text in TEXTS[first : first + count]]
        path = folder / f"train-{number:05d}-of-00006.{extension}"
        if extension == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        first += count
    remote.repos[name, revision] = folder
    return folder


def texts_of_parts(parts) -> list[str]:
    summary = DataSummary("")
    return [text for part in parts for text in texts_of(part.pieces(summary))]


def downloaded(name: str, log=None, **config) -> list[str]:
    rows = open_table(DataConfig(dataset=name, **config), [].append if log is None else log.append)
    return texts_of_parts(rows.parts())


def error_of(open_, name: str, **config) -> str:
    with pytest.raises(UserError) as error:
        open_(DataConfig(dataset=name, **config), print)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("open_", [open_table, open_stream])
def test_gated_datasets_say_what_to_do(remote, open_):
    remote.repos["bigcode/the-stack-dedup", "main"] = "GatedRepo"
    assert error_of(open_, "bigcode/the-stack-dedup") == (
        "dataset bigcode/the-stack-dedup is gated: accept its terms on "
        "https://huggingface.co/datasets/bigcode/the-stack-dedup, then log in on this machine with "
        "`hf auth login` (or set HF_TOKEN)"
    )


@pytest.mark.parametrize("open_", [open_table, open_stream])
def test_removed_datasets_name_their_successor(remote, open_):
    assert error_of(open_, "hendrycks/competition_math") == (
        "the Hugging Face Hub has no dataset hendrycks/competition_math, or it is private; use "
        "--dataset EleutherAI/hendrycks_math instead"
    )
    assert error_of(open_, "org/typo").endswith(
        "no dataset org/typo, or it is private; check its id; if it is private, log in with "
        "`hf auth login`"
    )


@pytest.mark.parametrize("open_", [open_table, open_stream])
def test_the_parquet_copy_of_a_loading_script_is_used(remote, open_):
    script = pathlib.Path("served/org/script")
    script.mkdir(parents=True)
    (script / "script.py").write_text("raise SystemExit('must not run')")
    remote.repos["org/script", "main"] = script
    assert error_of(open_, "org/script") == (
        "dataset org/script is a loading script, which is not supported, and the Hub has no "
        "parquet copy of it (refs/convert/parquet); use another dataset with the same data"
    )
    serve(remote, "org/script", "refs/convert/parquet")
    log = []
    opened = open_(DataConfig(dataset="org/script", cache_dir="cache"), log.append)
    assert texts_of_parts(opened.parts()) == TEXTS
    assert log == [
        "dataset org/script is a loading script, which is not supported: "
        "using the Hub's parquet copy"
    ]


# --- the cache ------------------------------------------------------------------------------------


def test_a_downloaded_dataset_is_read_from_the_cache_when_offline(remote, monkeypatch):
    import datasets
    from huggingface_hub import constants

    serve(remote, "org/name")
    assert downloaded("org/name") == TEXTS
    fetched = remote.sent_bytes
    assert downloaded("org/name") == TEXTS and remote.sent_bytes == fetched
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # and restored after the test
    remote.requests.clear()
    log = []
    assert downloaded("org/name", log) == TEXTS
    assert datasets.config.HF_HUB_OFFLINE and not remote.requests
    assert "using dataset org/name from the cache" in log[0]
    began = time.monotonic()
    assert "neither a folder here nor in the cache" in error_of(open_table, "org/other")
    assert time.monotonic() - began < 2


# --- streaming ------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    for module in (hub_table, hub_stream):
        monkeypatch.setattr(module, "PART_ROWS", 100)
        monkeypatch.setattr(module, "ROWS_AT_A_TIME", 50)


def stream_of(**config):
    return open_stream(DataConfig(dataset="org/name", cache_dir="cache", **config), [].append)


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_a_stream_has_the_rows_of_the_download_and_keeps_no_copy(remote, small_parts, extension):
    serve(remote, "org/name", extension=extension)
    parts = list(taken(stream_of().parts()))
    assert texts_of_parts(stream_of().parts()) == TEXTS == downloaded("org/name")
    assert [(part.start, part.stop) for part, _ in parts] == [
        (start, start + 100) for start in range(0, 900, 100)
    ]
    assert not list(pathlib.Path("built").rglob("*.incomplete"))
    stored = sum(f.stat().st_size for f in pathlib.Path("cache").rglob("*") if f.is_file())
    assert stored < 10_000  # where the parts end, nothing of what they hold


def taken(parts, stop_after=None):
    """Yields (part, texts) as a store would go through them."""
    for number, part in enumerate(parts):
        yield part, texts_of(part.pieces(DataSummary("")))
        if number + 1 == stop_after:
            return


@pytest.mark.parametrize("extension", ["parquet", "jsonl"])
def test_a_killed_stream_resumes_where_it_stopped(remote, small_parts, extension):
    serve(remote, "org/name", extension=extension)
    undisturbed = [(part.key(), texts) for part, texts in taken(stream_of().parts())]
    pathlib.Path("cache").rename("first")
    for stop_after in (1, 4, 8):
        seen = [(part.key(), texts) for part, texts in taken(stream_of().parts(), stop_after)]
        assert seen == undisturbed[:stop_after]
        cached = {key for key, _ in seen}
        record = next(pathlib.Path("cache/streams").iterdir())
        record.write_text(record.read_text()[:-3])  # the kill came during the write
        remote.requests.clear()
        for part in (parts := stream_of().parts()):
            if part.key() not in cached:
                seen.append((part.key(), texts_of(part.pieces(DataSummary("")))))
        assert seen == undisturbed and not list(parts)
        # Complete files before the last known place are left alone, but for two that the library
        # looks at the ends of; the first file gives the columns.
        row = (stop_after - 1) * 100
        complete = sum(sum(ROWS_PER_FILE[: n + 1]) <= row for n in range(len(ROWS_PER_FILE)))
        for number in range(1, len(ROWS_PER_FILE)):
            requested = remote.asked_for(f"train-{number:05d}")
            if number >= complete:
                assert requested
            elif number < complete - 2:
                assert not requested
        next(pathlib.Path("cache/streams").iterdir()).unlink()


def tokens_of(store: Store, taken) -> list[list[int]]:
    entries = store.entries(taken)
    names = list(dict.fromkeys(name for name, _ in entries))
    documents, tokens = store.documents(entries, names), store.tokens(names)
    bounds = zip(documents.start_d, documents.end_d, strict=True)
    return [tokens[start:end].tolist() for start, end in bounds]


def test_tokenising_a_stream_resumes_after_a_kill(remote, small_parts, monkeypatch):
    monkeypatch.setattr(data_store, "SHARD_BYTES", 5_000)  # sealed every two or three parts
    serve(remote, "org/name")
    open_store = lambda: Store(pathlib.Path("cache"), load_tokenizer("bytes"), [].append)
    store = open_store()
    undisturbed = tokens_of(store, store.tokenise(stream_of().parts(), 1))
    pathlib.Path("cache").rename("first")

    def killed():
        for number, part in enumerate(stream_of().parts()):
            if number == 6:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        open_store().tokenise(killed(), 1)
    store, requested = open_store(), []
    monkeypatch.setattr(
        hub_stream.Stream,
        "batches",
        lambda self, start, stop, real=hub_stream.Stream.batches: (
            requested.append(start),
            real(self, start, stop),
        )[1],
    )
    assert tokens_of(store, store.tokenise(stream_of().parts(), 1)) == undisturbed
    assert len(undisturbed) == len(TEXTS)
    assert 200 <= requested[0] <= 600 and requested == list(range(requested[0], 900, 100))


def test_with_all_parts_in_the_cache_nothing_is_fetched(remote, small_parts, monkeypatch):
    from huggingface_hub import constants

    serve(remote, "org/name")
    cached = {part.key() for part, _ in taken(stream_of().parts())}
    remote.requests.clear()
    assert [part.key() in cached for part in stream_of().parts()] == [True] * 9
    assert not remote.asked_for("train-")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remote.requests.clear()
    offline = stream_of()
    assert [part.key() in cached for part in offline.parts()] == [True] * 9
    assert not remote.requests
    part = next(iter(offline.parts()))
    with pytest.raises(
        UserError, match=r"org/name is only partly in the cache, .*train\[:100000\]"
    ):
        list(part.pieces(DataSummary("")))
    assert "neither a folder here nor in the cache" in error_of(open_stream, "org/other")


def test_rows_of_a_split_are_shared_with_the_whole(remote, small_parts):
    serve(remote, "org/name")
    cached = {part.key() for part, _ in taken(stream_of().parts(), 5)}
    few = [
        (part.key() in cached, texts)
        for part, texts in taken(stream_of(dataset_split="train[:230]").parts())
    ]
    assert [known for known, _ in few] == [True, True, False]
    assert [text for _, texts in few for text in texts] == TEXTS[:230]
    middle = [texts for _, texts in taken(stream_of(dataset_split="train[130:260]").parts())]
    assert middle == [TEXTS[130:200], TEXTS[200:260]]
    last = [texts for _, texts in taken(stream_of(dataset_split="train[850:]").parts())]
    assert [text for texts in last for text in texts] == TEXTS[850:]
    beyond = [texts for _, texts in taken(stream_of(dataset_split="train[2000:]").parts())]
    assert beyond == []


def test_streams_of_other_content_columns_or_splits_have_other_keys(remote, small_parts):
    folder = serve(remote, "org/name")
    keys = lambda **config: {part.key() for part, _ in taken(stream_of(**config).parts())}
    first = keys()
    assert not first & keys(text_column="text,n")
    remote.repos["org/name", "main"] = folder
    assert first == keys()
    # The Hub's commit identifies the content.
    import tests.data.fake_hub as fake

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "_commit", lambda revision: "7" * 40)
        assert not first & keys()


def test_what_cannot_be_streamed_is_an_error(remote, small_parts):
    for split in ("train[:10%]", "train+test", "train[-5:]"):
        assert error_of(open_stream, "org/name", dataset_split=split, cache_dir="cache") == (
            f'data.dataset_split="{split}" cannot be streamed; give a split or rows of one, such '
            "as train[:100000]"
        )
    serve(remote, "org/name")
    assert 'has no split "tset"' in error_of(
        open_stream, "org/name", dataset_split="tset", cache_dir="cache"
    )
    assert 'has no column "txt"; did you mean "text"?' in error_of(
        open_stream, "org/name", text_column="txt", cache_dir="cache"
    )


def test_a_hub_that_stops_answering_is_one_line_and_a_restart_resumes(remote, small_parts):
    folder = serve(remote, "org/name")
    stream = stream_of()
    parts = stream.parts()
    first = [texts_of(next(parts).pieces(DataSummary(""))) for _ in range(4)]
    remote.repos["org/name", "main"] = "Gone"
    with pytest.raises(UserError) as error:
        for part in parts:
            first.append(texts_of(part.pieces(DataSummary(""))))
    assert "\n" not in str(error.value) and "org/name" in str(error.value)
    remote.repos["org/name", "main"] = folder
    assert texts_of_parts(stream_of().parts()) == TEXTS


def test_a_folder_can_be_streamed_but_not_one_from_save_to_disk(remote, small_parts):
    import datasets

    folder = serve(remote, "org/name")
    config = DataConfig(dataset=str(folder.resolve()), cache_dir="cache")
    assert texts_of_parts(open_stream(config, print).parts()) == TEXTS
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk("saved")
    pathlib.Path("saved").rename("org")
    assert "leave out --dataset_streaming" in error_of(open_stream, "org")
