"""What JAX compiles: how often, and which programs."""

import contextlib
import logging

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # one for each call of the compiler
_LOGGER = logging.getLogger("jax._src.interpreters.pxla")
_listeners: list[list[str]] = []  # of the active listeners: JAX offers no way to unregister one


@jax.monitoring.register_event_duration_secs_listener
def _count(event: str, _: float, **about):
    if event == _EVENT:
        for listener in _listeners:
            listener.append(about.get("fun_name", "?"))


class _Named(logging.Handler):
    """Collects the programs that are about to be compiled: name and shapes of arguments."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.programs = []

    def emit(self, record):
        if record.msg.startswith("Compiling"):
            name, avals, *_ = record.args
            self.programs.append((name, str(avals)))


@contextlib.contextmanager
def compilations():
    """Gives the list of the names of what any thread compiles meanwhile, repetitions included."""
    names: list[str] = []
    _listeners.append(names)
    try:
        yield names
    finally:
        _listeners.remove(names)


@contextlib.contextmanager
def programs():
    """Gives the list of (name, shapes of arguments) of what is compiled meanwhile.

    A program that occurs twice was compiled twice for the same shapes, as happens when its arrays
    are committed to a device in one call and not in the next.
    """
    handler, level = _Named(), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.DEBUG)
    propagates, _LOGGER.propagate = _LOGGER.propagate, False
    try:
        with compilations() as names:
            yield handler.programs
        assert len(names) == len(handler.programs), "JAX logs its compilations in another way now"
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)
        _LOGGER.propagate = propagates
