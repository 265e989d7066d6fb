"""What the server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mamba_jax.serving.observer import Observer
from mamba_jax.serving.sequence import End, Failed, Sequence

_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics(Observer):
    """Counters of one server."""

    def __init__(self):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "mamba_jax"}
        self.responses = Counter("responses", "Of HTTP.", ["path", "status"], **own)
        self._ended = Counter("generations", "Ended, by reason.", ["reason"], **own)
        self._prompt = Counter("prompt_tokens", "Of prompts.", **own)
        self._cached = Counter("cached_prompt_tokens", "Of prompts, found in snapshots.", **own)
        self._new = Counter("generated_tokens", "Made.", **own)
        self._continued = Counter(
            "continued_answers", "Prompts that began with a kept prompt and its answer.", **own
        )
        self._warm_up = Gauge("warm_up_seconds", "Of compiling all programs.", **own)
        self._programs = Gauge("compiled_programs", "When the server became ready.", **own)
        self._under_way = {
            name: Gauge(f"generations_{name}", f"Now {name}.", **own)
            for name in ("waiting", "reading", "decoding")
        }
        self._snapshots = Gauge("prefix_cache_bytes", "Of snapshots of states.", **own)
        self._first = Histogram(
            "first_token_seconds", "From a request to its first token.", buckets=_SECS, **own
        )
        self._next = Histogram(
            "next_token_seconds", "Between two tokens.", buckets=_TOKEN_SECS, **own
        )

    def text(self) -> bytes:
        """Returns all in Prometheus' format."""
        return generate_latest(self._registry)

    def warmed_up(self, programs: int, secs: float) -> None:
        self._programs.set(programs)
        self._warm_up.set(secs)

    def first_token(self, secs: float) -> None:
        self._first.observe(secs)

    def next_token(self, secs: float) -> None:
        self._next.observe(secs)

    def ended(self, sequence: Sequence, event: End | Failed) -> None:
        self._ended.labels(event.reason).inc()
        if isinstance(event, End):
            self._prompt.inc(event.prompt_tokens)
            self._cached.inc(event.cached_tokens)
            self._continued.inc(sequence.continues_answer)
        self._new.inc(sequence.n_new)

    def round(self, waiting: int, reading: int, decoding: int, snapshot_bytes: int) -> None:
        counts = {"waiting": waiting, "reading": reading, "decoding": decoding}
        for name, count in counts.items():
            self._under_way[name].set(count)
        self._snapshots.set(snapshot_bytes)
