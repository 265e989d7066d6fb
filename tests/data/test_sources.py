"""Every kind of bad input that a folder may hold: none ends the run or slips in as garbage."""

import gzip
import json
import os
import random
import sysconfig

import pytest

from mamba_jax.data import decode, sources
from mamba_jax.data.sources import open_source
from mamba_jax.errors import UserError


def read(path):
    """Returns (texts, summary) of a folder or file."""
    source = open_source(str(path), print)
    digests, summary = source.read()
    documents = list(source.documents())
    assert [digest for digest, _ in documents] == digests  # both readings agree
    return [text for _, text in documents], summary


@pytest.fixture
def folder(tmp_path):
    """A folder with one good file, so that there is always something left."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good text")
    return folder


def assert_skipped(folder, reason, count=1):
    texts, summary = read(folder)
    assert texts == ["good text"]
    assert summary.skipped == {reason: count}
    assert any(reason in line for line in summary.lines())


def test_takes_the_four_kinds_in_sorted_order(tmp_path):
    for name in ("z.md", "b/c.py", "a.txt", "b/a.json", "b.txt"):  # made out of order
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(name) if name.endswith("json") else name)
    texts, summary = read(tmp_path)
    assert texts == ["a.txt", "b.txt", "b/a.json", "b/c.py", "z.md"]
    assert (summary.files, summary.documents, summary.duplicates) == (5, 5, 0)
    assert summary.text_bytes == sum(map(len, texts))


NO_NUL = bytes(b or 7 for b in random.Random(0).randbytes(3_000))


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(b"text " * 10),
        b"text\0text",
        b"x" * 8_191 + b"\0",
        "no mark".encode("utf-16-le"),
        NO_NUL,
    ],
    ids=["gz", "NUL", "NUL at 8191", "UTF-16 without BOM", "random without NUL"],
)
def test_binary_is_skipped(folder, data):
    (folder / "bad.txt").write_bytes(data)
    assert_skipped(folder, "binary")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_byte_order_marks_are_honoured(tmp_path, encoding):
    text = "naïve 日本 text"
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    texts, summary = read(tmp_path)
    assert texts == [text] and not summary.repaired


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_latin_1_is_read_with_a_warning(tmp_path, encoding):
    text = "déjà vu à la carte" + ("" if encoding == "latin-1" else " “quoted” €5")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    texts, summary = read(tmp_path)
    assert texts == [text]
    assert summary.repaired == {"not UTF-8, read as cp1252": 1}
    assert any(line.startswith("warning: 1 × not UTF-8") for line in summary.lines())


def test_undefined_cp1252_and_damaged_utf_8_do_not_end_the_run(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"plain caf\xe9 \x81")
    (tmp_path / "b.txt").write_bytes("日本語のテキスト".encode()[:-1])
    (tmp_path / "c.txt").write_bytes("even".encode("utf-16") + b"x")
    texts, summary = read(tmp_path)
    assert texts == ["plain café \ufffd", "日本語のテキス\ufffd", "even\ufffd"]
    assert summary.repaired.total() == 3


@pytest.mark.parametrize("data", [b"", b" \n\t \r\n", b"\xef\xbb\xbf", "\u3000".encode()])
def test_empty_is_skipped(folder, data):
    (folder / "bad.md").write_bytes(data)
    assert_skipped(folder, "empty")


def test_missing_and_empty_folders_name_path_and_extensions(tmp_path):
    with pytest.raises(UserError, match=r"data_dir=.*/nope does not exist;.*\.txt \.py \.md"):
        open_source(str(tmp_path / "nope"), print)
    with pytest.raises(UserError, match=rf"no files to read in {tmp_path};.*\.txt \.py \.md"):
        open_source(str(tmp_path), print)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"no files .*skipped 1 × other extension: \.csv \(1\)"):
        open_source(str(tmp_path), print)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(UserError, match=r"no text in .*skipped 1 × empty: .*a\.txt.*\.txt \.py"):
        open_source(str(tmp_path), print).read()


def test_a_single_file_is_accepted(tmp_path):
    (tmp_path / "a.TXT").write_text("alone")
    (tmp_path / "b.txt").write_text("not asked for")
    (tmp_path / "c.pdf").write_text("x")
    assert read(tmp_path / "a.TXT")[0] == ["alone"]
    with pytest.raises(UserError, match=r"no files to read in .*c\.pdf .*other extension: \.pdf"):
        open_source(str(tmp_path / "c.pdf"), print)


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("mine")
    assert read("~")[0] == ["mine"]


def test_links_fifos_and_folders_with_a_files_name(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "x.txt").mkdir()
    (folder / "sub" / "x.txt" / "in.txt").write_text("inside")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "z_link.txt").symlink_to("good.txt")
    os.mkfifo(folder / "pipe.txt")  # opening it would hang
    texts, summary = read(folder)
    assert texts == ["good text", "inside"]
    assert summary.duplicates == 0  # the link was known before reading
    assert summary.skipped == {
        "link to a folder": 1,
        "broken link": 2,
        "another link to a file already taken": 1,
        "not a regular file": 1,
    }


def test_a_link_as_the_root_is_followed(tmp_path, folder):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert read(tmp_path / "link")[0] == ["good text"]


@pytest.mark.parametrize("name", [".git", ".venv", "node_modules", "__pycache__"])
def test_folders_of_tools_are_skipped_and_said(folder, name):
    (folder / "deep" / name / "more").mkdir(parents=True)
    (folder / "deep" / name / "more" / "a.py").write_text("secret")
    assert_skipped(folder, f"folder {name}")


def test_unreadable_files_and_folders(folder, monkeypatch):
    # By patching, since a superuser can read everything.
    (folder / "bad.txt").write_text("secret")
    (folder / "closed").mkdir()
    real_open, real_scandir = open, os.scandir

    def opened(path, *args):
        if str(path).endswith("bad.txt"):
            raise PermissionError(13, "Permission denied", path)
        return real_open(path, *args)

    def scanned(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real_scandir(path)

    monkeypatch.setattr(decode, "open", opened, raising=False)
    monkeypatch.setattr(sources.os, "scandir", scanned)
    assert_skipped(folder, "unreadable (Permission denied)", count=2)
    (folder / "good.txt").unlink()
    with pytest.raises(UserError, match=r"no text in .*unreadable \(Permission denied\).*bad\.txt"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"a scalar"', ["a scalar"]),
        ('{"id": 7, "text": "body", "title": "no"}', ["body"]),
        ('{"text": null, "content": "body"}', ["body"]),
        ('[{"text": "one"}, {"text": null}, null, 3, "two"]', ["one", "two"]),
        ('{"text": "one"}\n\n{"text": "two"}\r\n', ["one", "two"]),
        ('{"a": ["x", {"b": "y"}], "n": 1.5, "c": {"d": ["z", null, true]}}', ["x\n\ny\n\nz"]),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]}',
            ["user: hi\n\nassistant: yo"],
        ),
        ('{"messages": [{"role": "user", "content": null}, "odd"]}', ["user\n\nodd"]),
        ('[{"n": %s, "s": "big"}]' % ("9" * 5_000), ["big"]),
        ('{"s": "nan"}\n{"n": NaN, "s": "inf"}', ["nan", "inf"]),
        ('{"text": "lone \\ud800 half"}', ["lone \ufffd half"]),
        ('{"text": "line\\u2028one"}\n{"text": "a\u2028b"}', ["line\u2028one", "a\u2028b"]),
        ('\ufeff{"text": "marked"}', ["marked"]),
    ],
)
@pytest.mark.parametrize("extension", ["json", "JSONL"])
def test_json_keeps_only_text(tmp_path, text, expected, extension):
    (tmp_path / f"a.{extension}").write_bytes(text.encode())
    assert read(tmp_path)[0] == expected


@pytest.mark.parametrize("text", ["3", "null", "[]", "{}", '[1, {"a": " "}]', "1\n2\n"])
def test_json_without_text_is_skipped(folder, text):
    (folder / "bad.json").write_text(text)
    assert_skipped(folder, "JSON without text")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": "b",\n "c": "d', 2),
        ('[\n{"a": "b"},\n{"c": ', 3),
        ('{"a": "b"}\n{"c": "d"}\n{"e": "f', 3),
        ("not json", 1),
        ("[" * 100_000 + "]" * 100_000, 1),
        ('{"a": "b"}\n' + '{"a":' * 100_000 + "1" + "}" * 100_000, 2),
    ],
    ids=["object", "array", "lines", "prose", "deep", "deep line"],
)
def test_broken_json_is_skipped_with_path_and_line(folder, text, line):
    (folder / "bad.json").write_text(text)
    assert_skipped(folder, "broken JSON")
    assert read(folder)[1].examples["broken JSON"] == [f"{folder}/bad.json:{line}"]


def test_extensions_ignore_case_and_others_are_listed(folder):
    (folder / "A.TXT").write_text("upper")
    (folder / "b.Jsonl").write_text('"lines"')
    for name in ("a.rst", "b.rst", "c.CSV", "Makefile"):
        (folder / name).write_text("ignored")
    texts, summary = read(folder)
    assert texts == ["upper", "lines", "good text"]
    assert summary.lines()[-1] == "skipped 4 × other extension: .rst (2), none (1), .csv (1)"


def test_exact_duplicates_are_left_out_and_counted(folder):
    (folder / "copy.md").write_text("good text")
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfgood text")
    (folder / "records.json").write_text('["good text", "new", "new"]')
    texts, summary = read(folder)
    assert texts == ["good text", "new"]
    assert (summary.documents, summary.duplicates) == (2, 4)
    assert "4 exact duplicates left out" in summary.lines()[0]


def test_names_that_are_not_unicode_can_be_printed(folder):
    with open(os.fsencode(folder) + b"/\xff.txt", "wb") as file:
        file.write(b"\0")
    _, summary = read(folder)
    assert "\\udcff.txt" in "\n".join(summary.lines()).encode("utf-8").decode()


def test_many_examples_are_cut_short(folder):
    for i in range(10):
        (folder / f"{i}.txt").write_text("")
    line = read(folder)[1].lines()[1]
    assert line.startswith("skipped 10 × empty: ") and line.endswith("2.txt, …")


def test_the_default_is_data_else_the_standard_library_said_aloud(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = []
    source = open_source("", log.append)
    assert "standard library" in log[0] and "./data" in log[0]
    library = sysconfig.get_path("stdlib")
    assert all(path.startswith(library) and path.endswith(".py") for path in source.files)
    parts = [path[len(library) :].split(os.sep)[:-1] for path in source.files]
    assert not {"test", "tests", "site-packages"} & {part for path in parts for part in path}
    assert len(source.files) > 300  # 674 on Python 3.11

    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="no files to read in data"):  # not silently the default
        open_source("", print)
    (tmp_path / "data" / "a.txt").write_text("mine")
    assert open_source("", print).files == ("data/a.txt",)
