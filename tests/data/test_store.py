"""The cache: made once, accepted only whole, safe under kill -9 and under two builders."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mamba_jax.data import cache, sources
from mamba_jax.data.tokenizer import load_tokenizer
from mamba_jax.errors import UserError

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture
def encoded(monkeypatch):
    """Counts the documents that are tokenised."""
    texts = []
    tokenizer_class = type(load_tokenizer("bytes"))
    encode = tokenizer_class.encode
    monkeypatch.setattr(
        tokenizer_class, "encode", lambda self, text: texts.append(text) or encode(self, text)
    )
    return texts


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir())


def test_holds_the_documents_each_behind_its_marker(make, many_files, tmp_path):
    make(many_files)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    expected = []
    for file in sorted(many_files.iterdir()):
        expected += [256, *file.read_bytes()]
    assert np.fromfile(folder / "tokens.bin", np.uint16).tolist() == expected


def test_a_second_call_tokenises_nothing(make, many_files, encoded, tmp_path):
    first = make(many_files)
    assert len(encoded) == 60
    os.utime(many_files / "00.txt")  # a new date is no new content
    again = make(many_files)
    other_seed = make(many_files, seed=1, seq_len=16)
    assert len(encoded) == 60
    assert again.fingerprint == first.fingerprint != other_seed.fingerprint
    (many_files / "00.txt").write_text("other content")
    assert make(many_files).fingerprint != first.fingerprint
    assert len(encoded) == 120
    assert len(folders(tmp_path)) == 2


def test_fingerprint_tells_content_tokenizer_window_and_seed_apart(make, many_files):
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


def test_a_large_vocabulary_takes_four_bytes(make, many_files, tmp_path, monkeypatch):
    narrow = make(many_files)
    monkeypatch.setattr(type(narrow.tokenizer), "vocab_size", 70_000)
    wide = make(many_files, cache_dir=str(tmp_path / "wide"))
    meta = next((tmp_path / "wide").rglob("meta.json"))
    assert json.loads(meta.read_text())["dtype"] == "uint32"
    np.testing.assert_array_equal(narrow.train[0], wide.train[0])


def damage_byte(folder):
    data = bytearray((folder / "tokens.bin").read_bytes())
    data[1_001] ^= 4
    (folder / "tokens.bin").write_bytes(data)


DAMAGES = {
    "bit flip": damage_byte,
    "truncated": lambda folder: os.truncate(folder / "tokens.bin", 1_000),
    "emptied": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "units": lambda folder: os.truncate(folder / "units.npz", 100),
    "no tokens": lambda folder: (folder / "tokens.bin").unlink(),
    "no meta": lambda folder: (folder / "meta.json").unlink(),
    "bad meta": lambda folder: (folder / "meta.json").write_text("[]"),
    "no JSON": lambda folder: (folder / "meta.json").write_bytes(b"\xff\0{"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_made_again(make, many_files, tmp_path, encoded, damage):
    first = make(many_files)
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    whole = (folder / "tokens.bin").read_bytes()
    damage(folder)
    assert make(many_files).fingerprint == first.fingerprint
    assert len(encoded) == 120
    assert any("is damaged" in line for line in make.log)
    assert (folder / "tokens.bin").read_bytes() == whole
    assert folders(tmp_path) == [folder.name]


def test_large_files_are_hashed_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK_BYTES", 16)
    monkeypatch.setattr(cache, "_HASHED_BLOCKS", 4)
    file = tmp_path / "f"

    def hashed(size, changed=None):
        data = bytearray(size)
        if changed is not None:
            data[changed] = 1
        file.write_bytes(data)
        return cache._size_and_hash(file)

    # Up to four blocks every byte counts; above, the first and the last block and some between.
    assert all(hashed(50) != hashed(50, changed=i) for i in range(50))
    assert hashed(1_000) != hashed(1_001)
    noticed = [i for i in range(1_000) if hashed(1_000) != hashed(1_000, changed=i)]
    assert noticed[:16] == list(range(16)) and noticed[-8:] == list(range(992, 1_000))
    assert len(noticed) == 3 * 16 + 8


def program(folder, cache_dir, patch):
    """Runs prepare() in another process, with some part of the builder patched first."""
    code = f"""
