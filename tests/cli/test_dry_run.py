"""``train --dry_run``: prints the plan, and every error of the run, without writing anything."""

import os
import pathlib
import sys

import jax
import pytest

from mamba_jax import train
from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints.folder import Metadata
from mamba_jax.cli.train_arguments import read
from mamba_jax.data.tokenizers.load import load_tokenizer
from mamba_jax.runs.lock import RunLock
from mamba_jax.training import summary

TINY = [
    *("--config.model.d_model=16", "--config.model.n_layers=1", "--config.model.max_seq_len=32"),
    *("--config.data.tokenizer=bytes", "--config.training.max_steps=6"),
]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Calls the command beside some text; returns (exit status, standard output, error)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("some text\n" * 50)

    def call(*argv: str, dry: bool = True) -> tuple[int, str, str]:
        status = train.main([*TINY, *argv, *(["--dry_run"] if dry else [])])
        return status, *capsys.readouterr()

    return call


def put_checkpoint(name: str, step: int) -> None:
    folder = pathlib.Path(name)
    folder.mkdir(parents=True)
    identity = load_tokenizer("bytes").identity
    metadata = Metadata(
        read([*TINY]).config, step, 32 * step, "these data", tokenizer_identity=identity
    )
    checkpoint_folder.write_metadata(folder, metadata)
    checkpoint_folder.write_manifest(folder)


def test_it_prints_the_whole_plan_and_writes_nothing(call, tmp_path):
    status, printed, error = call("--output_dir=out", "--seed=7", "--vram=8")
    assert status == 0 and not error
    for words in (
        *("custom: mamba, 16 wide, 1 layers", "(vocabulary 257, tokenizer bytes)"),
        *("custom: 6 steps, learning rate up to 0.0003, warm-up 0", "seed 7"),
        "32 windows of 32 tokens a step, 6,144 tokens in all",
        *("data: 1 files", "8.00 GiB (--vram) less a margin", "out: a new run"),
    ):
        assert words in printed, words
    assert f"memory of {jax.device_count()} × cpu" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_it_prints_the_layers_of_a_plan(call):
    layers = ("--config.model.family=hybrid", "--config.model.n_layers=6")
    status, printed, error = call(*layers, "--plan=M,M,H,M,M,H")
    assert status == 0 and not error
    assert "custom: hybrid, 16 wide, 6 layers, recursion depth 3" in printed
    assert "plan (M*2,H)*2" in printed
    _, printed, _ = call(*layers, "--plan=(M,M,A)*2")
    assert "recursion depth none, attention scales 1 2 4, plan (M*2,A)*2" in printed
    assert "recursion depth none, attention scales none" in call(*layers, "--plan=M*6")[1]


def test_it_prints_what_resuming_would_do(call):
    put_checkpoint("out/step_2", 2)
    status, printed, _ = call(
        "--resume=out/step_2", "--training_preset=careful", "--output_dir=new"
    )
    assert status == 0
    assert "continuing from out/step_2: step 2" in printed
    assert "changed since that checkpoint: training.learning_rate 0.0003 → 0.0001" in printed
    assert "new: 4 steps to go" in printed and not pathlib.Path("new").exists()
    assert "out: 4 steps to go" in call("--resume=auto", "--output_dir=out")[1]

    put_checkpoint("done/final", 6)
    (pathlib.Path("done") / summary.NAME).write_text("it went well")
    assert (
        "done: nothing to do, complete at step 6" in call("--resume=auto", "--output_dir=done")[1]
    )


REFUSED = {
    "out": (["--output_dir=out"], "output_dir out already holds checkpoints of a run (step_2)"),
    "structure": (
        ["--resume=out", "--config.model.d_model=32"],
        "out/step_2 does not match this model: model.d_model 16 there, 32 here",
    ),
    "file": (["--output_dir=data/a.txt/x"], "cannot write into output_dir data/a.txt/x: "),
    "profile": (["--profile"], "would trace the steps 6 to 8, but the run ends at step 6"),
    "data": (["--data_dir=absent"], "data.data_dir=absent does not exist"),
    "dataset": (["--dataset=./absent"], "dataset folder ./absent does not exist"),
    "scan": (["--config.model.scan=pallas_gpu"], "pallas_gpu"),
    "devices": (["--config.vram.batch_size=4"], "vram.batch_size=4 is not divisible by the 8 dev"),
    "vocabulary": (["--config.model.vocab_size=100"], "model.vocab_size=100 is below the 257 ids"),
    "memory": (["--vram=1", "--vram_safety_margin=1024"], "leaves nothing of"),
    "tokenizer": (
        ["--resume=out", "--config.data.tokenizer=gpt2"],
        "out/step_2 does not match this model: data.tokenizer bytes there, gpt2 here",
    ),
    "steps": (
        ["--resume=out", "--config.training.max_steps=1"],
        "nothing to train: checkpoint out/step_2 has 2 steps and training.max_steps=1; give a "
        "larger --config.training.max_steps",
    ),
    "steps elsewhere": (
        ["--resume=out", "--output_dir=new", "--config.training.max_steps=2"],
        "nothing to train: checkpoint out/step_2 has 2 steps and training.max_steps=2",
    ),
    "log": (["--config.log_dir=data/a.txt"], "cannot write into log_dir data/a.txt: "),
    "tensorboard": (
        ["--config.tensorboard_dir=data/a.txt/x"],
        "cannot write into tensorboard_dir data/a.txt/x: ",
    ),
    "tracker": (["--config.trackers=mlflow"], "mlflow is not installed; pip install"),
    "lock": (["--output_dir=locked"], "output_dir locked is in use by a run on "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_run_would_refuse_is_refused_in_one_line(call, case, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    put_checkpoint("out/step_2", 2)
    argv, message = REFUSED[case]
    with RunLock.acquire(pathlib.Path("locked")):
        status, printed, error = call(*argv)
        assert status == 2 and not printed
        assert message in error and error.count("\n") == 1
        status, _, same = call(*argv, dry=False)
    assert status == 2
    assert same == error or (case == "file" and message in same)
    assert not pathlib.Path("new").exists()


def test_a_locked_folder_is_reported_and_left_alone(call):
    with RunLock.acquire(pathlib.Path("locked")) as lock:
        before = os.fstat(lock.descriptor)
        status, printed, _ = call("--output_dir=locked", "--force")
        assert status == 0 and f"is locked by a run on {os.uname().nodename} (pid" in printed
        lock.check()
        assert os.fstat(lock.descriptor).st_ino == before.st_ino
