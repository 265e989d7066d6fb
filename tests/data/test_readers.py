"""Files read in pieces: compression, encodings, JSON layouts, parquet, the loss mask."""

import gzip
import json
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mamba_jax.data import text_cuts
from mamba_jax.data.sources import decode, json_records, readers
from mamba_jax.data.sources.decode import Skip, probe, read_text
from mamba_jax.data.sources.json_records import read_values
from mamba_jax.data.sources.readers import is_readable, pieces
from mamba_jax.data.sources.records import document_of
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.errors import UserError
from tests.support.reading import documents_of, read, texts_of


def zst(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zst}
CONTENT = {
    ".txt": (b"one\r\n two", ["one\r\n two"]),
    ".md": ("naïve 日本".encode("utf-16"), ["naïve 日本"]),
    ".py": ("é".encode("latin-1") + b" = 1", ["é = 1"]),
    ".json": (b'[{"text": "a"}, "b"]', ["a", "b"]),
    ".jsonl": (b'"a"\n\n{"text": "b"}', ["a", "b"]),
}

# --- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("extension", CONTENT)
def test_compressed_files_read_as_if_they_were_not(tmp_path, extension, compression):
    data, expected = CONTENT[extension]
    path = tmp_path / f"a{extension.upper()}{compression}"
    path.write_bytes(PACK[compression](data))
    assert is_readable(str(path))
    texts, summary = read(path)
    assert texts == expected and summary.files == 1
    (tmp_path / f"b{extension}").write_bytes(data)
    plain, plainly = read(tmp_path / f"b{extension}")
    assert plain == texts and plainly.repaired == summary.repaired


@pytest.mark.parametrize("name", ["a.gz", "a.tar.gz", "a.parquet.gz", "a.txt.gz.gz", "a.txt.xz"])
def test_other_compressions_are_not_read(name):
    assert not is_readable(name)


@pytest.mark.parametrize("compression", PACK)
def test_members_follow_each_other_and_are_expanded_once(tmp_path, compression):
    pack = PACK[compression]
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(pack(b"\xef\xbb") + pack(b"") + pack(b"\xbfone") + pack(b" two"))
    assert read(path)[0] == ["one two"]
    path.write_bytes(pack(pack(b"text " * 10)))
    assert read(path)[1].skipped == {"binary": 1}


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("size", [2_000, 3_000_000])
def test_cut_off_or_damaged_compression_gives_nothing(tmp_path, compression, size):
    text = np.random.default_rng(0).integers(97, 123, size, np.uint8).tobytes()
    whole = PACK[compression](text)
    path = tmp_path / f"a.txt{compression}"
    damaged = bytearray(whole)
    damaged[len(whole) * 2 // 3] ^= 0xFF
    for data in (whole[: len(whole) // 2], whole[:-4], b"no such thing", bytes(damaged)):
        path.write_bytes(data)
        texts, summary = read(path)
        if data == bytes(damaged) and not summary.skipped:
            # zst files need not hold a checksum: the damage is in the text, which may be read.
            assert compression == ".zst"
        else:
            assert texts == [] and summary.skipped == {f"damaged or cut off {compression}": 1}
    path.write_bytes(b"")
    assert read(path)[1].skipped == {"empty": 1}


@pytest.mark.parametrize("compression", PACK)
def test_a_decompression_bomb_is_skipped_early(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(decode, "_MOST_BYTES_UNASKED", 1 << 22)
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 1 << 16)
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(PACK[compression](b"a " * (3 << 20)))
    assert path.stat().st_size * 200 < 6 << 20
    texts, summary = read(path)
    assert texts == [] and list(summary.skipped) == ["grows more than 200 times when decompressed"]
    path.write_bytes(PACK[compression](b"a " * (1 << 20)))  # small, if dense
    assert read(path)[0] == ["a " * (1 << 20)]


# --- decoding by blocks ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc"]), min_size=1
    ),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    block=st.integers(4, 20),
)
def test_block_borders_have_no_effect(tmp_path_factory, text, encoding, block):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(text.encode(encoding))
    if text.startswith("\ufeff"):
        return  # reads as a mark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_BLOCK_BYTES", block)
        try:
            found = probe(str(path))
        except Skip as skip:
            assert skip.reason == "empty" and not text.strip()
            return
        assert not found.warning and "".join(read_text(str(path), found)) == text


def test_damage_is_judged_by_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 16)
    path = tmp_path / "a.txt"
    for data, expected in (
        # Two valid characters and one bad byte; the second character crosses a block's border.
        (("é" + "x" * 13 + "é").encode() + b"\xff", "damaged UTF-8, bad parts replaced"),
        ("日本語のテキスト".encode() * 4 + b"\xff tail", "damaged UTF-8, bad parts replaced"),
        (b"plain words " * 9 + b"caf\xe9", "not UTF-8, read as cp1252"),
        ("plain words ".encode("utf-16") * 3 + b"x", "damaged UTF-16-LE, bad parts replaced"),
    ):
        path.write_bytes(data)
        texts, summary = read(path)
        assert summary.repaired == {expected: 1}
        codec = "cp1252" if "cp1252" in expected else expected.split()[1][:-1].lower()
        bom = 2 if "UTF-16" in expected else 0
        assert texts == [data[bom:].decode(codec.rstrip(","), "replace")]


