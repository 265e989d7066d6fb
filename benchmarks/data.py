"""The data: batches against peers, tokenising and its memory, the first batch of a large cache.

Batches are timed in CPU seconds, threads included: while the device computes, a loader costs
nothing as long as it leaves the cores alone. All loaders read the same tokens of the standard
library, which fit into the system's cache.
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import harness
from benchmarks.harness import Candidate, Check, Context, Prepared, Row
from benchmarks.report import bars

BASELINE = "mamba_jax"
SEQ_LEN, BATCH = 2048, 32
BATCH_TOKENS = SEQ_LEN * BATCH
TOKENS_PER_CPU_SEC, BYTES_PER_SEC = 50e6, 8e6  # at least
GROWTH_BYTES, FIRST_BATCH_SECS = 300e6, 1.0  # at most
RATE, SPEED, GROWTH = "tokens_per_cpu_sec", "MB_per_cpu_sec", "growth_bytes"
_REPORTED = "measured "


def cases(context: Context) -> list[dict[str, Any]]:
    """Batches; a file to tokenise; a cache to open."""
    return [
        {"task": "batches", "size": f"{BATCH} × {SEQ_LEN} tokens"},
        {"task": "tokenise", "size": "20 MB" if context.quick else "1000 MB"},
        {"task": "first batch", "size": "0.1 GB" if context.quick else "10 GB"},
    ]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """Loaders, or our own processes."""
    size = float(case["size"].split()[0])
    if case["task"] == "tokenise":
        return [
            Candidate(BASELINE, functools.partial(prepare_tokenising, "ours", size)),
            Candidate("tiktoken alone", functools.partial(prepare_tokenising, "tiktoken", size)),
        ]
    if case["task"] == "first batch":
        return [Candidate(BASELINE, functools.partial(prepare_first_batch, size))]
    count = 10 if context.quick else 100
    return [
        Candidate(name, functools.partial(prepare_batches, batches, count))
        for name, batches in LOADERS.items()
    ]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Loaders in turn; processes one after another."""
    rounds = {"batches": 7, "tokenise": 1, "first batch": 5}[case["task"]]
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=1 if context.quick else rounds,
        candidate_secs=600.0,
        deadline=context.deadline,
    )
    for row in rows:
        if row.case == case and row.median_secs:
            if case["task"] == "batches":
                tokens = (10 if context.quick else 100) * BATCH_TOKENS
                row.metrics[RATE] = tokens / row.median_secs
            elif case["task"] == "tokenise":
                row.metrics[SPEED] = float(case["size"].split()[0]) / row.median_secs


# --- batches


def prepare_batches(batches: Any, count: int) -> Prepared:
    """Counts the CPU seconds of all threads for some batches."""
    endless = batches(corpus())
    next(endless)

    def run() -> float:
        begin = time.process_time()
        for _ in range(count):
            batch = next(endless)
        assert batch.shape == (BATCH, SEQ_LEN + 1), batch.shape
        return time.process_time() - begin

    return Prepared(run)


@functools.cache
def corpus() -> Any:
    """The standard library's source, tokenised once."""
    from mamba_jax.config import DataConfig
    from mamba_jax.data.pipeline import prepare

    library = sysconfig.get_path("stdlib")
    return prepare(DataConfig(data_dir=library), seq_len=SEQ_LEN, seed=0, log=lambda line: None)


@functools.cache
def flat_tokens() -> Any:
    """The training tokens as one array of uint16 in a file: what the peers read."""
    import numpy as np

    windows = corpus().train
    array = np.concatenate([windows[index][:-1] for index in range(len(windows))])
    file = tempfile.NamedTemporaryFile(suffix=".bin", delete=False)  # noqa: SIM115  # mapped
    array.astype(np.uint16).tofile(file.name)
    mapped = np.memmap(file.name, np.uint16, "r")
    os.unlink(file.name)
    return mapped


