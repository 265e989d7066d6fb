"""Datasets through the library's own loading, from folders laid out like those of the Hub."""

import json
import pathlib
import pickle
import socket
import sys
import threading

import pytest

from mamba_jax.config import DataConfig, SourceConfig
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.sources import hub_access, hub_table
from mamba_jax.data.sources.hub import open_dataset
from mamba_jax.data.summary import DataSummary
from mamba_jax.errors import UserError
from tests.support.reading import documents_of, texts_of

ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}.", "id": i} for i in range(40)]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """A working folder, with the library's cache inside it."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path


def put(name: str, **splits: list[dict]) -> str:
    """Writes a dataset as a folder with one file of JSON lines a split; returns its id."""
    folder = pathlib.Path(name)
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def rows_of(name: str, **config) -> tuple[list[str], DataSummary, list[str]]:
    """Returns (documents, summary, log)."""
    log: list[str] = []
    rows = open_dataset(DataConfig(dataset=name, **config), log.append)
    summary = DataSummary(rows.origin)
    return [text for part in rows.parts() for text in texts_of(part.pieces(summary))], summary, log


def error_of(name: str, **config) -> str:
    with pytest.raises(UserError) as error:
        rows_of(name, **config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_are_joined_by_a_blank_line():
    name = put("org/name", train=ROWS)
    texts, summary, log = rows_of(name, text_column="instruction, output")
    assert texts == [f"Say {i}.\n\nIt is {i}." for i in range(40)]
    assert summary.rows == 40 and not summary.skipped and not log
    assert rows_of(name, text_column="output")[0][3] == "It is 3."
    assert rows_of(name, text_column="output,id")[0][3] == "It is 3.\n\n3"


def test_rows_without_text_are_skipped_and_counted():
    rows = [{"a": "x", "b": None}, {"a": None, "b": " \n"}, {"a": "y", "b": "z"}]
    texts, summary, _ = rows_of(put("org/gaps", train=rows), text_column="a,b")
    assert texts == ["x", "y\n\nz"]
    assert summary.rows == 2 and summary.skipped == {"row without text": 1}
    assert summary.examples["row without text"] == ["dataset org/gaps, split train row 1"]


def test_messages_are_rendered():
    messages = [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]
    texts, _, log = rows_of(put("org/chat", train=[{"n": 1, "messages": messages}]))
    assert texts == ["user: hi\n\nassistant: yo"]
    assert log == ["dataset org/chat has no column text: using messages (of n, messages)"]


@pytest.mark.parametrize(
    ("row", "taken"),
    [
        ({"text": "t", "content": "c"}, "t"),
        ({"question": "q", "answer": "a", "source": "s"}, "q\n\na"),
        ({"source": "s", "instruction": "i", "output": "o"}, "i\n\no"),
        ({"type": "t", "query": "q", "response": "r"}, "q\n\nr"),
        ({"code": "c", "path": "p"}, "c"),
        ({"body": "b", "n": 3}, "b"),
        ({"body": "b", "id": "7", "url": "u", "license": "mit"}, "b"),
        ({"response": "r", "context": "c", "instruction": "i"}, "i\n\nc\n\nr"),
        ({"response": "r", "question": "q", "system_prompt": "s"}, "s\n\nq\n\nr"),
        ({"answer": 3, "question": "q"}, "q\n\n3"),
        ({"chosen": "c", "rejected": "r", "prompt": "p"}, "p\n\nc"),
        ({"problem": "p", "level": "5", "solution": "s"}, "p\n\ns"),
        ({"output": "o", "input": "in", "instruction": "i"}, "i\n\nin\n\no"),
        ({"question": "q", "expected_answer": "4", "generated_solution": "s"}, "q\n\ns"),
        ({"conversations": [{"from": "human", "value": "h"}], "id": "7"}, "user: h"),
        (
            {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
            "c\n\nq\n\na",
        ),
    ],
)
def test_columns_that_were_not_named_are_inferred(row, taken):
    texts, _, log = rows_of(put("org/name", train=[row]))
    assert texts == [taken] and len(log) == ("text" not in row)


def test_a_split_is_an_existing_one_or_a_part_of_it():
    name = put("org/name", train=ROWS[:30], test=ROWS[30:])
    count = lambda split: len(rows_of(name, text_column="output", dataset_split=split)[0])
    assert (count("train"), count("test"), count("train+test")) == (30, 10, 40)
    assert count("train[:10%]") == 3 and count("train[25:]") == 5
    assert error_of(name, dataset_split="validation") == (
        'dataset org/name has no split "validation" (choices: train, test); give one with '
        "--dataset_split"
    )
    assert 'did you mean "train"?' in error_of(name, dataset_split="trian[:5]")
    assert "cannot be loaded: " in error_of(name, dataset_split="train[")


def test_the_configuration_is_the_named_or_the_main_one():
    folder = pathlib.Path("org/several")
    folder.mkdir(parents=True)
    names = ("main", "other")
    lines = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in names]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    texts, _, log = rows_of("org/several")
    assert texts == ["main"]
    assert log == ["dataset org/several has configurations main, other: using main"]
    assert rows_of("org/several", dataset_config="other")[0] == ["other"]
    assert error_of("org/several", dataset_config="othr") == (
        'dataset org/several has no configuration "othr"; did you mean "other"? '
        "(choices: main, other)"
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n{lines[1]}{lines[0]}---\n".replace(
            "config_name: main", "config_name: third"
        )
    )
    assert "choose one with --dataset_config: other, third" in error_of("org/several")