# --- JSON -----------------------------------------------------------------------------------------

leaves = (
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=9)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def chunks(text: str, size: int):
    return lambda: iter([text[i : i + size] for i in range(0, len(text), size)])


@settings(max_examples=400, deadline=None)
@given(
    records=st.lists(values, min_size=1, max_size=6),
    layout=st.sampled_from(["array", "lines", "single"]),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    size=st.integers(1, 40),
)
def test_every_layout_reads_as_a_parser_of_the_whole_would(records, layout, indent, ascii, size):
    dump = lambda value, indent=None: json.dumps(value, indent=indent, ensure_ascii=ascii)
    if layout == "array":
        text = dump(records, indent)
    elif layout == "lines":
        text = "".join(dump(record) + "\r\n" for record in records)
    else:
        text = dump(records[0], indent)
        records = records[:1]
    if layout != "array" and len(records) == 1 and isinstance(records[0], list):
        records = records[0]  # a single array is its elements, whatever its layout
    lost = []
    read_back = list(read_values(chunks(text, size), lambda *line: lost.append(line)))
    assert not lost and read_back == [json.loads(json.dumps(record)) for record in records]


@settings(max_examples=300, deadline=None)
@given(
    value=st.lists(values, min_size=1, max_size=4),
    indent=st.sampled_from([None, 1]),
    data=st.data(),
)
def test_an_array_that_breaks_off_gives_nothing(value, indent, data):
    whole = json.dumps(value, indent=indent)
    text = whole[: data.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(Skip, match="broken JSON") as skip:
        list(read_values(chunks(text, data.draw(st.integers(1, 20))), lambda *_: None))
    assert 1 <= skip.value.line <= text.count("\n") + 1


def parsed(line: str) -> list:
    """Returns [value] of a line, [] of one that is broken or blank."""
    try:
        return [json.loads(line)]
    except ValueError:
        return []


@settings(max_examples=300, deadline=None)
@given(
    records=st.lists(values.filter(lambda v: not isinstance(v, list)), min_size=2, max_size=6),
    junk=st.lists(
        st.sampled_from(['{"text": "cut sho', "prose", "}", "{'a': 1}", "[1, 2"]), max_size=6
    ),
    first=st.booleans(),
    data=st.data(),
)
def test_only_broken_lines_are_skipped(records, junk, first, data):
    """Even if the first is broken, as long as most are valid."""
    good = [json.dumps(record) for record in records]
    junk = junk[: len(good) - 1]
    lines = data.draw(st.permutations(good[not first :] + junk))
    lines = ([] if first else good[:1]) + list(lines)
    lost = []
    source = chunks("\n".join(lines), data.draw(st.integers(1, 30)))
    read_back = list(read_values(source, lambda reason, line: lost.append((reason, line))))
    assert read_back == [value for line in lines for value in parsed(line)]
    broken = [number for number, line in enumerate(lines, 1) if not parsed(line)]
    assert lost == [("broken JSON line", number) for number in broken]


@pytest.mark.parametrize(
    "text", ["[12.5e3, 1.25]", "[-1.5]", "[1e-7 ]", "[true, null ,false]", "[NaN]"]
)
@pytest.mark.parametrize("size", range(1, 9))
def test_numbers_and_words_are_not_cut_by_the_end_of_a_block(text, size):
    read_back = list(read_values(chunks(text, size), lambda *_: None))
    assert str(read_back) == str(json.loads(text))


def test_a_value_that_is_too_large_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "_MOST_CHARACTERS", 1 << 20)
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 1 << 16)
    large = json.dumps({"text": "x" * (2 << 20)})
    small = json.dumps({"text": "y"})
    path = tmp_path / "a.json"
    reason = "a JSON value of more than 1 million characters"
    for text, line in ((f"[\n{small},\n{large}]", 3), (large, 1)):
        path.write_text(text)
        texts, summary = read(path)
        assert texts == [] and summary.skipped == {reason: 1}
        assert summary.examples == {reason: [f"{path}:{line}"]}
    path.write_text(f"{small}\n{large}\n{small}")  # only that line is skipped
    texts, summary = read(path)
    assert texts == ["y", "y"] and summary.lost == {reason: 1} and not summary.skipped
    assert summary.examples == {reason: [f"{path}:2"]}


