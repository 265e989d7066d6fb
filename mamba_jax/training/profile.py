"""A trace of a few training steps, for TensorBoard and Perfetto."""

import contextlib
import pathlib
import shlex
from collections.abc import Callable, Iterator

import jax

from mamba_jax.errors import UserError
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.summary import program


class Profile:
    """Traces some steps of a run; a context manager whose exit closes a trace in progress.

    While it traces, the clock of the training rate is paused: tracing slows the steps.
    """

    def __init__(self, first: int, last: int, monitor: Monitor, settle: Callable[[], None]):
        """
        Args:
          first: first step to trace.
          last: last step to trace; less than ``first``: no step is traced.
          monitor: reports where the trace is; the trace is written to its TensorBoard folder.
          settle: waits for the dispatched steps and records them.
        """
        self._first, self._last = first, last
        self._monitor = monitor
        self._settle = settle
        self._open: contextlib.ExitStack | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks a step in the trace while it is dispatched."""
        if step == self._first <= self._last:
            self._settle()  # the trace must not show the step before
            self._start()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def dispatched(self, step: int) -> None:
        """Ends the trace when the device has finished its last step."""
        if self._open is not None and step == self._last:
            self._settle()
            self._stop()

    def _start(self) -> None:
        self._open = contextlib.ExitStack()
        self._open.enter_context(self._monitor.paused())
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing each Python call: a hundred times the size
        # A file for ui.perfetto.dev is written beside the one for TensorBoard.
        jax.profiler.start_trace(
            str(self._monitor.folder), create_perfetto_trace=True, profiler_options=options
        )

    def _stop(self) -> None:
        opened, self._open = self._open, None
        if opened is None:
            return
        with opened:
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:  # XLA, which writes one file, raises the other
                self._monitor.warn(
                    f"the profile cannot be written ({error}); training continues without it"
                )
                return
        board = self._monitor.folder
        folder = max(pathlib.Path(board, "plugins", "profile").iterdir())
        self._monitor.say(
            f"profile of the steps from step {self._first}: {folder}\n"
            "open its perfetto_trace.json.gz at https://ui.perfetto.dev, or see the tab Profile "
            "(pip install xprof) of:\n"
            f"  {program('tensorboard')} --logdir {shlex.quote(str(board))}"
        )


def traced_steps(start: int, steps: int, first_step: int, max_steps: int) -> tuple[int, int]:
    """Returns the first and last step to trace.

    Args:
      start: steps to run before the trace, including the one that compiles.
      steps: how many to trace.
      first_step: the step that the run resumes from; 0 at its beginning.
      max_steps: the step at which it ends.

    Raises:
      UserError: if either number is invalid, or the run ends before the trace does.
    """
    if steps < 1:
        raise UserError(f"--profile_steps={steps} must be at least 1")
    if start < 0:
        raise UserError(f"--profile_start={start} must not be negative")
    first, last = first_step + start + 1, first_step + start + steps
    if last > max_steps:
        raise UserError(
            f"--profile would trace the steps {first} to {last}, but the run ends at step "
            f"{max_steps}; give a smaller --profile_start or --profile_steps, or a larger "
            "training.max_steps"
        )
    return first, last
