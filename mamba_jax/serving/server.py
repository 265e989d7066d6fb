"""From a checkpoint to a server."""

import dataclasses
from collections.abc import Callable

from fastapi import FastAPI

from mamba_jax.errors import UserError
from mamba_jax.generation.checkpoints import find
from mamba_jax.serving.api import make_app
from mamba_jax.serving.engine import Engine
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.protocol import Limits, Translator
from mamba_jax.training.hardware import cache_compilations


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
      checkpoint: a checkpoint's folder, or a run's.
      model_name: what clients call the model; None: the name of its config.
      api_key: that clients must send; None: none.
      max_batch: sequences at a time.
      max_queue: requests that may wait besides.
      prefix_cache_mb: for snapshots of states.
      max_prompt_tokens: of a request, its marker included.
      max_tokens: that a request may ask for.
      timeout_secs: from a request's arrival to its end.
      drain_secs: that requests under way are given when the server stops.
      scan: implementation of the selective scan; None: the checkpoint's.
    """

    checkpoint: str
    model_name: str | None = None
    api_key: str | None = None
    max_batch: int = 16
    max_queue: int = 256
    prefix_cache_mb: int = 256
    max_prompt_tokens: int = 32_768
    max_tokens: int = 4_096
    timeout_secs: float = 600.0
    drain_secs: float = 30.0
    scan: str | None = None

    def __post_init__(self):
        for name, least in (("prefix_cache_mb", 0), ("max_prompt_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.drain_secs < float("inf"):
            raise UserError(f"drain_secs={self.drain_secs} must be a number from 0 up")


def open_app(settings: Settings, log: Callable[[str], None]) -> FastAPI:
    """Loads a checkpoint and starts its engine; returns the application.

    Raises:
      UserError: if there is no such checkpoint, or a setting cannot work.
    """
    found = find(settings.checkpoint, log)
    run = found.metadata.config
    cache_compilations(run.data.cache_root)
    limits = Limits(settings.max_prompt_tokens, settings.max_tokens)
    metrics = Metrics()
    engine = Engine(
        found.load(settings.scan),
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        prefix_cache_bytes=settings.prefix_cache_mb << 20,
        timeout_secs=settings.timeout_secs,
        observer=metrics,
    )
    engine.start()
    return make_app(
        engine,
        Translator(found.tokenizer, limits, run.data.fim_rate > 0),
        metrics,
        model_name=settings.model_name or run.name,
        api_key=settings.api_key,
        on_stop=lambda: engine.close(settings.drain_secs),
    )
