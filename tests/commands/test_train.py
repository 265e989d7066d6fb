"""The ``train`` command: an interrupted and resumed run ends as an uninterrupted one, bit for bit;
each mistake of a user is one line."""

import contextlib
import errno
import gzip
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import mamba_jax
from mamba_jax import background, explain, report, train
from mamba_jax.checkpoints import folder as checkpoint_folder
from mamba_jax.checkpoints.arrays import read_metadata, restore
from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.runs import metrics
from mamba_jax.runs.recorded import read_status
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.state import abstract_state
from tests.support.tiny_run import quick_compiles  # noqa: F401

CONFIG = """
from mamba_jax.config import default_config

def get_config():
    config = default_config()
    config.update(name="tiny", log_dir="logs", tensorboard_dir="runs", output_dir="out")
    config.data.update(tokenizer="bytes", data_dir="texts", cache_dir="cache")
    config.model.update(d_model=16, n_layers=1, max_seq_len=32, attention_window=8, dropout=0.1)
    config.training.update(
        warmup_steps=2, max_steps=6, eval_steps=3, save_steps=2, eval_windows=16, log_steps=1
    )
    config.vram.update(effective_batch_size=16, batch_size=8)
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A working folder with a config and some text."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "texts").mkdir()
    for source in pathlib.Path(mamba_jax.__file__).parent.glob("*.py"):
        shutil.copy(source, folder / "texts")
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled_once(place):
    """Shares compiled programs between the runs in this process, and with no other test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(place / "compiled"))  # the command obeys it
        jax.config.update("jax_compilation_cache_dir", str(place / "compiled"))
        compilation_cache.reset_cache()
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def call(place, monkeypatch):
    """Calls the command in that folder and in this process, on its eight devices."""
    monkeypatch.chdir(place)

    def call(*argv: str) -> int:
        return train.main(["--config=tiny.py", *argv])

    return call


def final_state(output_dir: pathlib.Path) -> dict:
    path = output_dir / "final"
    config = read_metadata(path).config
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    return restore(path, abstract_state(config, mesh))


_OWN = {"tokens_per_sec", "run", "ended"}  # a run's speed, when and where it began and stopped


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Equal states, bit for bit, and equal measures at equal steps."""
    states = final_state(one), final_state(other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    measures = [
        [r for r in metrics.read(run / metrics.NAME) if not r.keys() & _OWN] for run in (one, other)
    ]
    assert measures[0] == measures[1]
    assert read_metadata(one / "final").samples_seen == read_metadata(other / "final").samples_seen


def interrupt_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal while the metrics of a step are being recorded."""
    record = Monitor.step

    def step_(self, at, **values):
        record(self, at, **values)
        if at == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Monitor, "step", step_)


# --- resume = uninterrupted -----------------------------------------------------------------------


PLAN = ("--config.model.family=hybrid", "--plan=M,H", "--config.model.n_layers=2")


@pytest.mark.parametrize(("name", "flags"), [("mamba", ()), ("plan", PLAN)], ids=["mamba", "plan"])
def test_a_run_resumed_equals_one_uninterrupted(call, place, monkeypatch, capsys, name, flags):
    whole, parts, moved = (place / f"{name}-{part}" for part in ("whole", "parts", "moved"))
    assert call(*flags, f"--output_dir={whole}") == 0
    printed = capsys.readouterr().out
    assert "unigram loss" in printed and f"generate --checkpoint {whole / 'final'}" in printed

    with monkeypatch.context() as patch:
        # Metrics come one step late: while those of step 2 are read, step 3 is under way.
        interrupt_at(patch, 2, signal.SIGTERM)
        assert call(*flags, f"--output_dir={parts}", "--resume=auto") == 75
    assert read_metadata(parts / "step_3").samples_seen == 48
    status = read_status(parts)
    assert (status.state, status.why) == ("stopped", "saved after SIGTERM")
    assert "stopped by SIGTERM and saved at step 3" in pathlib.Path(status.log).read_text()
    assert call(*flags, f"--output_dir={parts}", "--resume=auto") == 0
    assert_same_run(whole, parts)

    # From an earlier checkpoint into another folder, as if the rest had never happened.
    assert call(*flags, f"--output_dir={moved}", f"--resume={whole / 'step_2'}") == 0
    assert_same_run(whole, moved)


