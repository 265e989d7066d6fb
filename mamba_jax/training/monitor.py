"""What a run shows while it trains: progress bar, log file, trackers, ``metrics.jsonl``."""

import collections
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import tqdm

from mamba_jax.config import RunConfig
from mamba_jax.config.schema import flatten
from mamba_jax.errors import UserError
from mamba_jax.runs import log_file
from mamba_jax.runs.metrics import History
from mamba_jax.training.evaluation import Evaluation
from mamba_jax.training.hardware import Hardware, device_memory_bytes
from mamba_jax.training.stopwatch import Stopwatch
from mamba_jax.training.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from mamba_jax.training.tensorboard import TensorBoard

_MIB = 1024**2
_LOG, _TENSORBOARD, _HISTORY = "the log file", "TensorBoard", "metrics.jsonl"


class Monitor:
    """Reports on a run; a context manager.

    A full disk disables a log with one warning and does not end the run: only a failed checkpoint
    ends it.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        # A log that standard output is redirected to gets each line once, through `_to_log`.
        self._redirected = log_file.redirected()
        self._log: TextIO | None = sys.stdout if self._redirected else None
        self._before_log: list[str] = []  # lines from before the log file was open
        self._tensorboard: TensorBoard | None = None
        self._trackers: dict[str, Tracker] = {}  # TensorBoard is one of them
        self._folder: pathlib.Path | None = None  # this run's own, in TensorBoard's
        self._step = 0  # the last one recorded
        self._history: History | None = None
        self._silenced: set[str] = set()
        self._bar: tqdm.tqdm | None = None
        self._interval: collections.Counter[str] = collections.Counter()
        self._stopwatch = Stopwatch()
        self.paused, self.waiting = self._stopwatch.paused, self._stopwatch.waiting
        self._rate = 0.0  # tokens per second in the last timed interval
        self._secs_per_step = 0.0  # there
        self._hardware: Hardware | None = None

    def open(self) -> None:
        """Opens the log file and the TensorBoard folder, after every check has passed.

        Raises:
          UserError: if either cannot be written.
        """
        config = self._config
        name = f"{config.name}_{time.strftime('%Y%m%d-%H%M%S')}"
        path = self._redirected or log_file.path(config.log_dir, name)
        folder = pathlib.Path(config.tensorboard_dir) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = self._log = self._log or path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write the log {path}: {error.strerror}; choose another --config.log_dir"
            ) from error
        self._folder = folder
        try:
            from mamba_jax.training.tensorboard import TensorBoard

            self._tensorboard = self._trackers[_TENSORBOARD] = TensorBoard(folder)
        except ImportError as error:
            self.warn(f"{error}; training continues without TensorBoard (pip install tensorboardX)")
        except OSError as error:
            raise UserError(
                f"cannot write TensorBoard events to {folder}: {error.strerror}; "
                "choose another --config.tensorboard_dir"
            ) from error
        self._trackers |= open_trackers(config, self.warn)
        self.attempt(_LOG, lambda: log.writelines(self._before_log))
        curves = f"; curves: tensorboard --logdir {config.tensorboard_dir}"
        self.say(f"log: {path}{curves if self._tensorboard else ''}")

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self.finish()
        if error is not None:
            ended = f"{type(error).__name__}: {error}"
            self._to_log(f"ended by {ended}")
            self.record(step=self._step, ended=ended)
        self._forward("close", error is None)
        for what, stream in (
            (_LOG, None if self._redirected else self._log),
            (_HISTORY, self._history),
        ):
            if stream is not None:
                self.attempt(what, stream.close)

    def say(self, text: str) -> None:
        """Prints to standard output and to the log file."""
        self._to_log(text)
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Prints a warning to standard error and to the log file; ``metrics.jsonl`` keeps it."""
        self._to_log(f"warning: {text}")
        self._print(f"warning: {text}", sys.stderr)
        self.record(step=self._step, warning=text)

    def _print(self, text: str, stream: TextIO) -> None:
        """Prints above the bar. A reader that exits, or a full disk, does not stop the training."""
        if self._redirected:
            return
        try:
            with tqdm.tqdm.external_write_mode(file=stream):
                print(text, file=stream, flush=True)
        except OSError as error:
            # Nothing more can be printed, and Python's own flush at exit must not fail.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            self._to_log(f"warning: cannot print any more ({error}); training continues")

    @property
    def folder(self) -> pathlib.Path:
        """The run's own TensorBoard folder; the monitor must be open."""
        assert self._folder is not None
        return self._folder

    def start(
        self,
        step: int,
        source: pathlib.Path | None,
        hardware: Hardware | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens ``metrics.jsonl`` and shows the bar.

        Args:
          step: the step that the run resumes from; 0 at its beginning.
          source: the folder of the run that it resumes, if any.
          hardware: for FLOPs per second and the recorded device; None: neither is reported.
          about: what to record about the run: ``config``, as ``config.to_dict`` gives it,
            ``parameters``, their number, and anything else; None: nothing.
        """
        self._hardware, self._step = hardware, step
        self._history = History(pathlib.Path(self._config.output_dir), step, source)
        if about is not None:
            started, log = time.strftime("%Y-%m-%d %H:%M:%S"), str(self._redirected or "")
            if self._log is not None and not log:
                log = self._log.name
            self.record(step=step, run={"started": started, "log": log, **about})
            self._forward("hyperparameters", flatten(about["config"]))
        # Where stderr is not a terminal, whole lines at intervals replace the bar. Some
        # terminals (a container's) claim a size of 0, on which tqdm would draw nothing.
        shows_bar = sys.stderr.isatty()
        has_width = shows_bar and os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = tqdm.tqdm(
            total=self._config.training.max_steps,
            initial=step,
            desc=self._config.name,
            unit="step",
            dynamic_ncols=has_width,
            ncols=None if has_width else 80,
            nrows=None if has_width else 24,
            disable=not shows_bar,
        )

    def finish(self) -> None:
        """Closes the bar: later lines come after it."""
        if self._bar is not None:
            self._bar.close()

    def step(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        gradient_norm: float,
        tokens: int,
        skipped: bool,
        aux: Mapping[str, np.ndarray] | Callable[[], Mapping[str, np.ndarray]],
    ) -> None:
        """Records one step.

        Args:
          step: steps taken, this one included.
          loss: nats per token.
          learning_rate: of this step.
          gradient_norm: before clipping.
          tokens: target tokens in the batch.
          skipped: whether the step was a spike and changed nothing.
          aux: the model's, or a function that fetches it, called only where it is shown.
        """
        training = self._config.training
        record = {"loss": loss, "learning_rate": learning_rate, "gradient_norm": gradient_norm}
        if skipped:
            record["skipped"] = True
        self._step = step
        self.record(step=step, **record)
        if skipped:
            self.warn(f"step {step}: gradient norm {gradient_norm:.3g} is a spike; step skipped")
        if self._stopwatch.step():
            self._interval.update(tokens=tokens, timed=1)
        self._interval.update(loss=loss, steps=1)  # type: ignore[call-overload]
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.3f}, {self._rate_text()}", refresh=False)
        if step % training.log_steps == 0 or step == training.max_steps:
            self._show(step, record, aux() if callable(aux) else aux)

    def _show(self, step: int, record: Mapping[str, float], aux: Mapping[str, np.ndarray]) -> None:
        interval, self._interval = self._interval, collections.Counter()
        measures: dict[str, float] = {}
        hardware, memory_bytes, data_wait = self._hardware, device_memory_bytes(), 0.0
        if (secs := self._stopwatch.secs) > 0 and interval["timed"]:
            data_wait = min(1.0, self._stopwatch.data_secs / secs)
            self._rate = interval["tokens"] / secs
            self._secs_per_step = secs / interval["timed"]
            if hardware is not None:
                measures = hardware.measures(self._rate)
                self.record(
                    step=step,
                    tokens_per_sec=self._rate,
                    device_kind=hardware.device_kind,
                    device_count=hardware.device_count,
                    memory_bytes=memory_bytes,
                    data_wait=data_wait,
                )
        self._stopwatch.restart()
        mean_loss = interval["loss"] / interval["steps"]
        last = self._config.training.max_steps
        left = _duration((last - step) * self._secs_per_step) if self._rate else "–"
        line = (
            f"step {step}/{last}  loss {mean_loss:.4f}  lr {record['learning_rate']:.3g}  "
            f"gradient norm {record['gradient_norm']:.3g}  {self._rate_text()}  "
            f"{_flops_text(measures)}ETA {left}"
        )
        if self._bar is not None and self._bar.disable:
            self._print(line, sys.stderr)
        self._to_log(line)
        scalars = {
            "train/loss": mean_loss,
            "train/learning_rate": record["learning_rate"],
            "train/gradient_norm": record["gradient_norm"],
            "train/tokens_per_sec": self._rate,
            "train/data_wait": data_wait,
            "device/memory_mib": memory_bytes / _MIB,
            **{f"train/{name}": value for name, value in measures.items()},
        }
        if aux:
            gates = _gates(aux)
            self.record(step=step, **gates)
            gated = self._config.model.gated_layers
            scalars |= _by_layer({"depth": gates["depth_mean"]}, gated)
        self._forward("scalars", step, scalars)
        board = self._tensorboard
        if board is not None:
            gated = self._config.model.gated_layers
            self.attempt(_TENSORBOARD, lambda: _add_gates(board, step, aux, gated))
        self.flush()

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Records one evaluation."""
        self.record(step=step, **evaluation.measures(), **evaluation.layers)
        scalars = {
            name.replace("eval_", "eval/"): value for name, value in evaluation.measures().items()
        }
        layers = range(self._config.model.n_layers)
        self._forward("scalars", step, scalars | _by_layer(evaluation.layers, layers))
        self.say(
            f"step {step}: eval loss {evaluation.loss:.4f}, perplexity "
            f"{evaluation.perplexity:.2f}, {evaluation.bits_per_byte:.4f} bits per byte"
        )
        self.flush()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records the text that the model generated after a prompt."""
        self.record(step=step, prompt=prompt, sample=text)
        self._forward("text", step, "sample", prompt + text)
        self.flush()

    def flush(self) -> None:
        """Hands everything to the operating system, for example before a save."""
        for what, stream in ((_TENSORBOARD, self._tensorboard), (_HISTORY, self._history)):
            if stream is not None:
                self.attempt(what, stream.flush)

    def speed_text(self) -> str:
        """Returns tokens and FLOPs per second of the last interval of steps."""
        measures = self._hardware.measures(self._rate) if self._hardware and self._rate else {}
        return f"{self._rate_text()}  {_flops_text(measures)}".strip()

    def _rate_text(self) -> str:
        return f"{self._rate:,.0f} tokens/s" if self._rate else "– tokens/s"

    def record(self, **record: Any) -> None:
        """Adds a record, which must have a ``step``, to ``metrics.jsonl`` where that is open."""
        history = self._history
        if history is not None:
            self.attempt(_HISTORY, lambda: history.append(**record))

    def _forward(self, what: str, *values: Any) -> None:
        """Calls a method of every tracker; one that fails is not called again."""
        for name, tracker in self._trackers.items():
            self.attempt(name, lambda tracker=tracker: getattr(tracker, what)(*values), Exception)

    def _to_log(self, text: str) -> None:
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        log = self._log
        if log is None:
            self._before_log.append(line)
        else:
            self.attempt(_LOG, lambda: print(line, file=log, end="", flush=True))

    def attempt(
        self, what: str, write: Callable[[], object], failure: type[Exception] = OSError
    ) -> None:
        """Writes something that training does not depend on; a failure disables ``what``."""
        if what in self._silenced:
            return
        try:
            write()
        except failure as error:
            self._silenced.add(what)
            self.warn(f"{what} cannot be written ({error}); training continues without it")


def _add_gates(
    board: "TensorBoard", step: int, aux: Mapping[str, np.ndarray], layers: Sequence[int]
) -> None:
    """Adds the distribution of the depth gates of each layer, over tokens and recursion steps."""
    for layer, shares_kh in zip(layers, aux["gate_histogram"] if aux else (), strict=False):
        edges = np.linspace(0.0, 1.0, shares_kh.shape[-1] + 1).tolist()
        board.histogram(step, f"gate/layer_{layer:02d}", edges, shares_kh.mean(axis=0).tolist())


def _gates(aux: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Returns each layer's mean depth and its shares of gates nearly closed and nearly open."""
    histogram_lkg = np.asarray(aux["gate_histogram"])
    gates_l = {
        "depth_mean": np.asarray(aux["depth_mean"]),
        "gates_closed": histogram_lkg[..., 0].mean(axis=-1),  # below 0.1
        "gates_open": histogram_lkg[..., -1].mean(axis=-1),  # from 0.9 up
    }
    return {name: [float(f"{v:.4g}") for v in values] for name, values in gates_l.items()}


def _by_layer(measures: Mapping[str, list[float]], layers: Sequence[int]) -> dict[str, float]:
    """Returns a curve's name → value for each layer, by the layers' numbers."""
    return {
        f"{name}/layer_{layer:02d}": value
        for name, values in measures.items()
        for layer, value in zip(layers, values, strict=True)
    }


def _flops_text(measures: Mapping[str, float]) -> str:
    if "mfu" in measures:
        return f"{measures['tflops']:.3g} TFLOP/s (MFU {measures['mfu']:.1%})  "
    return f"{measures['tflops']:.3g} TFLOP/s  " if measures else ""


def _duration(secs: float) -> str:
    hours, rest = divmod(round(secs), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
