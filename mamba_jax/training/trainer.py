"""What changes while a run trains: its state, its position in the data, its newest measures."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mamba_jax.checkpoints import resume as resuming
from mamba_jax.checkpoints.arrays import CheckpointWriter, restore
from mamba_jax.checkpoints.folder import (
    Metadata,
    find_latest,
    layout_of,
)
from mamba_jax.config import RunConfig, to_dict
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.data.pipeline import prepare
from mamba_jax.errors import UserError
from mamba_jax.generation.generate import generate_text
from mamba_jax.parallel import mesh as meshes
from mamba_jax.parallel.compile_cache import cache_compilations
from mamba_jax.runs.lock import RunLock
from mamba_jax.training import loop, summary
from mamba_jax.training.elastic import ElasticStep
from mamba_jax.training.evaluation import Evaluation, evaluate
from mamba_jax.training.hardware import find_hardware
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.set_up import Setup
from mamba_jax.training.state import abstract_state, init_state
from mamba_jax.training.step import make_eval_step

# How samples are drawn: at a low temperature, because they show what a short run has learned.
_SAMPLE = {"max_tokens": 150, "temperature": 0.5, "top_k": 50, "top_p": 0.95}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      setup: what it started from.
      step: the last one.
      samples_seen: windows trained on, those before a resume included.
      interrupted_by: name of the signal that ended it; "": it reached its last step.
      evaluation: at the last step; None if it was interrupted elsewhere.
      sample: the newest sample; "" without a prompt.
      unigram_nll: nats per token, of the corpus's token frequencies alone.
    """

    setup: Setup
    step: int
    samples_seen: int
    interrupted_by: str
    evaluation: Evaluation | None
    sample: str
    unigram_nll: float