SLOW_RUN = """
    import sys, time
    import xxhash
    from mamba_jax import train
    from mamba_jax.data.pipeline import Corpus
    from mamba_jax.training.monitor import Monitor
    batches = Corpus.train_batches
    def printed(self, batch_size, seed, start=0):
        for batch in batches(self, batch_size, seed, start):
            print("batch", start, xxhash.xxh3_64_hexdigest(batch.tobytes()), flush=True)
            yield batch
            start += batch_size
    Corpus.train_batches = printed
    secs, record = float(sys.argv[1]), Monitor.step
    def step(self, at, **values):
        record(self, at, **values)
        print("recorded", at, flush=True)
        time.sleep(secs)
    Monitor.step = step
    sys.exit(train.main(sys.argv[2:]))
"""


class Process:
    """The command in a process of its own on one device, slowed down if it is to be killed."""

    def __init__(self, place: pathlib.Path, *argv: str, secs_per_step: float = 0.0):
        script = textwrap.dedent(SLOW_RUN)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, str(secs_per_step), "--config=tiny.py", *argv],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Without the faked devices of this process.
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
        )
        self.lines: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, beginning: str) -> None:
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith(beginning):
                return
        raise AssertionError(f"{beginning!r} never came: {self._process.stderr.read()}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        out, self.stderr = self._process.communicate(timeout=120)
        self.lines += out.splitlines()
        assert "Traceback" not in self.stderr, self.stderr
        return self._process.returncode


def test_a_process_stopped_by_signals_and_killed_equals_one_left_alone(place):
    whole, parts = place / "process-whole", place / "process-parts"
    (place / "few").mkdir()
    text = (place / "texts" / "generate.py").read_text()[:11_000]
    (place / "few" / "a.py").write_text(text)  # 60 steps are more than two epochs
    flags = ("--data_dir=few", "--config.training.max_steps=60", "--config.training.save_steps=4")
    alone = Process(place, *flags, f"--output_dir={whole}")
    assert alone.end() == 0
    assert not [line for line in alone.stderr.splitlines() if not line.startswith("step ")]

    flags = (*flags, f"--output_dir={parts}", "--resume", "auto")
    lines: list[str] = []
    for number, at in (
        (signal.SIGINT, "recorded 3"),
        (signal.SIGTERM, "recorded 9"),
        (signal.SIGKILL, f"saved {parts / 'step_16'}"),  # by the thread, some steps later
    ):
        process = Process(place, *flags, secs_per_step=0.1)
        process.wait_for(at)
        process.send(number)
        assert process.end() == (-9 if number == signal.SIGKILL else 75)
        lines += process.lines
    assert not (parts / "final").exists()
    rest = Process(place, *flags)
    assert rest.end() == 0
    (start,) = [line for line in rest.lines if line.startswith("continuing from")]
    assert int(start.rpartition(" ")[2]) >= 16
    assert_same_run(whole, parts)

    # Every batch that any of the processes read is the one that was read undisturbed.
    batches = lambda lines: {line for line in lines if line.startswith("batch ")}
    expected = batches(alone.lines)
    assert batches([*lines, *rest.lines]) == expected and len(expected) >= 60
    windows = next(line for line in alone.lines if line.startswith("held out")).split()[-1]
    assert 60 * 16 > 2 * int(windows) > 500, windows


# --- one run in a folder --------------------------------------------------------------------------


def recorded_steps(output_dir: pathlib.Path) -> list[int]:
    return [r["step"] for r in metrics.read(output_dir / metrics.NAME) if "loss" in r]


def test_an_active_run_has_exclusive_use_of_its_folder(call, place, capsys):
    """No other run, fresh or resumed, starts in its folder; readers may; a kill frees it."""
    flags = ("--config.training.max_steps=400", "--config.training.save_steps=2")
    run = Process(place, *flags, "--output_dir=lived", secs_per_step=0.05)
    run.wait_for("recorded 5")
    half_saved = place / "lived/.tmp-step_999"
    half_saved.mkdir()
    for more in ([], ["--resume=auto"], ["--resume=lived"], ["--dry_run"]):
        assert call("--output_dir=lived", *flags, *more) == 2
        printed = capsys.readouterr()
        assert f"output_dir lived is in use by a run on {socket.gethostname()} (pid " in printed.err
        assert f"(pid {run.pid}, since" in printed.err and printed.err.count("\n") == 1
        assert not printed.out
    assert background.main(["--config=tiny.py", "--output_dir=lived", "--resume=auto"]) == 2
    assert f"(pid {run.pid}, since" in capsys.readouterr().err
    assert half_saved.is_dir()
    assert explain.main(["lived"]) in (0, 1)
    assert report.main(["run", "lived", "--out=lived.html"]) == 0
    capsys.readouterr()
    run.wait_for("recorded 9")
    run.send(signal.SIGKILL)
    assert run.end() == -9

    saved = checkpoint_folder.list_checkpoints(place / "lived")[0][0]
    last = f"--config.training.max_steps={saved + 2}"
    assert call("--output_dir=lived", "--resume=auto", last) == 0
    assert recorded_steps(place / "lived") == list(range(1, saved + 3))
    assert not half_saved.exists()


def test_force_takes_over_the_folder_and_the_other_run_ends(call, place, capsys):
    run = Process(place, "--config.training.max_steps=400", "--output_dir=forced",
                  "--config.training.save_steps=10", secs_per_step=0.1)  # fmt: skip
    run.wait_for("recorded 3")
    assert call("--output_dir=forced", "--force") == 0
    assert "--force: took over output_dir forced from a run on" in capsys.readouterr().out
    assert run.end() == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: output_dir forced was taken over by a run on ")
    assert recorded_steps(place / "forced") == [1, 2, 3, 4, 5, 6]
    assert read_metadata(place / "forced/final").step == 6
    assert not (place / "forced/step_10").exists()


# --- one finished run, checked in many ways -------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place) -> pathlib.Path:
    flags = ["--config.sample_prompt=def ", "--config.training.keep_last", "1"]
    with contextlib.chdir(place):
        assert train.main(["--config=tiny.py", "--output_dir=finished", *flags]) == 0
    return place / "finished"


def test_what_a_run_leaves(finished):
    assert {path.name for path in finished.iterdir()} == {
        "step_6", "final", "best.json", "metrics.jsonl", "loss_curve.png", "summary.txt"
    }  # fmt: skip
    summary = (finished / "summary.txt").read_text()
    assert "sample after 'def '" in summary and "6, 3,072 tokens" in summary
    metadata = read_metadata(finished / "final")
    assert metadata.step == 6 and metadata.samples_seen == 96
    assert metadata.config.model.vocab_size == 257  # the tokenizer's, determined by the run
    records = metrics.read(finished / metrics.NAME)
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    evaluations = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    assert set(evaluations) == {3, 6} and metadata.metrics["eval_loss"] == evaluations[6]
    assert json.loads((finished / "best.json").read_text())["step"] == 6
    samples = {r["step"]: r["sample"] for r in records if "sample" in r}
    assert set(samples) == {3, 6}
    # Reading the file made line feeds of carriage returns.
    assert "def " + samples[6].replace("\r\n", "\n").replace("\r", "\n") in summary


def test_the_same_command_again_repeats_the_summary(finished, call, capsys):
    before = (finished / "final/MANIFEST.json").stat().st_mtime_ns
    assert call("--output_dir=finished", "--resume=auto") == 0
    printed = capsys.readouterr().out
    assert f"nothing to do: {finished.name}/final is complete at step 6" in printed
    assert (finished / "summary.txt").read_text() in printed
    assert (finished / "final/MANIFEST.json").stat().st_mtime_ns == before


def test_a_finished_run_is_extended_with_its_own_config(finished, place, capsys, monkeypatch):
    extended = pathlib.Path(shutil.copytree(finished, place / "extended"))
    monkeypatch.chdir(place)
    assert train.main(["--resume=extended/final", "--config.training.max_steps=8"]) == 0
    assert "changed since that checkpoint: training.max_steps 6 → 8" in capsys.readouterr().out
    assert read_metadata(extended / "final").step == 8
    assert [r["step"] for r in metrics.read(extended / metrics.NAME) if "loss" in r] == [
        *range(1, 9)
    ]


def test_a_kill_at_the_very_end_is_completed_by_the_next_run(finished, place, call):
    cut = pathlib.Path(shutil.copytree(finished, place / "cut"))
    for name in ("final", "summary.txt", "loss_curve.png"):
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert call("--output_dir=cut", "--resume=auto") == 0
    assert_same_state(finished, cut)
    assert (cut / "summary.txt").is_file() and (cut / "loss_curve.png").is_file()


def assert_same_state(one: pathlib.Path, other: pathlib.Path) -> None:
    for a, b in zip(
        jax.tree.leaves(final_state(one)), jax.tree.leaves(final_state(other)), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_signal_before_the_first_step_saves_nothing(call, place, monkeypatch, capsys):
    monkeypatch.setattr(
        "mamba_jax.training.trainer.prepare", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
    )
    assert call("--output_dir=early") == 75
    assert "SIGTERM before the first step" in capsys.readouterr().err
    assert not (place / "early").exists()


def test_divergence_stops_before_it_is_saved(call, place, capsys):
    flags = ("--config.training.learning_rate=1e30", "--config.training.warmup_steps=0")
    assert call("--output_dir=diverged", "--config.training.save_steps=1", *flags) == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if "step 1/6" not in row]
    assert line.startswith("error: training diverged at step 2: ")
    assert "culprits: " in line and f"last good checkpoint: {place.name}" not in line
    assert "last good checkpoint: diverged/step_1" in line
    assert not (place / "diverged/step_2").exists()
    config = read_metadata(place / "diverged/step_1").config
    mesh = make_mesh(config.parallel, jax.devices()[:1])
    for leaf in jax.tree.leaves(restore(place / "diverged/step_1", abstract_state(config, mesh))):
        assert np.isfinite(leaf).all()


# --- bad input ------------------------------------------------------------------------------------


def write(path: str, text: str = "") -> None:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(text)


BAD = {
    "no config": (lambda: None, ["--config=x.py"], "config file x.py does not exist"),
    "a config near it": (lambda: None, ["--config=tinny.py"], 'did you mean "tiny.py"?'),
    "broken config": (
        lambda: write("broken.py", "def get_config(:"),
        ["--config=broken.py"],
        "config file broken.py failed: SyntaxError",
    ),
    "unknown size": (
        lambda: write(
            "size.py",
            "from mamba_jax.config import preset_config\n"
            "get_config = lambda: preset_config('hybrid-smal')\n",
        ),
        ["--config=size.py"],
        'unknown model size "hybrid-smal"; did you mean "hybrid-small"?',
    ),
    "misspelt field": (
        lambda: None,
        ["--config.training.max_step=3"],
        'unknown config field --config.training.max_step; did you mean "training.max_steps"?',
    ),
    "not a number": (lambda: None, ["--seed=one"], "--seed='one' is not a whole number"),
    "misspelt flag": (lambda: None, ["--outputdir=x"], 'did you mean "--output_dir"?'),
    "a field as a flag": (
        lambda: None,
        ["--max_steps=3"],
        'unknown flag --max_steps; did you mean "--config.training.max_steps"?',
    ),
    "a stray word": (lambda: None, ["stray"], 'unexpected argument "stray"'),
    "a field without value": (lambda: None, ["--config.seed"], "--config.seed needs a value"),
    "odd width": (
        lambda: None,
        ["--config.model.family=hybrid", "--config.model.d_model=15"],
        "model.d_model=15 must be even",
    ),
    "batch and devices": (
        lambda: None,
        ["--config.vram.batch_size=4"],
        "vram.batch_size=4 is not divisible by the 8 devices",
    ),
    "output_dir is a file": (
        lambda: write("file"),
        ["--output_dir=file/out"],
        "cannot write into output_dir file/out: Not a directory; choose another --output_dir",
    ),
    "another run's output_dir": (
        lambda: None,
        ["--output_dir=finished"],
        "output_dir finished already holds checkpoints of a run (final); continue it with --resume",
    ),
    "resume from nothing": (
        lambda: None,
        ["--resume=texts"],
        "--resume=texts: the folder holds no intact checkpoint",
    ),
    "resume from nowhere": (lambda: None, ["--resume=nowhere"], "the folder does not exist"),
    "another model": (
        lambda: None,
        ["--output_dir=finished", "--resume=auto", "--config.model.d_model=32"],
        "finished/final does not match this model: model.d_model 16 there, 32 here",
    ),
    "other data": (
        lambda: write("other/x.txt", "".join(f"other text {i**5} " for i in range(99))),
        [
            *("--output_dir=new", "--resume=finished", "--data_dir=other"),
            "--config.training.max_steps=8",
        ],
        "finished/final was trained on other data",
    ),
    "no data": (
        lambda: pathlib.Path("empty").mkdir(),
        ["--output_dir=new", "--data_dir=empty"],
        "empty",
    ),
    "no data folder": (lambda: None, ["--output_dir=new", "--data_dir=absent"], "absent"),
    "too little text": (
        lambda: write("little/x.txt", "short"),
        ["--output_dir=new", "--data_dir=little"],
        "need ≥ 66 for seq_len 32",
    ),
    "a small vocabulary": (
        lambda: None,
        ["--output_dir=new", "--config.model.vocab_size=100"],
        "model.vocab_size=100 is below the 257 ids",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(finished, call, capsys, case):
    prepare, argv, message = BAD[case]
    prepare()
    assert call(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_full_disk_ends_the_run_in_one_line(call, place, monkeypatch, capsys):
    from mamba_jax.checkpoints import arrays

    def full(path):
        if path.name == ".tmp-step_4":
            raise OSError(28, "No space left on device")
        write_manifest(path)

    write_manifest = arrays.write_manifest
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "write_manifest", full)
        assert call("--output_dir=full") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: cannot save checkpoint full/step_4: no space left on the device"
    )
    assert [path.name for path in (place / "full").iterdir() if path.is_dir()] == ["step_2"]
    assert call("--output_dir=full", "--resume=auto") == 0


def test_a_full_disk_under_standard_output_does_not_stop_training(finished, place):
    """The reader of its output is gone: the run still finishes, and reports nothing about it."""
    # The command makes a process of its own: it closes standard output for good.
    program = (
        "import sys; from mamba_jax import train; "
        "sys.exit(train.main(['--config=tiny.py', '--output_dir=unheard', "
        "'--config.training.max_steps=1', '--config.training.warmup_steps=0']))"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program], cwd=place, stdout=full, stderr=subprocess.PIPE
        )
    assert result.returncode == 0, result.stderr.decode()
    assert b"Traceback" not in result.stderr
    assert (place / "unheard" / "final" / "MANIFEST.json").is_file()


def test_a_damaged_final_falls_back_to_the_previous_checkpoint(
    finished, place, capsys, monkeypatch
):
    """The form that the summary prints: the config comes from the intact checkpoint as well."""
    monkeypatch.chdir(place)
    shutil.copytree(finished, place / "dented")
    longer = ["--resume=dented/final", "--config.training.max_steps=7"]
    assert train.main(longer) == 0
    (place / "dented" / "final" / "config.json").write_text("{")
    capsys.readouterr()
    assert train.main(longer) == 0
    assert "continuing from dented/step_6" in capsys.readouterr().out


def test_a_trial_shorter_than_the_warmup_warms_up_for_a_tenth(call, capsys):
    flags = ("--config.training.max_steps=2", "--config.training.warmup_steps=2000")
    assert call("--output_dir=trial", *flags) == 0
    assert "would outlast the 2 steps: warming up for 0" in capsys.readouterr().out


def test_help_is_quick_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    assert done.value.code == 0
    assert "--config=configs/quickstart.py" in capsys.readouterr().out
    script = "import sys; from mamba_jax import train; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# --- profile --------------------------------------------------------------------------------------


def test_profile_writes_a_trace_of_its_steps(call, place, monkeypatch, capsys):
    runs = place / "profile-runs"
    output = f"--output_dir={place / 'profiled'}"
    board = f"--config.tensorboard_dir={runs}"
    # The evaluation and the save of step 3 and 4 fall into the trace.
    assert call(output, board, "--profile", "--profile_start=1", "--profile_steps=3") == 0
    printed = capsys.readouterr().out
    (trace,) = runs.glob("tiny_*/plugins/profile/*/perfetto_trace.json.gz")
    assert str(trace.parent.relative_to(place)) in printed and "pip install xprof" in printed
    assert list(trace.parent.glob("*.xplane.pb")), "TensorBoard's file is missing"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {
        int(event["args"]["step_num"])
        for event in events
        if event.get("name") == "train" and "step_num" in event.get("args", {})
    }
    assert steps == {2, 3, 4}
    # The device's own events, not the host's alone.
    assert any("hlo_op" in event.get("args", {}) for event in events)
    # What was traced was not timed: its steps are in no rate.
    rated = [
        r["step"] for r in metrics.read(place / "profiled/metrics.jsonl") if "device_kind" in r
    ]
    assert rated == [5, 6]
    # The trace does not change the training.
    assert call(f"--output_dir={place / 'unprofiled'}") == 0
    assert_same_run(place / "profiled", place / "unprofiled")


def test_profile_is_closed_by_an_interruption(call, place, monkeypatch, capsys):
    runs = place / "interrupted-runs"
    interrupt_at(monkeypatch, 1, signal.SIGINT)
    flags = f"--output_dir={place / 'cut-profile'}", f"--config.tensorboard_dir={runs}"
    assert call(*flags, "--profile", "--profile_start=0", "--profile_steps=6") == 75
    (trace,) = runs.glob("tiny_*/plugins/profile/*/perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert "profile of the steps" in capsys.readouterr().out


def test_a_profile_that_cannot_be_written_does_not_end_the_run(call, place, monkeypatch, capsys):
    stop = jax.profiler.stop_trace

    def full() -> None:
        stop()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    flags = (
        f"--output_dir={place / 'full-profile'}",
        f"--config.tensorboard_dir={place / 'full-runs'}",
    )
    assert call(*flags, "--profile", "--profile_start=1", "--profile_steps=1") == 0
    printed = capsys.readouterr()
    assert "warning: the profile cannot be written" in printed.err
    assert "profile of the steps" not in printed.out
    # Its clock continues with the next step.
    rated = [
        r["step"] for r in metrics.read(place / "full-profile/metrics.jsonl") if "device_kind" in r
    ]
    assert rated == [3, 4, 5, 6]


@pytest.mark.parametrize("flag", ["--profile_steps=2", "--profile_start=0"])
def test_profile_settings_without_profile_are_refused(call, capsys, flag):
    assert call(flag) == 2
    assert f"{flag} has no effect without --profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "would trace the steps 6 to 8, but the run ends at step 6"),
        (["--profile_steps=0"], "--profile_steps=0 must be at least 1"),
        (["--profile_start=-1"], "--profile_start=-1 must not be negative"),
        (["--profile_start=x"], "--profile_start: invalid int value: 'x'"),
    ],
)
def test_an_impossible_profile_is_refused_in_one_line(call, place, capsys, flags, message):
    assert call(f"--output_dir={place / 'refused'}", "--profile", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (place / "refused").exists()
