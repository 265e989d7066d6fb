"""The recogniser of records: one text and one loss mask, from files and from datasets."""

import datetime
import decimal
import json
import pathlib
import shutil

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from mamba_jax.config import DataConfig
from mamba_jax.data.sources.chats import chat_text
from mamba_jax.data.sources.hub import open_dataset
from mamba_jax.data.sources.readers import pieces
from mamba_jax.data.sources.records import (
    CHAT_NOT_UNDERSTOOD,
    CHOICE_BY_NUMBER,
    CHOSEN_ALONE,
    LOOSE,
    UNDESIRABLE,
    WITHOUT_ANSWER,
    Document,
    document_of,
    document_of_columns,
)
from mamba_jax.data.summary import DataSummary
from mamba_jax.errors import UserError
from tests.support.reading import documents_of

CASES = pathlib.Path(__file__).parent / "cases"
BROKEN_LINE = "broken JSON line"


def masked(text: str) -> tuple[str, bool]:
    return text, False


def target(text: str) -> tuple[str, bool]:
    return text, True


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> pathlib.Path:
    """A working folder, with the library's cache inside it."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path


def by_file(path: pathlib.Path) -> tuple[list, DataSummary]:
    summary = DataSummary("")
    return documents_of(pieces(str(path), summary)), summary


def by_dataset(path: pathlib.Path, **config) -> tuple[list, DataSummary]:
    """Reads a file as the split of a dataset."""
    folder = pathlib.Path("org") / path.stem
    if not folder.is_dir():
        folder.mkdir(parents=True)
        shutil.copy(path, folder / f"train{path.suffix}")
    summary = DataSummary("")
    rows = open_dataset(
        DataConfig(dataset=str(folder), cache_dir="cache", **config), lambda line: None
    )
    return [doc for part in rows.parts() for doc in documents_of(part.pieces(summary))], summary


# name → (documents, warnings)
EXPECTED = {
    "answer_is_a_number.jsonl": (
        [[masked(f"What is {i} plus one?"), target(f"\n\n{i + 1}")] for i in range(4)],
        {},
    ),
    "answer_key_first.jsonl": ([[masked("Which colour?"), target("\n\nIt is red.")]], {}),
    "chat_array_per_line.jsonl": (
        [
            [
                masked(f"user: Which colour has number {i}?\n\nassistant:"),
                target(f" Number {i} is {c}."),
            ]
            for i, c in enumerate(("red", "green", "blue", "white"))
        ],
        {},
    ),
    "chat_beside_empty_text.jsonl": (
        [[masked("user: Hello.\n\nassistant:"), target(" Good day.")]],
        {},
    ),
    "chat_ends_with_user.jsonl": (
        [
            [
                masked("user: Say four.\n\nassistant:"),
                target(" Four."),
                masked("\n\nuser: Thanks."),
            ]
        ],
        {},
    ),
    "chat_one_conversation.json": (
        [
            [
                masked("user: Say one.\n\nassistant:"),
                target(" One."),
                masked("\n\nuser: Say two.\n\nassistant:"),
                target(" Two."),
            ]
        ],
        {},
    ),
    "chat_tool_call_without_content.jsonl": (
        [
            [
                masked("user: Is it warm?\n\nassistant:"),
                target(' {"name": "weather", "arguments": {"town": 1}}'),
                masked("\n\ntool: 21 degrees\n\nassistant:"),
                target(" Yes, 21 degrees."),
            ]
        ],
        {},
    ),
    "chat_trl_conversational.jsonl": (
        [[masked(f"user: Name {i}.\n\nassistant:"), target(f" It is {i}.")] for i in range(4)],
        {},
    ),
    "empty_answers.jsonl": (
        [
            [masked("Which colour has number 4?")],
            [masked("And 5?")],
            [masked("And 6?"), target(" Blue.")],
        ],
        {WITHOUT_ANSWER: 2},
    ),
    "instruction_with_context.jsonl": (
        [
            [
                masked("Which town is named?\n\nThe bus stops in Oakfield."),
                target("\n\nOakfield."),
            ]
        ],
        {},
    ),
    "one_broken_line.jsonl": (
        [
            *[[target(f"line {i} of a longer text")] for i in range(24)],
            [target("a last good line")],
        ],
        {BROKEN_LINE: 1},
    ),
    "preference_pair.jsonl": ([[target("Good answer.")]], {CHOSEN_ALONE: 1}),
}
# The library itself refuses these.
FILES_ALONE = {"chat_array_per_line.jsonl", "one_broken_line.jsonl"}


def test_every_case_is_here():
    assert {path.name for path in CASES.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("route", [by_file, by_dataset])
@pytest.mark.parametrize("name", EXPECTED)
def test_cases(name, route):
    documents, warnings = EXPECTED[name]
    if route is by_dataset and name in FILES_ALONE:
        with pytest.raises(UserError, match="cannot be loaded"):
            route(CASES / name)
        return
    found, summary = route(CASES / name)
    assert found == documents
    assert dict(summary.lost + summary.repaired) == warnings
    assert not summary.skipped


def test_a_stream_gives_what_the_download_gives():
    for name, (documents, warnings) in EXPECTED.items():
        if name not in FILES_ALONE:
            found, summary = by_dataset(CASES / name, dataset_streaming=True)
            assert found == documents and summary.repaired == warnings


def test_warnings_name_the_record():
    path = CASES / "empty_answers.jsonl"
    _, summary = by_file(path)
    assert summary.lines()[1] == (
        f'warning: 2 × record without an answer: no target with loss_on="answer": {path} record 1, '
        f"{path} record 2"
    )
    _, summary = by_dataset(path)
    assert summary.examples[WITHOUT_ANSWER] == [
        f"dataset org/empty_answers, split train row {row}" for row in (0, 1)
    ]
    path = CASES / "one_broken_line.jsonl"
    _, summary = by_file(path)
    assert summary.lines()[1] == (
        f"warning: left out 1 × broken JSON line (3.85% of all records): {path}:25"
    )


# --- answers that are not strings -----------------------------------------------------------------

ANSWERS = {
    "int": ([1, -20, 3], ["1", "-20", "3"]),
    "int with gaps": ([1, None, 3], ["1", None, "3"]),
    "float": ([2.5, 1e-7, 4.0], ["2.5", "1e-07", "4"]),
    "bool": ([True, False, True], ["true", "false", "true"]),
    "date": (["2024-01-02", "2024-12-31", "1999-05-05"],) * 2,
    "string": (["a b", "1.50x", "c"],) * 2,
}
ONLY_TYPED = {
    "decimal": (
        [decimal.Decimal("1.50"), decimal.Decimal("2.00"), decimal.Decimal("100")],
        ["1.5", "2", "100"],
    ),
    "long decimal": (
        [decimal.Decimal("1234567890123456789012345678901234.5")],
        ["1234567890123456789012345678901234.5"],
    ),
    "date": ([datetime.date(2024, 1, 2)], ["2024-01-02"]),
    "time stamp": (
        [datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4, 5)],
        ["2024-01-02", "2024-01-02T03:04:05"],
    ),
    "time": ([datetime.time(3, 4, 5)], ["03:04:05"]),
    "bytes": (["naïve".encode(), b"x"], ["naïve", "x"]),
    "single precision": (
        pyarrow.array(np.array([0.1, 3.0, 1e10], np.float32)),
        ["0.1", "3", "10000000000"],
    ),
    "dictionary": (pyarrow.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
}


def write(path: pathlib.Path, answers) -> pathlib.Path:
    """Writes a table of questions and answers, by the file's extension."""
    questions = [f"q{i}" for i in range(len(answers))]
    table = pyarrow.table({"id": questions, "answer": answers, "question": questions})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.parquet.write_table(table, path)
    return path


