"""Generated files and trees: none ends in a traceback, and tokens decode back to the text.

The profile of every run is small; ``-m exhaustive`` runs thousands.
"""

import gzip
import json
import os
import shutil
import tempfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from tests.data.test_readers import zst
from tests.support.reading import read_folder

ROUTINE = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(ROUTINE, max_examples=2_500)

# --- contents -------------------------------------------------------------------------------------

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be", "cp1252", "koi8-r"]
texts = st.one_of(
    st.text(max_size=40),
    st.text("a é日\n\t\r\u2028\u3000\ufeff\0<|>.", max_size=40),
    st.sampled_from(["<|endoftext|>", " " * 300, "\n" * 300, "word " * 200, "x" * 3_000]),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "role", "q", "é"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", 3]), "content": texts | st.none()}
)
records = values | st.fixed_dictionaries({"messages": st.lists(turns, max_size=3)})


def dumped(value, indent=None) -> str:
    return json.dumps(value, indent=indent)


@st.composite
def contents(draw) -> bytes:
    kind = draw(
        st.sampled_from(["bytes", "text", "text", "json", "json", "lines", "deep", "parquet"])
    )
    if kind == "bytes":
        data = draw(st.binary(max_size=80))
    elif kind == "text":
        data = draw(texts).encode(draw(st.sampled_from(ENCODINGS)), "replace")
    elif kind == "json":
        data = dumped(draw(records), draw(st.sampled_from([None, 1]))).encode()
    elif kind == "lines":
        data = "\n".join(map(dumped, draw(st.lists(records, max_size=4)))).encode()
    elif kind == "deep":
        opening, closing = draw(st.sampled_from([("[", "]"), ('{"a":', "}"), ('[{"b":[', "]}]")]))
        depth = draw(st.sampled_from([3, 500, 60_000]))
        data = (opening * depth + '"leaf"' + closing * draw(st.sampled_from([depth, 1]))).encode()
    else:
        sink = pyarrow.BufferOutputStream()
        columns = draw(st.lists(texts, min_size=1, max_size=3))
        rows = {draw(st.sampled_from(["text", "body", "answer"])): columns, "n": [1] * len(columns)}
        pyarrow.parquet.write_table(pyarrow.table(rows), sink)
        data = sink.getvalue().to_pybytes()
    for pack in draw(st.lists(st.sampled_from([gzip.compress, zst]), max_size=2)):
        data = pack(data)
    if data and draw(st.integers(0, 4)) == 0:  # cut off, or with wrong bytes inside
        cut = draw(st.integers(0, len(data)))
        data = (
            data[:cut]
            + draw(st.sampled_from([b"", b"\0", b"\xff\xfe", b"{", b"]"]))
            + data[cut + 1 :]
        )
        data = data[: draw(st.integers(0, len(data)))]
    return data


# --- trees ----------------------------------------------------------------------------------------

EXTENSIONS = [".txt", ".py", ".md", ".json", ".jsonl", ".parquet", ".rst", "", ".gz"]
stems = st.sampled_from(
    [b"a", b"b", b" ", b"-rf", b"\xff\xfe", "é日".encode(), b".hidden", b"x\ny", b"~"]
)
names = st.tuples(
    stems,
    st.sampled_from([*EXTENSIONS, ".TXT", ".JsonL"]).map(str.encode),
    st.sampled_from([b"", b"", b".gz", b".zst"]),
).map(b"".join)
folders = st.lists(
    st.sampled_from([b"sub", b"x.txt", b".git", b"deep", b"\xfe", b"node_modules"]), max_size=6
)
entries = st.tuples(
    folders,
    names,
    st.one_of(
        contents(),
        contents(),
        contents(),
        st.sampled_from(["fifo", "loop", "link out", "link to folder", "link to file", "closed"]),
    ),
)


def put(root: bytes, folder: list[bytes], name: bytes, content) -> None:
    path = os.path.join(root, *folder, name)
    if os.path.lexists(path):
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, bytes):
            with open(path, "wb") as file:
                file.write(content)
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "closed":
            os.mkdir(path, 0)
        else:
            target = {"loop": name, "link out": b"/nowhere", "link to folder": b".."}
            os.symlink(target.get(content, b"a.txt"), path)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        pass  # the tree has something else there


def check_tree(tree: list) -> int:
    """Reads a tree as ``data_dir``; returns the number of its documents."""
    root = tempfile.mkdtemp().encode()
    try:
        for folder, name, content in tree:
            put(root, folder, name, content)
        try:
            found, summary = read_folder(os.fsdecode(root))
        except UserError as error:
            assert "\n" not in str(error) and str(error).encode("utf-8")
            return 0
        for line in summary.lines():
            assert "\n" not in line and line.encode("utf-8")
        assert len(found) == summary.documents == len(set(found)) > 0
        for text in found:
            assert text.strip()
            for name in ("gpt2", "bytes"):
                tokenizer = load_tokenizer(name)
                tokens = tokenizer.encode(text)
                assert tokenizer.eot_id not in tokens
                assert tokenizer.decode(tokens) == text
        return len(found)
    finally:
        shutil.rmtree(root)


# --- tests ----------------------------------------------------------------------------------------


def test_the_generators_make_readable_and_unreadable_files():
    counts = [0, 0]

    @settings(ROUTINE, max_examples=60, database=None, derandomize=True)
    @given(st.lists(entries, min_size=1, max_size=5))
    def run(tree):
        counts[0] += 1
        counts[1] += check_tree(tree) > 0

    run()
    assert counts[0] * 0.2 < counts[1] < counts[0] * 0.95


@ROUTINE
@given(st.lists(entries, max_size=5))
def test_trees(tree):
    check_tree(tree)


@pytest.mark.exhaustive
@THOROUGH
@given(st.lists(entries, max_size=5))
def test_thousands_of_trees(tree):
    check_tree(tree)
