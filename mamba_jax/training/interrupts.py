"""Signals: finish the step, save, exit with a status on which a launcher restarts."""

import os
import signal
from types import FrameType, TracebackType

from mamba_jax.errors import INTERRUPTED

# Schedulers announce the end with SIGTERM, SLURM's --signal commonly with USR1 or USR2.
_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)


class StoppedEarly(BaseException):
    """A signal came before there was anything to save; ``except Exception`` must not catch it."""


class Interrupts:
    """Records signals so that they do not end the process; for the main thread.

    A context manager.

    Until ``defer`` is called, a signal raises ``StoppedEarly`` at once (reading data may take long,
    and no step is lost). After that the first signal only sets ``received``, which the loop reads
    between steps. A further Ctrl-C ends the process immediately.
    """

    def __init__(self) -> None:
        self.received = ""  # the signal's name; "": none yet
        self._deferred = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interrupts":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def defer(self) -> None:
        """From now on a signal waits for the end of the step."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT:
                os.write(2, b"\nstopped at once; nothing more was saved\n")
                os._exit(INTERRUPTED)  # a writer thread or XLA would delay a normal exit
            return  # schedulers repeat their signals
        self.received = signal.Signals(number).name
        if not self._deferred:
            raise StoppedEarly(self.received)
        # os.write: a handler may interrupt a print, whose buffer must not be entered twice.
        os.write(2, f"\n{self.received}: finishing the step and saving\n".encode())
