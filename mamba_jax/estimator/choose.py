"""Chooses how a run's effective batch is laid out: microbatch, remat policy, loss chunk.

The effective batch, the model and the length of its windows are the user's and never change. What
the user has set of the layout stays as well. Among the layouts left open, the fastest that fits
wins:

* Speed is the floor of ``costs.flops`` on the device's published peaks: "dots" and "full"
  recompute more, smaller microbatches read weights and add up gradients more often. What "none"
  keeps beyond "dots" would not leave the chip in a fused program: writing and reading it again
  costs more than recomputing it on a card with slow memory. (The order is computed; it has not been
  timed on a card. On a CPU it has: there "dots" is the fastest.) Among layouts within 1% of the
  fastest, the one that needs the least memory wins.
* Without published peaks (a CPU, an unknown card) "dots" comes first, then "none", then "full", and
  a larger microbatch before a smaller one. On a CPU a microbatch has at most ``CPU_TOKENS`` tokens.
* The loss is computed in chunks of the usual size, halved only where nothing fits.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

from mamba_jax.config import RunConfig, presets, size_fields
from mamba_jax.costs.devices import Device
from mamba_jax.costs.flops import Setting, parts, setting_of
from mamba_jax.costs.parameters import parameter_count
from mamba_jax.errors import UserError
from mamba_jax.estimator.breakdown import MemoryBreakdown, kept_bytes, memory_breakdown
from mamba_jax.estimator.budget import Budget, Machine, gib

CPU_TOKENS = 4_096  # of a device's microbatch: a CPU core gains nothing from more
CHUNK_TOKENS = {True: 512, False: 1_024}  # of the loss, on a CPU and elsewhere
SMALLEST_CHUNK = 128
SAME_SPEED = 1.01
POLICIES = ("dots", "none", "full")  # fastest first, where nothing is known of the device


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """One way to lay out a step."""

    batch_size: int  # sequences of a microbatch, over all devices
    remat: str
    chunk_tokens: int


def laid_out(config: RunConfig, layout: StepLayout) -> RunConfig:
    """Returns a run with a layout filled in."""
    whole = config.vram.effective_batch_size
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=layout.remat),
        training=dataclasses.replace(config.training, loss_chunk_tokens=layout.chunk_tokens),
        vram=dataclasses.replace(
            config.vram,
            batch_size=layout.batch_size,
            gradient_accumulation_steps=whole // layout.batch_size,
        ),
    )


def quick(config: RunConfig, machine: Machine, layout: StepLayout) -> MemoryBreakdown:
    """Returns the bytes of a layout by the formula; the run's vocabulary must be set."""
    setting = _setting(config, machine, layout)
    return memory_breakdown(config.model, setting, chunk_tokens=layout.chunk_tokens)


