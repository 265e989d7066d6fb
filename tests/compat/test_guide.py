"""Every command block of the guide runs as printed, apart from the Hub's data.

Each that trains or resumes is run with --dry_run, in this process; a few are run for real at a tiny
size. Names of the Hub are folders of that name here, and /mnt is in the working folder.
"""

import ast
import dataclasses
import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mamba_jax import train
from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints.folder import Metadata, read_metadata
from mamba_jax.cli.train_arguments import read
from mamba_jax.config import freeze, merge, preset_config, presets
from mamba_jax.data.sources.hub import open_dataset
from mamba_jax.data.summary import DataSummary
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.runs import metrics
from tests.compat.blocks import GUIDE, Block, blocks, calls
from tests.support.reading import texts_of
from tests.support.tiny_run import quick_compiles  # noqa: F401

REPOSITORY = pathlib.Path(__file__).parents[2]
SHELL = [block for block in blocks() if block.language == "bash"]
TRAINS = [block for block in SHELL if "./train_background.sh" in block.text]
FLAGS = [block for block in SHELL if block.flag_lines]
WATCHES = ("TensorBoard", "Log Files", "3. Monitor Early")
TEMPLATES = {
    "Basic Command Structure": "[OPTIONS] stands for flags",
    "Full Syntax": "capitals stand for values; its flags: test_full_syntax_…",
}
NOT_COVERED = {
    "Directory Structure": "a picture of folders, no command",
    "vLLM Compatibility": "deployment: export and serving are other commands",
    "Ollama Compatibility": "deployment",
    "2. **FastAPI Server**": "deployment",
    "3. **TorchServe**": "deployment",
    "Future Compatibility": "a list in words, no command",
    "GPU Monitoring": "tools of the NVIDIA driver; nothing of ours is called",
    "4. Save Configurations": "writes a note by echo; nothing of ours is called",
}
ids = lambda block: block.heading


def test_every_shell_block_is_run_or_says_why_not():
    run = {block.heading for block in (*TRAINS, *FLAGS)} | {*WATCHES, *TEMPLATES}
    assert not run & set(NOT_COVERED)
    assert {block.heading for block in SHELL} == run | set(NOT_COVERED)
    assert len({block.heading for block in SHELL}) == len(SHELL) == 43
    assert GUIDE.read_text().count("```bash\n") == 43


# --- where they run -------------------------------------------------------------------------------

# id → a row, with the columns of the real one (the long tail of the-stack's left out).
ROWS = {
    "TIGER-Lab/MathInstruct": {"source": "s", "output": "{}.", "instruction": "Add {} and 1."},
    "bigcode/the-stack-dedup": {"hexsha": "7f{}", "lang": "Python", "content": "x = {}\n"},
    "openai/gsm8k": {"question": "What is {} + {}?", "answer": "#### {}"},
    "custom/dataset": {"prompt": "p{}", "reasoning": "r", "answer": "a"},
    "nvidia/OpenMathInstruct-1": {
        "question": "q{}", "expected_answer": "4", "predicted_answer": "4", "error_message": "",
        "is_correct": True, "generation_type": "x", "dataset": "gsm8k", "generated_solution": "s",
    },
    "meta-math/MetaMathQA": {"type": "t", "query": "q{}", "original_question": "", "response": "r"},
    "codeparrot/github-code": {
        "code": "y = {}", "repo_name": "a/b", "path": "p", "language": "Python", "license": "mit",
        "size": 3,
    },
    "HuggingFaceH4/ultrachat_200k": {
        "prompt": "hi {}", "prompt_id": "7f",
        "messages": [
            {"content": "hi {}", "role": "user"}, {"content": "yo", "role": "assistant"},
        ],
    },
    "squad_v2": {
        "id": "7f", "title": "t", "context": "Of {}.", "question": "Of what?",
        "answers": {"text": ["{}"], "answer_start": [3]},
    },
}  # fmt: skip
# (id, --text_column) → the text of row 5.
TEXTS = {
    ("TIGER-Lab/MathInstruct", ""): "Add 5 and 1.\n\n5.",
    ("TIGER-Lab/MathInstruct", "instruction,output"): "Add 5 and 1.\n\n5.",
    ("bigcode/the-stack-dedup", ""): "x = 5\n",
    ("bigcode/the-stack-dedup", "content"): "x = 5\n",
    ("openai/gsm8k", ""): "What is 5 + 5?\n\n#### 5",
    ("openai/gsm8k", "question"): "What is 5 + 5?",
    ("custom/dataset", "prompt,reasoning,answer"): "p5\n\nr\n\na",
    ("nvidia/OpenMathInstruct-1", ""): "q5\n\ns",
    ("meta-math/MetaMathQA", ""): "q5\n\nr",
    ("codeparrot/github-code", ""): "y = 5",
    ("HuggingFaceH4/ultrachat_200k", ""): "user: hi 5\n\nassistant: yo",
    ("squad_v2", ""): "Of 5.\n\nOf what?\n\n5",
}
# The card at the top of a dataset's folder, where its splits are not named by its files. The real
# gsm8k has no validation split; the guide's command for it needs one.
SPLITS = ("train", "test", "validation")
CARDS = {
    "openai/gsm8k": {"main": dict(zip(SPLITS, SPLITS, strict=True)), "socratic": {"train": "test"}},
    "HuggingFaceH4/ultrachat_200k": {"default": {"train_sft": "train", "test_sft": "test"}},
}