def rendered(texts) -> list:
    return [
        [masked(f"q{i}"), *([target(f"\n\n{text}")] if text else [])]
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_read_alike_from_json_csv_and_parquet(kind):
    answers, texts = ANSWERS[kind]
    for extension in (".jsonl", ".csv", ".parquet"):
        path = write(pathlib.Path(f"{kind}{extension}".replace(" ", "")), answers)
        path = path.rename(f"{extension[1:]}{path}")
        assert by_dataset(path)[0] == rendered(texts), extension
        named, _ = by_dataset(path, text_column="question, answer")
        assert named == rendered(texts), extension
        if extension != ".csv":
            assert by_file(path)[0] == rendered(texts), extension


@pytest.mark.parametrize("kind", ONLY_TYPED)
def test_typed_answers_of_parquet(kind):
    answers, texts = ONLY_TYPED[kind]
    path = write(pathlib.Path("typed.parquet"), answers)
    assert by_file(path)[0] == by_dataset(path)[0] == rendered(texts)
    found, _ = by_dataset(path, text_column="answer")
    assert found == [[target(text)] for text in texts]


def test_a_column_of_bytes_is_text_or_named():
    path = pathlib.Path("bytes.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["é".encode(), b"\xff\0"], "n": [1, 2]}), path
    )
    reason = 'bytes that are not UTF-8 in "text"'
    for route in (by_file, by_dataset, lambda path: by_dataset(path, text_column="text")):
        found, summary = route(path)
        assert found == [[target("é")]] and summary.lost == {reason: 1}


def test_an_array_of_rows_with_bytes_alone_is_named_in_the_error(make):
    pathlib.Path("in").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"\xff\xfe"] * 3}), "in/a.parquet")
    with pytest.raises(UserError, match=r'3 × bytes that are not UTF-8 in "text" \(100.00% of all'):
        make("in")


