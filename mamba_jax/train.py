"""``python -m mamba_jax.train``: trains a model, told by ``run`` from top to bottom."""

import contextlib
import functools
import pathlib
import sys
from typing import TYPE_CHECKING

from mamba_jax.cli import train_arguments
from mamba_jax.config import RunConfig, to_dict
from mamba_jax.errors import UserError, command
from mamba_jax.files import write_atomic

if TYPE_CHECKING:
    from mamba_jax.runs.lock import RunLock

# How samples are drawn: cool, as they have to show what a short run has learnt.
_SAMPLE = {"max_tokens": 150, "temperature": 0.5, "top_k": 50, "top_p": 0.95}


def run(
    config: RunConfig,
    resume: str = "",
    profile: tuple[int, int] | None = None,
    notes: tuple[str, ...] = (),
    force: bool = False,
) -> int:
    """Trains, evaluates and saves as the config says.

    Args:
      config: of the run.
      resume: "" to start anew, "auto", or a folder: see ``resume.find_start``.
      profile: steps to run before a trace begins, and steps to trace; None: no trace.
      notes: to be said before anything else.
      force: take ``config.output_dir`` even from a run that may live.

    Returns:
      The exit status: 0 done, 75 stopped by a signal and saved.

    Raises:
      UserError: for whatever a user can mend.
    """
    from mamba_jax.checkpoints import resume as resuming
    from mamba_jax.checkpoints.folder import list_checkpoints
    from mamba_jax.runs.lock import RunLock
    from mamba_jax.training.elastic import OutOfMemory

    output_dir = pathlib.Path(config.output_dir)
    say = functools.partial(print, flush=True)  # there is no log yet
    with RunLock.acquire(output_dir, force=force, log=say) as lock:
        while True:
            try:
                return _run(config, resume, profile, notes, lock)
            except OutOfMemory as lost:
                config = lost.config
            # Out here, where nothing holds the arrays of the run that failed any more.
            if list_checkpoints(output_dir):
                resume = resuming.AUTO
            again = f"starting again with a microbatch of {config.vram.batch_size}"
            notes = (*notes, f"{again}: the state was lost")