def put_dataset(folder: pathlib.Path) -> None:
    """Writes 60 rows a split, as JSON lines."""
    name = "/".join(folder.parts[-2:]) if folder.name != "squad_v2" else "squad_v2"
    row = json.dumps(ROWS[name])
    lines = "".join(row.replace("{}", str(i)) + "\n" for i in range(60))
    folder.mkdir(parents=True)
    for split in SPLITS:
        (folder / f"{split}.jsonl").write_text(lines)
    if name in CARDS:
        configs = [
            {
                "config_name": config,
                "data_files": [{"split": s, "path": f"{f}.jsonl"} for s, f in splits.items()],
            }
            for config, splits in CARDS[name].items()
        ]
        (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A working folder that has what the guide's reader has."""
    place = tmp_path_factory.mktemp("guide")
    for folder in (
        "data",
        "data/custom_examples",
        "data/custom_reasoning",
        "mnt/datasets/math_problems",
    ):
        (place / folder).mkdir(parents=True)
        for i in range(3):
            text = "".join(f"{folder} has line {i}.{j}.\n" for j in range(30))
            (place / folder / f"{i}.txt").write_text(text)
    for name in ROWS:
        put_dataset(place / name)
    (place / "configs").mkdir()
    (custom,) = [block for block in blocks() if block.language == "json"]
    (place / "configs/custom_model.json").write_text(custom.text)
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    import datasets

    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "hf")


def commands(block: Block, place: pathlib.Path) -> list[list[str]]:
    return calls(block.text.replace("/mnt/", f"{place}/mnt/"), place)


def flag(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1] if name in argv else ""


def stand_in(resume: str, saved: list[str]) -> pathlib.Path:
    """A checkpoint without arrays, as if the command ``saved`` had made it."""
    folder = pathlib.Path(resume)
    folder.mkdir(parents=True)
    step = int(folder.name.removeprefix("step_"))
    config = read(saved).config
    identity = load_tokenizer(config.data.tokenizer).identity
    metadata = Metadata(config, step, 32 * step, "these data", tokenizer_identity=identity)
    checkpoint_folder.write_metadata(folder, metadata)
    checkpoint_folder.write_manifest(folder)
    return folder


# --- as a dry run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in TRAINS if b.heading not in TEMPLATES], ids=ids)
def test_a_block_that_trains(block, place, card, capsys):
    made = commands(block, place)
    assert len(made) >= block.text.count("./train_background.sh")
    for argv in made:
        resumed = flag(argv, "--resume")
        checkpoint = stand_in(resumed, made[0] if len(made) > 1 else []) if resumed else None
        status = train.main([*argv, "--dry_run"])
        told = capsys.readouterr()
        assert status == 0, f"{argv}: {told.err}"
        size = flag(argv, "--model_size") or ("" if resumed or "--config" in argv else "medium")
        if size:
            assert f"{size}: " in told.out and f"{presets.SIZES[size].parameters:,} " in told.out
        steps = presets.TRAINING_PRESETS[flag(argv, "--training_preset") or "default"].max_steps
        assert f"{steps:,} steps" in told.out
        for name in ("--dataset", "--output_dir"):
            assert flag(argv, name).removeprefix("./") in told.out
        if checkpoint:
            assert f"continuing from {checkpoint}: step {checkpoint.name[5:]}" in told.out
            shutil.rmtree(checkpoint.parent)
    # Nothing was made or written.
    assert not (place / "checkpoints").exists() or not any((place / "checkpoints").rglob("step_*"))
    assert not (place / "logs").exists() and not (place / "runs").exists()


