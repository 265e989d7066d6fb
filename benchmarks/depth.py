"""A trained hybrid whose tokens skip recursion steps: time and quality against the threshold.

The model is a checkpoint of your own (``--checkpoint``): what its gates learned decides how many
recursion steps a threshold saves. Quality is the loss on held-out windows of its own corpus; time
is that of decoding after held-out prompts, for one text as ``generate`` does it, and for four at
once as ``serve`` does, whose tokens run to different depths.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness, workloads
from benchmarks.harness import Candidate, Check, Context, Prepared, Row
from benchmarks.report import ratio
from mamba_jax.config import ModelConfig, for_inference
from mamba_jax.data import pipeline
from mamba_jax.errors import UserError
from mamba_jax.generation.load import find
from mamba_jax.models import build
from mamba_jax.modules.block import GATE_BINS
from mamba_jax.serving import slots
from mamba_jax.serving.batched_sampling import batch_sampling

BASELINE = "none skipped"
# Multiples of a gate bin's width, so that the histogram of gates counts the steps.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
PROMPT_TOKENS = 64
SERVED = 4
FASTER, WORSE = 1.2, 1.005  # targets: decoding, and the loss that it may cost


def cases(context: Context) -> list[dict[str, Any]]:
    """One text, and four at once."""
    tokens = 8 if context.quick else 96
    return [
        {"task": "generate", "texts": 1, "tokens": tokens},
        {"task": "serve", "texts": SERVED, "tokens": tokens},
    ]


def candidates(case: dict[str, Any], context: Context) -> list[Candidate]:
    """One per threshold."""

    def prepare(threshold: float) -> Prepared:
        assert context.checkpoint is not None
        trained = load(context.checkpoint, 4 if context.quick else 64)
        of_task = {"generate": prepare_generation, "serve": prepare_serving}[case["task"]]
        return of_task(trained, threshold, case["texts"], case["tokens"])

    return [
        Candidate(str(threshold or BASELINE), functools.partial(prepare, threshold))
        for threshold in (0.0, *(THRESHOLDS[:1] if context.quick else THRESHOLDS))
    ]


def measure(case: dict[str, Any], context: Context, rows: list[Row]) -> None:
    """Measures all thresholds in turns."""
    harness.measure(
        candidates(case, context),
        case,
        rows,
        rounds=2 if context.quick else 9,
        candidate_secs=30.0,
        deadline=context.deadline,
    )
    workloads.add_token_rates(rows, case, case["texts"] * case["tokens"])


def checks(rows: list[Row], context: Context) -> list[Check]:
    """Whether some threshold makes decoding faster at almost the same loss."""
    del context
    found = []
    for task in ("generate", "serve"):
        of_task = [row for row in rows if row.case["task"] == task and row.samples_secs]
        base = next((row for row in of_task if row.name == BASELINE), None)
        claim = f"{task}: ≥ {FASTER} × faster at a loss ≤ {WORSE} × that of skipping none"
        if base is None:
            found.append(Check(claim, None, ""))
            continue
        good = [row for row in of_task if row.metrics["loss"] <= WORSE * base.metrics["loss"]]
        faster, best = max((1 / (ratio(row, base) or 1.0), row.name) for row in good)
        found.append(Check(claim, faster >= FASTER, f"{faster:.2f} × at {best}"))
    return found


def draw(rows: list[Row], figure: Any) -> None:
    """Draws the loss against the time of a token, one point for each threshold."""
    plots = figure.subplots(1, 2, sharey=True)
    for plot, task in zip(plots, ("generate", "serve"), strict=True):
        for row in rows:
            if row.case["task"] == task and row.samples_secs:
                at = 1e3 / row.metrics["tokens_per_sec"], row.metrics["loss"]
                plot.plot(*at, "o")
                plot.annotate(row.name, at, textcoords="offset points", xytext=(4, 4))
        plot.set_title(task)
        plot.set_xlabel("time of a token (ms)")
    plots[0].set_ylabel("loss (nats a token)")


# --- the model and its text


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, to be a cache's key
class Trained:
    """A trained model and held-out windows of its corpus, int32 (n, t)."""

    model: ModelConfig
    params: Any
    windows_nt: np.ndarray
    vocab_size: int
    eot_id: int


@functools.cache
def load(checkpoint: str, n_windows: int) -> Trained:
    """Loads a checkpoint and held-out text of its run.

    Raises:
      UserError: if there is no checkpoint, or its model or text cannot be measured here.
    """
    found = find(checkpoint, print)
    config = found.metadata.config
    if not config.model.gated_layers or config.model.gate != "token":
        raise UserError(
            f"--checkpoint={checkpoint} has no gates of tokens to measure; give a hybrid trained "
            "with model.gate=token"
        )
    if config.data.has_loss_mask or config.data.window == "concat":
        raise UserError(
            f"--checkpoint={checkpoint} was trained with a loss mask or data.window=concat, which "
            "depth does not measure; give one trained on whole texts"
        )
    model = found.load()
    corpus = pipeline.prepare(
        config.data, seq_len=config.model.max_seq_len, seed=config.seed, log=print
    )
    windows = [windows_bt for windows_bt, _ in corpus.eval_batches(1, n_windows)]
    if len(windows) < SERVED:
        raise UserError(
            f"--checkpoint={checkpoint}: {len(windows)} held-out windows; depth needs {SERVED}"
        )
    tokenizer = found.tokenizer
    return Trained(
        model.config, model.params, np.concatenate(windows), tokenizer.vocab_size, tokenizer.eot_id
    )


@functools.cache
def quality(trained: Trained, threshold: float) -> dict[str, float]:
    """The loss on the held-out windows, nats a token, and a token's mean steps per layer."""
    model = for_inference(trained.model, gate_skip_threshold=threshold)

    @jax.jit
    def run(params: Any, windows_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs_bt, targets_bt = windows_bt[:, :-1], windows_bt[:, 1:]
        segments_bt = jnp.cumsum(inputs_bt == trained.eot_id, axis=1, dtype=jnp.int32)
        logits_btv, aux, _ = build.apply(params, model, inputs_bt, segment_ids_bt=segments_bt)
        log_probs_btv = jax.nn.log_softmax(logits_btv[..., : trained.vocab_size])
        nll_bt = -jnp.take_along_axis(log_probs_btv, targets_bt[..., None], axis=-1)
        # A step that was taken has a gate above the threshold: outside the first bins.
        taken_lk = 1 - aux["gate_histogram"][..., : round(threshold * GATE_BINS)].sum(-1)
        return nll_bt.mean(), taken_lk.sum(1).mean()

    found = [run(trained.params, window_t[None]) for window_t in trained.windows_nt]
    nll, steps = np.mean(np.asarray(found), axis=0).tolist()
    return {"loss": nll, "recursion_steps": steps}


# --- decoding


def prepare_generation(trained: Trained, threshold: float, texts: int, n_tokens: int) -> Prepared:
    """Greedy generation after held-out prompts, as ``mamba_jax.generate`` does it."""
    model = for_inference(trained.model, gate_skip_threshold=threshold)
    made = workloads.prepare_generation_of(
        trained.params, model, prompts_of(trained, texts), n_tokens
    )
    return dataclasses.replace(made, metrics=quality(trained, threshold))


def prepare_serving(trained: Trained, threshold: float, texts: int, n_tokens: int) -> Prepared:
    """The server's decoding steps, after held-out prompts in as many slots."""
    model = for_inference(trained.model, gate_skip_threshold=threshold)
    params = build.prepare_for_decoding(jax.device_put(trained.params), model)
    how = {"config": model, "vocab_size": trained.vocab_size}
    prefilled = slots.empty(**how, n_slots=texts)
    for slot, prompt_t in enumerate(prompts_of(trained, texts)):
        state, _ = slots.prefill(
            params,
            slots.empty(**how, n_slots=1),
            jnp.asarray(prompt_t[None]),
            jnp.ones((1, len(prompt_t)), jnp.int32),
            **how,
        )
        prefilled = slots.insert(prefilled, state, jnp.int32(slot))
    sampling = batch_sampling([None] * texts, [0] * texts)  # greedy
    flags = np.bool_(False), np.ones(texts, bool)

    def run() -> float:
        # A copy: a step donates its slots.
        state = jax.block_until_ready(slots.gather(prefilled, jnp.arange(texts)))
        begin = time.perf_counter()
        token_b = None
        for _ in range(n_tokens):
            token_b, _, state = slots.step(params, state, sampling, *flags, **how)
        jax.block_until_ready(token_b)
        return time.perf_counter() - begin

    return Prepared(run, metrics=quality(trained, threshold))


def prompts_of(trained: Trained, texts: int) -> list[np.ndarray]:
    """The beginnings of held-out windows."""
    return list(trained.windows_nt[:texts, :PROMPT_TOKENS])
