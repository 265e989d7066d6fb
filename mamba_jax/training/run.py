"""A run from start to end: ``set_up`` checks and plans, ``fit`` trains, ``conclude`` reports.

``run`` puts the three together; ``train --dry_run`` prints what ``set_up`` returns and stops.
"""

import functools
import pathlib

from mamba_jax.checkpoints import resume as resuming
from mamba_jax.checkpoints.folder import (
    FINAL,
    list_checkpoints,
    step_name,
)
from mamba_jax.config import RunConfig
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.files import write_atomic
from mamba_jax.runs import metrics
from mamba_jax.runs.exit_status import PREEMPTED
from mamba_jax.runs.lock import RunLock
from mamba_jax.training import loop, summary
from mamba_jax.training.elastic import OutOfMemory
from mamba_jax.training.interrupts import Interrupts
from mamba_jax.training.monitor import Monitor
from mamba_jax.training.profile import Profile
from mamba_jax.training.set_up import Complete, PlanRun, Setup, set_up
from mamba_jax.training.trainer import Outcome, Trainer


def run(
    config: RunConfig,
    resume: str = "",
    *,
    plan_run: PlanRun,
    profile: tuple[int, int] | None = None,
    notes: tuple[str, ...] = (),
    force: bool = False,
) -> int:
    """Trains, evaluates and saves as the config says.

    Args:
      config: the run's config.
      resume: "" to start anew, "auto", or a folder: see ``checkpoints.resume.find_start``.
      plan_run: ``estimator.plan_run``.
      profile: steps to run before a trace begins, and steps to trace; None: no trace.
      notes: logged before anything else.
      force: take ``config.output_dir`` even from a run that may be active.

    Returns:
      The exit status: 0 done, 75 stopped by a signal and saved.

    Raises:
      UserError: for a mistake or a fault that the user can fix.
    """
    output_dir = pathlib.Path(config.output_dir)
    say = functools.partial(print, flush=True)  # there is no log yet
    with RunLock.acquire(output_dir, force=force, log=say) as lock:
        while True:
            try:
                with Interrupts() as interrupts, Monitor(config) as monitor:
                    for note in notes:
                        monitor.say(note)
                    setup = set_up(config, resume, monitor.say, plan_run=plan_run, profile=profile)
                    if isinstance(setup, Complete):
                        path, step = setup.start.path, setup.start.metadata.step
                        monitor.say(f"nothing to do: {path} is complete at step {step}")
                        print(setup.summary_file.read_text(), end="")
                        return 0
                    return conclude(fit(setup, monitor, interrupts, lock), monitor)
            except OutOfMemory as lost:
                config = lost.config
            # Out here, where nothing refers to the failed attempt's arrays any more.
            if list_checkpoints(output_dir):
                resume = resuming.AUTO
            again = f"starting again with a microbatch of {config.vram.batch_size}"
            notes = (*notes, f"{again}: the state was lost")


def fit(setup: Setup, monitor: Monitor, interrupts: Interrupts, lock: RunLock) -> Outcome:
    """Trains from the start of a setup to its last step, or until a signal."""
    training = setup.config.training
    trainer = Trainer(setup, monitor, lock)
    interrupts.defer()
    late = loop.LateMetrics(monitor, training.max_gradient_norm, trainer.last_good)
    interrupted = False
    with (
        trainer.guard(),
        trainer.writer,
        Profile(*setup.traced, monitor, late.drain) as profiler,
    ):
        for step in range(trainer.step + 1, training.max_steps + 1):
            with profiler.step(step):
                step_metrics = trainer.train_step()
            late.push(step, step_metrics)
            profiler.dispatched(step)
            trainer.writer.check()
            is_last = step == training.max_steps
            interrupted = bool(interrupts.received) and not is_last
            evaluates = is_last or step % training.eval_steps == 0
            saves = interrupted or step % training.save_steps == 0
            if evaluates or saves or step == trainer.first_step + 1:
                late.drain()  # nothing is evaluated or saved before its step was checked
                trainer.report_memory()
                with monitor.paused():
                    if evaluates:
                        trainer.evaluate()
                    if saves:
                        trainer.save(step_name(step))
            if interrupted:
                break
        else:
            late.drain()
            if trainer.evaluation is None:
                trainer.evaluate()
            if not (setup.start and setup.start.ends(setup.config)):
                trainer.save(FINAL)
    monitor.finish()
    return trainer.outcome(str(interrupts.received) if interrupted else "")


def conclude(outcome: Outcome, monitor: Monitor) -> int:
    """Reports how a run ended; writes its summary and its loss curve.

    Returns:
      The exit status, as ``run``.
    """
    setup, config = outcome.setup, outcome.setup.plan.config
    if outcome.interrupted_by:
        add = "" if setup.resume == resuming.AUTO else " with --resume auto"
        monitor.record(
            step=outcome.step, ended=f"StoppedEarly: saved after {outcome.interrupted_by}"
        )
        monitor.say(
            f"stopped by {outcome.interrupted_by} and saved at step {outcome.step}; "
            f"the same command{add} resumes from there"
        )
        return PREEMPTED
    assert outcome.evaluation is not None  # a run that was not interrupted ends with one
    output_dir = pathlib.Path(config.output_dir)
    records = metrics.read(output_dir / metrics.NAME)
    picture = output_dir / "loss_curve.png"
    block = summary.Summary(
        name=config.name,
        checkpoint=output_dir / FINAL,
        picture=picture,
        tensorboard_dir=config.tensorboard_dir,
        parameters=parameter_count(config.model),
        steps=outcome.step,
        skipped_steps=sum(record.get("skipped", False) for record in records),
        tokens=outcome.samples_seen * config.model.max_seq_len,
        speed=monitor.speed_text(),
        train_loss=metrics.mean_recent_loss(records),
        evaluation=outcome.evaluation,
        unigram_nll=outcome.unigram_nll,
        prompt=config.sample_prompt,
        sample=outcome.sample,
    ).text()
    monitor.say(block)  # first of all: the disk may be full
    monitor.attempt(
        "the loss curve",
        lambda: metrics.draw_curve(
            records, picture, title=config.name, unigram_nll=outcome.unigram_nll
        ),
    )
    monitor.attempt("the summary", lambda: write_atomic(output_dir / summary.NAME, block))
    return 0