def test_without_train_the_first_similarly_named_split_is_used():
    folder = pathlib.Path("org/chat")
    folder.mkdir(parents=True)
    names = ("test_sft", "train_sft", "train_gen")
    lines = [f"  - split: {name}\n    path: {name}.jsonl\n" for name in names]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{''.join(lines)}---\n"
    )
    for name in names:
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    for streaming in (False, True):
        texts, _, log = rows_of("org/chat", dataset_streaming=streaming, cache_dir="cache")
        assert texts == ["train_sft"]
        assert log == [
            "dataset org/chat has no split train: using train_sft (of test_sft, train_sft, "
            "train_gen)"
        ]
    assert rows_of("org/chat", dataset_split="train[:1]")[0] == ["train_sft"]
    assert 'has no split "validation"' in error_of("org/chat", dataset_split="validation")


def test_folders_written_by_save_to_disk_are_read():
    import datasets

    table = datasets.Dataset.from_list([{"text": f"row {i}", "n": i} for i in range(40)])
    table.save_to_disk("one")
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk("several")
    whole = [f"row {i}" for i in range(40)]
    assert rows_of("one")[0] == rows_of("several")[0] == whole
    assert rows_of("several", dataset_split="test+train[90%:]")[0] == whole[:5] + whole[36:]
    assert rows_of("one", dataset_split="train[3:5]", text_column="n,text")[0] == [
        "3\n\nrow 3",
        "4\n\nrow 4",
    ]
    assert 'no split "validation" (choices: train, test)' in error_of(
        "several", dataset_split="validation"
    )
    assert "has no configurations: leave out --dataset_config" in error_of(
        "one", dataset_config="main"
    )
    assert "cannot be loaded: " in error_of("one", dataset_split="train[")
    keys = lambda name: {part.key() for part in opened(name).parts()}
    before = keys("one")
    assert before == keys("one")
    table.map(lambda row: {"text": row["text"] + "!"}).save_to_disk("one")
    assert not before & keys("one")
    next(pathlib.Path("one").glob("*.arrow")).write_bytes(b"")
    assert "cannot be loaded: " in error_of("one")


def opened(name: str, **config):
    return open_dataset(DataConfig(dataset=name, **config), print)


