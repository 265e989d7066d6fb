"""The plan of a run: a layout that fits, how it was found, and where its bytes go."""

import dataclasses

from mamba_jax.checkpoints.resume import Start, laid_out_as_before
from mamba_jax.config import RunConfig
from mamba_jax.estimator import choose
from mamba_jax.estimator.breakdown import MemoryBreakdown
from mamba_jax.estimator.budget import (
    Budget,
    Machine,
    budget,
    gib,
    set_client_fraction,
    this_machine,
)
from mamba_jax.estimator.choose import StepLayout
from mamba_jax.estimator.exact import Compiler, Unavailable

HOPELESS = 1.3  # times the budget, by the formula: above it, compiling is not worthwhile
FAR_APART = 4  # times the smallest microbatch: the second microbatch to compile


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """A layout with its reasons."""

    config: RunConfig  # with the layout filled in
    machine: Machine
    budget: Budget
    breakdown: MemoryBreakdown  # by the formula
    needs_bytes: int  # on each device, by ``level``
    level: str  # "quick" or "exact"
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.budget.bytes

    @property
    def device(self) -> str:
        """What it was made for, e.g. "1 × NVIDIA GeForce RTX 4080"."""
        return f"{self.machine.count} × {self.machine.kind}"

    def text(self) -> str:
        """Returns lines that describe the plan and where its bytes go."""
        config, vram = self.config, self.config.vram
        found = {"quick": "by formula", "exact": "compiled"}[self.level]
        verdict = "" if self.fits else "; OVER BUDGET: the run can run out of memory"
        width = max(map(len, self.breakdown.parts))
        parts = (f"  {part:<{width}}  {gib(n)}" for part, n in self.breakdown.parts.items())
        lines = (
            f"memory of {self.device}: {self.budget.text()}",
            f"layout: microbatch {vram.batch_size} × {vram.accumulation_steps} = "
            f"{vram.effective_batch_size} sequences of {config.model.max_seq_len} tokens, remat "
            f"{config.model.remat}, loss in chunks of {config.training.loss_chunk_tokens} tokens",
            f"needs {gib(self.needs_bytes)} on each device ({found}){verdict}; parts by formula:",
            *parts,
            *self.notes,
        )
        return "\n".join(lines)

    def compared(self) -> str:
        """Compares the estimate with the first device's peak; "" if it reports none."""
        import jax

        peak_bytes = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if not peak_bytes:
            return ""
        return (
            f"memory: {gib(self.needs_bytes)} estimated, {gib(peak_bytes)} at the peak so far "
            f"(estimate {self.needs_bytes / peak_bytes - 1:+.1%})"
        )


def plan(config: RunConfig, *, level: str = "quick", machine: Machine | None = None) -> MemoryPlan:
    """Lays a run out.

    Args:
      config: of the run; what its layout leaves open (0 or "auto") is chosen.
      level: "quick", by the formula, in milliseconds; or "exact", by compiling the step, where
        there is a compiler (else quick, and a note says why).
      machine: to plan for; None: this one, which starts jax's backend.

    Raises:
      UserError: if nothing fits, or the effective batch cannot be divided over the devices.
    """
    machine = machine or this_machine()
    limit = budget(config.vram, machine)
    whole = _with_vocabulary(config)
    groups = choose.candidates(whole, machine)
    sorted_groups = (choose.by_speed(whole, machine, group) for group in groups)
    formula = lambda layout: choose.quick(whole, machine, layout).total_bytes
    notes: tuple[str, ...] = ()
    found = None
    if level == "exact":
        try:
            with Compiler(machine, config.data.cache_root) as compiler:
                search = _Exact(whole, machine, compiler, limit.bytes)
                found = next(filter(None, map(search.best, sorted_groups)), None)
        except Unavailable as reason:
            level, notes = "quick", (f"not compiled: {reason}",)
    if level == "quick":
        fitting = (choose.first_that_fits(group, formula, limit.bytes) for group in sorted_groups)
        found = next(filter(None, fitting), None)
    if found is None:
        if not (config.vram.batch_size or config.vram.gradient_accumulation_steps):
            raise choose.nothing_fits(whole, machine, limit)
        # The user's own microbatch is not refused: choose the least for what is left open.
        layout = min((one for group in groups for one in group), key=formula)
        level, found = "quick", (layout, formula(layout))
    layout, needs_bytes = found
    return MemoryPlan(
        config=choose.laid_out(config, layout),
        machine=machine,
        budget=limit,
        breakdown=choose.quick(whole, machine, layout),
        needs_bytes=needs_bytes,
        level=level,
        notes=notes,
    )


