"""The first signal waits for the step, a second Ctrl-C waits for nothing."""

import signal
import subprocess
import sys
import textwrap

import pytest

from mamba_jax.training.interrupts import Interrupts, StoppedEarly

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_recorded_and_the_step_continues(number, capfd):
    with Interrupts() as interrupts:
        interrupts.defer()
        assert not interrupts.received
        signal.raise_signal(number)
        assert interrupts.received == number.name
    assert capfd.readouterr().err == f"\n{number.name}: finishing the step and saving\n"


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step_it_ends_the_wait(number):
    with pytest.raises(StoppedEarly, match=number.name), Interrupts():
        try:
            signal.raise_signal(number)
        except Exception:  # a library's own handling must not swallow it
            pytest.fail("caught as an Exception")


def test_the_previous_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupts():
        assert all(
            signal.getsignal(number) != handler
            for number, handler in zip(SIGNALS, before, strict=True)
        )
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (["SIGINT", "SIGINT"], 130),
        (["SIGTERM", "SIGINT"], 130),
        (["SIGINT", "SIGTERM"], 75),
        (["SIGTERM", "SIGTERM", "SIGUSR1"], 75),  # schedulers repeat their signals
    ],
)
def test_only_a_second_ctrl_c_ends_at_once(sent, status):
    script = f"""
        import signal, sys
        from mamba_jax.runs.exit_status import PREEMPTED
        from mamba_jax.training.interrupts import Interrupts
        with Interrupts() as interrupts:
            interrupts.defer()
            for name in {sent!r}:
                signal.raise_signal(signal.Signals[name])
            sys.exit(PREEMPTED)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == status
    assert b"Traceback" not in done.stderr
