"""Our own side of the model benchmarks: a training step, a forward, decoding, as users run them."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from benchmarks.harness import Prepared
from mamba_jax.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VramConfig,
    from_dict,
    preset_config,
)
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.generation import generate
from mamba_jax.generation.sampling import Sampling
from mamba_jax.models import build
from mamba_jax.parallel.mesh import make_mesh
from mamba_jax.training.state import init_state
from mamba_jax.training.step import make_train_step

GPT2_VOCABULARY = 50_257
EOT = GPT2_VOCABULARY - 1
GREEDY = Sampling(temperature=0.0)


def model_of(size: str, **fields: Any) -> ModelConfig:
    """The structure of a preset size with the GPT-2 vocabulary, with some fields changed."""
    model = from_dict(preset_config(size).to_dict()).model
    return dataclasses.replace(model, **{"vocab_size": GPT2_VOCABULARY, **fields})


def run_of(model: ModelConfig, batch: int) -> RunConfig:
    """A run whose step is one microbatch."""
    return RunConfig(model=model, vram=VramConfig(effective_batch_size=batch, batch_size=batch))


def windows(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Random tokens, a document per row: int32 (batch, length + 1)."""
    drawn = np.random.default_rng(0).integers(0, vocabulary - 1, (batch, length + 1))
    return drawn.astype(np.int32)


def prepare_train_step(model: ModelConfig, batch: int, length: int) -> Prepared:
    """Our optimizer step as ``mamba_jax.train`` compiles it, on one device."""
    config = run_of(model, batch)
    mesh = make_mesh(ParallelConfig(), jax.devices()[:1])
    step = make_train_step(config, mesh, model.vocab_size - 1)
    state, tokens = init_state(config, mesh), jnp.asarray(windows(batch, length, model.vocab_size))
    program, memory = harness.compiled(step, state, tokens)

    def run() -> None:
        nonlocal state
        state, metrics = program(state, tokens)
        if not math.isfinite(metrics["loss"]):  # which also waits for it
            raise harness.NotMeasured("the loss is not finite")
        jax.block_until_ready(state)

    count = parameter_count(model).total
    return Prepared(run, lambda: memory, {"parameters": count})


def prepare_forward(model: ModelConfig, batch: int, length: int) -> Prepared:
    """A forward pass up to the head, as evaluation and prefill use it."""
    params = jax.jit(lambda: build.init(model, jax.random.key(0)))()
    tokens_bt = jnp.asarray(windows(batch, length, model.vocab_size)[:, :-1])
    return harness.prepare_jax(
        lambda params, tokens_bt: build.forward(params, model, tokens_bt)[0], params, tokens_bt
    )


def prepare_generation(
    model: ModelConfig, batch: int, context: int, n_tokens: int, *, int8_head: bool = False
) -> Prepared:
    """Generation as ``mamba_jax.generate`` does it, on prompts of ``context`` random tokens.

    Args:
      model: its structure; the weights are random and no row ends early.
      batch: prompts.
      context: tokens in each.
      n_tokens: tokens to time after the first one; 0: time the first one.
      int8_head: decode as ``--head int8`` does.
    """
    params = jax.jit(lambda: build.init(model, jax.random.key(0)))()
    prompts = list(windows(batch, context, model.vocab_size)[:, :-1])
    return prepare_generation_of(params, model, prompts, n_tokens, int8_head=int8_head)


def prepare_generation_of(
    params: Any,
    model: ModelConfig,
    prompts: list[np.ndarray],
    n_tokens: int,
    *,
    int8_head: bool = False,
) -> Prepared:
    """``prepare_generation`` with given weights and prompts of equal length."""
    # As a program does once, not per text.
    params = build.prepare_for_decoding(jax.device_put(params), model, int8_head=int8_head)
    batch = len(prompts)

    def secs(max_tokens: int) -> float:
        begin = time.perf_counter()
        made = generate.generate_tokens(
            (params,),
            (model,),
            prompts,
            range(batch),
            n_rows=batch,
            max_tokens=max_tokens,
            sampling=GREEDY,
            seed=0,
            vocab_size=model.vocab_size,
            eot_id=-1,  # none: no row ends
            dispatch_tokens=generate.WHOLE_TOKENS,
        )
        n_made = sum(1 for _ in made)
        assert n_made == max_tokens, n_made
        return time.perf_counter() - begin

    def run() -> float:
        if not n_tokens:
            return secs(1)
        # The smaller of two: a delay in the part that is subtracted would look like speed.
        first = min(secs(1), secs(1))
        return secs(1 + n_tokens) - first

    return Prepared(run)


def add_token_rates(rows: list[Any], case: dict[str, Any], n_tokens: int) -> None:
    """Writes tokens per second into the rows of a case in which each sample took ``n_tokens``."""
    for row in rows:
        if row.case == case and row.samples_secs:
            row.metrics["tokens_per_sec"] = n_tokens / row.median_secs
