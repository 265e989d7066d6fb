"""Where a run's measures go besides ``metrics.jsonl``, read back with the trackers' own readers."""

import contextlib
import dataclasses
import json
import struct
import sys
import types

import pytest

from mamba_jax.config import ModelConfig, RunConfig, TrainingConfig, to_dict
from mamba_jax.config.schema import flatten
from mamba_jax.errors import UserError
from mamba_jax.training import trackers
from mamba_jax.training.evaluation import Evaluation
from mamba_jax.training.monitor import Monitor

SAMPLE = "def <b>f</b>():\n    return 'ü'"
MEASURES = {  # of the run below, by hand
    ("train/loss", 2): 2.5,  # the mean of 3 and 2
    ("train/loss", 4): 0.5,
    ("train/learning_rate", 4): 0.25,
    ("eval/loss", 4): 2.0,
    ("A_min/layer_01", 4): -17.0,
}


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "out").mkdir()
    return RunConfig(
        name="tiny",
        output_dir=str(tmp_path / "out"),
        log_dir=str(tmp_path / "logs"),
        tensorboard_dir=str(tmp_path / "runs"),
        model=ModelConfig(n_layers=2),
        training=TrainingConfig(max_steps=4, log_steps=2, learning_rate=0.003),
    )


def tell(config: RunConfig, end: BaseException | None = None) -> None:
    """Reports a run of four steps to a monitor; ``end`` ends it."""
    ignored = contextlib.suppress(type(end)) if end else contextlib.nullcontext()
    with ignored, Monitor(config) as shown:
        shown.open()
        shown.start(0, None, about={"config": to_dict(config), "parameters": 7})
        for step in range(1, 5):
            shown.step(
                step, loss=4.0 - step, learning_rate=1 / step, gradient_norm=2.0, tokens=10,
                skipped=False, aux={},
            )  # fmt: skip
        layers = {"dt_mean": [0.01, 0.02], "A_min": [-16.0, -17.0]}
        shown.evaluation(4, Evaluation(nll=20.0, targets=10.0, bytes=40.0, layers=layers))
        shown.sample(4, "def ", SAMPLE.removeprefix("def "))
        if end:
            raise end


# --- TensorBoard ----------------------------------------------------------------------------------


