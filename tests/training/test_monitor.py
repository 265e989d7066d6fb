"""What a run records and shows, and that showing it can neither stop nor slow the run."""

import dataclasses
import io
import json
import math
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mamba_jax.config import RunConfig, TrainingConfig
from mamba_jax.costs.parameters import ParameterCount
from mamba_jax.errors import UserError
from mamba_jax.models import build
from mamba_jax.runs import metrics as history
from mamba_jax.training import loop, monitor
from mamba_jax.training.evaluation import Evaluation, evaluate
from mamba_jax.training.hardware import find_hardware
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.summary import Summary
from tests.support.tiny_run import HYBRID, one_device


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "out").mkdir()
    return RunConfig(
        name="tiny",
        output_dir=str(tmp_path / "out"),
        log_dir=str(tmp_path / "logs"),
        tensorboard_dir=str(tmp_path / "runs"),
        model=dataclasses.replace(HYBRID, plan="M,H,M,H", n_layers=4),
        training=TrainingConfig(max_steps=6, log_steps=2, warmup_steps=0),
    )


def take_step(shown: Monitor, step: int, **changes) -> None:
    values = {
        "loss": 4.0 - step,
        "learning_rate": 0.5,
        "gradient_norm": 2.0,
        "tokens": 1000,
        "skipped": False,
        "aux": {},
    }
    shown.step(step, **(values | changes))


def read_events(folder) -> list[event_pb2.Event]:
    """Reads the frames of the one event file: length, its checksum, event, its checksum."""
    (file,) = folder.rglob("events*")
    stream, events = io.BytesIO(file.read_bytes()), []
    while header := stream.read(12):
        events.append(event_pb2.Event.FromString(stream.read(struct.unpack("<Q4x", header)[0])))
        stream.read(4)
    return events


def test_tensorboard_log_file_and_metrics(config, tmp_path, capsys):
    aux = {
        "depth_mean": np.array([1.5, 2.5]),
        "gate_histogram": np.stack([np.eye(3, 10), np.full((3, 10), 0.1)]),
        "gate_mean": np.full((2, 3), 0.5),
    }
    reported = jax.eval_shape(
        lambda: build.forward(
            build.init(HYBRID, jax.random.key(0)), HYBRID, jnp.zeros((1, 4), jnp.int32)
        )[1]
    )
    assert aux.keys() == reported.keys(), "the monitor is told other names than the model uses"
    with Monitor(config) as shown:
        shown.say("before the log is open")
        shown.open()
        shown.start(0, None)
        for step in (1, 2, 3, 4):
            take_step(shown, step, aux=lambda: aux, skipped=step == 3)
            if step == 2:
                layers = {
                    "dt_mean": [0.01, 0.02, 0.03, 0.04],
                    "A_min": [-16.0, -17.0, -18.0, -19.0],
                }
                shown.evaluation(2, Evaluation(nll=20.0, targets=10.0, bytes=40.0, layers=layers))
    points = {
        (value.tag, event.step): value for event in read_events(tmp_path / "runs")
        for value in event.summary.value
    }  # fmt: skip
    scalar = lambda tag, step: points[tag, step].simple_value
    assert scalar("train/loss", 2) == 2.5 and scalar("train/loss", 4) == 0.5  # means of two
    assert scalar("train/learning_rate", 2) == 0.5 and scalar("train/gradient_norm", 4) == 2.0
    assert scalar("device/memory_mib", 2) > 1 and ("train/tokens_per_sec", 4) in points
    assert scalar("eval/loss", 2) == 2.0
    assert scalar("eval/perplexity", 2) == pytest.approx(math.exp(2.0), rel=1e-6)  # float32
    assert scalar("eval/bits_per_byte", 2) == pytest.approx(0.5 / math.log(2), rel=1e-6)
    # The hybrid layers are 1 and 3; A is measured in every layer.
    assert scalar("depth/layer_03", 4) == 2.5 and scalar("A_min/layer_01", 2) == -17.0
    assert not {("depth/layer_00", 4), ("gate/layer_00", 4)} & points.keys()
    gates = points["gate/layer_01", 4].histo
    assert list(gates.bucket_limit) == pytest.approx([i / 10 for i in range(1, 11)])
    assert list(gates.bucket) == pytest.approx([1 / 3] * 3 + [0] * 7)
    assert {event.step for event in read_events(tmp_path / "runs")} == {0, 2, 4}

    (log,) = (tmp_path / "logs").glob("training_tiny_*.log")
    text = log.read_text()
    for line in ("before the log is open", "step 4/6  loss 0.5", "ETA", "step 3: gradient norm 2"):
        assert line in text
    assert "step 2/6" in capsys.readouterr().err  # not a terminal: whole lines instead of a bar

    records = history.read(tmp_path / "out/metrics.jsonl")
    assert records[0] == {"step": 1, "loss": 3.0, "learning_rate": 0.5, "gradient_norm": 2.0}
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4] and losses[2]["skipped"] is True
    (evaluation,) = (record for record in records if "eval_loss" in record)
    assert evaluation["eval_loss"] == 2.0 and evaluation["dt_mean"] == [0.01, 0.02, 0.03, 0.04]
    (warning,) = (record["warning"] for record in records if "warning" in record)
    assert "step 3: gradient norm 2" in warning
    # In the first layer all gates of step k are in decile k: a third of them is nearly closed.
    gates = [record for record in records if "depth_mean" in record]
    assert [record["step"] for record in gates] == [2, 4]
    assert gates[0]["depth_mean"] == [1.5, 2.5] and gates[0]["gates_open"] == [0.0, 0.1]
    assert gates[0]["gates_closed"] == [0.3333, 0.1]


