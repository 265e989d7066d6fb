"""``prepare_data``, ``--list_files`` and ``--clear_cache``: what they print and leave behind."""

import signal
import subprocess
import sys

import pytest

from mamba_jax import prepare_data, train
from mamba_jax.config import DataConfig
from mamba_jax.data.cache import store
from mamba_jax.data.pipeline import prepare


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i:02d}.txt").write_text(f"text {i} " * 30)
    (texts / "copy.txt").write_text((texts / "00.txt").read_text())
    (texts / "odd.txt").write_bytes(b"caf\xe9")
    (texts / "image.txt").write_bytes(b"\0\1\2")
    (texts / "broken.json").write_text("[1, ")
    return texts


FLAGS = ["--data_dir", "texts", "--config.data.tokenizer=bytes", "--config.data.cache_dir=cache"]


def test_a_run_finds_what_was_prepared(capsys, monkeypatch):
    assert prepare_data.main([*FLAGS, "--workers", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    text_bytes = sum(len(f"text {i} ") * 30 for i in range(20)) + len("café".encode())
    assert out[1].startswith("texts: 22 files, 21 documents, ")
    assert out[1].endswith(f"{text_bytes + 21:,} tokens; 1 exact duplicates left out")
    assert "1.000 bytes per token (bytes); 1 exact and 0 near duplicates" in out
    assert out[-1].startswith("token cache: 0.0") and "cache/tokens" in out[-1]

    def refuse(*_args):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(store, "build_shards", refuse)
    config = DataConfig(data_dir="texts", tokenizer="bytes", cache_dir="cache")
    assert len(prepare(config, seq_len=64, seed=0, log=print).train) > 10


@pytest.mark.parametrize("main", [train.main, prepare_data.main], ids=["train", "prepare_data"])
def test_list_files_lists_each_file_and_tokenises_nothing(main, capsys, tmp_path):
    assert main([*FLAGS, "--list_files"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "texts/00.txt: 1 documents, 210 bytes of text" in out
    assert "texts/odd.txt: 1 documents, 5 bytes of text; not UTF-8, read as cp1252" in out
    assert "texts/image.txt: skipped, binary" in out
    assert "texts/broken.json: skipped, broken JSON" in out
    assert "skipped 1 × binary: texts/image.txt" in out
    assert out[-1].startswith("none of these files is in the token cache: tokens and duplicates")
    assert not (tmp_path / "cache").exists() and not (tmp_path / "checkpoints").exists()


def test_inspect_shows_the_windows_that_a_training_begins_with(capsys):
    flags = [*FLAGS, "--config.model.max_seq_len=100", "--seed=3"]
    assert prepare_data.main([*flags, "--inspect", "2"]) == 0
    out = capsys.readouterr().out
    config = DataConfig(data_dir="texts", tokenizer="bytes", cache_dir="cache")
    batch = next(prepare(config, seq_len=100, seed=3, log=print).train_batches(2, 3))
    for number, window in enumerate(batch, 1):
        text = "".join("⟦document⟧" if token == 256 else chr(token) for token in window)
        heading = f"==> training window {number}: 100 tokens to predict, 0 of them not trained on; "
        begun = int((window == 256).sum())
        assert f"{heading}{begun} documents begin <==\n{text}\n" in out
    assert prepare_data.main([*flags, "--inspect"]) == 0
    assert capsys.readouterr().out.count("==> training window") == 3
    for count in ("0", "", "x"):
        assert prepare_data.main([*flags, f"--inspect={count}"]) == 2
        assert f"--inspect={count}: give a number of windows" in capsys.readouterr().err
    window = "--config.data.window=document"
    assert prepare_data.main([*flags, window, "--inspect=1"]) == 0
    out = capsys.readouterr().out
    assert "; 1 documents begin <==" in out or "; 2 documents begin <==" in out  # and its end


def test_list_files_shows_what_is_cached(capsys, here):
    assert prepare_data.main([*FLAGS, "--workers", "1"]) == 0
    (here / "new.txt").write_text("not tokenised yet")
    capsys.readouterr()
    assert prepare_data.main([*FLAGS, "--list_files"]) == 0
    texts = [(here / f"{i:02d}.txt").read_bytes() for i in (*range(20), 0)] + ["café".encode()]
    tokens = sum(len(text) + 1 for text in texts)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"the token cache has 24 of 25 files: {tokens:,} tokens, 1 exact duplicates among them"
    )


def test_clear_cache_removes_the_tokens(capsys, tmp_path):
    assert prepare_data.main(FLAGS) == 0
    assert train.main([*FLAGS, "--clear_cache", "--list_files"]) == 0
    assert "MB of tokens from cache/tokens" in capsys.readouterr().out
    assert not (tmp_path / "cache/tokens").exists()
    assert prepare_data.main([*FLAGS, "--clear_cache"]) == 0
    assert "removed 0.00 MB" in capsys.readouterr().out
    assert (tmp_path / "cache/tokens").exists()  # filled again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "x"], "data.tokenise_workers='x' is not a whole number"),
        (["--workers"], "needs a value"),
        (["--workers=-1"], "data.tokenise_workers=-1 must not be negative"),
        (["--dry_run"], "do not apply: prepare_data does not train"),
        (["--wrkers", "2"], "unknown flag --wrkers"),
        (["--data_dir", "nowhere"], "nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert prepare_data.main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_names_the_flags_about_text(capsys):
    assert prepare_data.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--workers", "--data_dir", "--dataset", "--list_files"))


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "build_shards", interrupt)
    assert prepare_data.main(FLAGS) == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    code = """
import concurrent.futures, multiprocessing, os, time
from mamba_jax.data.cache.workers import _begin_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context, initializer=_begin_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 60)
    time.sleep(60)
"""
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, "parent.py"],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(prepare_data.__file__).rpartition("/mamba_jax/")[0]},
    )
    assert parent.stdout is not None and int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    # Its end of the pipe closes with the child's own.
    assert parent.stdout.read() == b""
    parent.stdout.close()