def _run(
    config: RunConfig,
    resume: str,
    profile: tuple[int, int] | None,
    notes: tuple[str, ...],
    lock: "RunLock",
) -> int:
    """One attempt of ``run``."""
    from mamba_jax import starting
    from mamba_jax.checkpoints import resume as resuming
    from mamba_jax.checkpoints.arrays import CheckpointWriter, restore
    from mamba_jax.checkpoints.folder import FINAL, Metadata, find_latest, layout_of, step_name
    from mamba_jax.costs.parameters import parameter_count
    from mamba_jax.data.pipeline import prepare
    from mamba_jax.generation.generate import generate_text
    from mamba_jax.parallel.compile_cache import cache_compilations
    from mamba_jax.parallel.mesh import batch_sharding
    from mamba_jax.runs import metrics as history
    from mamba_jax.training import loop, summary
    from mamba_jax.training.elastic import ElasticStep
    from mamba_jax.training.evaluation import Evaluation, evaluate
    from mamba_jax.training.hardware import find_hardware
    from mamba_jax.training.interrupts import EXIT_PREEMPTED, Interrupts
    from mamba_jax.training.monitor import Monitor
    from mamba_jax.training.profile import Profile
    from mamba_jax.training.state import abstract_state, init_state
    from mamba_jax.training.step import make_eval_step

    training, output_dir = config.training, pathlib.Path(config.output_dir)
    summary_file = output_dir / summary.NAME
    with Interrupts() as interrupts, Monitor(config) as monitor:
        for note in notes:
            monitor.say(note)
        # What can be refused is refused before anything slow.
        start = resuming.find_start(config, resume, monitor.say)
        if start and starting.is_complete(start, config):
            monitor.say(f"nothing to do: {start.path} is complete at step {start.metadata.step}")
            print(summary_file.read_text(), end="")
            return 0
        prepared = starting.prepare(config, start, profile)
        asked, planned, tokenizer = prepared.asked, prepared.plan, prepared.tokenizer
        config, mesh = planned.config, prepared.mesh
        monitor.say(planned.text())
        cache_compilations(config.data.cache_root)
        monitor.open()

        # The data.
        seq_len, batch_size = config.model.max_seq_len, config.vram.effective_batch_size
        corpus = prepare(config.data, seq_len=seq_len, seed=config.seed, log=monitor.say)

        # The state, made from the seed or read from a checkpoint.
        if start:
            resuming.check_same_data(start, corpus.fingerprint)
            first_step, first_sample = start.metadata.step, start.metadata.samples_seen
            state = restore(start.path, abstract_state(config, mesh))
            resuming.set_newer_aside(output_dir, first_step, monitor.say)
            summary_file.unlink(missing_ok=True)
        else:
            first_step, first_sample = 0, 0
            state = init_state(config, mesh)

        # The step, its batches and its measures.
        eot_id, token_bytes = tokenizer.eot_id, tokenizer.token_bytes
        train_step = ElasticStep(config, mesh, eot_id, monitor.warn)
        eval_step = make_eval_step(config, mesh, eot_id, token_bytes)
        batches = monitor.waiting(
            loop.prefetch(
                corpus.train_batches(batch_size, config.seed, first_sample), batch_sharding(mesh)
            )
        )
        keep = {"keep_last": training.keep_last, "keep_every": training.keep_every}
        parameters = parameter_count(config.model)
        hardware = find_hardware(config, mesh)
        if training.resolved_warmup_steps != training.warmup_steps:
            monitor.say(
                f"training.warmup_steps={training.warmup_steps} would outlast the "
                f"{training.max_steps} steps: warming up for {training.resolved_warmup_steps}"
            )
        monitor.say(
            f"{config.name}: {parameters.total:,} parameters on {planned.device}; "
            f"selective scan: {prepared.scan}; compiling …"
        )
        about = {
            "config": to_dict(config),
            "parameters": parameters.total,
            "unigram_nll": corpus.unigram_nll,
        }
        monitor.start(first_step, start.path.parent if start else None, hardware, about)

        def evaluated() -> tuple[Evaluation, str]:
            windows = corpus.eval_batches(config.vram.batch_size, training.eval_windows)
            evaluation = evaluate(eval_step, state["params"], windows)
            monitor.evaluation(step, evaluation)
            if shares := corpus.shares_text(samples_seen(), batch_size):
                monitor.say(f"so far from {shares}")
            return evaluation, sampled()

        def sampled() -> str:
            if not prompt:
                return ""
            (text,) = generate_text(
                state["params"],
                config.model,
                tokenizer,
                [prompt],
                **_SAMPLE,
                seed=config.seed,
            )
            monitor.sample(step, prompt, text)
            return text

        def samples_seen() -> int:
            return first_sample + (step - first_step) * batch_size

        def metadata() -> Metadata:
            measures = evaluation.measures() if evaluation else {}
            # As asked for: on another device the run is laid out anew.
            layout = layout_of(asked, config)
            return Metadata(
                asked,
                step,
                samples_seen(),
                corpus.fingerprint,
                measures,
                layout,
                planned.device,
                tokenizer.identity,
            )

        def save(name: str) -> None:
            lock.check()
            monitor.flush()
            writer.save(name, state, metadata())

        def last_good() -> pathlib.Path | None:
            with contextlib.suppress(UserError):  # the divergence is what has to be told
                writer.wait()
            return find_latest(output_dir, monitor.say)

        interrupts.defer()
        late = loop.LateMetrics(monitor, training.max_gradient_norm, last_good)
        step, interrupted = first_step, False
        prompt, sample = config.sample_prompt, ""
        evaluation: Evaluation | None = None  # of this very step
        with (
            train_step.guard(),
            CheckpointWriter(output_dir, **keep, log=monitor.say, files=tokenizer.files) as writer,
            Profile(*prepared.traced, monitor, late.drain) as profiler,
        ):
            for step in range(first_step + 1, training.max_steps + 1):
                with profiler.step(step):
                    state, metrics = train_step(state, next(batches))
                config = train_step.config  # its microbatch may have become smaller
                late.push(step, metrics)
                profiler.dispatched(step)
                writer.check()
                is_last = step == training.max_steps
                interrupted = bool(interrupts.received) and not is_last
                evaluates = is_last or step % training.eval_steps == 0
                saves = interrupted or step % training.save_steps == 0
                evaluation = None
                if evaluates or saves or step == first_step + 1:
                    late.drain()  # nothing is evaluated or saved before its step was checked
                    if config.vram == planned.config.vram and (line := planned.compared()):
                        monitor.say(line)
                    with monitor.paused():
                        if evaluates:
                            evaluation, sample = evaluated()
                        if saves:
                            save(step_name(step))
                if interrupted:
                    break
            else:
                late.drain()
                if evaluation is None:
                    evaluation, sample = evaluated()
                if not (start and start.ends(config)):
                    save(FINAL)
        monitor.finish()
        if interrupted:
            add = "" if resume == resuming.AUTO else " with --resume auto"
            monitor.say(
                f"stopped by {interrupts.received} and saved at step {step}; "
                f"the same command{add} goes on from there"
            )
            return EXIT_PREEMPTED

        # What came of it.
        assert evaluation is not None  # every way out of the loop but the interruption has one
        records = history.read(output_dir / history.NAME)
        picture = output_dir / "loss_curve.png"
        block = summary.Summary(
            name=config.name,
            checkpoint=output_dir / FINAL,
            picture=picture,
            tensorboard_dir=config.tensorboard_dir,
            parameters=parameters,
            steps=step,
            skipped_steps=sum(record.get("skipped", False) for record in records),
            tokens=samples_seen() * seq_len,
            speed=monitor.speed_text(),
            train_loss=history.mean_recent_loss(records),
            evaluation=evaluation,
            unigram_nll=corpus.unigram_nll,
            prompt=prompt,
            sample=sample,
        ).text()
        monitor.say(block)  # first of all: the disk may be full
        monitor.attempt(
            "the loss curve",
            lambda: history.draw_curve(
                records, picture, title=config.name, unigram_nll=corpus.unigram_nll
            ),
        )
        monitor.attempt("the summary", lambda: write_atomic(summary_file, block))
    return 0


@command
def main(argv: list[str]) -> int:
    """The command: reads ``argv``, returns the exit status."""
    asked = train_arguments.read(argv)
    if asked.dry_run:
        from mamba_jax.cli.dry_run import describe

        print(describe(asked))
        return 0
    if asked.clear_cache or asked.list_files:
        from mamba_jax.data.listing import clear_cache, list_files

        if asked.clear_cache:
            clear_cache(asked.config.data, print)
        if asked.list_files:
            list_files(asked.config.data, print)
            return 0
    from mamba_jax.training.interrupts import EXIT_PREEMPTED, StoppedEarly

    try:
        return run(asked.config, asked.resume, asked.profile, asked.notes, asked.force)
    except StoppedEarly as signal:
        print(f"stopped by {signal} before the first step: nothing to save", file=sys.stderr)
        return EXIT_PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