def ours(corpus: Any) -> Iterator[Any]:
    """What the training loop reads."""
    return corpus.train_batches(BATCH, 0)


def torch_loader(corpus: Any) -> Iterator[Any]:
    """A ``DataLoader`` that shuffles windows of the map, in this process: workers would cost as
    much again to pass the batches on."""
    import numpy as np

    data = harness.import_peer("torch.utils.data")
    tokens = flat_tokens()

    class Windows(data.Dataset):
        def __len__(self) -> int:
            return (len(tokens) - 1) // SEQ_LEN

        def __getitem__(self, index: int) -> Any:
            window = tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN + 1]
            return window.astype(np.int32)

    return _shuffled_by_torch(data, Windows())


def _shuffled_by_torch(data: Any, windows: Any) -> Iterator[Any]:
    loader = data.DataLoader(windows, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def arrow_table() -> Any:
    """``datasets``: one row per window, as numpy arrays."""
    import numpy as np

    datasets = harness.import_peer("datasets")
    tokens = flat_tokens()
    starts = range(0, len(tokens) - SEQ_LEN, SEQ_LEN)
    rows = {"tokens": [tokens[start : start + SEQ_LEN + 1].astype(np.int32) for start in starts]}
    return datasets.Dataset.from_dict(rows).with_format("numpy")


def arrow_batches(corpus: Any) -> Iterator[Any]:
    """Shuffled, and read in batches."""
    table, epoch = arrow_table(), 0
    while True:
        for batch in table.shuffle(seed=epoch).iter(BATCH, drop_last_batch=True):
            yield batch["tokens"]
        epoch += 1


def arrow_rows(corpus: Any) -> Iterator[Any]:
    """Read row by row, as torch's ``DataLoader`` does."""
    data = harness.import_peer("torch.utils.data")
    for batch in _shuffled_by_torch(data, arrow_table().with_format("torch")):
        yield batch["tokens"]


def grain_packing(corpus: Any) -> Iterator[Any]:
    """grain packs shuffled documents (concatenated, then split) as it goes."""
    import grain
    import numpy as np
    from grain.experimental import ConcatThenSplitIterDataset

    tokens = flat_tokens()
    edges = [*np.flatnonzero(tokens == corpus.tokenizer.eot_id).tolist(), len(tokens)]
    documents = [
        {"tokens": tokens[start:end].astype(np.int32)} for start, end in itertools.pairwise(edges)
    ]
    source = grain.MapDataset.source(documents).seed(0).shuffle().repeat(None)
    packed = ConcatThenSplitIterDataset(
        source.to_iter_dataset(grain.ReadOptions(num_threads=0)),
        length_struct={"tokens": SEQ_LEN + 1},
    )
    for batch in packed.batch(BATCH):
        yield batch["tokens"]


LOADERS = {
    BASELINE: ours,
    "torch DataLoader": torch_loader,
    "datasets, arrow batches": arrow_batches,
    "datasets, arrow rows by torch": arrow_rows,
    "grain, packing": grain_packing,
}

# --- processes


def in_process(*words: str) -> dict[str, float]:
    """Runs this module's ``main`` with these arguments, and returns what it measured."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--in_process", *words],
        check=False,
        capture_output=True,
        text=True,
    )
    reported = [line for line in done.stdout.splitlines() if line.startswith(_REPORTED)]
    if done.returncode or not reported:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise harness.NotMeasured(f"its process failed: {last}"[:160])
    return json.loads(reported[-1].removeprefix(_REPORTED))


def prepare_tokenising(who: str, megabytes: float) -> Prepared:
    """Tokenises one text file in a process of its own; in CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        write_text(pathlib.Path(folder, "text.py"), int(megabytes * 1e6))
        reported = in_process("tokenise", who, folder)
    secs = reported.pop("secs")
    return Prepared(lambda: secs, metrics=reported)  # once: it takes minutes


def write_text(path: pathlib.Path, size_bytes: int) -> None:
    """Writes source code of the standard library, changing some words in each repetition."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text("utf-8") for file in files]
    written, number = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size_bytes:
            text = texts[number % len(texts)].replace("self", f"self{number // len(texts)}")
            text = text[: size_bytes - written]
            written += len(text.encode())
            file.write(text)
            number += 1


def tokenise(who: str, folder: str) -> dict[str, float]:
    """Tokenises the file; returns CPU seconds and by how much memory grew."""
    from mamba_jax.config import DataConfig
    from mamba_jax.data.pipeline import prepare
    from mamba_jax.data.tokenizers import tiktoken_encodings

    file = pathlib.Path(folder, "text.py")
    tokenizer = tiktoken_encodings.packaged_gpt2()
    import tqdm  # noqa: F401  # imported by what is measured: not growth

    before, begin = harness.peak_rss_bytes(), time.process_time()
    if who == "ours":
        config = DataConfig(
            data_dir=str(file), cache_dir=str(pathlib.Path(folder, "cache")), tokenise_workers=1
        )
        prepare(config, seq_len=SEQ_LEN, seed=0, log=lambda line: None)
    else:
        with open(file, encoding="utf-8") as text:
            while piece := text.read(1 << 20):
                tokenizer._encoding.encode_to_numpy(piece, disallowed_special=())
    secs = time.process_time() - begin
    return {"secs": secs, GROWTH: harness.peak_rss_bytes() - before}


def prepare_first_batch(gigabytes: float) -> Prepared:
    """Opens a cache of documents of 1,000 tokens in a fresh process."""
    folder = tempfile.TemporaryDirectory()
    write_sparse_cache(pathlib.Path(folder.name), int(gigabytes * 1e9))
    metrics: dict[str, float] = {}

    def run() -> float:
        begin = time.perf_counter()
        metrics.update(in_process("first_batch", folder.name))
        metrics["whole_process_secs"] = time.perf_counter() - begin
        return metrics.pop("secs")

    return Prepared(run, lambda: metrics, metrics)


def write_sparse_cache(root: pathlib.Path, size_bytes: int) -> None:
    """Writes shards as ``data.shards`` does, of tokens that are all 0 and take no space on disk."""
    import numpy as np
    import xxhash

    from mamba_jax.data.cache.shards import _BLOCK_BYTES
    from mamba_jax.data.cache.store import Store
    from mamba_jax.data.sources.files import FilePart
    from mamba_jax.data.summary import DataSummary
    from mamba_jax.data.tokenizers.load import load_tokenizer

    n_shards, document_tokens = 10, 1_000
    documents = size_bytes // 2 // document_tokens // n_shards
    tokens = documents * document_tokens
    store_root = Store(root / "cache", load_tokenizer("gpt2"), print).root
    rng, known = np.random.default_rng(0), {}
    (root / "texts").mkdir()
    zeros = b"\0" * _BLOCK_BYTES
    for number in range(n_shards):
        file = root / "texts" / f"{number}.txt"
        with open(file, "wb") as text:
            text.truncate(4 * tokens)
        stat = FilePart(str(file)).stat
        assert stat is not None
        key = f"{number:032}"
        known[stat[0]] = [*stat[1:], key]
        shard = store_root / "shards" / f"shard{number}"
        shard.mkdir(parents=True)
        with open(shard / "tokens.bin", "wb") as data:
            data.truncate(2 * tokens)
        starts = np.arange(documents, dtype=np.int64) * document_tokens
        np.savez(
            shard / "index.npz",
            start_d=starts,
            end_d=starts + document_tokens,
            bytes_d=np.full(documents, 4 * document_tokens, np.int64),
            digest_dk=rng.integers(0, 256, (documents, 16), np.uint8),
        )
        blocks, rest = divmod(2 * tokens, _BLOCK_BYTES)
        hashes = [xxhash.xxh3_64_hexdigest(zeros)] * blocks
        hashes += [xxhash.xxh3_64_hexdigest(zeros[:rest])] if rest else []
        summary = DataSummary("", files=1, documents=documents, text_bytes=4 * tokens)
        meta = {
            "tokenizer": "gpt2",
            "dtype": "uint16",
            "tokens": tokens,
            "files": {path.name: path.stat().st_size for path in shard.iterdir()},
            "hashes": hashes,
            "index_hash": xxhash.xxh3_64_hexdigest((shard / "index.npz").read_bytes()),
            "parts": {key: (0, documents, summary.to_json(), str(file))},
        }
        words = json.dumps(meta)
        (shard / "meta.json").write_text(f"{words}\n{xxhash.xxh3_64_hexdigest(words.encode())}")
    (store_root / "files.json").write_text(json.dumps(known))


def first_batch(folder: str) -> dict[str, float]:
    """Opens the cache and takes a batch; returns seconds, imports not included."""
    import grain  # noqa: F401  # imported by what is measured

    from mamba_jax.config import DataConfig
    from mamba_jax.data.pipeline import prepare

    root = pathlib.Path(folder)
    config = DataConfig(data_dir=str(root / "texts"), cache_dir=str(root / "cache"))
    begin = time.perf_counter()
    corpus = prepare(config, seq_len=SEQ_LEN, seed=0, log=lambda line: None)
    batch = next(corpus.train_batches(BATCH, 0))
    secs = time.perf_counter() - begin
    begin = time.perf_counter()
    assert corpus.unigram_nll >= 0
    return {
        "secs": secs,
        "unigram_secs": time.perf_counter() - begin,
        "train_tokens": float(len(corpus.train) * SEQ_LEN),
        "batch_tokens": float(batch[:, 1:].size),
    }


# --- results


def checks(rows: list[Row], context: Context) -> list[Check]:
    """The targets of each."""
    if context.quick:
        return []

    def check(claim: str, task: str, value: Any, keeps: Any, unit: str, factor: float) -> Check:
        for row in rows:
            if row.case["task"] == task and row.name == BASELINE and row.samples_secs:
                number = value(row)
                return Check(claim, bool(keeps(number)), f"{number * factor:,.2f} {unit}")
        return Check(claim, None, "")

    return [
        check(
            *("the loader gives at least 50 M tokens per CPU second", "batches"),
            *(lambda row: row.metrics[RATE], lambda rate: rate >= TOKENS_PER_CPU_SEC),
            *("M", 1e-6),
        ),
        check(
            *("tokenising takes in at least 8 MB per CPU second", "tokenise"),
            *(lambda row: row.metrics[SPEED], lambda speed: speed * 1e6 >= BYTES_PER_SEC),
            *("MB", 1.0),
        ),
        check(
            *("its memory grows by less than 300 MB on a file of 1 GB", "tokenise"),
            *(lambda row: row.metrics[GROWTH], lambda growth: growth < GROWTH_BYTES),
            *("MB", 1e-6),
        ),
        check(
            *("the first batch of a warm cache of 10 GB comes within a second", "first batch"),
            *(lambda row: row.median_secs, lambda secs: secs < FIRST_BATCH_SECS),
            *("s, imports not included", 1.0),
        ),
    ]


def draw(rows: list[Row], figure: Any) -> None:
    """The loaders, one bar each."""
    rates = [(row.name, row.metrics[RATE] / 1e6) for row in rows if RATE in row.metrics]
    bars(figure.subplots(), rates, "million tokens per CPU second")


def main(argv: list[str]) -> int:
    """``--in_process`` measures here; other arguments are those of ``benchmarks.run data``."""
    if argv[:1] == ["--in_process"]:
        task, *words = argv[1:]
        measured = {"tokenise": tokenise, "first_batch": first_batch}[task](*words)
        print(_REPORTED + json.dumps(measured))
        return 0
    from benchmarks import run

    return run.main(["data", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
