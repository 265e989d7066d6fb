"""Exported models in their engines against our own logits: the table in ``docs/export.md``.

    pip install -e '.[gguf,llamacpp,onnx,bench]'
    python -m benchmarks.engines

Trains a tiny Mamba and a tiny hybrid on bytes of Python's own library, exports each in every format
and dtype that has an engine, and compares as ``mamba_jax.export --verify`` does. A format whose
libraries are missing gets a note. Writes benchmarks/results/engines_cpu.json and .md.
"""

import json
import pathlib
import sys
import sysconfig
import tempfile
import time
from typing import Any

from benchmarks.report import cpu_name, git_commit, installed
from mamba_jax import export, train
from mamba_jax.errors import UserError

ENGINES = {"hf": "transformers", "gguf": "llama.cpp", "onnx": "onnxruntime"}
PACKAGES = ("jax", "torch", "transformers", "gguf", "xllamacpp", "onnx", "onnxruntime")
# Untied, like the tests: a tiny tied model soon repeats a single token.
FIELDS = {"d_model": 64, "n_layers": 2, "max_seq_len": 128, "tie_embeddings": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "hybrid": {"recursion_depth": 2, "attention_window": 32},
}
STEPS, ROWS = 300, 16


def train_model(family: str, folder: pathlib.Path) -> pathlib.Path:
    """Trains one of the models; returns its checkpoint."""
    out = folder / family
    fields = {f"config.model.{name}": value for name, value in (FIELDS | FAMILIES[family]).items()}
    fields |= {
        "config.model.family": family,
        "config.training.max_steps": STEPS,
        "config.training.learning_rate": 3e-3,
        "config.training.warmup_steps": 30,
        "config.training.eval_windows": 64,
        "config.vram.effective_batch_size": ROWS,
        "config.vram.batch_size": ROWS,
        "config.data.cache_dir": str(folder / "cache"),
        "data_dir": str(pathlib.Path(sysconfig.get_path("stdlib"), "asyncio")),
        "tokenizer": "bytes",
        "output_dir": str(out),
    }
    status = train.main([f"--{name}={value}" for name, value in fields.items()])
    assert status == 0, status
    return out / "final"


def compare(checkpoint: pathlib.Path, form: str, dtype: str, out: pathlib.Path) -> dict[str, Any]:
    """Exports and verifies; returns what was found, or a note that says why nothing was."""
    from mamba_jax.exporting import tensors, verify
    from mamba_jax.generation.load import find

    arguments = ["--checkpoint", str(checkpoint), "--format", form, "--dtype", dtype]
    try:
        export.run(export.parse([*arguments, "--out", str(out)]))
        found = find(str(checkpoint), print)
        assert found.metadata.step == STEPS, found.metadata.step
        model = found.load()
        table = tensors.to_hf(model.params, model.config, model.tokenizer.vocab_size)
        check = getattr(verify, f"check_{form}")
        return check(out, table, model.config, model.tokenizer, dtype)._asdict()
    except UserError as error:
        return {"note": str(error)}


def markdown(record: dict[str, Any]) -> str:
    """Returns the table for people."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    training = record["training"]
    lines = [
        "# Exported models in their engines against ours",
        "",
        f"CPU ({record['device']}), {record['date']}, commit {record['commit'][:8]}; {versions}. "
        f"Models of {FIELDS['n_layers']} layers, d_model {FIELDS['d_model']}, trained "
        f"{training['steps']} steps of {training['tokens_per_step']} bytes; three prompts, "
        "64 greedy tokens after each. Each row compares the file in the other engine with the "
        "same rounded weights in JAX float32. To reproduce it: `python -m benchmarks.engines`.",
        "",
        "| model | engine | weights | largest difference | of logits up to | greedy tokens equal "
        "| rounding the weights moves logits by | folder |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        head = f"| {row['model']} | {ENGINES[row['format']]} ({row['format']}) | {row['dtype']} "
        if "note" in row:
            lines.append(f"{head}| {row['note'].replace('|', '/')} | | | | |")
            continue
        lines.append(
            f"{head}| {row['largest_difference']:.2g} | {row['largest_value']:.1f} "
            f"| {row['same_greedy']} of {row['n_greedy']} | {row['drift']:.2g} "
            f"| {row['folder_bytes'] / 1e3:,.0f} kB |"
        )
    lines.append("")
    lines.append("llama.cpp reports log-probabilities of its 20 most likely tokens, not logits.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Trains, exports, compares and writes."""
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": git_commit(),
        "device": cpu_name(),
        "versions": installed(PACKAGES),
        "training": {"steps": STEPS, "tokens_per_step": ROWS * FIELDS["max_seq_len"]},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for family in FAMILIES:
            checkpoint = train_model(family, folder)
            for form, dtypes in export._DTYPES.items():
                for dtype in dtypes if form in ENGINES else ():
                    if (family, form) == ("hybrid", "gguf"):
                        continue  # refused, as llama.cpp has no such architecture
                    out = folder / f"{family}-{form}-{dtype}"
                    row = {"model": family, "format": form, "dtype": dtype}
                    row |= compare(checkpoint, form, dtype, out)
                    row["folder_bytes"] = sum(file.stat().st_size for file in out.glob("*"))
                    record["rows"].append(row)
                    print(row, flush=True)
    stem = pathlib.Path(__file__).parent / "results" / "engines_cpu"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(record))
    print(f"written: {stem}.json, {stem}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