def test_many_commands_are_found(place):
    made = [argv for b in TRAINS if b.heading not in TEMPLATES for argv in commands(b, place)]
    # As many as are printed, except that the loop over seeds prints one and makes three.
    printed = sum(b.text.count("./train_background.sh") for b in TRAINS) - len(TEMPLATES)
    assert len(made) == printed + 2 > 50
    (ensemble,) = [block for block in TRAINS if "Ensemble" in block.heading]
    seeds = [flag(argv, "--seed") for argv in commands(ensemble, place)]
    assert seeds == ["42", "123", "789"]


# --- the datasets ---------------------------------------------------------------------------------


def test_every_command_with_a_dataset_finds_its_text(place, tmp_path):
    made = [argv for b in TRAINS if b.heading not in TEMPLATES for argv in commands(b, place)]
    found = set()
    for config in [read(argv).config.data for argv in made if "--dataset" in argv]:
        choice = config.dataset, config.text_column
        found.add((*choice, config.dataset_split))
        for streaming in (False, True):
            config = dataclasses.replace(
                config, dataset_streaming=streaming, cache_dir=str(tmp_path)
            )
            texts = texts_of(
                next(iter(open_dataset(config, print).parts())).pieces(DataSummary(""))
            )
            assert len(texts) == 60 and texts[5] == TEXTS[choice]
    assert {choice[:2] for choice in found} == set(TEXTS)
    assert {split for _, _, split in found} == set(SPLITS)


@pytest.mark.parametrize("block", FLAGS, ids=ids)
def test_flags_named_in_troubleshooting(block, card, capsys):
    for line in block.flag_lines:
        assert train.main([*shlex.split(line, comments=True), "--dry_run"]) == 0, line
    assert len(block.flag_lines) in (2, 4)


def test_full_syntax_has_only_known_flags():
    (block,) = [block for block in SHELL if block.heading == "Full Syntax"]
    words = [line.split("#")[0].strip(" \\") for line in block.text.splitlines()]
    flags = [word.split()[0] for word in words if word.startswith("--")]
    assert len(flags) == 12
    values = {
        "--vram_auto": [], "--vram_safety_margin": ["2048"], "--model_size": ["small"],
        "--training_preset": ["fast"], "--data_dir": ["data"], "--dataset": ["squad_v2"],
        "--dataset_split": ["test"], "--text_column": ["column1,column2"], "--output_dir": ["out"],
        "--config": ["configs/custom_model.json"], "--resume": ["auto"], "--seed": ["3"],
    }  # fmt: skip
    config = read([word for name in flags for word in (name, *values[name])]).config
    assert (config.seed, config.data.text_column, config.vram.auto) == (3, "column1,column2", True)


def test_the_json_example_loads_as_printed():
    (block,) = [block for block in blocks() if block.language == "json"]
    config = read(["--config", "./configs/custom_model.json"]).config
    printed = json.loads(block.text)
    assert set(printed) == {"model", "training", "vram"}
    for group, fields in printed.items():
        assert fields.items() <= dataclasses.asdict(getattr(config, group)).items()
    expected = preset_config("medium")
    merge(expected, {**printed, "name": "custom_model", "output_dir": "checkpoints"})
    assert config == freeze(expected)


def test_presets_are_those_printed():
    printed = {
        block.heading.split()[0].lower(): ast.literal_eval(block.text)
        for block in blocks()
        if block.language == "python" and "Preset" in block.heading
    }
    assert printed == {name: dataclasses.asdict(p) for name, p in presets.TRAINING_PRESETS.items()}


def test_a_missing_folder_is_refused_by_the_dry_run(card, capsys):
    assert train.main(["--data_dir", "/mnt/nowhere/math_problems", "--dry_run"]) == 2
    assert "data.data_dir=/mnt/nowhere/math_problems does not exist" in capsys.readouterr().err