class Trainer:
    """Trains, evaluates and saves, one call each.

    Attributes:
      writer: writes checkpoints; a context manager.
      first_step: that of the checkpoint resumed from; 0: the run starts anew.
      step: the newest one dispatched.
      evaluation: that of this very step; None: there is none.
      sample: the newest one; "" without a prompt.
    """

    def __init__(self, setup: Setup, monitor: Monitor, lock: RunLock):
        """Prepares the data, makes or restores the state, and opens the record of the run."""
        config, start, training = setup.plan.config, setup.start, setup.config.training
        self._setup, self._monitor, self._lock = setup, monitor, lock
        self._output_dir = pathlib.Path(config.output_dir)
        self._batch_size = config.vram.effective_batch_size
        monitor.say(setup.plan.text())
        cache_compilations(config.data.cache_root)
        monitor.open()

        self._corpus = prepare(
            config.data, seq_len=config.model.max_seq_len, seed=config.seed, log=monitor.say
        )
        if start is not None:
            resuming.check_same_data(start, self._corpus.fingerprint)
            self.first_step, self._first_sample = start.metadata.step, start.metadata.samples_seen
            self._state = restore(start.path, abstract_state(config, setup.mesh))
            resuming.set_newer_aside(self._output_dir, self.first_step, monitor.say)
            (self._output_dir / summary.NAME).unlink(missing_ok=True)
        else:
            self.first_step, self._first_sample = 0, 0
            self._state = init_state(config, setup.mesh)
        self.step = self.first_step
        self.evaluation: Evaluation | None = None
        self.sample = ""

        tokenizer = setup.tokenizer
        self._train_step = ElasticStep(config, setup.mesh, tokenizer.eot_id, monitor.warn)
        self._eval_step = make_eval_step(
            config, setup.mesh, tokenizer.eot_id, tokenizer.token_bytes
        )
        self._batches = self._prefetched_batches()
        self.writer = CheckpointWriter(
            self._output_dir,
            keep_last=training.keep_last,
            keep_every=training.keep_every,
            log=monitor.say,
            files=tokenizer.files,
        )
        self._start_record()

    def _prefetched_batches(self) -> Iterator[jax.Array]:
        batches: Iterator[np.ndarray] = self._corpus.train_batches(
            self._batch_size, self._setup.config.seed, self._first_sample
        )
        sharding = meshes.batch_sharding(self._setup.mesh)
        return self._monitor.waiting(loop.prefetch(batches, sharding))

    def _start_record(self) -> None:
        """Logs what is about to train, and begins metrics and trackers."""
        config, training = self._setup.plan.config, self._setup.config.training
        if training.resolved_warmup_steps != training.warmup_steps:
            self._monitor.say(
                f"training.warmup_steps={training.warmup_steps} would outlast the "
                f"{training.max_steps} steps: warming up for {training.resolved_warmup_steps}"
            )
        parameters = parameter_count(config.model).total
        self._monitor.say(
            f"{config.name}: {parameters:,} parameters on {self._setup.plan.device}; "
            f"selective scan: {self._setup.scan}; compiling …"
        )
        about = {
            "config": to_dict(config),
            "parameters": parameters,
            "unigram_nll": self._corpus.unigram_nll,
        }
        start = self._setup.start
        self._monitor.start(
            self.first_step,
            start.path.parent if start else None,
            find_hardware(config, self._setup.mesh),
            about,
        )

    @property
    def config(self) -> RunConfig:
        """The planned config; its microbatch may have become smaller since."""
        return self._train_step.config

    @property
    def samples_seen(self) -> int:
        return self._first_sample + (self.step - self.first_step) * self._batch_size

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which running out of memory is handled."""
        return self._train_step.guard()

    def train_step(self) -> dict[str, Any]:
        """Dispatches one optimizer step; returns its metrics, still on the devices."""
        self._state, step_metrics = self._train_step(self._state, next(self._batches))
        self.step += 1
        self.evaluation = None
        return step_metrics

    def report_memory(self) -> None:
        """Logs the estimate beside the device's peak, while the plan's layout is in use."""
        plan = self._setup.plan
        if self.config.vram == plan.config.vram and (line := plan.compared()):
            self._monitor.say(line)

    def evaluate(self) -> None:
        """Measures the held-out windows, and samples if there is a prompt."""
        windows = self._corpus.eval_batches(
            self.config.vram.batch_size, self.config.training.eval_windows
        )
        self.evaluation = evaluate(self._eval_step, self._state["params"], windows)
        self._monitor.evaluation(self.step, self.evaluation)
        if shares := self._corpus.shares_text(self.samples_seen, self._batch_size):
            self._monitor.say(f"so far from {shares}")
        if not (prompt := self.config.sample_prompt):
            return
        (self.sample,) = generate_text(
            self._state["params"],
            self.config.model,
            self._setup.tokenizer,
            [prompt],
            **_SAMPLE,
            seed=self.config.seed,
        )
        self._monitor.sample(self.step, prompt, self.sample)

    def save(self, name: str) -> None:
        """Begins to write a checkpoint.

        Raises:
          UserError: if another run has taken the folder over.
        """
        self._lock.check()
        self._monitor.flush()
        setup = self._setup
        metadata = Metadata(
            setup.config,  # as requested: on another device the run is laid out anew
            self.step,
            self.samples_seen,
            self._corpus.fingerprint,
            self.evaluation.measures() if self.evaluation else {},
            layout_of(setup.config, self.config),
            setup.plan.device,
            setup.tokenizer.identity,
        )
        self.writer.save(name, self._state, metadata)

    def last_good(self) -> pathlib.Path | None:
        """Returns the newest intact checkpoint, for the message of a run that diverged."""
        with contextlib.suppress(UserError):  # the divergence is what has to be reported
            self.writer.wait()
        return find_latest(self._output_dir, self._monitor.say)

    def outcome(self, interrupted_by: str) -> Outcome:
        return Outcome(
            self._setup,
            self.step,
            self.samples_seen,
            interrupted_by,
            self.evaluation,
            self.sample,
            self._corpus.unigram_nll,
        )