def candidates(config: RunConfig, machine: Machine) -> list[list[StepLayout]]:
    """Returns the layouts that a run leaves open, by size of the loss chunk, largest first.

    Raises:
      UserError: if the effective batch cannot be divided over the devices.
    """
    vram, model, on_cpu = config.vram, config.model, machine.platform == "cpu"
    if vram.batch_size:
        sizes = [vram.batch_size]
    elif vram.gradient_accumulation_steps:
        sizes = [vram.effective_batch_size // vram.gradient_accumulation_steps]
    else:
        sizes = vram.microbatches(machine.count)
        if not sizes:
            raise UserError(
                f"vram.effective_batch_size={vram.effective_batch_size} is not divisible by the "
                f"{machine.count} devices that share it; choose a multiple of {machine.count}"
            )
        if on_cpu:
            few = [s for s in sizes if s * model.max_seq_len <= CPU_TOKENS * machine.count]
            sizes = few or sizes[:1]
    if model.remat != "auto":
        policies: tuple[str, ...] = (model.remat,)
    else:
        policies = ("dots", "full") if on_cpu else POLICIES
    chunk = config.training.loss_chunk_tokens
    chunks = [chunk] if chunk else _halves(CHUNK_TOKENS[on_cpu])
    return [[StepLayout(s, p, chunk) for p in policies for s in sizes] for chunk in chunks]


def _halves(chunk: int) -> list[int]:
    count = int(math.log2(chunk / SMALLEST_CHUNK)) + 1
    return [chunk >> i for i in range(count)]


def by_speed(config: RunConfig, machine: Machine, layouts: list[StepLayout]) -> list[StepLayout]:
    """Sorts layouts by the speed to expect, fastest first."""
    preset = machine.preset
    if preset is None:
        return sorted(layouts, key=lambda one: (POLICIES.index(one.remat), -one.batch_size))
    secs = {layout: expected_secs(config, machine, preset, layout) for layout in layouts}
    needs = {layout: quick(config, machine, layout).total_bytes for layout in layouts}
    ordered: list[StepLayout] = []
    left = set(layouts)
    while left:
        fastest = min(secs[layout] for layout in left)
        level = [layout for layout in left if secs[layout] <= SAME_SPEED * fastest]
        ordered += sorted(level, key=needs.__getitem__)
        left -= set(level)
    return ordered


def expected_secs(config: RunConfig, machine: Machine, preset: Device, layout: StepLayout) -> float:
    """Returns the least time for a token with a layout, on a device of the table."""
    from mamba_jax.costs.roofline import floor_secs, published

    setting, model = _setting(config, machine, layout), config.model
    peaks = published(preset, setting.dtype)
    secs = floor_secs((part.hardware for part in parts(model, setting)), peaks)
    if layout.remat == "none":
        dots = dataclasses.replace(setting, remat="dots")
        more_bytes = kept_bytes(model, setting) - kept_bytes(model, dots)
        secs += 2 * more_bytes / peaks.bytes_per_sec
    return secs


def _setting(config: RunConfig, machine: Machine, layout: StepLayout) -> Setting:
    on_cpu = machine.platform == "cpu"
    return setting_of(laid_out(config, layout), devices=machine.count, on_cpu=on_cpu)


def first_that_fits(
    layouts: Iterable[StepLayout], needs: Callable[[StepLayout], int], limit_bytes: int
) -> tuple[StepLayout, int] | None:
    """Returns the first layout within the limit and what it needs; None: there is none."""
    for layout in layouts:
        needed = needs(layout)
        if needed <= limit_bytes:
            return layout, needed
    return None


def smallest_bytes(config: RunConfig, machine: Machine) -> int:
    """Returns the least that a run could need, whatever layout is left open."""
    groups = candidates(config, machine)
    return min(quick(config, machine, one).total_bytes for group in groups for one in group)


def nothing_fits(config: RunConfig, machine: Machine, limit: Budget) -> UserError:
    """Returns the error that names what would fit, and the settings to change."""
    model = config.model
    fitting = [
        size
        for size in presets.SIZES.values()
        if size.family == model.family
        and smallest_bytes(_resized(config, size.name), machine) <= limit.bytes
    ]
    count = lambda size: parameter_count(_resized(config, size.name).model).total
    remedies = []
    if fitting:
        remedies.append(f'the largest size that fits is "{max(fitting, key=count).name}"')
    length = model.max_seq_len
    while length > 64:
        length //= 2
        shorter = dataclasses.replace(model, max_seq_len=length)
        if smallest_bytes(dataclasses.replace(config, model=shorter), machine) <= limit.bytes:
            remedies.append(f"this one fits with model.max_seq_len={length}")
            break
    remedies.append("or give it more memory (--vram, a smaller --vram_safety_margin)")
    if machine.count > 1 and config.parallel.fsdp < machine.count:
        remedies.append(f"or shard the state (parallel.fsdp={machine.count})")
    return UserError(
        f"{config.name} needs at least {gib(smallest_bytes(config, machine))} on each device and "
        f"may use {limit.text()}; {', '.join(remedies)}"
    )


def _resized(config: RunConfig, size: str) -> RunConfig:
    """Returns a run of another size, its other settings the same."""
    structure = size_fields(size)["model"] | {"family": config.model.family}
    model = dataclasses.replace(config.model, attention_head_size=0, **structure)
    return dataclasses.replace(config, model=model)