@pytest.fixture
def board(config, tmp_path):
    """What TensorBoard's own reader finds in the run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(config)
    (folder,) = (tmp_path / "runs").iterdir()
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_has_the_curves_and_the_sample(board):
    for (tag, step), value in MEASURES.items():
        points = {point.step: point.value for point in board.Scalars(tag)}
        assert points[step] == pytest.approx(value, rel=1e-6)  # float32
    (text,) = board.Tensors("sample/text_summary")
    assert text.step == 4
    shown = text.tensor_proto.string_val[0].decode()
    assert shown == "    def <b>f</b>():\n        return 'ü'"  # Markdown of code: no HTML in it


def test_tensorboard_has_every_field_of_the_config_as_hyperparameter(board, config):
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    tags = board.PluginTagToContent("hparams")
    assert {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG} <= set(tags)
    read = lambda tag: plugin_data_pb2.HParamsPluginData.FromString(tags[tag])
    shown = read(metadata.SESSION_START_INFO_TAG).session_start_info.hparams
    plain = {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}
    assert plain == flatten(to_dict(config))
    assert plain["training.learning_rate"] == 0.003 and plain["model.attention_scales"]
    experiment = read(metadata.EXPERIMENT_TAG).experiment
    judged_by = {metric.name.tag for metric in experiment.metric_infos}
    assert "eval/loss" in judged_by
    assert judged_by <= set(board.Tags()["scalars"])  # each column has a curve behind it
    end = read(metadata.SESSION_END_INFO_TAG).session_end_info
    assert end.status == api_pb2.STATUS_SUCCESS


def test_without_tensorboardx_a_run_continues(config, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mamba_jax.training.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    tell(config)
    output = capsys.readouterr()
    assert [line for line in output.err.splitlines() if "warning" in line] == [
        "warning: import of tensorboardX halted; None in sys.modules; training continues without "
        "TensorBoard (pip install tensorboardX)"
    ]
    assert "eval loss 2.0000" in output.out and "tensorboard --logdir" not in output.out


# --- trackers that are requested ------------------------------------------------------------------


class Fake:
    """Records its calls, and fails in those that are named."""

    def __init__(self, fails_at=""):
        self.calls, self._fails_at = [], fails_at

    def __getattr__(self, what):
        def note(*values):
            self.calls.append((what, *values))
            if what == self._fails_at:
                raise ConnectionError("the server\nwent away")

        return note


def with_tracker(monkeypatch, config, tracker):
    monkeypatch.setattr(trackers, "_TRACKERS", {"wandb": lambda _: tracker})
    return dataclasses.replace(config, trackers="wandb")


@pytest.mark.parametrize("end", [None, RuntimeError("no more")])
def test_a_tracker_gets_what_is_recorded(config, monkeypatch, end):
    fake = Fake()
    tell(with_tracker(monkeypatch, config, fake), end)
    assert fake.calls[0][0] == "hyperparameters"
    assert fake.calls[0][1]["training.learning_rate"] == 0.003
    scalars = {
        (tag, step): value for what, *values in fake.calls if what == "scalars"
        for step, points in [values] for tag, value in points.items()
    }  # fmt: skip
    assert scalars.items() >= MEASURES.items()
    assert ("text", 4, "sample", SAMPLE) in fake.calls
    assert fake.calls[-1] == ("close", end is None)


def test_a_tracker_that_fails_is_dropped_and_stops_nothing(config, monkeypatch, capsys):
    fake = Fake("scalars")
    tell(with_tracker(monkeypatch, config, fake))
    assert [what for what, *_ in fake.calls] == ["hyperparameters", "scalars"]
    output = capsys.readouterr()
    (warning,) = (line for line in output.err.splitlines() if "warning" in line)
    assert warning.startswith("warning: wandb cannot be written (the server")
    assert "eval loss 2.0000" in output.out


def test_a_tracker_that_cannot_start_is_dropped(config, monkeypatch, capsys):
    def refuse(_):
        raise PermissionError("no key\nlog in first")

    monkeypatch.setattr(trackers, "_TRACKERS", {"mlflow": refuse})
    tell(dataclasses.replace(config, trackers="mlflow"))
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert warning == (
        "warning: mlflow cannot start (PermissionError: no key); training continues without it"
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_names_its_extra(config, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"{name} is not installed; pip install -e '\.\[{name}\]'"):
        tell(dataclasses.replace(config, trackers=name))


def test_mlflow_takes_any_number_of_parameters(monkeypatch):
    batches = []
    mlflow = types.ModuleType("mlflow")
    mlflow.entities = types.SimpleNamespace(Param=lambda name, value: (name, value))
    info = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r"))
    mlflow.MlflowClient = lambda: types.SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name: "1",
        create_run=lambda found, run_name: info,
        log_batch=lambda run_id, params: batches.append(params),
    )
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    values = {f"p{i}": i for i in range(250)}
    trackers.Mlflow(RunConfig()).hyperparameters(values)
    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert [pair for batch in batches for pair in batch] == [(k, str(v)) for k, v in values.items()]


# --- the real ones, where they are installed ------------------------------------------------------


@pytest.mark.parametrize(("end", "status"), [(None, "FINISHED"), (RuntimeError("x"), "FAILED")])
def test_mlflow_has_what_the_run_reported(config, tmp_path, monkeypatch, end, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    tell(dataclasses.replace(config, trackers="mlflow"), end)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'mamba_jax'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tiny" and run.info.status == status
    flat = flatten(to_dict(dataclasses.replace(config, trackers="mlflow")))
    assert run.data.params == {name: str(value) for name, value in flat.items()}
    for (tag, step), value in MEASURES.items():
        points = {
            point.step: point.value for point in client.get_metric_history(run.info.run_id, tag)
        }
        assert points[step] == value
    text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/sample/step_4.txt")
    assert text == SAMPLE


def log_records(data: bytes):
    """Yields the records of LevelDB's log format, behind a head of seven bytes.

    Blocks of 32 KiB hold pieces: checksum, length, kind (1 whole, 2 first, 3 middle, 4 last).
    """
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := -position % 32_768) and left < 7:  # too little of the block for a piece
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.parametrize(("end", "status"), [(None, 0), (RuntimeError("x"), 1)])
def test_wandb_has_what_the_run_reported(config, tmp_path, monkeypatch, end, status):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(dataclasses.replace(config, trackers="wandb"), end)
    (file,) = (tmp_path / "out").rglob("*.wandb")
    records = list(map(wandb_internal_pb2.Record.FromString, log_records(file.read_bytes())))
    shown, points = {}, {}
    for record in records:
        for item in record.config.update:
            shown["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        items = {
            "/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
        }
        points |= {(tag, items["_step"]): value for tag, value in items.items()}
    flat = flatten(to_dict(dataclasses.replace(config, trackers="wandb")))
    assert shown.items() >= flat.items()
    assert points.items() >= MEASURES.items()
    (exit_code,) = (r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit")
    assert exit_code == status
    (html,) = (tmp_path / "out").rglob("sample*.html")
    assert "def &lt;b&gt;f&lt;/b&gt;():\n    return &#x27;ü&#x27;" in html.read_text()