def test_parts_are_stretches_of_rows(monkeypatch):
    monkeypatch.setattr(hub_table, "PART_ROWS", 16)
    monkeypatch.setattr(hub_table, "ROWS_AT_A_TIME", 5)
    name = put("org/name", train=[*ROWS[:20], {"instruction": " ", "output": None, "id": 0}])
    parts = list(opened(name).parts())
    assert [(part.start, part.stop) for part in parts] == [(0, 16), (16, 21)]
    assert parts[1].name == "dataset org/name, split train, rows 16 to 21"
    summary = DataSummary("")
    assert documents_of(parts[1].pieces(summary)) == [
        [(f"Say {i}.", False), (f"\n\nIt is {i}.", True)] for i in range(16, 20)
    ]
    assert summary.examples == {"row without text": ["dataset org/name, split train row 20"]}
    assert len({part.key() for part in parts}) == 2
    other_process = pickle.loads(pickle.dumps(parts[1]))
    assert other_process.key() == parts[1].key()
    assert texts_of(other_process.pieces(DataSummary(""))) == texts_of(
        parts[1].pieces(DataSummary(""))
    )
    assert [part.key() for part in opened(name).parts()] == [part.key() for part in parts]
    for other in ({"text_column": "output"}, {"dataset_split": "train[:20]"}):
        assert not {part.key() for part in parts} & {p.key() for p in opened(name, **other).parts()}


def test_a_loading_script_in_a_folder_is_an_error_with_a_remedy():
    pathlib.Path("org/old").mkdir(parents=True)
    pathlib.Path("org/old/old.py").write_text("raise SystemExit('must not run')")
    assert error_of("org/old") == (
        "dataset org/old is a loading script, which is not supported; put its data there as "
        ".parquet or .jsonl files"
    )


def test_mistakes_name_the_choices():
    name = put("org/name", train=[{"body": "x", "title": "y", "n": 1}])
    assert error_of(name, text_column="titel") == (
        'dataset org/name has no column "titel"; did you mean "title"? (it has: body, title, n)'
    )
    assert "with --text_column, separated by commas (it has: body, title, n)" in error_of(name)
    assert "dataset folder ./nowhere does not exist" in error_of("./nowhere")
    assert "dataset folder a/b/c does not exist" in error_of("a/b/c")
    pathlib.Path("empty").mkdir()
    assert "dataset empty cannot be loaded: " in error_of("empty")
    pathlib.Path("broken").mkdir()
    pathlib.Path("broken/train.jsonl").write_text('{"text": "x"\n{')
    assert "dataset broken cannot be loaded: " in error_of("broken")


@pytest.mark.parametrize("streaming", [False, True])
def test_files_with_different_columns_are_named_with_their_columns(streaming):
    name = put("org/mixed", first=[{"text": "one"}] * 3, second=[{"text": "two", "more": 1}] * 2)
    for no_columns in ("third.csv", "third.parquet"):
        pathlib.Path(name, no_columns).touch()
    with pytest.raises(UserError) as error:
        rows_of(name, dataset_streaming=streaming)
    assert str(error.value) == (
        "dataset org/mixed cannot be loaded: its files have different columns (first.jsonl: "
        "text; second.jsonl: text, more): give all files the same columns, or read each on its own "
        "with --data_dir org/mixed instead of --dataset (.json, .jsonl, .parquet)"
    )


def test_tables_with_different_columns_are_named_or_read_by_their_files(corpus_of):
    import pyarrow
    from pyarrow import parquet

    pathlib.Path("mixed").mkdir()
    texts = {
        column: [f"{column} {i}, a line that is long enough" for i in range(20)] for column in "ab"
    }
    parquet.write_table(pyarrow.table({"text": texts["a"]}), "mixed/a.parquet")
    parquet.write_table(pyarrow.table({"text": texts["b"], "n": [*range(20)]}), "mixed/b.parquet")
    assert "(a.parquet: text; b.parquet: text, n)" in error_of("mixed")
    assert corpus_of(data_dir="mixed")[0].summary.documents == 40  # as the error suggests


# --- without the Hub ------------------------------------------------------------------------------