# --- forms ----------------------------------------------------------------------------------------

USER, BOT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
QUESTION = [masked("user: q\n\nassistant:"), target(" a")]
FORMS = {
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        QUESTION,
    ),
    "role and text": (
        {"conversation": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]},
        QUESTION,
    ),
    "text beside empty content": (
        {"chat": [USER | {"content": "", "text": "q"}, BOT | {"content": None, "text": "a"}]},
        QUESTION,
    ),
    "chat": ({"chat": [USER, BOT], "url": "u"}, QUESTION),
    "JSON in a string": ({"messages": json.dumps([USER, BOT])}, QUESTION),
    "object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        QUESTION,
    ),
    "an unknown key": ({"data": [USER, BOT], "note": "n"}, QUESTION),
    "deep inside": ({"data": {"thread": [USER, BOT]}, "note": "n"}, QUESTION),
    "system beside a chat": (
        {"system": "s", "conversations": [USER, BOT]},
        [masked("system: s\n\nuser: q\n\nassistant:"), target(" a")],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, USER, BOT]},
        [masked("system: s\n\nuser: q\n\nassistant:"), target(" a")],
    ),
    "content in parts": (
        {"messages": [turn | {"content": [{"text": turn["content"]}]} for turn in (USER, BOT)]},
        QUESTION,
    ),
    "weight 0": (
        {"messages": [USER, BOT | {"weight": 0}, USER, BOT]},
        [masked("user: q\n\nassistant: a\n\nuser: q\n\nassistant:"), target(" a")],
    ),
    "TRL with history": (
        {"prompt": [USER, BOT, USER], "completion": [BOT]},
        [masked("user: q\n\nassistant: a\n\nuser: q\n\nassistant:"), target(" a")],
    ),
    "prompt as text, completion as turns": ({"prompt": "q", "completion": [BOT]}, QUESTION),
    "prompt as turns, completion as text": ({"prompt": [USER], "completion": "a"}, QUESTION),
    "system prompt": (
        {"response": "a", "question": "q", "system_prompt": "s", "id": "7", "license": "mit"},
        [masked("s\n\nq"), target("\n\na")],
    ),
    "system and instruction": (
        {"response": "a", "instruction": "q", "system": "s"},
        [masked("s\n\nq"), target("\n\na")],
    ),
    "Alpaca": (
        {"output": "a", "input": "i", "instruction": "q", "text": ""},
        [masked("q\n\ni"), target("\n\na")],
    ),
    "Alpaca without input": (
        {"output": "a", "input": "", "instruction": "q"},
        [masked("q"), target("\n\na")],
    ),
    "context before a question": (
        {"answers": {"text": ["a"], "answer_start": [3]}, "question": "q", "context": "c"},
        [masked("c\n\nq"), target("\n\na")],
    ),
    "problem": (
        {"solution": "a", "problem": "q", "answer": "4", "url": "u"},
        [masked("q"), target("\n\na")],
    ),
    "the answer that is there": (
        {"solution": None, "problem": "q", "answer": 4},
        [masked("q"), target("\n\n4")],
    ),
    "query": ({"response": "a", "query": "q", "type": "t"}, [masked("q"), target("\n\na")]),
    "input and output": ({"output": "a", "input": "q"}, [masked("q"), target("\n\na")]),
    "number as text": ({"text": 2.50}, [target("2.5")]),
    "content": ({"text": None, "content": "c", "meta": {"a": "b"}}, [target("c")]),
    "no known key but one": ({"id": "7", "url": "u", "license": "mit", "body": "b"}, [target("b")]),
}  # fmt: skip


