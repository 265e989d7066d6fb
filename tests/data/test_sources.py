"""Where the files come from and what a summary says; ``test_bad_input`` covers their content."""

import hashlib
import os
import sysconfig

import pytest

from mamba_jax.data.cache import shards
from mamba_jax.data.sources.files import open_source
from mamba_jax.errors import UserError
from tests.support.reading import read_folder as read


@pytest.fixture
def folder(tmp_path):
    """A folder with one good file, so that there is always something left."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.txt").write_text("good text")
    return folder


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("mine")
    assert read("~")[0] == ["mine"]


def test_a_link_as_the_root_is_followed(tmp_path, folder):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert read(tmp_path / "link")[0] == ["good text"]


def test_exact_duplicates_are_left_out_and_counted(folder, make):
    (folder / "copy.md").write_text("good text")
    (folder / "marked.txt").write_bytes(b"\xef\xbb\xbfgood text")
    (folder / "records.json").write_text('["good text", "new", "new"]')
    summary = make(folder, seq_len=2).summary
    assert (summary.documents, summary.duplicates) == (2, 4)
    assert summary.text_bytes == len("good text" + "new")
    assert "4 exact duplicates left out" in summary.lines()[0]


@pytest.mark.parametrize("deduplicate", ["exact", "none"])
def test_line_endings_do_not_make_documents_differ(folder, make, deduplicate):
    """One kind of line ending inside a stretch of blank lines of another kind is kept."""
    twins = {
        "dos": b"one\r\n\r\ntwo\r\n",
        "mac": b"one\r\rtwo",
        "marked": b"\xef\xbb\xbfone\n\ntwo\n\n",
        "utf16": "one\r\n\r\ntwo".encode("utf-16"),
        "record": b"one\n\ntwo\r",
        "other": b"one\ntwo\n",
        "spaced": b"one\n\ntwo \n",
        "longer": b"\none\n\ntwo",
    }
    for name, data in twins.items():
        (folder / f"{name}.txt").write_bytes(data)
    summary = make(folder, seq_len=2, deduplicate=deduplicate).summary
    duplicates = 4 if deduplicate == "exact" else 0
    assert (summary.documents, summary.duplicates) == (9 - duplicates, duplicates)


def test_lines_cut_between_pieces_are_the_same_lines():
    text = "a\r\n\r\nb\n\r\rc\n\r\n"
    for size in (1, 2, 3, len(text)):
        lines = shards._Lines()
        for start in range(0, len(text), size):
            lines.update(text[start : start + size])
        assert lines.digest() == hashlib.blake2b(b"a\n\nb\n\n\nc", digest_size=16).digest()


def test_names_that_are_not_unicode_can_be_printed(folder):
    with open(os.fsencode(folder) + b"/\xff.txt", "wb") as file:
        file.write(b"\0")
    _, summary = read(folder)
    assert "\\udcff.txt" in "\n".join(summary.lines()).encode("utf-8").decode()


def test_a_long_list_of_examples_is_shortened(folder):
    for i in range(10):
        (folder / f"{i}.txt").write_text("")
    line = read(folder)[1].lines()[1]
    assert line.startswith("skipped 10 × empty: ") and line.endswith("2.txt, …")


def test_the_default_is_data_or_the_standard_library_and_logged(tmp_path, monkeypatch):
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


def test_the_size_of_skipped_files_is_reported(folder):
    (folder / "a.txt").write_bytes(bytes(30_000))
    (folder / "b.txt").write_bytes(bytes(4_000))
    (folder / "c.txt").write_text("")
    lines = read(folder)[1].lines()
    assert lines[1].startswith(f"skipped 2 × binary (0.03 MB): {folder}/a.txt, ")
    assert lines[2] == f"skipped 1 × empty: {folder}/c.txt"