def plan_run(config: RunConfig, start: Start | None) -> MemoryPlan:
    """Lays out a run on this machine, if possible like the run that it resumes.

    Starts JAX, with the share of the device's memory that the run may use.

    Raises:
      UserError: as ``plan``.
    """
    set_client_fraction(config.vram)  # before JAX starts
    planned = plan(config)
    if start is None:
        return planned
    before = plan(laid_out_as_before(start, config, planned.device))
    return before if before.fits else planned


def _with_vocabulary(config: RunConfig) -> RunConfig:
    """Returns the run with the tokenizer's number of ids, if it leaves the vocabulary open."""
    if config.model.vocab_size:  # the tokenizer takes a tenth of a second
        return config
    from mamba_jax.data.tokenizers.load import load_tokenizer, with_vocabulary

    return with_vocabulary(config, load_tokenizer(config.data.tokenizer))


class _Exact:
    """Searches with the compiler's figures: fits a line to two microbatches, then checks a choice.

    Memory grows by the same amount with every sequence, so two compiles of a remat policy nearly
    determine all its microbatches; the choice is compiled too, and lowered if it does not fit.
    """

    def __init__(
        self, config: RunConfig, machine: Machine, compiler: Compiler, limit_bytes: int
    ) -> None:
        self._config = resolved(config, machine)
        self._machine, self._compiler = machine, compiler
        self._limit_bytes = limit_bytes

    def best(self, layouts: list[StepLayout]) -> tuple[StepLayout, int] | None:
        """Returns the first layout that fits, and what it needs."""
        for layout in layouts:
            about = choose.quick(self._config, self._machine, layout).total_bytes
            if about > HOPELESS * self._limit_bytes:
                continue
            if self._on_the_line(layout, layouts) > self._limit_bytes:
                continue
            needed = self._compiled(layout)
            if needed <= self._limit_bytes:
                return layout, needed
        return None

    def _on_the_line(self, layout: StepLayout, layouts: list[StepLayout]) -> float:
        same = lambda other: dataclasses.replace(other, batch_size=layout.batch_size) == layout
        sizes = sorted(other.batch_size for other in layouts if same(other))
        low = sizes[0]
        high = max((size for size in sizes if size <= FAR_APART * low), default=low)
        at = lambda size: self._compiled(dataclasses.replace(layout, batch_size=size))
        if layout.batch_size in (low, high) or low == high:
            return at(layout.batch_size)
        slope = (at(high) - at(low)) / (high - low)
        return at(low) + slope * (layout.batch_size - low)

    def _compiled(self, layout: StepLayout) -> int:
        return self._compiler.step_bytes(choose.laid_out(self._config, layout))


def resolved(config: RunConfig, machine: Machine) -> RunConfig:
    """Returns the run with device-dependent choices named, for a process without that device."""
    if machine.is_here:
        return config
    from mamba_jax.ops.selective_scan import unsupported

    model = config.model
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    scan = model.scan
    if scan == "auto":
        reason = unsupported("pallas_gpu", "gpu", dtype, model.d_inner, model.d_state)
        scan = "chunked" if reason else "pallas_gpu"
    return dataclasses.replace(config, model=dataclasses.replace(model, dtype=dtype, scan=scan))