def test_the_rate_counts_training_alone(config, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    with Monitor(config) as shown:
        shown.start(0, None)
        now[0] = 100.0  # compilation
        take_step(shown, 1)
        with shown.paused():
            now[0] = 200.0
        for step, secs in ((2, 202.0), (3, 204.0)):
            now[0] = secs
            take_step(shown, step)
        now[0] = 205.0  # the next step is under way …
        with shown.paused():
            now[0] = 500.0  # … when an evaluation intervenes
        now[0] = 502.0
        take_step(shown, 4)
        assert shown._rate == 400.0  # 2000 tokens in 2 + 1 + 2 seconds


def test_waiting_for_data_is_recorded_as_a_share_of_the_training_time(config, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])

    def batches():
        for secs in (50.0, 3.0, 3.0, 7.0, 1.0, 1.0):  # that each takes to come
            now[0] += secs
            yield None

    with Monitor(config) as shown:
        shown.start(0, None, find_hardware(config, one_device()))
        for step, _ in enumerate(shown.waiting(batches()), 1):
            now[0] += 1.0  # the step itself; the first one compiles for longer
            take_step(shown, step)
            with shown.paused():
                now[0] += 100.0 if step in (1, 4) else 0.0  # compiling, an evaluation
    records = history.read(pathlib.Path(config.output_dir) / history.NAME)
    waits = [record["data_wait"] for record in records if "data_wait" in record]
    # The first batch comes before the clock: of step 2's 4 seconds 3 were a wait, and so on.
    assert waits == pytest.approx([3 / 4, (3 + 7) / (4 + 8), (1 + 1) / (2 + 2)])


def test_a_full_disk_disables_a_log_with_one_warning(config, capsys):
    with Monitor(config) as shown:
        shown.open()
        shown.start(0, None)
        full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        shown._tensorboard._events._py_recordio_writer._writer = full
        shown._history._stream = io.TextIOWrapper(full, write_through=True)
        for step in range(1, 7):
            take_step(shown, step)
        shown.evaluation(6, Evaluation(1.0, 1.0, 1.0))
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.partition(" cannot")[0] for line in warnings] == [
        "warning: metrics.jsonl",
        "warning: TensorBoard",
    ]
    assert all("No space left on device" in line for line in warnings)


@pytest.mark.parametrize("field", ["log_dir", "tensorboard_dir"])
def test_logs_that_cannot_be_written_are_refused(config, tmp_path, field):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(config, **{field: str(tmp_path / "file/x")})
    with pytest.raises(UserError, match=f"file/x.*another --config.{field}"), Monitor(config) as it:
        it.open()


# --- metrics.jsonl --------------------------------------------------------------------------------


def write_records(folder, steps) -> None:
    kept = history.History(folder, 0)
    for step in steps:
        kept.append(step=step, loss=float(step))
    kept.close()


def test_a_resumed_history_has_no_overlap(tmp_path):
    write_records(tmp_path, range(1, 8))
    with (tmp_path / history.NAME).open("a") as stream:
        stream.write('{"step": 8, "lo')  # cut off by a kill
    resumed = history.History(tmp_path, 5)
    resumed.append(step=6, loss=60.0)
    resumed.close()
    assert [(r["step"], r["loss"]) for r in history.read(tmp_path / history.NAME)] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 60)
    ]  # fmt: skip


