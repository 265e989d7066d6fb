"""The token cache: made once, used only when complete, safe under kill -9 and concurrent builds."""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import xxhash

from mamba_jax.data.cache import shards, store, workers
from mamba_jax.data.document import Piece
from mamba_jax.data.sources import files as sources
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.data.windows import plan
from mamba_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def encoded(monkeypatch):
    """Lists the texts that are tokenised in this process."""
    texts = []
    tokenizer_class = type(load_tokenizer("bytes"))
    encode = tokenizer_class.encode
    monkeypatch.setattr(
        tokenizer_class, "encode", lambda self, text: texts.append(text) or encode(self, text)
    )
    return texts


@pytest.fixture
def small_shards(monkeypatch):
    """Seven files of ``many_files`` to a shard."""
    monkeypatch.setattr(workers, "SHARD_PARTS", 7)


def shard_folders(tmp_path, cache="cache"):
    return sorted((tmp_path / cache / "tokens").glob("*/shards/*"))


def leftovers(tmp_path):
    return [path for path in shard_folders(tmp_path) if path.name.startswith(".")]


def age(folder, secs=10):
    """Makes files old enough that their times are trusted."""
    past = time.time() - secs
    for file in folder.iterdir():
        os.utime(file, (past, past))


def two_epochs(corpus):
    """Hashes of batches that cover each window twice."""
    steps = -(-2 * len(corpus.train) // 5)
    batches = itertools.islice(corpus.train_batches(5, 3), steps)
    return [xxhash.xxh3_64_hexdigest(batch.tobytes()) for batch in batches]


def all_windows(corpus):
    return [window.tobytes() for side in (corpus.train, corpus.eval) for window in _each(side)]


def _each(side):
    return (side[i] for i in range(len(side)))


# --- content --------------------------------------------------------------------------------------


def test_it_holds_each_document_after_its_separator(make, many_files, tmp_path):
    make(many_files)
    (folder,) = shard_folders(tmp_path)
    expected = []
    for file in sorted(many_files.iterdir()):
        expected += [256, *file.read_bytes()]
    assert np.fromfile(folder / "tokens.bin", np.uint16).tolist() == expected


def test_a_large_vocabulary_takes_four_bytes(make, many_files, tmp_path, monkeypatch):
    narrow = make(many_files)
    monkeypatch.setattr(type(narrow.tokenizer), "vocab_size", 70_000)
    wide = make(many_files, cache_dir=str(tmp_path / "wide"))
    meta = next((tmp_path / "wide").rglob("meta.json"))
    assert json.loads(meta.read_text().splitlines()[0])["dtype"] == "uint32"
    assert all_windows(narrow) == all_windows(wide) and narrow.fingerprint == wide.fingerprint


def test_masked_tokens_are_recorded(tmp_path):
    class Talk:
        name, stat, size_bytes, parallel = "talk", None, 0, False

        def key(self):
            return "talk"

        def pieces(self, summary):
            yield Piece("as a whole", True)
            yield Piece("ask", True, is_target=False)
            yield Piece("answer", False)

    made = store.Store(tmp_path, load_tokenizer("bytes"), print)
    entries = made.entries(made.tokenise([Talk()], workers=1))
    names = [name for name, _ in entries]
    loss_mask = made.loss_mask(names)
    assert loss_mask is not None
    assert loss_mask[0 : len(loss_mask)].tolist() == [1] * 11 + [1, 0, 0, 0] + [1] * 6
    assert made.documents(entries, names).end_d.tolist() == [11, 21]


def test_flat_reads_across_its_arrays():
    flat = store.Flat([np.arange(3), np.arange(0), np.arange(3, 5), np.arange(5, 9)])
    assert len(flat) == 9
    for start in range(10):
        for stop in range(start, 10):
            assert flat[start:stop].tolist() == list(range(start, stop))


def test_shards_and_their_number_do_not_change_the_corpus(
    make, many_files, tmp_path, small_shards, monkeypatch
):
    many = make(many_files)
    assert len(shard_folders(tmp_path)) == 9
    monkeypatch.setattr(workers, "SHARD_PARTS", 1_000)
    one = make(many_files, cache_dir=str(tmp_path / "one"))
    assert len(shard_folders(tmp_path, "one")) == 1
    assert many.fingerprint == one.fingerprint
    assert all_windows(many) == all_windows(one)


def test_processes_do_not_change_the_corpus(make, many_files, tmp_path, small_shards, encoded):
    several = make(many_files, tokenise_workers=2)
    assert not encoded  # it happened in another process
    alone = make(many_files, tokenise_workers=1, cache_dir=str(tmp_path / "alone"))
    assert len(encoded) == 60
    assert several.fingerprint == alone.fingerprint
    assert all_windows(several) == all_windows(alone)
    content = lambda cache: [
        (path.name, (path / "tokens.bin").read_bytes()) for path in shard_folders(tmp_path, cache)
    ]
    assert content("cache") == content("alone")


def test_an_error_in_a_process_is_reported(make, many_files, small_shards, monkeypatch):
    """A file that disappears while the processes wait for their turn."""
    monkeypatch.setattr(sources.FilePart, "key", lambda self: f"not of the content {self.path}")
    with pytest.raises(UserError, match="changed while it was being read; run the command again"):
        make(many_files, tokenise_workers=2)


# --- what is tokenised again ----------------------------------------------------------------------


def test_one_changed_file_is_tokenised_alone(make, many_files, encoded, tmp_path, small_shards):
    first = make(many_files)
    assert len(encoded) == 60
    (many_files / "30.txt").write_text("other content")
    assert make(many_files).fingerprint != first.fingerprint
    assert encoded[60:] == ["other content"]
    (many_files / "61.txt").write_text("one file more")
    (many_files / "00.txt").unlink()
    make(many_files)
    assert encoded[61:] == ["one file more"]
    fresh = make(many_files, cache_dir=str(tmp_path / "fresh"))
    again = make(many_files)
    assert fresh.fingerprint == again.fingerprint and all_windows(fresh) == all_windows(again)


def test_a_new_date_or_path_is_not_new_content(make, many_files, encoded, tmp_path):
    first = make(many_files)
    os.utime(many_files / "00.txt")
    assert make(many_files).fingerprint == first.fingerprint
    moved = many_files.rename(tmp_path / "moved")
    again = make(moved)
    assert again.fingerprint == first.fingerprint and len(encoded) == 60
    assert str(moved) in again.summary.lines()[0]


def test_the_summary_is_kept_with_the_paths_as_they_are_now(make, many_files, tmp_path):
    (many_files / "empty.txt").write_text("")
    lines = make(many_files).summary.lines()
    assert lines[1] == f"skipped 1 × empty: {many_files}/empty.txt"
    moved = many_files.rename(tmp_path / "moved")
    assert make(moved).summary.lines()[1] == f"skipped 1 × empty: {moved}/empty.txt"


def test_unchanged_files_are_not_read(make, many_files, monkeypatch):
    age(many_files)
    time.sleep(0.01)
    monkeypatch.setattr(store, "_SETTLED_SECS", -1)  # ctime is now and cannot be set back
    first = make(many_files)

    def refuse(*_args):
        raise AssertionError("read")

    with monkeypatch.context() as patch:
        patch.setattr(sources.FilePart, "key", refuse)
        patch.setattr(sources.FilePart, "pieces", refuse)
        assert make(many_files).fingerprint == first.fingerprint
    # With its old time and size: what is left is the time of the change itself.
    before = os.stat(many_files / "00.txt")
    (many_files / "00.txt").write_text("X" + (many_files / "00.txt").read_text()[1:])
    os.utime(many_files / "00.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert make(many_files).fingerprint != first.fingerprint


def test_a_file_changed_just_now_is_read_again(make, many_files, monkeypatch):
    make(many_files)
    keys = []
    key = sources.FilePart.key
    monkeypatch.setattr(sources.FilePart, "key", lambda self: keys.append(self) or key(self))
    make(many_files)
    assert len(keys) == 60  # clocks are coarse: a second change may leave the time as it is


def test_a_warm_start_makes_no_plan_and_hashes_no_document(make, many_files, monkeypatch):
    first = make(many_files)

    def refuse(*_args, **_kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(plan, "hold_out", refuse)
    monkeypatch.setattr(shards.Shard, "documents", refuse)
    again = make(many_files)
    assert again.fingerprint == first.fingerprint and all_windows(again) == all_windows(first)
    assert again.summary == first.summary


def test_the_fingerprint_depends_on_content_tokenizer_window_and_seed(make, many_files):
    fingerprints = {
        make(many_files).fingerprint,
        make(many_files, seq_len=33).fingerprint,
        make(many_files, seed=1).fingerprint,
        make(many_files, tokenizer="gpt2").fingerprint,
    }
    text = (many_files / "00.txt").read_text()
    (many_files / "00.txt").write_text(text[:-1] + "!")  # as long as before
    fingerprints.add(make(many_files).fingerprint)
    assert len(fingerprints) == 5
    (many_files / "00.txt").write_text(text)
    assert make(many_files).fingerprint in fingerprints


def test_duplicates_may_be_kept(make, many_files):
    (many_files / "copy.txt").write_text((many_files / "00.txt").read_text())
    left_out, kept = make(many_files).summary, make(many_files, deduplicate="none").summary
    assert (left_out.documents, left_out.duplicates) == (60, 1)
    assert (kept.documents, kept.duplicates) == (61, 0)
    assert kept.tokens == left_out.tokens + 151  # the first 150 bytes, and a separator


# --- damage ---------------------------------------------------------------------------------------


def damage_byte(folder):
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[1_001] ^= 4
    (folder / "tokens.bin").write_bytes(data)


DAMAGES = {
    "bit flip": damage_byte,
    "truncated": lambda folder: os.truncate(folder / "tokens.bin", 1_000),
    "emptied": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "index": lambda folder: os.truncate(folder / "index.npz", 100),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "bad meta": lambda folder: (folder / "meta.json").write_text("[]"),
    "other meta": lambda folder: (folder / "meta.json").write_text(
        (folder / "meta.json").read_text().replace("[0, 1,", "[1, 1,")
    ),
    "no JSON": lambda folder: (folder / "meta.json").write_bytes(b"\xff\0{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_only_a_damaged_shard_is_rebuilt(make, many_files, tmp_path, encoded, small_shards, damage):
    first = make(many_files)
    windows = all_windows(first)  # now: its map shows the damage
    folders = shard_folders(tmp_path)
    whole = (folders[3] / "tokens.bin").read_bytes()
    damage(folders[3])
    again = make(many_files)
    assert again.fingerprint == first.fingerprint and all_windows(again) == windows
    assert len(encoded) in (60 + 7, 60 + 4)  # the last shard has four
    assert len([line for line in make.log if "is damaged" in line]) == 1
    assert (folders[3] / "tokens.bin").read_bytes() == whole
    assert shard_folders(tmp_path) == folders


def test_damaged_index_files_are_rebuilt(make, many_files, tmp_path, encoded):
    first = make(many_files)
    for name in ("files.json", "*.npz"):
        for path in (tmp_path / "cache" / "tokens").rglob(name):
            if path.name != "index.npz":
                path.write_bytes(b"\0[")
    assert make(many_files).fingerprint == first.fingerprint and len(encoded) == 60


def test_large_shards_are_hashed_in_part(make, many_files, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BLOCK_BYTES", 256)
    make(many_files)
    (folder,) = shard_folders(tmp_path)
    shard = shards.open_shards(folder.parent, print)[0]
    whole = (folder / "tokens.bin").read_bytes()

    def noticed(position, blocks):
        data = bytearray(whole)
        data[position] ^= 1
        (folder / "tokens.bin").write_bytes(data)
        return bool(shard.damage(blocks))

    count = -(-len(whole) // 256)
    assert all(noticed(position, count) for position in range(0, len(whole), 97))
    assert {p // 256 for p in range(0, len(whole), 64) if noticed(p, 3)} == {
        0,
        (count - 1) // 2,
        count - 1,
    }


# --- kill -9, and two at once ---------------------------------------------------------------------


def program(folder, cache_dir, patch):
    """Runs prepare() in another process, with some part of it patched first."""
    code = f"""
import os, time
from mamba_jax.config import DataConfig
from mamba_jax.data.cache import workers
from mamba_jax.data.tokenizers import load
from mamba_jax.data.pipeline import prepare
workers.SHARD_PARTS = 7
{patch}
config = DataConfig(data_dir={str(folder)!r}, tokenizer="bytes", cache_dir={str(cache_dir)!r},
    tokenise_workers=1)
corpus = prepare(config, seq_len=32, seed=0, log=lambda line: None)
print(corpus.fingerprint, flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


STOP_WHILE_TOKENISING = """
count, encode = [], load._Bytes.encode
def slow(self, text):
    count.append(text)
    if len(count) == 20:
        print("reached", flush=True)
        time.sleep(60)
    return encode(self, text)
load._Bytes.encode = slow
"""
STOP_BEFORE_RENAME = """
rename, renamed = os.rename, []
def stop(*paths):
    renamed.append(paths)
    if len(renamed) == 3:
        print("reached", flush=True)
        time.sleep(60)
    rename(*paths)
os.rename = stop
"""


@pytest.mark.parametrize("patch", [STOP_WHILE_TOKENISING, STOP_BEFORE_RENAME])
def test_killed_in_the_middle(make, many_files, tmp_path, patch, encoded, small_shards):
    process = program(many_files, tmp_path / "cache", patch)
    assert process.stdout is not None and process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = leftovers(tmp_path)
    assert len(shard_folders(tmp_path)) == 3  # two whole ones
    killed = make(many_files)
    assert len(encoded) == 60 - 14
    undisturbed = make(many_files, cache_dir=str(tmp_path / "other"))
    assert killed.fingerprint == undisturbed.fingerprint
    assert all_windows(killed) == all_windows(undisturbed)
    assert two_epochs(killed) == two_epochs(undisturbed)

    # A fresh unfinished folder may be another run's; an old one is removed by the next build.
    assert leftovers(tmp_path) == [left]
    past = time.time() - 2 * shards._ABANDONED_SECS
    for path in (*left.iterdir(), left):
        os.utime(path, (past, past))
    (many_files / "new.txt").write_text("new")
    make(many_files)
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_killed_at_any_time(make, many_files, tmp_path, small_shards):
    """Repeatedly, at random moments, until a run completes."""
    slow = """
encode = load._Bytes.encode
load._Bytes.encode = lambda self, text: time.sleep(0.02) or encode(self, text)
"""
    random_ = random.Random(0)
    for _ in range(8):
        process = program(many_files, tmp_path / "cache", slow)
        time.sleep(random_.uniform(0.3, 1.2))
        process.kill()
        process.communicate()
    last = program(many_files, tmp_path / "cache", "")
    assert last.communicate(timeout=60)[0].strip() == make(many_files).fingerprint
    undisturbed = make(many_files, cache_dir=str(tmp_path / "other"))
    assert all_windows(make(many_files)) == all_windows(undisturbed)


def test_two_concurrent_builds(make, many_files, tmp_path):
    """Both are in the middle of building before either may continue."""
    patch = f"""
import pathlib
encode = load._Bytes.encode
def wait(self, text):
    pathlib.Path({str(tmp_path)!r}, f"at-{{os.getpid()}}").touch()
    while len(list(pathlib.Path({str(tmp_path)!r}).glob("at-*"))) < 2:
        time.sleep(0.01)
    return encode(self, text)
load._Bytes.encode = wait
"""
    processes = [program(many_files, tmp_path / "cache", patch) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    undisturbed = make(many_files, cache_dir=str(tmp_path / "other")).fingerprint
    assert outputs == [f"{undisturbed}\n"] * 2
    assert len(shard_folders(tmp_path)) == 9 and leftovers(tmp_path) == []


# --- what cannot be written or read ---------------------------------------------------------------


def test_an_interrupted_build_leaves_only_whole_shards(
    make, many_files, tmp_path, monkeypatch, encoded, small_shards
):
    def interrupt(text):
        if len(encoded) == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        encode = type(load_tokenizer("bytes")).encode
        patch.setattr(
            type(load_tokenizer("bytes")),
            "encode",
            lambda self, text: interrupt(text) or encode(self, text),
        )
        with pytest.raises(KeyboardInterrupt):
            make(many_files)
    assert len(shard_folders(tmp_path)) == 1 and leftovers(tmp_path) == []


def test_an_unwritable_cache_names_folder_and_field(make, many_files, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(UserError, match=rf"{file}.*Not a directory; set data\.cache_dir"):
        make(many_files, cache_dir=str(file))


def test_a_full_disk_is_one_line(make, many_files, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.np, "savez", full)
        with pytest.raises(UserError, match=r"No space left on device; set data\.cache_dir"):
            make(many_files)
    assert shard_folders(tmp_path) == []
    # And where the device itself is full, while tokens are written.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))"
    code = f"""
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{limit}
from mamba_jax.config import DataConfig
from mamba_jax.data.pipeline import prepare
from mamba_jax.errors import UserError
try:
    prepare(DataConfig(data_dir={str(many_files)!r}, tokenizer="bytes", tokenise_workers=1,
        cache_dir={str(tmp_path / "cache")!r}), seq_len=32, seed=0, log=lambda line: None)
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert "File too large; set data.cache_dir" in done.stdout
    assert shard_folders(tmp_path) == []


def test_a_warm_cache_needs_no_writing(make, many_files, monkeypatch):
    first = make(many_files)

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "rename", "replace", "fsync"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(store, "write_atomic", refuse)
    assert make(many_files).fingerprint == first.fingerprint
    # Files that only save time are skipped if they cannot be written.
    assert make(many_files, seed=5).fingerprint != first.fingerprint
    monkeypatch.setattr(store, "_SETTLED_SECS", -1)
    assert make(many_files).fingerprint == first.fingerprint


def test_the_default_folder(make, many_files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    make(many_files, cache_dir="")
    assert len(list((tmp_path / "xdg" / "mamba_jax" / "tokens").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    make(many_files, cache_dir="")
    assert len(list((tmp_path / "home" / ".cache" / "mamba_jax" / "tokens").iterdir())) == 1


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_files_that_change_while_they_are_read(make, many_files, tmp_path, monkeypatch, change):
    file = many_files / "59.txt"
    if change == "added":  # a JSON file that gains a record
        file.unlink()
        file = many_files / "z.json"
        file.write_text('["one"]')
    pieces = sources.FilePart.pieces

    def read_then_change(self, summary):
        yield from pieces(self, summary)
        if self.path == str(file):
            if change == "removed":
                file.unlink()
            else:
                file.write_text("edited" if change == "edited" else '["one", "two"]')

    monkeypatch.setattr(sources.FilePart, "pieces", read_then_change)
    with pytest.raises(
        UserError, match=rf"{file} changed while it was being read; run the command again"
    ):
        make(many_files)
    assert shard_folders(tmp_path) == []


def test_the_size_of_the_cache_and_clearing_it(make, many_files, tmp_path):
    assert store.clear(tmp_path / "cache") == 0
    make(many_files)
    (tmp_path / "cache" / "other").touch()
    files = [path for path in (tmp_path / "cache" / "tokens").rglob("*") if path.is_file()]
    taken = sum(path.stat().st_blocks * 512 for path in files)
    assert store.size_bytes(tmp_path / "cache") == store.clear(tmp_path / "cache") == taken > 0
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["other"]


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_file_is_tokenised_in_bounded_memory(tmp_path):
    with open(tmp_path / "large.txt", "w") as file:
        for start in range(0, 4_000_000, 6_250):
            numbers = range(start, start + 6_250)
            file.write("".join(f"word{i * 7919 % 15_485_863} and, " for i in numbers))
    code = f"""
import resource
from mamba_jax.config import DataConfig
from mamba_jax.data.pipeline import prepare
from mamba_jax.data.tokenizers.load import load_tokenizer
load_tokenizer("gpt2").encode("x" * 100)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
corpus = prepare(DataConfig(data_dir={str(tmp_path / "large.txt")!r}, tokenise_workers=1,
    cache_dir={str(tmp_path / "cache")!r}), seq_len=1024, seed=0, log=lambda line: None)
print(corpus.summary.text_bytes, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    text_bytes, grown_mb = done.stdout.split()
    assert int(text_bytes) > 60_000_000
    assert float(grown_mb) < 150  # 91 measured, also for twice the text
