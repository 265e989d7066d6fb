"""What an engine tells of its work."""

from mamba_jax.serving.sequence import End, Failed, Sequence


class Observer:
    """Is told what happens, by the engine's thread; this one does not listen."""

    def warmed_up(self, programs: int, secs: float) -> None:
        """The engine serves from now on: so many programs took so long to compile."""

    def first_token(self, secs: float) -> None:
        """A first token came ``secs`` after its request."""

    def next_token(self, secs: float) -> None:
        """A further token came ``secs`` after the one before it."""

    def ended(self, sequence: Sequence, event: End | Failed) -> None:
        """A request ended."""

    def round(self, waiting: int, reading: int, decoding: int, snapshot_bytes: int) -> None:
        """So many requests are under way, and snapshots take so many bytes."""