@pytest.mark.parametrize("layout", ["lines", "broken lines", "array", "line", "text", "lines.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "_MOST_HELD_CHARACTERS", 1 << 17)
    monkeypatch.setattr(text_cuts, "_PIECE_CHARACTERS", 1 << 16)
    record = json.dumps({"text": "some words " * 100}) + "\n"
    record = record[:-1] + ",\n" if layout == "array" else record
    record += record[:-3] + "\n" if layout == "broken lines" else ""
    data = (record * 8_000).encode()  # 9 MB, or twice as much
    if layout == "line":  # an array in one
        data = (record[:-1] + ",").encode() * 8_000
    if layout in ("array", "line"):
        data = b"[" + data.rstrip(b",\n") + b"]"
    name = {"text": "a.txt", "lines.gz": "a.jsonl.gz"}.get(layout, "a.json")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    del data
    tracemalloc.start()
    count = sum(len(piece.text) for piece in pieces(str(path), DataSummary("")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count >= 8_000 * 1_100
    assert peak < 3_000_000


# --- pieces and tokens ----------------------------------------------------------------------------


word = st.from_regex(r"[a-zA-Z0-9.,?!'é日_-]{1,8}", fullmatch=True)
sentence = st.lists(word, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), sentence), min_size=1))
@example([("user", "How?"), ("assistant", "So.")])
def test_cuts_between_turns_change_no_token(turns):
    chat = [{"role": role, "content": content} for role, content in turns]
    tokens = load_tokenizer("gpt2").encode
    parts = [text for text, _ in document_of({"messages": chat}).segments]
    assert np.concatenate([tokens(text) for text in parts]).tolist() == (
        tokens("".join(parts)).tolist()
    )


def test_long_texts_are_cut_without_changing_a_token(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_BLOCK_BYTES", 300)
    monkeypatch.setattr(text_cuts, "_PIECE_CHARACTERS", 200)
    monkeypatch.setattr(readers, "_MOST_HELD_CHARACTERS", 400)
    text = "".join(f"Line {i},  with 日本 and\n\n more.\t" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps("short"))
    tokens = load_tokenizer("gpt2").encode
    for name, count in (("a.txt", 1), ("b.jsonl", 2)):
        found = list(pieces(str(tmp_path / name), DataSummary("")))
        assert len(found) > 20 and max(len(piece.text) for piece in found) <= 200
        assert [piece.begins for piece in found].count(True) == count
        assert texts_of(found)[0] == text
        found = found[: len(found) - count + 1]
        joined = np.concatenate([tokens(piece.text) for piece in found])
        assert joined.tolist() == tokens(text).tolist()


# --- parquet --------------------------------------------------------------------------------------


def put(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 1, "text": "t", "content": "c"}, [("t", True)]),
        ({"output": "o", "instruction": "i", "source": "s"}, [("i", False), ("\n\no", True)]),
        ({"n": 1, "body": "b", "raw": b"\xff\0"}, [("b", True)]),
        ({"x": "one", "y": [{"z": "two", "n": 3}], "w": 4}, [("one\n\ntwo", True)]),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [("user: q\n\nassistant:", False), (" a", True)],
        ),
    ],
    ids=["text", "answer", "only strings", "all strings", "chat"],
)
def test_columns_of_parquet_are_chosen_as_those_of_a_dataset(tmp_path, row, expected):
    path = put(tmp_path / "a.parquet", [row] * 3)
    assert documents_of(pieces(path, DataSummary(""))) == [expected] * 3


def test_parquet_is_read_in_batches_and_rows_without_text_are_skipped(tmp_path):
    rows = [{"text": None if i % 7 == 0 else f"row {i}"} for i in range(4_321)]
    path = put(tmp_path / "a.parquet", rows, row_group_size=500)
    texts, summary = read(path)
    assert texts == [row["text"] for row in rows if row["text"]] and summary.files == 1
    texts, summary = read(put(tmp_path / "a.parquet", [{"text": " "}, {"text": None}]))
    assert texts == [] and summary.skipped == {"parquet without text": 1}
    texts, summary = read(put(tmp_path / "a.parquet", [{"n": 1}]))
    assert texts == [] and summary.skipped == {"parquet without text": 1}


def test_damaged_parquet_gives_nothing(tmp_path):
    path = tmp_path / "a.parquet"
    put(path, [{"text": f"row {i} " * 9} for i in range(3_000)], row_group_size=1_000)
    whole = path.read_bytes()
    torn = whole[:2_000] + bytes(600) + whole[2_600:]
    for data in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], torn):
        path.write_bytes(data)
        texts, summary = read(path)
        assert texts == [] and summary.skipped == {"damaged parquet": 1}
    strings = pyarrow.array([b"ok", b"\xff\xfe"]).cast(pyarrow.binary())
    table = pyarrow.table(
        {"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, strings.buffers())}
    )
    pyarrow.parquet.write_table(table, path)
    assert read(path)[1].skipped == {"damaged parquet": 1}  # strings that are not UTF-8


# --- while it is read -----------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1_000}, *[{"text": "y"}] * 200_000]))
    reading = pieces(str(path), DataSummary(""))
    assert next(reading).text == "x" * 1_000
    with open(path, "r+b") as file:
        file.seek(2_500_000)
        file.write(b"{{{{")
    with pytest.raises(
        UserError, match=r"a\.json changed while it was being read; run the command again"
    ):
        list(reading)
