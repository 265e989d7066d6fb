"""Bad input and what users expect: one table, with a line for each kind of thing in folders.

``LINES`` is the list of kinds; every case belongs to one of them. A case puts files beside one good
file, so that there is always something left, and states the result.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import random
from collections.abc import Callable

import pytest

from mamba_jax.data.sources import decode
from mamba_jax.data.sources import files as sources
from mamba_jax.data.sources.records import CHAT_NOT_UNDERSTOOD, LOOSE
from mamba_jax.errors import UserError
from tests.data.conftest import words
from tests.support.reading import read_folder

LINES = (
    "binary or gz named .txt, NULs",
    "latin-1, UTF-16/UTF-8 BOM",
    "empty, white space only",
    "missing or empty directory",
    "symlinked directories, broken links, FIFOs, directories named x.txt",
    ".git, .venv, node_modules, __pycache__, .ipynb_checkpoints, site-packages, .pytest_cache",
    "unreadable file",
    "JSON lines in .json, arrays, nested, messages, scalars, null, numbers",
    "truncated JSON, 100k deep",
    "A.TXT, .jsonl, .rst",
    "file order",
    "total under one window",
    "1% under one window",
    "one big document",
)

Make = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """Files beside a good one, and what reading the folder gives.

    Attributes:
      line: of ``LINES``.
      name: of the case.
      files: name → bytes, text, or what makes it.
      texts: texts of all documents, the good one's included, in order.
      skipped, lost, repaired: of the summary.
      says: a part of one of the summary's lines.
    """

    line: str
    name: str
    files: dict[str, bytes | str | Make]
    texts: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    lost: dict[str, int] = dataclasses.field(default_factory=dict)
    repaired: dict[str, int] = dataclasses.field(default_factory=dict)
    says: str = ""


def link(target: str) -> Make:
    return lambda path: path.symlink_to(target)


BINARY, LATIN, EMPTY, MISSING, KINDS, TOOLS, UNREADABLE, JSON, BROKEN, NAMES, ORDER, *SIZES = LINES
NO_NUL = bytes(b or 7 for b in random.Random(0).randbytes(3_000))
CP1252 = {"not UTF-8, read as cp1252": 1}
DEEP = "[" * 100_000 + "]" * 100_000


def binary(name: str, data: bytes) -> Case:
    return Case(BINARY, name, {"bad.txt": data}, skipped={"binary": 1}, says="skipped 1 × binary")


def text(name: str, data: bytes, expected: str, repaired=()) -> Case:
    says = f"warning: 1 × {next(iter(repaired))}: " if repaired else ""
    return Case(LATIN, name, {"a.txt": data}, [expected], repaired=dict(repaired), says=says)


def empty(name: str, data: bytes) -> Case:
    return Case(EMPTY, name, {"bad.md": data}, skipped={"empty": 1}, says="skipped 1 × empty")


def values(name: str, data: str, *expected: str, **counts: dict[str, int]) -> Case:
    files: dict = {"a.json": data, "b.JSONL": data.replace("one", "eins")}
    texts = [*expected, *(text.replace("one", "eins") for text in expected)]
    return Case(JSON, name, files, texts, **counts)


def no_text(data: str) -> Case:
    skipped = {"JSON without text": 1}
    return Case(JSON, f"no text in {data!r}", {"bad.json": data}, skipped=skipped)


def broken(name: str, data: str, line: int) -> Case:
    skipped = {"broken JSON": 1}
    return Case(BROKEN, name, {"bad.json": data}, skipped=skipped, says=f"/bad.json:{line}")


def lines(name: str, data: str, line: int) -> Case:
    """Lines of which one is broken."""
    says = "warning: left out 1 × broken JSON line (33.33% of all records): "
    lost = {"broken JSON line": 1}
    return Case(
        BROKEN, f"line: {name}", {f"at {line}.json": data}, ["b", "d"], lost=lost, says=says
    )


def chat(*turns: dict) -> str:
    return json.dumps({"id": 1, "messages": turns})


CASES = [
    binary("gz", gzip.compress(b"text " * 10)),
    binary("NUL", b"text\0text"),
    binary("NUL at 8191", b"x" * 8_191 + b"\0"),
    binary("UTF-16 without BOM", "no mark".encode("utf-16-le")),
    binary("random without NUL", NO_NUL),
    binary("random, large", NO_NUL * 500),
    *(
        text(encoding, "naïve 日本 one".encode(encoding), "naïve 日本 one")
        for encoding in ("utf-8-sig", "utf-16", "utf-32")
    ),
    *(
        text(encoding, "\ufeffnaïve 日本".encode(encoding), "naïve 日本")
        for encoding in ("utf-16-be", "utf-32-be")
    ),
    text("latin-1", "déjà vu".encode("latin-1"), "déjà vu", CP1252),
    text("cp1252", "“déjà” €5".encode("cp1252"), "“déjà” €5", CP1252),
    text("undefined cp1252", b"plain caf\xe9 \x81", "plain café \ufffd", CP1252),
    text(
        "damaged UTF-8",
        "日本語のテキスト".encode()[:-1],
        "日本語のテキス\ufffd",
        {"damaged UTF-8, bad parts replaced": 1},
    ),
    text(
        "damaged UTF-16",
        "even".encode("utf-16") + b"x",
        "even\ufffd",
        {"damaged UTF-16-LE, bad parts replaced": 1},
    ),
    empty("no bytes", b""),
    empty("white space", b" \n\t \r\n"),
    empty("a BOM alone", b"\xef\xbb\xbf"),
    empty("Unicode's white space", "\u3000\u2003".encode()),
    empty("much white space", b" \n" * 2_000_000),
    Case(
        KINDS,
        "links, FIFOs and folders",
        {
            "sub/x.txt/in.txt": "inside",
            "again": link("."),
            "loop.txt": link("loop.txt"),
            "gone.txt": link("nowhere.txt"),
            "z_link.txt": link("good.txt"),
            "pipe.txt": os.mkfifo,  # opening it would hang
        },
        ["inside"],
        {
            "link to a folder": 1,
            "broken link": 2,
            "another link to a file already listed": 1,
            "not a regular file": 1,
        },
    ),
    *(
        Case(TOOLS, name, {f"deep/{name}/more/a.py": "secret"}, skipped={f"folder {name}": 1})
        for name in (*TOOLS.split(", "), ".hg", ".svn", ".tox", ".nox", ".mypy_cache", ".idea")
    ),
    values("a scalar", '"one scalar"', "one scalar"),
    values("a text key", '{"id": 7, "text": "one", "title": "no"}', "one"),
    values("text is null", '{"text": null, "content": "one"}', "one"),
    values("an array", '[{"text": "one"}, {"text": null}, null, 3, "two"]', "one", "two"),
    values("lines", '{"text": "one"}\n\n{"text": "two"}\r\n', "one", "two"),
    values("lines of arrays", '["one", "two"]\n["three"]\n', "one\n\ntwo", "three"),
    values(
        "nested",
        '{"a": ["one", {"b": "y"}], "n": 1.5, "c": [null, "z"]}',
        "one\n\ny\n\nz",
        repaired={LOOSE: 2},
    ),
    values(
        "messages",
        chat({"role": "user", "content": "one"}, {"role": "bot", "content": "yo"}),
        "user: one\n\nassistant: yo",
    ),
    Case(
        JSON,
        "odd messages",
        {"a.jsonl": json.dumps({"id": 1, "messages": [{"role": "one", "content": None}, "odd"]})},
        skipped={"JSON without text": 1},
        lost={CHAT_NOT_UNDERSTOOD: 1},
        says=f"warning: left out 1 × {CHAT_NOT_UNDERSTOOD} (100.00% of all records): ",
    ),
    values("huge numbers", '[{"n": %s, "s": "one"}]' % ("9" * 5_000), "one"),
    values("NaN", '{"s": "one"}\n{"n": NaN, "s": "inf"}', "one", "inf"),
    values("lone surrogates", '{"text": "one \\ud800 half"}', "one \ufffd half"),
    values("line separators", '"one\\u2028"\n"a\u2028b"', "one\u2028", "a\u2028b"),
    values("a BOM", '\ufeff{"text": "one"}', "one"),
    *map(no_text, ("3", "null", "[]", "{}", '[1, {"a": " "}]', "1\n2\n")),
    broken("object", '{"a": "b",\n "c": "d', 2),
    broken("array", '[\n{"a": "b"},\n{"c": ', 3),
    broken("array without end", '["a",\n"b"\n', 3),
    broken("a comma too many", '["a",\n]', 2),
    lines("cut off", '{"a": "b"}\n{"c": "d"}\n{"e": "f', 3),
    broken("more behind it", '{"a":\n"b"}\n{"c":\n"d"}', 3),
    broken("prose", "not json", 1),
    broken("deep", DEEP, 1),
    lines("deep", '{"a": "b"}\n{"c": "d"}\n' + '{"a":' * 100_000 + "1" + "}" * 100_000, 3),
    lines("the first", '{"a" "b"}\n{"a": "b"}\n{"c": "d"}\n', 1),
    broken("most lines, from the first on", '{"a" "b"}\n{"a": "b"}\n{"c"\n', 1),
    broken("deep in an array", f'["a",\n"b",\n{DEEP}]', 3),
    Case(
        NAMES,
        "case and other extensions",
        {
            "A.TXT": "upper",
            "b.Jsonl": '"lines"',
            "c.Txt.GZ": gzip.compress(b"packed"),
            **dict.fromkeys(("a.rst", "b.rst", "c.CSV", "Makefile", "a.tar.gz"), "ignored"),
        },
        ["upper", "lines", "packed"],
        says="skipped 5 × other extension: .rst (2), none (1), .tar.gz (1), .csv (1)",
    ),
]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good text")
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.line}: {case.name}"[:90])
def test_each_case_is_read_or_skipped_as_stated(case, folder):
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    texts, summary = read_folder(folder)
    assert sorted(texts) == sorted({"good text", *case.texts})
    assert summary.skipped == case.skipped
    assert summary.lost == case.lost
    assert summary.repaired == case.repaired
    output = "\n".join(summary.lines())
    assert case.says in output
    for reason in case.skipped:
        assert f"× {reason}" in output


# --- lines that are not a single file -------------------------------------------------------------


def test_missing_and_empty_folders_name_path_and_extensions(tmp_path):
    with pytest.raises(UserError, match=r"data_dir=.*/nope does not exist;.*\.txt \.py \.md"):
        read_folder(tmp_path / "nope")
    with pytest.raises(UserError, match=rf"no files to read in {tmp_path};.*\.txt \.py \.md"):
        read_folder(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(UserError, match=r"no files .*skipped 1 × other extension: \.csv \(1\)"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(UserError, match=r"no text in .*skipped 1 × empty: .*a\.txt.*\.txt \.py"):
        read_folder(tmp_path)


def test_a_single_file_is_accepted(tmp_path):
    (tmp_path / "a.TXT").write_text("alone")
    (tmp_path / "b.txt").write_text("not asked for")
    (tmp_path / "c.pdf").write_text("x")
    assert read_folder(tmp_path / "a.TXT")[0] == ["alone"]
    with pytest.raises(UserError, match=r"no files to read in .*c\.pdf .*other extension: \.pdf"):
        read_folder(tmp_path / "c.pdf")


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
    texts, summary = read_folder(folder)
    assert texts == ["good text"]
    assert summary.skipped == {"unreadable (Permission denied)": 2}
    assert summary.examples.popitem()[1] == [f"{folder}/closed", f"{folder}/bad.txt"]
    (folder / "good.txt").unlink()
    with pytest.raises(UserError, match=r"no text in .*unreadable \(Permission denied\).*bad\.txt"):
        read_folder(folder)


def test_the_order_is_that_of_the_sorted_paths(tmp_path):
    for name in ("z.md", "b/c.py", "a.txt", "b/a.json", "b.txt"):  # made out of order
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(name) if name.endswith("json") else name)
    texts, summary = read_folder(tmp_path)
    assert texts == ["a.txt", "b.txt", "b/a.json", "b/c.py", "z.md"]
    assert (summary.files, summary.documents, summary.duplicates) == (5, 5, 0)
    assert summary.text_bytes == sum(map(len, texts))


def test_the_error_for_too_little_text_counts_tokens(tmp_path, make):
    (tmp_path / "a.txt").write_text("x" * 811)
    with pytest.raises(UserError, match=r"a\.txt holds 812 tokens; need ≥ 2050 for seq_len 1024"):
        make(tmp_path / "a.txt", seq_len=1024)


def test_at_least_one_window_is_held_out_and_the_share_is_logged(tmp_path, make):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(words(10, f"t{i}-"))
    corpus = make(tmp_path, seq_len=64, eval_fraction=0.01)
    assert len(corpus.eval) >= 1 and len(corpus.train) >= 1
    (line,) = [line for line in make.log if line.startswith("held out ")]
    share = float(line.split("(")[1].split("%")[0])
    tokens = int(line.split()[2].replace(",", ""))
    assert share > 1 and share == pytest.approx(100 * tokens / corpus.summary.tokens, abs=0.01)


def test_a_single_big_document_is_not_held_out_as_a_whole(tmp_path, make):
    (tmp_path / "a.txt").write_text(words(20_000))
    corpus = make(tmp_path / "a.txt", seq_len=64)
    assert corpus.summary.documents == 1
    assert len(corpus.eval) < 0.03 * len(corpus.train)


def test_every_line_of_the_table_has_its_test():
    no_single_file = {MISSING, UNREADABLE, ORDER, *SIZES}  # the tests above
    assert {case.line for case in CASES} | no_single_file == set(LINES)
    assert not {case.line for case in CASES} & no_single_file
