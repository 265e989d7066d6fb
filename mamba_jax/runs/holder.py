"""The process that holds a lock: its record, and whether it is alive."""

import dataclasses
import json
import os
import pathlib
import socket
import time

_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")  # Linux; equal in all containers of a host


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that a record names."""

    host: str
    pid: int
    boot: str  # id of the host's boot; "": unknown on this system
    process_start: str  # of the process, in the system's own count; "": unknown on this system
    since: str  # local time, for people

    @classmethod
    def this_process(cls) -> "Holder":
        pid = os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(socket.gethostname(), pid, _read_text(_BOOT), _process_start(pid), since)

    @classmethod
    def parse(cls, record: bytes) -> "Holder | None":
        """Returns the holder that a record names; None if it is damaged."""
        try:
            return cls(**json.loads(record))
        except (ValueError, TypeError):
            return None

    def record(self) -> bytes:
        return json.dumps(vars(self)).encode() + b"\n"

    @property
    def is_on_this_host(self) -> bool:
        """Whether it runs in this boot of this host. Containers on many hosts share their names."""
        boot = _read_text(_BOOT)
        return self.boot == boot if self.boot and boot else self.host == socket.gethostname()

    def was_ended_by_a_reboot(self, renewed: float) -> bool:
        """Whether this host has booted since the record was last renewed, in seconds since 1970."""
        same_name = self.host == socket.gethostname() and bool(_read_text(_BOOT))
        return same_name and renewed < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)

    @property
    def is_alive(self) -> bool:
        """Whether the process exists; it must be on this host."""
        if self.process_start != _process_start(self.pid):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return True

    @property
    def where(self) -> str:
        return f"on {self.host} (pid {self.pid}, since {self.since})"

    def __str__(self) -> str:
        return f"a run {self.where}"


def _process_start(pid: int) -> str:
    """Returns when a process started, in ticks since the boot (field 22 of Linux's stat)."""
    fields = _read_text(pathlib.Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
