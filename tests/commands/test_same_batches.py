"""Commands that are killed with SIGKILL and restarted give the same batches as undisturbed ones, by
hash over two epochs. The state of the samples is one integer, which survives JSON."""

import collections
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from mamba_jax.checkpoints.arrays import read_metadata
from mamba_jax.config import DataConfig
from mamba_jax.data.pipeline import prepare

BATCH, SEQ_LEN = 16, 32
CONFIG = f"""
from mamba_jax.config import default_config

def get_config():
    config = default_config()
    config.update(name="tiny", log_dir="logs", tensorboard_dir="runs")
    config.data.update(tokenizer="bytes", cache_dir="cache")
    config.model.update(d_model=16, n_layers=1, max_seq_len={SEQ_LEN}, attention_window=8)
    config.training.update(warmup_steps=2, eval_steps=1000, save_steps=3, eval_windows=8)
    config.vram.update(effective_batch_size={BATCH}, batch_size={BATCH})
    return config
"""
# Writes (sample, hash) of each window that the run is given; slowed down if it is to be killed.
TRAIN = """
    import hashlib, sys, time
    from mamba_jax import train
    from mamba_jax.data.pipeline import Corpus
    file, secs, made = open(sys.argv[1], "w", buffering=1), float(sys.argv[2]), Corpus.train_batches
    def train_batches(self, batch_size, seed, start_sample=0):
        for batch in made(self, batch_size, seed, start_sample):
            for window in batch:
                file.write(f"{start_sample} {hashlib.sha256(window.tobytes()).hexdigest()}\\n")
                start_sample += 1
            time.sleep(secs)
            yield batch
    Corpus.train_batches = train_batches
    sys.exit(train.main(sys.argv[3:]))
"""
# Small shards and slow tokenising, so that a kill leaves some shards whole and one unfinished.
PREPARE = """
    import sys, time
    from mamba_jax import prepare_data
    from mamba_jax.data.cache import workers
    from mamba_jax.data.tokenizers import load
    workers.SHARD_PARTS, encode, count = 7, load._Bytes.encode, 0
    def slow(self, text):
        global count
        count += 1
        if count == int(sys.argv[1]):
            print("reached", flush=True)
            time.sleep(60)
        return encode(self, text)
    load._Bytes.encode = slow
    sys.exit(prepare_data.main(sys.argv[2:]))
"""


def start(place, script: str, *argv: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, argv)],
        cwd=place,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": "",
            "HF_DATASETS_CACHE": str(place / "hf"),
            "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
        },
    )


def end(process: subprocess.Popen) -> list[str]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out.splitlines()


def kill_at(process: subprocess.Popen, beginning: str) -> None:
    assert process.stdout is not None
    assert any(line.startswith(beginning) for line in process.stdout), "it never came"
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of files, and a dataset laid out like one of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / f"texts/{i:02d}.txt").write_text(f"file {i}: " + f"{i * i} " * (8 + i % 5))
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i**3}."} for i in range(40)]
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def windows_of(path) -> dict[int, str]:
    return {int(sample): digest for sample, digest in map(str.split, open(path))}


@pytest.mark.slow
def test_train_on_files_and_a_dataset_killed_within_an_epoch(place, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "hf")
    source = {"data_dir": "texts", "dataset": "org/name", "text_column": "instruction,output"}
    config = DataConfig(**source, tokenizer="bytes", cache_dir="cache")
    corpus = prepare(config, seq_len=SEQ_LEN, seed=42, log=lambda _: None)
    epoch = len(corpus.train)
    assert epoch > 3 * BATCH and epoch % BATCH and 2 * epoch % BATCH
    flags = ["--config=tiny.py", *(f"--{name}={value}" for name, value in source.items())]
    flags += [f"--config.training.max_steps={-(-2 * epoch // BATCH)}", "--seed=42"]

    end(start(place, TRAIN, "whole.txt", 0, *flags, "--output_dir=whole"))
    flags += ["--output_dir=parts", "--resume=auto"]
    kill_at(start(place, TRAIN, "killed.txt", 0.3, *flags), "saved parts/step_3")
    samples_seen = read_metadata(place / "parts/step_3").samples_seen
    assert samples_seen == 3 * BATCH < epoch
    end(start(place, TRAIN, "resumed.txt", 0, *flags))

    whole, killed, resumed = (windows_of(f"{x}.txt") for x in ("whole", "killed", "resumed"))
    assert min(resumed) == samples_seen and not (place / "parts/step_3").is_symlink()
    requested = range(2 * epoch)
    assert [(killed | resumed)[i] for i in requested] == [whole[i] for i in requested]
    assert all(whole[i] == digest for i, digest in killed.items())

    # Each epoch has every window of both sources once, across the batch that holds parts of two.
    digest = lambda window: hashlib.sha256(window.tobytes()).hexdigest()
    every = collections.Counter(digest(corpus.train[i]) for i in range(epoch))
    first, second = ([whole[i + at] for i in range(epoch)] for at in (0, epoch))
    assert collections.Counter(first) == collections.Counter(second) == every
    assert first != second

    # The state of the order, through JSON.
    state = json.loads(json.dumps({"samples_seen": samples_seen}))
    batch = next(corpus.train_batches(BATCH, seed=42, start_sample=state["samples_seen"]))
    assert [digest(window) for window in batch] == [whole[samples_seen + i] for i in range(BATCH)]


def test_prepare_data_killed_half_way(place):
    flags = ["--data_dir=texts", "--config.data.tokenizer=bytes", "--workers=1"]
    flags += [f"--config.model.max_seq_len={SEQ_LEN}"]
    once = [*flags, "--config.data.cache_dir=once"]
    kill_at(start(place, PREPARE, 18, *once), "reached")
    shards = lambda cache: {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (place / cache).glob("tokens/*/shards/[!.]*/tokens.bin")
    }
    left = shards("once")
    assert len(left) == 2  # of 7 files each
    end(start(place, PREPARE, 0, *once))
    end(start(place, PREPARE, 0, *flags, "--config.data.cache_dir=undisturbed"))
    again, undisturbed = shards("once"), shards("undisturbed")
    # What was complete at the kill is kept; the rest is grouped as if that did not exist.
    assert left.items() <= again.items() and left.items() <= undisturbed.items()
    assert again == undisturbed and len(again) == 5

    def batches(cache):
        config = DataConfig(data_dir="texts", tokenizer="bytes", cache_dir=cache)
        corpus = prepare(config, seq_len=SEQ_LEN, seed=0, log=lambda _: None)
        made = corpus.train_batches(BATCH, seed=0)
        count = -(-2 * len(corpus.train) // BATCH)
        return [hashlib.sha256(next(made).tobytes()).hexdigest() for _ in range(count)]

    assert batches("once") == batches("undisturbed")
