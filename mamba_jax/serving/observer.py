"""The events that an engine reports."""

from mamba_jax.serving.sequence import End, Failed, Sequence


class Observer:
    """Receives events from the engine thread; this base class ignores them."""

    def warmed_up(self, programs: int, secs: float) -> None:
        """The engine is ready: it compiled ``programs`` programs in ``secs``."""

    def first_token(self, secs: float) -> None:
        """A first token was sampled ``secs`` after its request arrived."""

    def next_token(self, secs: float) -> None:
        """A token was sampled ``secs`` after the previous one."""

    def ended(self, sequence: Sequence, event: End | Failed) -> None:
        """A request ended."""

    def round(self, waiting: int, prefilling: int, decoding: int, cache_bytes: int) -> None:
        """A round ended: requests by stage, and the size of the prefix cache."""