import os, time
from mamba_jax.config import DataConfig
from mamba_jax.data import cache, tokenizer
from mamba_jax.data.pipeline import prepare
{patch}
config = DataConfig(data_dir={str(folder)!r}, tokenizer="bytes", cache_dir={str(cache_dir)!r})
corpus = prepare(config, seq_len=32, seed=0, log=lambda line: None)
print(corpus.fingerprint, int(sum(w.sum() for w in map(corpus.train.__getitem__,
    range(len(corpus.train))))), flush=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


STOP_WHILE_TOKENISING = """
count, encode = [], tokenizer._Bytes.encode
def slow(self, text):
    count.append(text)
    if len(count) == 30:
        print("reached", flush=True)
        time.sleep(60)
    return encode(self, text)
tokenizer._Bytes.encode = slow
"""
STOP_BEFORE_RENAME = """
def stop(*paths):
    print("reached", flush=True)
    time.sleep(60)
os.rename = stop
"""


@pytest.mark.parametrize("patch", [STOP_WHILE_TOKENISING, STOP_BEFORE_RENAME])
def test_killed_in_the_middle(make, many_files, tmp_path, patch, encoded):
    process = program(many_files, tmp_path / "cache", patch)
    assert process.stdout is not None and process.stdout.readline() == "reached\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = folders(tmp_path)
    assert left.startswith(".")  # nothing that could be taken for a cache
    killed = make(many_files)
    assert len(encoded) == 60
    undisturbed = make(many_files, cache_dir=str(tmp_path / "other"))
    assert killed.fingerprint == undisturbed.fingerprint
    np.testing.assert_array_equal(killed.train[0], undisturbed.train[0])

    # A fresh unfinished folder may be another run's; an old one is removed by the next build.
    assert left in folders(tmp_path)
    root = tmp_path / "cache" / "tokens"
    past = time.time() - 2 * cache._ABANDONED_SECS
    for path in (*(root / left).iterdir(), root / left):
        os.utime(path, (past, past))
    make(many_files, tokenizer="gpt2")
    assert left not in folders(tmp_path)


def test_two_at_once(many_files, tmp_path):
    """Both are in the middle of building before either is let go on."""
    patch = f"""
import pathlib
encode = tokenizer._Bytes.encode
def wait(self, text):
    pathlib.Path({str(tmp_path)!r}, f"at-{{os.getpid()}}").touch()
    while len(list(pathlib.Path({str(tmp_path)!r}).glob("at-*"))) < 2:
        time.sleep(0.01)
    return encode(self, text)
tokenizer._Bytes.encode = wait
"""
    processes = [program(many_files, tmp_path / "cache", patch) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(folders(tmp_path)) == 1 and not folders(tmp_path)[0].startswith(".")


def test_an_interrupted_build_leaves_nothing(make, many_files, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "cut_into_units", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(many_files)
    assert folders(tmp_path) == []


def test_an_unwritable_cache_names_folder_and_field(make, many_files, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(UserError, match=rf"{file}.*Not a directory; set data\.cache_dir"):
        make(many_files, cache_dir=str(file))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    with pytest.raises(UserError, match=r"No space left on device; set data\.cache_dir"):
        make(many_files)
    assert folders(tmp_path) == []


def test_a_warm_cache_needs_no_writing(make, many_files, monkeypatch):
    first = make(many_files)

    def refuse(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "rename", "fsync"):
        monkeypatch.setattr(os, name, refuse)
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
    read = sources.Source.read

    def read_then_change(self):
        result = read(self)
        file = many_files / "59.txt"
        if change == "removed":
            file.unlink()
        else:
            file.write_text("edited" if change == "edited" else "[1]")
        return result

    if change == "added":  # a JSON file that gains a record
        (many_files / "59.txt").unlink()
        (many_files / "z.json").write_text('["one"]')

        def read_then_change(self):
            result = read(self)
            (many_files / "z.json").write_text('["one", "two"]')
            return result

    monkeypatch.setattr(sources.Source, "read", read_then_change)
    with pytest.raises(UserError, match="changed while they were read; start again"):
        make(many_files)
    assert folders(tmp_path) == []
