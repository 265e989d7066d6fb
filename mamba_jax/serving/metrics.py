"""Prometheus metrics of the server."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mamba_jax.serving.observer import Observer
from mamba_jax.serving.sequence import End, Failed, Sequence

_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics(Observer):
    """The metrics of one server."""

    def __init__(self):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "mamba_jax"}
        self.responses = Counter("responses", "HTTP responses.", ["path", "status"], **own)
        self._ended = Counter("generations", "Ended generations, by reason.", ["reason"], **own)
        self._prompt = Counter("prompt_tokens", "Prompt tokens.", **own)
        self._cached = Counter(
            "cached_prompt_tokens", "Prompt tokens found in the prefix cache.", **own
        )
        self._new = Counter("generated_tokens", "Generated tokens.", **own)
        self._continued = Counter(
            "continued_answers", "Prompts that continued a cached prompt and its answer.", **own
        )
        self._warm_up = Gauge("warm_up_seconds", "Time to compile all programs.", **own)
        self._programs = Gauge(
            "compiled_programs", "Programs compiled before the server was ready.", **own
        )
        self._in_progress = {
            name: Gauge(f"generations_{name}", about, **own)
            for name, about in (
                ("waiting", "Requests in the waiting queue."),
                ("reading", "Requests whose prompt is being prefilled."),
                ("decoding", "Requests that are decoding."),
            )
        }
        self._cache_bytes = Gauge("prefix_cache_bytes", "Size of the prefix cache.", **own)
        self._first = Histogram(
            "first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECS,
            **own,
        )
        self._next = Histogram(
            "next_token_seconds", "Between two tokens.", buckets=_TOKEN_SECS, **own
        )

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
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

    def round(self, waiting: int, prefilling: int, decoding: int, cache_bytes: int) -> None:
        counts = {"waiting": waiting, "reading": prefilling, "decoding": decoding}
        for name, count in counts.items():
            self._in_progress[name].set(count)
        self._cache_bytes.set(cache_bytes)