def test_a_history_follows_its_run_into_another_folder(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    write_records(old, range(1, 8))
    history.History(new, 3, old).close()
    assert [r["step"] for r in history.read(new / history.NAME)] == [1, 2, 3]
    assert len(history.read(old / history.NAME)) == 7


def test_the_curve_is_drawn_whatever_was_recorded(tmp_path):
    steps = [{"step": i, "loss": 5.0 / i} for i in range(1, 100)]
    for records in (steps, [*steps, {"step": 9, "eval_loss": 2.0}], steps[:1], []):
        picture = tmp_path / "curve.png"
        history.draw_curve(records, picture, title="tiny", unigram_nll=3.0)
        data = picture.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (1200, 720)
        picture.unlink()


def test_a_spike_does_not_set_the_range_of_the_curves_axis():
    """The quick start's own: it falls from 10.9 to 4.6, and one step is at 21 nats."""
    losses = 3 + 7.9 * np.exp(-np.arange(200) / 20)
    assert history.usual_top(losses, [4.4]) is None
    losses[39] = 21.05
    top = history.usual_top(losses, [4.4, math.nan])
    assert top is not None and losses[:5].min() < top < 12
    assert history.usual_top(losses, [15.0]) is None or history.usual_top(losses, [15.0]) > 15
    assert history.usual_top(losses[:15], []) is None
    losses[100:140] = 21.05  # no spike
    assert history.usual_top(losses, [4.4]) is None


def test_mean_recent_loss():
    losses = [9.0] * 90 + [1.0] * 5 + [2.0] * 5
    records = [{"step": i, "loss": loss} for i, loss in enumerate(losses)]
    assert history.mean_recent_loss([*records, {"step": 99, "eval_loss": 7.0}]) == 1.5
    assert math.isnan(history.mean_recent_loss([]))


# --- the loop's pieces ----------------------------------------------------------------------------


def metrics_of(loss: float = 1.0, norm: float = 1.0, finite: bool = True, **norms) -> dict:
    return {
        "loss": jnp.float32(loss),
        "gradient_norm": jnp.float32(norm),
        "learning_rate": jnp.float32(0.1),
        "target_tokens": jnp.float32(8),
        "skipped": jnp.bool_(False),
        "finite": jnp.bool_(finite),
        "tensor_norms": {"layers": {name: jnp.float32(value) for name, value in norms.items()}},
        "aux": {},
    }


class Recorder:
    """Stands in for a monitor."""

    def __init__(self):
        self.steps = []

    def step(self, step, **values):
        self.steps.append((step, values["loss"]))


def test_metrics_are_read_one_step_late():
    recorder = Recorder()
    late = loop.LateMetrics(recorder, 1e4, lambda: None)
    late.push(1, metrics_of(loss=1.0))
    assert recorder.steps == []
    late.push(2, metrics_of(loss=2.0))
    assert recorder.steps == [(1, 1.0)]
    late.drain()
    late.drain()
    assert recorder.steps == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (metrics_of(loss=np.nan), "loss nan and gradient norm 1 are not both finite"),
        (metrics_of(norm=np.inf), "loss 1 and gradient norm inf are not both finite"),
        (metrics_of(finite=False), "not both finite"),
        (metrics_of(norm=200.0), "gradient norm 200 exceeds training.max_gradient_norm=100"),
        (metrics_of(norm=200.0, D=1, A_log=9), "culprits: layers.A_log, layers.D;"),
        (metrics_of(norm=np.nan, D=1, A_log=np.nan), "culprits: layers.A_log;"),
        (
            metrics_of(norm=np.nan, **{name: np.nan for name in "abcde"}),
            "culprits: layers.a, layers.b, layers.c and 2 more; last good checkpoint: out/step_2;",
        ),
    ],
)
def test_divergence_names_step_culprits_and_the_way_back(metrics, message):
    recorder = Recorder()
    late = loop.LateMetrics(recorder, 100.0, lambda: "out/step_2")
    late.push(3, metrics_of())
    late.push(4, metrics)
    with pytest.raises(UserError, match="training diverged at step 4: ") as diverged:
        late.drain()
    assert message in str(diverged.value)
    assert [step for step, _ in recorder.steps] == [3]


def test_batches_are_fetched_one_ahead_in_order():
    fetched = []

    def source():
        for i in range(4):
            fetched.append(i)
            yield np.full((8, 2), i)

    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batches = loop.prefetch(source(), sharding)
    assert int(next(batches)[0, 0]) == 0 and fetched == [0, 1]
    assert [int(batch[0, 0]) for batch in batches] == [1, 2, 3]