def test_offline_is_reported_before_the_library_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import would fail
    assert error_of("openai/gsm8k") == (
        "dataset openai/gsm8k is neither a folder here nor in the cache, and the Hugging Face Hub "
        "is out of reach (HF_HUB_OFFLINE is set); go online once, or give a folder"
    )


def online_with(monkeypatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_an_unreachable_or_silent_hub_is_given_up_soon(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, but not listening
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        online_with(monkeypatch, endpoint)
        assert f"out of reach ({endpoint} does not answer)" in error_of("openai/gsm8k")

    silent, closing = threading.Event(), socket.socket()
    monkeypatch.setattr(hub_access, "_PATIENCE_SECS", 0.05)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: (silent.wait(20), closing)[1])
    assert "does not answer" in error_of("openai/gsm8k")  # though looking up never returns
    silent.set()


def test_a_hub_that_answers_is_used(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        online_with(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ImportError):  # of the library, which this test has removed
            rows_of("openai/gsm8k")


@pytest.mark.parametrize(
    ("answer", "reached"),
    [(b"HTTP/1.1 200 OK", True), (b"HTTP/1.1 407 Who?", True), (b"HTTP/1.1 403 No", False)],
)
def test_the_hub_is_reached_through_a_proxy(monkeypatch, answer, reached):
    online_with(monkeypatch, "https://hub.invalid")
    requested = []
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()

        def serve():
            connection, _ = proxy.accept()
            with connection:
                requested.append(connection.recv(1_000))
                connection.sendall(answer + b"\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert hub_access.out_of_reach() == (
            "" if reached else "https://hub.invalid does not answer"
        )
    assert requested[0].startswith(b"CONNECT hub.invalid:443 HTTP/1.1\r\n")


def test_a_dataset_in_the_library_cache_is_enough(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "built"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")  # and back, after the test
    (tmp_path / "built/TIGER-Lab___math_instruct").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "datasets", None)
    log: list[str] = []
    with pytest.raises(ImportError):
        open_dataset(DataConfig(dataset="TIGER-Lab/MathInstruct"), log.append)
    assert "using dataset TIGER-Lab/MathInstruct from the cache" in log[0]
    assert "nor in the cache" in error_of("TIGER-Lab/MathInstruct2")


# --- as a corpus ----------------------------------------------------------------------------------


@pytest.fixture
def corpus_of(tmp_path):
    log: list[str] = []

    def corpus_of(**config):
        log.clear()
        values = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache")} | config
        corpus = prepare(DataConfig(**values), seq_len=32, seed=0, log=log.append)
        return corpus, list(log)

    return corpus_of


def tokens_in(tmp_path) -> list[bytes]:
    return [path.read_bytes() for path in (tmp_path / "cache/tokens").rglob("tokens.bin")]


def test_a_folder_and_a_dataset_are_both_read_files_first(corpus_of, tmp_path):
    import numpy as np

    name = put("org/name", train=ROWS)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("From a file.")
    (tmp_path / "texts/b.txt").write_text("Say 3.\n\nIt is 3.")  # a row's text as well
    corpus, _ = corpus_of(dataset=name, data_dir="texts", text_column="instruction,output")
    summary = corpus.summary
    assert (summary.files, summary.rows, summary.documents, summary.duplicates) == (2, 40, 41, 1)
    assert summary.lines()[0].startswith(
        "texts and dataset org/name, split train: 2 files, 40 rows"
    )
    expected = ["From a file.", "Say 3.\n\nIt is 3."]
    expected += [f"Say {i}.\n\nIt is {i}." for i in range(40)]  # duplicates are left out later
    (tokens,) = tokens_in(tmp_path)
    assert np.frombuffer(tokens, np.uint16).tolist() == [
        token for text in expected for token in (256, *text.encode())
    ]


def test_a_dataset_alone_ignores_the_data_folder_and_logs_it(corpus_of, tmp_path):
    name = put("org/name", train=ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("not asked for")
    corpus, log = corpus_of(dataset=name, text_column="output")
    assert corpus.summary.files == 0 and corpus.summary.documents == 40
    assert "./data is ignored because a dataset was given; --data_dir data adds it" in log


def test_split_columns_and_content_each_have_their_own_cache(corpus_of, tmp_path):
    name = put("org/name", train=ROWS, test=ROWS[:35])
    choices = [{"text_column": "output"}, {"text_column": "instruction,output"}]
    choices += [{"text_column": "output", "dataset_split": "test"}]
    fingerprints = [corpus_of(dataset=name, **choice)[0].fingerprint for choice in choices]
    assert len(set(fingerprints)) == 3 == len(tokens_in(tmp_path))
    again, log = corpus_of(dataset=name, **choices[0])
    assert again.fingerprint == fingerprints[0]
    assert not [line for line in log if line.startswith("tokenising")]
    (tmp_path / name / "train.jsonl").write_text(
        "".join(json.dumps(row | {"output": "Other " * 9}) + "\n" for row in ROWS)
        + json.dumps(ROWS[0])
        + "\n"
    )
    assert corpus_of(dataset=name, text_column="instruction,output")[0].fingerprint not in (
        fingerprints
    )


def test_a_stream_gives_the_corpus_of_the_download(corpus_of):
    name = put("org/name", train=ROWS)
    corpora = [corpus_of(dataset=name, dataset_streaming=choice) for choice in (False, True)]
    (whole, _), (streamed, log) = corpora
    assert streamed.fingerprint == whole.fingerprint and streamed.summary.rows == 40
    assert [line for line in log if line.startswith("tokenising")]
    again, log = corpus_of(dataset=name, dataset_streaming=True)
    assert again.fingerprint == whole.fingerprint
    assert not [line for line in log if line.startswith("tokenising")]


def test_a_dataset_without_text_is_an_error(corpus_of):
    name = put("org/name", train=[{"text": " ", "n": 1}])
    with pytest.raises(UserError, match=r"no text in dataset org/name, .*1 × row without text.*"):
        corpus_of(dataset=name)


def test_a_mixture_of_files_a_split_and_a_stream(place):
    """However the rows are fetched: the same window at each sample, each window once per epoch."""
    put("org/one", train=ROWS)
    put("org/two", train=[{"text": f"Second {i}. " * 9} for i in range(40)])
    (place / "texts").mkdir()
    for number in range(30):
        (place / "texts" / f"{number}.txt").write_text(f"File {number}! " * 12)

    def corpus_of(streaming: bool):
        mixture = (
            SourceConfig(data_dir="texts", weight=1.0),
            SourceConfig(dataset="org/one", text_column="instruction,output", weight=2.0),
            SourceConfig(dataset="org/two", dataset_streaming=streaming, weight=1.0),
        )
        config = DataConfig(mixture=mixture, tokenizer="bytes", cache_dir=f"cache{streaming}")
        return prepare(config, seq_len=16, seed=0, log=lambda line: None)

    loaded, streamed = corpus_of(False), corpus_of(True)
    assert len(loaded.train) == len(streamed.train) > 300
    pairs = zip(loaded.train_batches(7, 1), streamed.train_batches(7, 1), strict=False)
    found = {mark: 0 for mark in (b"File", b"Say", b"Second")}
    for _, (one, other) in zip(range(200), pairs, strict=False):
        assert one.tobytes() == other.tobytes()
    for source, mark in zip(streamed.train.sources, found, strict=True):
        text = b" ".join(bytes(t for t in w.tolist() if t < 256) for w in source)
        found[mark] = text.count(mark[:3])
    assert min(found.values()) > 20
    # One epoch of the smallest source, counted window by window.
    order = streamed._order(1, 1)
    smallest = min(range(3), key=lambda k: len(streamed.train.sources[k]))
    mine = [i for k, i in (order[n] for n in range(40 * len(loaded.train))) if k == smallest]
    length = len(streamed.train.sources[smallest])
    assert sorted(mine[:length]) == sorted(mine[length : 2 * length]) == list(range(length))
