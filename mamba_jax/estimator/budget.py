"""The memory that a device has, and how much of it a run may use.

    total        what the device has: from NVIDIA's driver, the runtime, or ``--vram``
    pool         what jax's allocator reserves at once, before anything is computed
    budget       what a step may need by the estimate: total less the margin

Half of the margin stays outside the pool, for the CUDA context and libraries; half is inside it,
for the gaps that an allocator leaves. How much either takes has not been measured on a card yet.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess

from mamba_jax.config import VramConfig
from mamba_jax.costs.devices import Device, device_named
from mamba_jax.errors import UserError

GIB, MIB = 2**30, 2**20
FRACTION = "XLA_CLIENT_MEM_FRACTION"
_OLD_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax refuses to start with both


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a run has."""

    kind: str  # what jax calls them, or a row of ``costs.devices.DEVICES``
    platform: str  # "gpu", "tpu" or "cpu"
    count: int = 1
    total_bytes: int | None = None  # of each device; None: not known
    pool_bytes: int | None = None  # of it, that jax's allocator may take; None: not known
    source: str = ""  # where total_bytes comes from
    is_here: bool = False  # rather than only described

    @property
    def sharers(self) -> int:
        """The devices that share one memory: all of those that a CPU is split into."""
        return self.count if self.platform == "cpu" else 1

    @property
    def preset(self) -> Device | None:
        """Its row of published figures, if it has one."""
        return device_named(self.kind)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a step may need on each device."""

    bytes: int
    total_bytes: int
    margin_bytes: int
    source: str  # of the total
    sharers: int = 1  # devices that share that total

    def text(self) -> str:
        """Returns e.g. ``14.00 GiB = 16.00 GiB (--vram) less a margin of 2.00 GiB``."""
        line = f"{gib(self.bytes)} = {gib(self.total_bytes)} ({self.source}) less a margin of "
        line += gib(self.margin_bytes)
        taken = self.total_bytes - self.margin_bytes - self.bytes * self.sharers
        if self.sharers > 1:
            line = f"{line}, shared by {self.sharers} devices"
        if taken > MIB:
            line += f", and {gib(taken)} that jax's allocator may not take"
        return line


def gib(n_bytes: float) -> str:
    """Returns bytes as text."""
    return f"{n_bytes / GIB:.2f} GiB"


def budget(vram: VramConfig, machine: Machine) -> Budget:
    """Returns the memory that a step may need.

    With ``vram.auto`` the total is what the device has; without, ``vram.memory_gb``, but never more
    than the device has.

    Raises:
      UserError: if the margin leaves nothing.
    """
    total, source = round(vram.memory_gb * GIB), "--vram"
    has = machine.total_bytes
    if has is not None and (vram.auto or has < total):
        total, source = has, machine.source
    margin = vram.safety_margin_mb * MIB
    if machine.platform == "cpu":
        margin = min(margin, total // 2)  # swapping is slow, but nothing fails
    if margin >= total:
        raise UserError(
            f"vram.safety_margin_mb={vram.safety_margin_mb} leaves nothing of "
            f"{gib(total)} ({source}); lower --vram_safety_margin"
        )
    allowed = (total - margin) // machine.sharers
    if machine.pool_bytes is not None:
        allowed = min(allowed, machine.pool_bytes)
    return Budget(allowed, total, margin, source, machine.sharers)


def of_device(device: Device) -> Machine:
    """Returns a machine with one device of the table: to plan for an absent one."""
    platform = "tpu" if device.name.startswith("TPU") else "gpu"
    return Machine(device.name, platform, 1, device.memory_bytes, source=device.name)


def this_machine() -> Machine:
    """Returns what jax finds here; starts its backend."""
    import jax

    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    found = Machine(device.device_kind, platform, jax.device_count(), is_here=True)
    if platform == "cpu":
        has = available_host_bytes()
        return dataclasses.replace(found, total_bytes=has, source="free memory of this machine")
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if platform == "gpu" and (cards := visible_cards()):
        total = min(card.total_bytes for card in cards)
        return dataclasses.replace(
            found, total_bytes=total, pool_bytes=limit, source="the driver's figure"
        )
    if limit is not None:
        return dataclasses.replace(found, total_bytes=limit, source="the runtime's limit")
    if found.preset is not None:
        return dataclasses.replace(
            found, total_bytes=found.preset.memory_bytes, source=found.preset.name
        )
    return found


@dataclasses.dataclass(frozen=True)
class Card:
    """One NVIDIA card, as its driver reports it."""

    total_bytes: int
    used_bytes: int


def visible_cards() -> list[Card]:
    """Asks NVIDIA's driver, through its ``nvidia-smi``, for the cards that a run will see.

    Returns:
      Those that ``CUDA_VISIBLE_DEVICES`` names, or all; none where there is no driver.
    """
    program = shutil.which("nvidia-smi")
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or chosen == "":
        return []
    command = [program, "--query-gpu=memory.total,memory.used", "--format=csv,noheader,nounits"]
    if chosen is not None:
        command.append(f"--id={chosen}")  # indices or UUIDs, as CUDA takes them
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    cards = []
    for line in ran.stdout.splitlines() if ran.returncode == 0 else ():
        numbers = [word.strip() for word in line.split(",")]
        if len(numbers) == 2 and all(number.isdigit() for number in numbers):  # not "[N/A]"
            cards.append(Card(*(int(number) * MIB for number in numbers)))
    return cards


def set_client_fraction(vram: VramConfig) -> None:
    """Lets jax's allocator take what the budget needs: its default limit is 75% of a card.

    Call it before jax's backend starts. A fraction that the user has set stays. Without NVIDIA
    cards nothing happens.
    """
    if FRACTION in os.environ or _OLD_FRACTION in os.environ:
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", "") or not (cards := visible_cards()):
        return
    pools = []
    for card in cards:
        machine = Machine("", "gpu", 1, card.total_bytes, source="the driver's figure")
        whole = budget(vram, machine)
        free = min(whole.total_bytes, card.total_bytes - card.used_bytes)
        pools.append((free - whole.margin_bytes // 2) / card.total_bytes)
    os.environ[FRACTION] = f"{max(min(pools), 0.01):.4f}"


def available_host_bytes() -> int | None:
    """Free memory for this process: of the machine or its container (Linux)."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    if not limit.isdigit():
        return free
    return min(free, int(limit) - used + int(fields.get("inactive_file", 0)))  # files it may drop