def test_evaluation_adds_sums_not_means():
    parts = {1: (6.0, 3.0, 9.0), 2: (4.0, 1.0, 1.0)}

    def eval_step(params, windows, weights):
        of_layers = np.array([1.0, -1.0]) * windows
        layers = dict.fromkeys(("dt_mean", "dt_max", "A_min", "A_max"), of_layers)
        sums = dict(zip(("nll", "targets", "bytes"), parts[windows], strict=True))
        return sums | {"layers": layers}

    got = evaluate(eval_step, None, [(1, None), (2, None)])
    assert (got.nll, got.targets, got.bytes) == (10.0, 4.0, 10.0)
    assert got.layers == {
        "dt_mean": [1.5, -1.5],
        "dt_max": [2.0, -1.0],
        "A_min": [1.0, -2.0],
        "A_max": [2.0, -1.0],
    }
    assert got.loss == 2.5
    assert got.perplexity == pytest.approx(12.182493960703473)
    assert got.bits_per_byte == pytest.approx(1.4426950408889634)  # 1 / ln 2


def test_the_closing_block(tmp_path):
    text = Summary(
        name="tiny",
        checkpoint=tmp_path / "final",
        picture=tmp_path / "curve.png",
        tensorboard_dir="runs",
        parameters=ParameterCount(1234, 1000),
        steps=20,
        skipped_steps=2,
        tokens=5120,
        speed="1,000 tokens/s  2 TFLOP/s (MFU 50.0%)",
        train_loss=1.25,
        evaluation=Evaluation(10.0, 4.0, 10.0),
        unigram_nll=3.0,
        prompt="def ",
        sample="f(x):",
    ).text()
    for fact in (
        "1,234 (1,000 without embeddings)",
        "20, 5,120 tokens, 2 skipped as spikes",
        "1.2500 nats per token",
        "2.5000 nats per token: perplexity 12.18, 1.443 bits per byte",
        "3.0000 nats per token: perplexity 20.09",
        "def f(x):",
        f"generate --checkpoint {tmp_path / 'final'} --prompt",
        "tensorboard --logdir runs",
        f"--resume {tmp_path / 'final'} --config.training.max_steps=40",
        json.dumps(str(tmp_path / "curve.png"))[1:-1],
    ):
        assert fact in text


# --- speed ----------------------------------------------------------------------------------------


def test_flops_per_second_and_mfu(config, tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now[0])
    hardware = monitor.Hardware("NVIDIA H200", 2, model_flops=4e9, peak_flops_per_sec=16e12)
    with Monitor(config) as shown:
        shown.open()
        shown.start(0, None, hardware)
        take_step(shown, 1)
        with shown.paused():
            pass
        now[0] += 0.5
        take_step(shown, 2)  # 1000 tokens in half a second
        with shown.paused():
            with shown.paused():  # an evaluation while steps are traced
                now[0] += 50
            now[0] += 50
            take_step(shown, 3)  # not timed
        now[0] += 0.25
        take_step(shown, 4)
        assert shown.speed_text() == "4,000 tokens/s  16 TFLOP/s (MFU 100.0%)"
    speeds = [r for r in history.read(tmp_path / "out/metrics.jsonl") if "tokens_per_sec" in r]
    device = {"device_kind": "NVIDIA H200", "device_count": 2}
    assert all(
        record.pop("memory_bytes") > 1e6 and record.pop("data_wait") == 0 for record in speeds
    )
    assert speeds == [
        {"step": 2, "tokens_per_sec": 2000.0} | device,
        {"step": 4, "tokens_per_sec": 4000.0} | device,
    ]
    assert "2,000 tokens/s  8 TFLOP/s (MFU 50.0%)  ETA" in capsys.readouterr().err
    curves = {
        (value.tag, event.step): value.simple_value
        for event in read_events(tmp_path / "runs")
        for value in event.summary.value
    }
    assert curves["train/tflops", 2] == pytest.approx(8.0)
    assert curves["train/mfu", 4] == pytest.approx(1.0)


def test_an_unknown_peak_gives_no_mfu(config):
    hardware = find_hardware(config_of(config), one_device())
    assert hardware.device_kind == "cpu" and hardware.device_count == 1
    assert list(hardware.measures(1e3)) == ["tflops"]
    assert hardware.measures(1e3)["tflops"] == pytest.approx(hardware.model_flops / 1e9)


def config_of(config: RunConfig) -> RunConfig:
    """The run with the model of the tests, whose vocabulary is set."""
    return dataclasses.replace(config, model=HYBRID)
