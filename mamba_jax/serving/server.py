"""Builds the server of a checkpoint."""

import os
from collections.abc import Callable

import jax
from fastapi import FastAPI

from mamba_jax.generation.load import find
from mamba_jax.parallel.compile_cache import cache_compilations
from mamba_jax.serving.api import make_app
from mamba_jax.serving.engine import Engine
from mamba_jax.serving.metrics import Metrics
from mamba_jax.serving.request_parser import Limits, RequestParser
from mamba_jax.serving.settings import Settings


def open_app(settings: Settings, log: Callable[[str], None]) -> FastAPI:
    """Loads a checkpoint and starts its engine; returns the application.

    Raises:
      UserError: if the checkpoint does not exist, or a setting is out of range.
    """
    found = find(settings.checkpoint, log)
    run = found.metadata.config
    cache_compilations(run.data.cache_root)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Every start compiles the same programs, many of them small: cache all of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    limits = Limits(settings.max_prompt_tokens, settings.max_tokens)
    metrics = Metrics()
    engine = Engine(
        found.load(
            scan=settings.scan,
            gate_skip_threshold=settings.gate_skip_threshold,
            recursion_depth=settings.recursion_depth,
        ),
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        prefix_cache_bytes=settings.prefix_cache_mb << 20,
        timeout_secs=settings.timeout_secs,
        observer=metrics,
        log=log,
    )
    engine.start()
    return make_app(
        engine,
        RequestParser(found.tokenizer, limits, run.data.fim_rate > 0),
        metrics,
        model_name=settings.model_name or run.name,
        api_key=settings.api_key,
        cors_origins=settings.cors_origins,
        max_body_bytes=settings.max_body_bytes,
        on_stop=lambda: engine.close(settings.drain_secs),
    )