def routes(record, tmp: pathlib.Path) -> list[Document]:
    """Returns the document of a record by itself, with its keys reversed, and as a row."""
    import datasets

    row = datasets.Dataset.from_list([record])[0]
    return [document_of(each) for each in (record, dict(reversed(record.items())), row)]


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, place):
    record, parts = FORMS[name]
    for document in routes(record, place):
        assert document == Document(parts)
    path = place / "form.jsonl"
    path.write_text(json.dumps(record) + "\n")
    if len([key for key in record if key not in ("id", "url", "license")]) == 1 or (
        name not in ("an unknown key", "deep inside")
    ):
        assert by_dataset(path)[0] == by_file(path)[0] == [parts]


def call(**function) -> dict:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": function}]}


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        (
            call(name="f", arguments='{"b": 1, "a": [2]}'),
            '{"name": "f", "arguments": {"b": 1, "a": [2]}}',
        ),
        (call(name="f", arguments={"b": "é", "a": None}), '{"name": "f", "arguments": {"b": "é"}}'),
        (call(name="f", arguments="not JSON"), '{"name": "f", "arguments": "not JSON"}'),
        (call(name="f"), '{"name": "f", "arguments": {}}'),
        (call(name="f") | {"content": "So:"}, 'So:\n{"name": "f", "arguments": {}}'),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            '{"name": "f", "arguments": {}}',
        ),
        (
            BOT | {"content": [{"type": "tool_use", "name": "f", "input": {"a": 1}}]},
            '{"name": "f", "arguments": {"a": 1}}',
        ),
        ({"from": "function_call", "value": "{}"}, "{}"),
    ],
)  # fmt: skip
def test_tool_calls_are_lines_of_json_by_the_assistant(turn, text):
    expected = [masked("user: q\n\nassistant:"), target(f" {text}")]
    assert document_of({"messages": [USER, turn]}) == Document(expected)
    assert chat_text([USER, turn]) == f"user: q\n\nassistant: {text}"


@pytest.mark.parametrize(
    "chat",
    [
        [USER, "odd"],
        [USER, {"role": 3, "content": "x"}],
        [USER, {"role": "assistant", "reply": "x"}],
        [USER, {"content": "x"}],
        [{"speaker": "Ann", "words": "x"}],
        [USER, {"role": "assistant", "content": {"image": "x"}, "tool_calls": "x"}],
        [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}],
        {"role": ["user"], "content": ["a", "b"]},
        json.dumps([USER, {"role": "assistant", "reply": "x"}]),
    ],
)
def test_a_chat_that_cannot_be_parsed_is_skipped_and_counted(chat, place):
    assert document_of({"id": "x", "messages": chat}).skip == CHAT_NOT_UNDERSTOOD
    path = place / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + json.dumps({"messages": chat}))
    found, summary = by_file(path)
    assert found == [[target("good")]] and summary.lost == {CHAT_NOT_UNDERSTOOD: 1}
    assert summary.examples == {CHAT_NOT_UNDERSTOOD: [f"{path} record 2"]}


def test_lists_that_only_have_roles_are_not_chats():
    record = {"film": "f", "credits": [{"role": "director", "person": "p"}]}
    assert document_of(record) == Document([target("f\n\ndirector\n\np")], (LOOSE,))