def test_the_launcher_from_inside_its_folder(tmp_path):
    (block,) = [block for block in TRAINS if block.heading == "`--vram_auto`"]
    command = f"{block.text} --dry_run --output_dir {tmp_path / 'out'}"
    environment = {"PATH": f"{pathlib.Path(sys.executable).parent}:/usr/bin:/bin", "VENV": "none"}
    ran = subprocess.run(
        ["bash", "-c", command],
        cwd=REPOSITORY / "launch",
        env={**environment, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"{presets.SIZES['medium'].parameters:,} parameters" in ran.stdout


# --- for real, at a tiny size ---------------------------------------------------------------------

TINY = [
    "--config.model.d_model=16", "--config.model.n_layers=1", "--config.model.max_seq_len=32",
    "--config.model.attention_window=8", "--config.model.attention_scales=(2,)",
    "--config.model.recursion_depth=1", "--config.data.tokenizer=bytes",
    "--config.data.cache_dir=cache", "--config.training.max_steps=4",
    "--config.training.save_steps=2", "--config.training.eval_steps=4",
    "--config.training.eval_windows=8", "--config.training.log_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once(place):
    """Shares compiled programs between the runs in this module, and with no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))
        jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
        compilation_cache.reset_cache()
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def heading(beginning: str) -> Block:
    (block,) = [block for block in SHELL if block.heading.startswith(beginning)]
    return block


def train_for_real(text: str, place: pathlib.Path) -> None:
    for argv in calls(text, place):
        assert train.main([*argv, *TINY]) == 0


@pytest.fixture(scope="module")
def resumed(place):
    """Example 6, but from step 2 of 4: returns (first run, second run)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train_for_real(heading("Example 6").text.replace("step_50000", "step_2"), place)
    yield place / "checkpoints/initial", place / "checkpoints/continued"
    for folder in ("checkpoints", "logs", "runs"):
        shutil.rmtree(place / folder)


def test_resuming_with_other_settings(resumed, place):
    first, second = resumed
    log = max((place / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime).read_text()
    assert "continuing from checkpoints/initial/step_2: step 2" in log
    for change in (
        "training.learning_rate 0.0003 → 0.0001",
        "training.warmup_steps 2000 → 5000",
    ):
        assert f"changed since that checkpoint: {change}" in log
    changes = [line for line in log.splitlines() if "changed since that checkpoint" in line]
    assert len(changes) == 2, changes  # TINY keeps what else the presets differ in
    # Step, position in the data and schedule continue, with the other peak.
    saved = read_metadata(second / "final")
    assert (saved.step, saved.samples_seen) == (4, 4 * 32)
    assert [r["step"] for r in metrics.read(second / metrics.NAME) if "loss" in r] == [1, 2, 3, 4]
    rates = {
        run: {
            r["step"]: r["learning_rate"] for r in metrics.read(run / metrics.NAME) if "loss" in r
        }
        for run in resumed
    }
    for step in (1, 2):  # what came before belongs to the history of both
        assert rates[second][step] == rates[first][step]
    for step in (3, 4):
        assert rates[second][step] == pytest.approx(rates[first][step] / 3, rel=1e-5)


def test_a_structure_that_does_not_fit_is_refused_in_one_line(resumed, capsys):
    argv = ["--resume=checkpoints/initial/step_2", "--model_size=hybrid-large", "--dry_run"]
    assert train.main([*argv, "--output_dir=other"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not match this model: model.d_model 16 there, 1024 here; model.n_layers" in error


def test_files_and_a_dataset_together(resumed, place, capsys):
    train_for_real(heading("Example 4").text, place)
    told = capsys.readouterr().out
    assert (
        "data/custom_reasoning and dataset TIGER-Lab/MathInstruct, split train: 3 files, 60 rows"
        in told
    )
    assert (place / "checkpoints/combined/final/MANIFEST.json").is_file()


def test_the_viewer_commands(resumed, place, monkeypatch):
    viewer = place / "view_training_log.sh"
    viewer.write_text(f'#!/bin/sh\nexec {shlex.quote(str(REPOSITORY))}/launch/{viewer.name} "$@"\n')
    viewer.chmod(0o755)
    for name in ("Log Files", "3. Monitor Early"):
        # Following never ends, and with the pattern's several files tail names each.
        text = heading(name).text.replace("tail -f", "tail -n 100")
        ran = subprocess.run(
            ["bash", "-c", f"set -x\n{text}"], cwd=place, capture_output=True, text=True
        )
        assert "step 4/4" in ran.stdout
        assert not [line for line in ran.stderr.splitlines() if not line.startswith("+")]
        # The search finds no errors in logs without any: status 1.
        assert ran.returncode == (1 if name == "Log Files" else 0)

    line = next(line for line in heading("TensorBoard").text.splitlines() if "logdir" in line)
    program = pathlib.Path(sys.executable).with_name("tensorboard")
    command = [str(program), *shlex.split(line)[1:], "--inspect"]  # reads it all and ends
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "train/loss" in ran.stdout