REJECTED = "never train on this"


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"chosen": "a", "rejected": REJECTED}, [target("a")]),
        ({"rejected": REJECTED, "chosen": "a", "prompt": "q"}, [masked("q"), target("\n\na")]),
        (
            {"system": "s", "question": "q", "chosen": "a", "rejected": REJECTED},
            [masked("s\n\nq"), target("\n\na")],
        ),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT | {"content": REJECTED}]}, QUESTION),
        (
            {"prompt": "q", "chosen": [USER, BOT], "rejected": [BOT | {"content": REJECTED}],
             "messages": [USER, BOT]},
            QUESTION,
        ),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [BOT | {"content": REJECTED}]}, QUESTION),
        ({"prompt": "q", "chosen": [BOT], "rejected": [BOT | {"content": REJECTED}]}, QUESTION),
        (
            {"conversations": [{"from": "human", "value": "q"}],
             "chosen": {"from": "gpt", "value": "a"},
             "rejected": {"from": "gpt", "value": REJECTED}},
            QUESTION,
        ),
    ],
)  # fmt: skip
def test_the_chosen_answer_of_a_preference_pair_is_the_target(record, parts, place):
    for document in routes(record, place):
        assert document == Document(parts, (CHOSEN_ALONE,))
    path = place / "pair.jsonl"
    path.write_text(json.dumps(record) + "\n")
    for route in (by_file, by_dataset):
        found, summary = route(path)
        assert found == [parts] and summary.repaired == {CHOSEN_ALONE: 1}


def test_records_that_must_not_be_trained_on_are_skipped_and_counted():
    bad = {"prompt": "q", "completion": REJECTED, "label": False}
    assert document_of(bad).skip == UNDESIRABLE
    assert document_of(bad | {"label": True}).segments == [masked("q"), target(f"\n\n{REJECTED}")]
    assert document_of({"rejected": REJECTED}).is_blank
    assert document_of({"rejected": REJECTED, "note": "n"}).segments == [target("n")]
    choice = {"question": "q", "choices": ["x", "y"], "answer": 1}
    assert document_of(choice).skip == CHOICE_BY_NUMBER
    assert document_of(choice | {"answer": "y"}).segments == [masked("q"), target("\n\ny")]


def test_records_of_no_known_form():
    assert document_of({"title": "t", "body": "b", "id": "7", "n": 3}) == Document(
        [target("t\n\nb")], (LOOSE,)
    )
    for record, text in (
        ({"question": "q", "id": "7"}, "q"),
        ({"input": "i", "instruction": "q"}, "q\n\ni"),
        ({"question": "q", "context": "c", "system": "s"}, "s\n\nc\n\nq"),
    ):
        assert document_of(record) == Document([masked(text)], (WITHOUT_ANSWER,))
    assert document_of({"question": "q", "body": "b"}).warnings == (LOOSE,)
    assert document_of(["x", {"a": "y", "url": "u"}]) == Document([target("x\n\ny")])
    for blank in (None, 3, "", " ", [], {}, {"text": " "}, {"text": None, "title": "t"}, [1, 2]):
        assert document_of(blank).is_blank


def test_a_chat_without_content_is_blank():
    assert document_of({"messages": [{"role": "user", "content": None}]}) == Document()
    left_out = [USER, {"role": "assistant", "content": ""}, BOT]
    assert document_of({"messages": left_out}).segments == QUESTION


def test_halves_of_characters_are_joined_or_replaced():
    halves = "\ud83d\ude00 \ud800"
    for record in ({"text": halves}, [halves], {"question": "", "answer": halves}):
        assert document_of(record).segments == [target("😀 \ufffd")]
    assert document_of_columns({"a": halves}, ("a",)).segments == [target("😀 \ufffd")]


def test_the_last_of_several_named_columns_is_the_answer():
    row = {"a": "x ", "b": "\n", "c": 3, "d": ["z", None]}
    of = lambda *columns: document_of_columns(row, columns)
    assert of("a", "b", "c", "d") == Document([masked("x \n\n3"), target("\n\nz")])
    assert of("d", "a") == Document([masked("z"), target("\n\nx ")])
    assert of("a") == Document([target("x ")])
    assert of("a", "b") == Document([masked("x ")], (WITHOUT_ANSWER,))
    assert document_of_columns({"q": None, "a": "only"}, ("q", "a")).segments == [target("only")]
    chat = {"turns": json.dumps([USER, BOT]), "title": "t"}
    assert document_of_columns(chat, ("turns",)).segments == QUESTION
    assert document_of_columns(chat, ("title", "turns")).segments == QUESTION
